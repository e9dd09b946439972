"""`aroma bench`: what a training step costs, method by method."""

from __future__ import annotations

import argparse
from typing import Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import add_command, add_force

_SETTINGS = ("model", "batch_size", "length", "rounds", "dtype", "device", "threads", "seed")


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "bench",
        "measure what a training step costs in time and memory, method by method",
        (
            "Measure what a training step costs. All methods take turns, one step each, in one process. The report\n"
            "has ratios to the floor (forward and backward of the frozen backbone), bytes kept for backward,\n"
            "optimizer state and trainable parameters: as a table and as JSON.\n"
            "Weights and tokens are random: nothing is downloaded for a named shape."
        ),
        "aroma bench",
        "aroma bench --model minilm --batch-size 16 --length 64 --out minilm.json",
        "aroma bench --only lora-r8 aroma-0 aroma-8 --rounds 21 --threads 1",
        "aroma bench --device cuda --dtype bfloat16 --batch-size 32",
    )
    add = parser.add_argument
    model_help = "shape (roberta-base, minilm, tiny), or a folder or hub name, of which only the configuration is read"
    add("--model", metavar="NAME", default="roberta-base", help=f"{model_help} (%(default)s)")
    add("--batch-size", type=int, default=8, help="sequences in a batch (%(default)s)")
    add("--length", type=int, default=128, help="tokens in a sequence (%(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="backbone (%(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where (%(default)s)")
    add("--seed", type=int, default=0, help="seed of weights and tokens (%(default)s)")
    add("--rounds", type=int, default=9, help="how often each case is timed (%(default)s)")
    add("--threads", type=int, help="CPU threads (PyTorch's default)")
    add("--only", metavar="CASE", nargs="+", help="measure these cases and the floor (all)")
    add("--out", metavar="FILE", default="bench.json", help="new JSON file (%(default)s)")
    add_force(parser)
    # PyTorch's own way of waiting for threads, since that is what a user's script has.
    parser.set_defaults(run=run, waits_passively=False)


def run(arguments: argparse.Namespace) -> None:
    """Measure; print the table; write the results."""
    require_extra("lab")
    from aroma.outputs import new_file

    out = new_file("--out", arguments.out, force=arguments.force)
    from aroma.cli.quiet import quiet

    quiet()
    from aroma.files import write_json

    from ..bench.measure import measure
    from ..bench.models import BenchSettings
    from ..bench.report import table

    given = {name: getattr(arguments, name) for name in _SETTINGS}
    only = tuple(arguments.only) if arguments.only else None
    result = measure(BenchSettings(**given, only=only), progress=True)
    write_json(out, result)
    print(table(result), f"Left: {out}.", sep="\n")
