"""`aroma lab run`: all trials of a grid; `aroma lab worker`: help with the trials of another command."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import TYPE_CHECKING, Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import add_command

if TYPE_CHECKING:
    from rich.console import Console

    from ..study.grid import Grid
    from ..study.run import GridOutcome


def add_parser(commands: Any) -> None:
    """Add the commands to the parser of `aroma lab`."""
    parser = add_command(
        commands,
        "run",
        "run methods × tasks × seeds, on one machine or several",
        (
            "Run every trial of a grid that has no result yet, each in a process of its own. Finished trials are\n"
            "skipped, interrupted ones resume from their last checkpoint, and failed ones are listed at the end. If\n"
            "the grid has a selection, it comes first: settings are chosen on held-out training data. With --storage\n"
            "several machines share the trials: run the same command, or `aroma lab worker`, on each of them."
        ),
        "aroma lab run examples/lab/minilm-tiny.yaml",
        "aroma lab run examples/lab/minilm-tiny.yaml training.max_steps=60 methods.lora-r8.r=4 output=runs/other",
        "aroma lab run examples/lab/minilm-tiny.yaml --list",
        "aroma lab run examples/lab/glue-roberta-base.yaml --tasks mrpc rte --methods aroma",
        "aroma lab run examples/lab/minilm-tiny.yaml --retry-failed --workers 1",
        "aroma lab run examples/lab/minilm-tiny.yaml --storage postgresql://aroma:secret@localhost/aroma",
    )
    parser.add_argument("grid", metavar="GRID.yaml", help="model, tasks, methods, training, seeds")
    add_study_options(parser)
    parser.add_argument("--tasks", metavar="TASK", nargs="+", help="run these tasks only (all)")
    parser.add_argument("--methods", metavar="METHOD", nargs="+", help="run these methods only (all)")
    parser.add_argument("--list", action="store_true", help="list the trials and their states, and run nothing")
    parser.add_argument("--retry-failed", action="store_true", help="run trials again that failed earlier")
    parser.set_defaults(run=run)

    worker = add_command(
        commands,
        "worker",
        "run trials that `aroma lab run` or `aroma lab search` started elsewhere",
        (
            "Run trials that wait in the study of a grid or a search, which `aroma lab run` or `aroma lab search`\n"
            "has started, on any machine that reaches the storage. A worker ends when nothing has waited or run for\n"
            "some time. If it is killed, others take up its trials."
        ),
        "aroma lab worker examples/lab/minilm-tiny.yaml --storage postgresql://aroma:secret@localhost/aroma",
        "aroma lab worker examples/lab/search-messages.yaml --workers 4 --idle 600",
    )
    worker.add_argument("grid", metavar="GRID.yaml", help="the file that the other command was given")
    add_study_options(worker)
    worker.add_argument("--idle", type=float, default=60, metavar="SECONDS", help="end after so long (%(default)s)")
    worker.set_defaults(run=run_worker)


def add_study_options(parser: argparse.ArgumentParser) -> None:
    """Add what all commands of a study take: overrides, workers, storage."""
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="win over the file, such as seeds=[0,1]")
    parser.add_argument(
        "--workers", "--processes", type=int, metavar="N", help="trials at a time on this machine (the file's)"
    )
    parser.add_argument(
        "--storage", metavar="URL", help="database of the study, shared by machines (a journal file in output)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the grid, or list its trials; return 1 if there are trials without a result."""
    require_extra("lab")
    from rich.console import Console

    from ..study.grid import load_grid

    grid = load_grid(arguments.grid, arguments.overrides, processes=arguments.workers, storage=arguments.storage)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    from ..study.run import list_grid, run_grid

    if arguments.list:
        states = list_grid(grid, tasks=arguments.tasks, methods=arguments.methods)
        for name, state in states:
            console.print(f"{state:12}{name}")
        counts = Counter(state for _, state in states)
        console.print(f"{len(states)} trials: {', '.join(f'{count} {state}' for state, count in counts.items())}")
        return 0
    from aroma.cli.quiet import quiet

    quiet()
    from .lab_progress import StudyProgress

    retry = arguments.retry_failed
    with StudyProgress() as progress:
        outcome = run_grid(grid, tasks=arguments.tasks, methods=arguments.methods, retry_failed=retry, watch=progress)
    _print(outcome, grid, console)
    return 1 if outcome.failed else 0


def run_worker(arguments: argparse.Namespace) -> None:
    """Run trials of a grid or a search that another command started."""
    require_extra("lab")
    from ..study.grid import Grid, make_grid, read_grid_file
    from ..study.run import serve
    from ..study.search import Search
    from .lab_progress import StudyProgress

    values = read_grid_file(
        arguments.grid, arguments.overrides, processes=arguments.workers, storage=arguments.storage
    )
    settings = make_grid(values, Search if "space" in values else Grid)
    with StudyProgress() as progress:
        count = serve(settings, arguments.idle, progress)
    print(f"Trials that ended here: {count}.")


def _print(outcome: GridOutcome, grid: Grid, console: Console) -> None:
    counts = f"{len(outcome.finished)} now, {len(outcome.skipped)} earlier; failed: {len(outcome.failed)}"
    console.print(
        f"Trials finished: {counts}. "
        f"Results are in {grid.output}: runs/, grid.yaml{', selection.json' if grid.select else ''}."
    )
    for failure in outcome.failed:
        console.print(f"failed: {failure.name}: {failure.message}")
        if failure.path is not None:
            console.print(f"        {failure.path}")
    if outcome.failed:
        console.print("When the cause is fixed, run the same command with --retry-failed.")
