"""`aroma lab collect`: all runs of a grid in one small table, to commit or to pass on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import examples

from .lab_table import new_file


def add_parser(commands: Any) -> None:
    """Add the command to the parser of `aroma lab`."""
    parser = commands.add_parser(
        "collect",
        help="write all runs of a grid into one small table, which tables and figures are made of as well",
        description=(
            "Write all runs of a grid into one table, runs.parquet: settings, versions, metrics, ranks, curves,\n"
            "evaluations and inner checks of each run, failures included. `aroma lab table` and `aroma lab figure`\n"
            "take it in place of the run folders and give the same numbers. Adapters, events and losses are left\n"
            "out, so cosines still need the run folders."
        ),
        epilog=examples(
            "aroma lab collect results/lab/minilm",
            "aroma lab collect results/lab/minilm --out minilm.parquet",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="the grid's output folder")
    parser.add_argument("--out", metavar="FILE", help="new file to write it to (FOLDER/runs.parquet)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the table of runs."""
    require_extra("lab")
    out = new_file(arguments.out or str(Path(arguments.folder) / "runs.parquet"))
    from ..report.runs import collect_runs, read_runs

    runs = read_runs(arguments.folder)
    collect_runs(runs, out)
    print(f"{len(runs.rows)} runs, {out.stat().st_size / 1e3:.0f} kB: {out}")
