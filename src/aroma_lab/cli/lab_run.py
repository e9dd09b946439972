"""`aroma lab run`: all trials of a grid."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import examples

if TYPE_CHECKING:
    from rich.console import Console

    from ..grid.run import GridOutcome
    from ..grid.spec import Grid, Part


def add_parser(commands: Any) -> None:
    """Add the command to the parser of `aroma lab`."""
    parser = commands.add_parser(
        "run",
        help="run methods × tasks × seeds in worker processes",
        description=(
            "Run every trial of a grid that has no result yet, each in a process of its own: finished ones are\n"
            "skipped, interrupted ones go on from their last checkpoint, failed ones stop nothing and are listed at\n"
            "the end. Where the grid has a selection, it comes first: settings are chosen on held-out training\n"
            "data."
        ),
        epilog=examples(
            "aroma lab run examples/lab/minilm-tiny.yaml",
            "aroma lab run examples/lab/minilm-tiny.yaml training.max_steps=60 methods.lora-r8.r=4 output=runs/other",
            "aroma lab run examples/lab/minilm-tiny.yaml --list",
            "aroma lab run examples/lab/glue-roberta-base.yaml --tasks mrpc rte --methods aroma",
            "aroma lab run examples/lab/minilm-tiny.yaml --retry-failed --processes 1",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("grid", metavar="GRID.yaml", help="model, tasks, methods, training, seeds")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="stronger than the file, as seeds=[0,1]")
    parser.add_argument("--tasks", metavar="TASK", nargs="+", help="run these tasks only (all)")
    parser.add_argument("--methods", metavar="METHOD", nargs="+", help="run these methods only (all)")
    parser.add_argument("--processes", type=int, metavar="N", help="worker processes (the grid's)")
    parser.add_argument("--list", action="store_true", help="list the trials and how far they are, and run nothing")
    parser.add_argument("--retry-failed", action="store_true", help="run trials again that failed earlier")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the grid, or list its trials; return 1 if there are trials without a result."""
    require_extra("train")
    from ..grid.reader import load_grid

    processes = [] if arguments.processes is None else [f"processes={arguments.processes}"]
    grid = load_grid(arguments.grid, [*arguments.overrides, *processes])
    from rich.console import Console

    from ..grid.spec import Part

    part = Part(*(None if names is None else tuple(names) for names in (arguments.tasks, arguments.methods)))
    console = Console(markup=False, highlight=False, soft_wrap=True)
    from aroma.cli.quiet import quiet

    quiet()
    if arguments.list:
        _list(grid, part, console)
        return 0
    from ..grid.run import run_grid
    from .lab_progress import GridProgress

    with GridProgress(Console(stderr=True, markup=False, highlight=False, soft_wrap=True)) as progress:
        outcome = run_grid(grid, part=part, retry_failed=arguments.retry_failed, watcher=progress)
    _print(outcome, grid, console)
    return 1 if outcome.failed else 0


def _list(grid: Grid, part: Part, console: Console) -> None:
    from ..grid.survey import survey

    states = survey(grid, part)
    for name, state in states:
        console.print(f"{state:12}{name}")
    counts = {state: sum(other == state for _, other in states) for _, state in states}
    console.print(f"{len(states)} trials: {', '.join(f'{count} {state}' for state, count in counts.items())}")


def _print(outcome: GridOutcome, grid: Grid, console: Console) -> None:
    console.print(
        f"Trials finished: {len(outcome.finished)} now, {len(outcome.skipped)} earlier; "
        f"failed: {len(outcome.failed)}. "
        f"Left in {Path(grid.output)}: runs/, grid.yaml{', selection.json' if grid.select else ''}."
    )
    for failure in outcome.failed:
        console.print(f"failed: {failure.name}: {failure.message}\n        {failure.path}")
    if outcome.failed:
        console.print("Once the cause is mended: the same command with --retry-failed.")
