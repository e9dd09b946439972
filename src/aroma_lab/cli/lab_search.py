"""`aroma lab search`: hyperparameters of one method on one task."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import add_command

from .lab_run import add_study_options

if TYPE_CHECKING:
    from ..study.search import Search, SearchOutcome

_MOST_ROWS = 20


def add_parser(commands: Any) -> None:
    """Add the command to the parser of `aroma lab`."""
    parser = add_command(
        commands,
        "search",
        "search hyperparameters at random, on a grid, or by TPE; on one machine or several",
        (
            "Search the hyperparameters of one method on one task, on examples held out from the training data.\n"
            "A search file is a grid file with `space`, `sampler` (random, grid, tpe) and `trials`. Machines that\n"
            "are given the same file and the same --storage share the trials: none is run twice, and one whose\n"
            "process or machine died is tried again. The same command resumes an interrupted search."
        ),
        "aroma lab search examples/lab/search-messages.yaml",
        "aroma lab search examples/lab/search-messages.yaml training.max_steps=100 --trials 40 --workers 2",
        "aroma lab search examples/lab/search-messages.yaml --storage postgresql://aroma:secret@localhost/aroma",
    )
    parser.add_argument("search", metavar="SEARCH.yaml", help="a grid file of one task and method, and a space")
    add_study_options(parser)
    parser.add_argument("--trials", type=int, metavar="N", help="trials in all, over all machines (the file's)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Search, and print what was found; return 1 if a trial failed."""
    require_extra("lab")
    from aroma.cli.quiet import quiet

    from ..study.grid import make_grid, read_grid_file
    from ..study.search import Search, run_search
    from .lab_progress import StudyProgress

    given = {"storage": arguments.storage, "trials": arguments.trials, "processes": arguments.workers}
    search = make_grid(read_grid_file(arguments.search, arguments.overrides, **given), Search)
    quiet()
    with StudyProgress() as progress:
        outcome = run_search(search, progress)
    _print(search, outcome)
    return 0 if all(one.error is None for one in outcome.trials) else 1


def _print(search: Search, outcome: SearchOutcome) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, soft_wrap=True)
    finished = sorted((one for one in outcome.trials if one.score is not None), key=lambda one: -(one.score or 0.0))
    table = Table("trial", *search.space, "score", title=f"{search.study_name}: the best on held-out examples")
    for one in finished[:_MOST_ROWS]:
        values = [_text(one.attempt.params[key]) for key in search.space]
        table.add_row(one.name.rpartition("/")[2], *values, f"{one.score:.4f}")
    if outcome.best is not None:
        console.print(table)
        best = " ".join(f"{key}={_text(outcome.best.attempt.params[key])}" for key in search.space)
        console.print(f"best, with {outcome.best.score:.4f} on held-out examples: {best}")
    failed = [one for one in outcome.trials if one.error is not None]
    for one in failed:
        console.print(f"failed: {one.name}: {one.error}")
    console.print(f"{len(finished)} trials finished, {len(failed)} failed. Results are in {outcome.file}.")


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
