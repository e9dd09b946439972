"""`aroma report`: one HTML file of a run, or of a grid's comparison."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import add_command, add_force
from aroma.errors import bad_value

from ..run.files import REPORT, TrialFiles


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "report",
        "write one HTML file to look at: of a run, or of a grid's comparison",
        (
            "Write one HTML file that needs no network: of a finished run its result, loss, ranks, settings and\n"
            "the command that repeats it; of a grid its tables, and score against trained rank. `aroma train` ends\n"
            "with it."
        ),
        "aroma report runs/mrpc",
        "aroma report results/lab/minilm-six --out six.html",
    )
    parser.add_argument("run_folder", metavar="RUN", help="folder of a run, or of a grid or its table of runs")
    parser.add_argument("--out", metavar="FILE", help=f"HTML file to write (RUN/{REPORT})")
    add_force(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the report."""
    require_extra("lab")
    from aroma.files import write_text
    from aroma.report.page import report_file

    folder = Path(arguments.run_folder)
    if arguments.out is None and not folder.exists():
        raise bad_value("RUN", str(folder), "no such folder; give the output of `aroma train` or `aroma lab run`")
    beside = folder if folder.is_dir() else folder.parent
    out = report_file("--out", arguments.out or beside / REPORT, force=arguments.force)
    from aroma.cli.quiet import quiet

    quiet()
    if TrialFiles(folder).trial.is_file():
        from ..report.run_page import write_run_page

        write_run_page(folder, out)
    else:
        from ..report.grid_page import grid_page

        write_text(out, grid_page(folder))
    print(f"report: {out}")
