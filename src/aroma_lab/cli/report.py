"""`aroma report`: one HTML file of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import add_command, add_force
from aroma.errors import bad_value

from ..run.trial import REPORT, TrialFiles


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "report",
        "write one HTML file of a run, to look at",
        (
            "Write one HTML file that needs no network: of a finished run its result, loss, ranks, settings and\n"
            "the command that repeats it. `aroma train` ends with it."
        ),
        "aroma report runs/mrpc",
        "aroma report runs/lab-tiny/runs/messages/aroma/seed-0 --out seed-0.html",
    )
    parser.add_argument("run_folder", metavar="RUN", help="folder of a run of `aroma train`, or of a grid's trial")
    parser.add_argument("--out", metavar="FILE", help=f"HTML file to write (RUN/{REPORT})")
    add_force(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the report."""
    require_extra("lab")
    from aroma.outputs import new_file

    folder = Path(arguments.run_folder)
    out = None if arguments.out is None else new_file("--out", arguments.out, force=bool(arguments.force))
    if not TrialFiles(folder).trial.is_file():
        raise bad_value("RUN", str(folder), "no run there; give the output of `aroma train`, or the folder of a trial")
    out = out or new_file("--out", folder / REPORT, force=True)
    from aroma.cli.quiet import quiet

    quiet()
    from ..report.run_page import write_run_page

    write_run_page(folder, out)
    print(f"report: {out}")
