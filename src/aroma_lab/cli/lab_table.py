"""`aroma lab table`: a table of a grid's runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import examples
from aroma.errors import bad_value

# As in report/; written out here so that help imports nothing.
KINDS = ("main", "paired", "sets", "reset", "time", "inner")
FORMAT_NAMES = ("text", "markdown", "latex", "csv")


def add_parser(commands: Any) -> None:
    """Add the command to the parser of `aroma lab`."""
    parser = commands.add_parser(
        "table",
        help="print a table of a grid's runs: scores, differences, set by set, Reset ablation, times, inner criterion",
        description=(
            "Print a table of the runs that `aroma lab run` left: mean ± standard deviation over seeds, with the\n"
            "protocol in its caption and every failed run below it.\n\n"
            "main   scores, trainable parameters, paired difference to a baseline (the paper's Table 2)\n"
            "paired the difference to the baseline on each task: better, tied or worse\n"
            "sets   each reported set and their average, with the difference of the average (Table 3)\n"
            "reset  AROMA's scores, ranks and effective ranks by what a merge resets (Table 4)\n"
            "time   seconds of an epoch, and their ratios (Table 5)\n"
            "inner  after how many steps the inner criterion fires, by kind of matrix"
        ),
        epilog=examples(
            "aroma lab table results/lab/minilm",
            "aroma lab table results/lab/minilm --kind time --baseline lora-r1",
            "aroma lab table results/lab/smollm2-commonsense --kind sets --metric accuracy_normalised",
            "aroma lab table results/lab/minilm --format latex --out table.tex",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="the grid's output folder, or its table of runs")
    parser.add_argument("--kind", choices=KINDS, default="main", help="what the table is of (%(default)s)")
    parser.add_argument("--format", choices=FORMAT_NAMES, help="how it is written (by the suffix of --out, else text)")
    parser.add_argument(
        "--baseline",
        metavar="LABEL",
        help="method to compare with, of all kinds but reset and inner (lora-r8 if it was run)",
    )
    parser.add_argument("--metric", metavar="NAME", help="what --kind sets shows (the metric that is the score)")
    parser.add_argument("--out", metavar="FILE", help="new file to write it to, instead of printing it")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the table, or write it; what CSV cannot hold goes to standard error."""
    require_extra("lab")
    out = new_file(arguments.out) if arguments.out else None
    from aroma.files import write_text

    from ..report.formats import FORMATS, SUFFIXES
    from ..report.runs import read_runs
    from ..report.tables import make_table

    form = arguments.format or (SUFFIXES.get(out.suffix.lower(), "text") if out else "text")
    table = make_table(read_runs(arguments.folder), arguments.kind, arguments.baseline, arguments.metric)
    rendered = FORMATS[form](table)
    if out is not None:
        write_text(out, rendered)
        print(f"Left: {out}.")
    else:
        sys.stdout.write(rendered)
    if form == "csv":
        sys.stderr.write("".join(f"{line}\n" for line in (table.caption, *table.notes)))


def new_file(name: str) -> Path:
    """Return the file to write.

    Raises:
        ConfigError: It exists already.
    """
    path = Path(name)
    if path.exists():
        raise bad_value("--out", name, "it exists; give another name, or move it away")
    return path
