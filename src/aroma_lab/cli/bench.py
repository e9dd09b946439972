"""`aroma bench`: what a training step costs, method by method; `aroma bench profile`: where its time goes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import add_command, add_force
from aroma.errors import bad_value

from ..progress import progress_bar

if TYPE_CHECKING:
    from ..bench.models import BenchSettings


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "bench",
        "measure what a training step costs in time and memory, method by method",
        (
            "Measure what a training step costs. All methods take turns, one step each, in one process. The report\n"
            "has ratios to the floor (forward and backward of the frozen backbone), bytes kept for backward, peak\n"
            "memory, optimizer state, trainable parameters, and the cost of AROMA's controller: as a table, as JSON\n"
            "and as a picture. Weights and tokens are random: nothing is downloaded for a named shape."
        ),
        "aroma bench",
        "aroma bench --model minilm --batch-size 16 --length 64 --out minilm.json",
        "aroma bench --only lora-r8 aroma-0 aroma-8 --rounds 21 --threads 1",
        "aroma bench --device cuda --dtype bfloat16 --batch-size 32",
    )
    _add_options(parser, "bench.json", "; the picture goes beside it")
    flag = argparse.BooleanOptionalAction
    compile_help = "measure each case with torch.compile too (on CUDA: yes; on a CPU: no)"
    parser.add_argument("--compile", action=flag, help=compile_help)
    peak_help = "measure peak memory; on a CPU each case then runs in a process of its own (yes)"
    parser.add_argument("--peak", action=flag, default=True, help=peak_help)
    # PyTorch's own way of waiting for threads, since that is what a user's script has.
    parser.set_defaults(run=run, waits_passively=False)
    profiler = add_command(
        parser.add_subparsers(title="further benchmarks", metavar="COMMAND"),
        "profile",
        "measure where the time of forward and backward goes, by kind of operation",
        (
            "Measure where the time of forward and backward goes, by kind of operation: matmuls of the backbone,\n"
            "narrow matmuls of the update, folding, dropout masks, attention, the rest. PyTorch's profiler slows\n"
            "every step down a little: take ratios from `aroma bench`."
        ),
        "aroma bench profile --only aroma-0 aroma-8 lora-r8 --rounds 5",
    )
    _add_options(profiler, "profile.json")
    profiler.set_defaults(run=run_profile)


def _add_options(parser: argparse.ArgumentParser, out: str, beside: str = "") -> None:
    add = parser.add_argument
    model_help = "shape (roberta-base, minilm, tiny), or a folder or hub name, of which only the configuration is read"
    add("--model", metavar="NAME", default="roberta-base", help=f"{model_help} (%(default)s)")
    add("--batch-size", type=int, default=8, help="sequences in a batch (%(default)s)")
    add("--length", type=int, default=128, help="tokens in a sequence (%(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="backbone (%(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where (%(default)s)")
    add("--seed", type=int, default=0, help="seed of weights and tokens (%(default)s)")
    add("--rounds", type=int, default=9, help="how often each case is timed (%(default)s)")
    add("--warmup-rounds", type=int, default=0, help="rounds before those (%(default)s)")
    add("--threads", type=int, help="CPU threads (PyTorch's default)")
    add("--only", metavar="CASE", nargs="+", help="measure these cases and the floor (all)")
    keep_help = (
        "keep freed memory in the process, which leaves page faults and most of the noise out of the times (yes)"
    )
    add("--keep-memory", action=argparse.BooleanOptionalAction, default=True, help=keep_help)
    add("--out", metavar="FILE", default=out, help=f"new .json file{beside} (%(default)s)")
    add_force(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure; print the tables; write the results and the picture."""
    require_extra("lab")
    out, picture = new_files(arguments, "--out", ".png")
    from aroma.cli.quiet import quiet

    quiet()
    from aroma.files import write_json
    from aroma.pictures import save_picture

    from ..bench import report
    from ..bench.measure import measure

    compiled = arguments.device == "cuda" if arguments.compile is None else arguments.compile
    result = measure(_settings(arguments, compiled=compiled, peak=arguments.peak), progress=progress_bar)
    write_json(out, result)
    save_picture(report.draw(result), picture)
    comparison = [report.comparison_table(result)] if result["comparisons"] else []
    print_lines([report.case_table(result), *comparison, *report.notes(result), f"Left: {out}, {picture}."])


def run_profile(arguments: argparse.Namespace) -> None:
    """Profile; print the table; write the results."""
    require_extra("lab")
    (out,) = new_files(arguments, "--out")
    from aroma.cli.quiet import quiet

    quiet()
    from aroma.files import write_json

    from ..bench.profile import profile
    from ..bench.report import profile_table

    found = profile(_settings(arguments, peak=False), progress=progress_bar)
    write_json(out, found)
    print_lines([profile_table(found), f"Left: {out}."])


def _settings(arguments: argparse.Namespace, **more: Any) -> BenchSettings:
    from ..bench.models import BenchSettings

    names = ("model", "batch_size", "length", "rounds", "warmup_rounds", "dtype", "device", "threads", "seed")
    given = {name: getattr(arguments, name) for name in (*names, "keep_memory")}
    return BenchSettings(**given, only=tuple(arguments.only) if arguments.only else None, **more)


def new_files(arguments: argparse.Namespace, option: str, *suffixes: str) -> list[Path]:
    """Return the files to write: the results, and files of the same name with other suffixes.

    Args:
        arguments: With `force`.
        option: The option that names the results.
        suffixes: Of the files beside it, such as `.png`.

    Raises:
        ConfigError: The name does not end in .json.
        OutputError: One of them exists, or cannot be written.
    """
    from aroma.outputs import new_file

    results = Path(getattr(arguments, option.removeprefix("--")))
    if results.suffix != ".json":
        raise bad_value(option, str(results), "the name of the results must end in .json")
    files = [results, *map(results.with_suffix, suffixes)]
    return [new_file(option, file, force=arguments.force) for file in files]


def print_lines(lines: Sequence[str]) -> None:
    """Print lines as they are, without wrapping."""
    from rich.console import Console

    console = Console(markup=False, soft_wrap=True)
    for line in lines:
        console.print(line, highlight=False)
