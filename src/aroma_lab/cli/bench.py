"""`aroma bench`: what a training step costs, method by method."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import examples

from . import bench_profile, bench_run
from .bench_options import add_model_options, add_round_options, new_files, print_lines, settings_of, timed_phase

if TYPE_CHECKING:
    from ..bench.result import BenchResult


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "bench",
        help="measure what a training step costs in time and memory, method by method",
        description=(
            "Measure what a training step costs: every method takes one step after the other, in turns, in one\n"
            "process. Ratios to the floor (the frozen backbone, forward and backward), bytes kept for backward, peak\n"
            "memory, optimizer state, trainable parameters, and the cost of AROMA's controller; as a table, JSON and\n"
            "a picture. Weights and tokens are random: nothing is downloaded for a named shape."
        ),
        epilog=examples(
            "aroma bench",
            "aroma bench --model minilm --batch-size 16 --length 64 --out minilm.json",
            "aroma bench --only lora-r8 aroma-0 aroma-8 --rounds 21 --threads 1",
            "aroma bench --device cuda --dtype bfloat16 --batch-size 32",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    add_round_options(parser)
    _add_measuring_options(parser)
    # PyTorch's own way of waiting: what is measured is what a script of the user's costs.
    parser.set_defaults(run=run, waits_passively=False)
    subcommands = parser.add_subparsers(title="further benchmarks", metavar="COMMAND")
    bench_run.add_parser(subcommands)
    bench_profile.add_parser(subcommands)


def _add_measuring_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="measure each case with torch.compile too (on CUDA: yes; on a CPU: no)",
    )
    parser.add_argument(
        "--peak",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure peak memory; on a CPU in a process of its own for every case (yes)",
    )
    parser.add_argument(
        "--out", metavar="FILE", default="bench.json", help="new .json file; the picture goes beside it (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure; print the tables; write the results and the picture."""
    require_extra("plot")
    out, picture = new_files(arguments.out, ".png")
    from aroma.cli.quiet import quiet

    quiet()
    from aroma.files import write_json

    from ..bench.measure import measure
    from ..bench.picture import bench_picture

    settings = settings_of(
        arguments,
        compiled=arguments.device == "cuda" if arguments.compile is None else arguments.compile,
        peak=arguments.peak,
    )
    result = measure(settings, phase=timed_phase)
    write_json(out, result.as_dict())
    bench_picture(result, picture)
    _print(result)
    print_lines([f"Left: {out}, {picture}."])


def _print(result: BenchResult) -> None:
    from rich.console import Console

    from ..bench.table import comparison_table, growth_lines, machine_lines, roofline_lines, size_table, time_table

    console = Console()
    console.print(time_table(result))
    console.print(size_table(result))
    if result.comparisons:
        console.print(comparison_table(result.comparisons))
    print_lines([*growth_lines(result), *roofline_lines(result), *machine_lines(result)])
