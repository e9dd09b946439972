"""`aroma bench profile`: where the time of a step goes."""

from __future__ import annotations

import argparse
from typing import Any

from aroma.cli.texts import examples

from .bench_options import add_model_options, add_round_options, new_files, print_lines, settings_of, timed_phase


def add_parser(commands: Any) -> None:
    """Add the command to the parser of `aroma bench`."""
    parser = commands.add_parser(
        "profile",
        help="measure where the time of forward and backward goes, by kind of operation",
        description=(
            "Measure where the time of forward and backward goes, by kind of operation: matmuls of the backbone,\n"
            "narrow matmuls of the update, folding, dropout masks, attention, the rest. PyTorch's profiler measures,\n"
            "and makes every step a little slower: ratios are `aroma bench`'s to give."
        ),
        epilog=examples("aroma bench profile --only aroma-0 aroma-8 lora-r8 --rounds 5"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    add_round_options(parser)
    parser.add_argument("--out", metavar="FILE", default="profile.json", help="new .json file (%(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure; print the table; write the results."""
    (out,) = new_files(arguments.out)
    from aroma.cli.quiet import quiet

    quiet()
    from rich.console import Console

    from aroma.files import write_json

    from ..bench.operations import operation_times, operations_record
    from ..bench.table import operations_table

    settings = settings_of(arguments, peak=False)
    found = operation_times(settings, phase=timed_phase)
    write_json(out, operations_record(settings, found))
    Console().print(operations_table(found))
    print_lines([f"Left: {out}."])
