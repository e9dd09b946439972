"""`aroma lab search`: hyperparameters of one method on one task."""

from __future__ import annotations

import argparse
from typing import Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import add_command

from .lab_run import add_study_options, progress

_MOST_ROWS = 20


def add_parser(commands: Any) -> None:
    """Add the command to the parser of `aroma lab`."""
    parser = add_command(
        commands,
        "search",
        "search hyperparameters at random or by TPE",
        (
            "Search the hyperparameters of one method on one task, on examples held out from the training data.\n"
            "A search file is a grid file with `space`, `sampler` (random, tpe) and `trials`. The same command\n"
            "resumes an interrupted search; commands on one output folder share its trials."
        ),
        "aroma lab search examples/lab/search-messages.yaml",
        "aroma lab search examples/lab/search-messages.yaml training.max_steps=100 --trials 40 --workers 2",
    )
    parser.add_argument("search", metavar="SEARCH.yaml", help="a grid file of one task and method, and a space")
    add_study_options(parser)
    parser.add_argument("--trials", type=int, metavar="N", help="trials in all (the file's)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Search, and print what was found; return 1 if a trial failed."""
    require_extra("lab")
    from tabulate import tabulate

    from aroma.cli.quiet import quiet

    from ..study.grid import load_grid
    from ..study.search import SEARCH_FILE, Search, run_search

    given = {"trials": arguments.trials, "processes": arguments.workers}
    search = load_grid(arguments.search, arguments.overrides, Search, **given)
    quiet()
    found = run_search(search, progress())
    finished = [one for one in found if one["error"] is None]
    rows = [[one["name"], *one["values"].values(), one["score"]] for one in finished[:_MOST_ROWS]]
    print(tabulate(rows, ["trial", *search.distributions, "held-out score"], floatfmt=".4g"))
    for one in found:
        if one["error"] is not None:
            print(f"failed: {one['name']}: {one['error']}")
    counts = f"{len(finished)} trials finished, {len(found) - len(finished)} failed"
    print(f"{counts}. Results are in {search.output}/{SEARCH_FILE}.")
    return 0 if len(finished) == len(found) else 1
