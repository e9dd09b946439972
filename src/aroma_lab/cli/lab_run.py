"""`aroma lab run`: all trials of a grid."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import add_command

if TYPE_CHECKING:
    from ..study.grid import Grid
    from ..study.trials import Ended


def add_parser(commands: Any) -> None:
    """Add the command to the parser of `aroma lab`."""
    parser = add_command(
        commands,
        "run",
        "run methods × tasks × seeds",
        (
            "Run every trial of a grid that has no result yet. Finished trials are skipped, interrupted ones resume\n"
            "from their last checkpoint, and failed ones are listed at the end. A selection comes first: settings\n"
            "are chosen on held-out training data. Commands with the same file and the same output folder, on one\n"
            "machine or several, share its trials."
        ),
        "aroma lab run examples/lab/minilm-tiny.yaml",
        "aroma lab run examples/lab/minilm-tiny.yaml training.max_steps=60 methods.lora-r8.r=4 output=runs/other",
        "aroma lab run examples/lab/minilm-tiny.yaml --list",
        "aroma lab run examples/lab/glue-roberta-base.yaml --tasks mrpc rte --methods aroma",
        "aroma lab run examples/lab/minilm-tiny.yaml --retry-failed --workers 1",
    )
    parser.add_argument("grid", metavar="GRID.yaml", help="model, tasks, methods, training, seeds")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="win over the file, such as seeds=[0,1]")
    parser.add_argument("--workers", "--processes", type=int, metavar="N", help="trials at a time (the file's)")
    parser.add_argument("--tasks", metavar="TASK", nargs="+", help="run these tasks only (all)")
    parser.add_argument("--methods", metavar="METHOD", nargs="+", help="run these methods only (all)")
    parser.add_argument("--list", action="store_true", help="list the trials and their states, and run nothing")
    parser.add_argument("--retry-failed", action="store_true", help="run trials again that failed earlier")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the grid, or list its trials; return 1 if there are trials without a result."""
    require_extra("lab")
    from ..study.grid import load_grid
    from ..study.run import list_grid, run_grid

    workers = [] if arguments.workers is None else [f"processes={arguments.workers}"]
    grid: Grid = load_grid(arguments.grid, arguments.overrides + workers)
    tasks, methods = arguments.tasks, arguments.methods
    if arguments.list:
        states = list_grid(grid.part(tasks, methods))
        for name, state in states:
            print(f"{state:12}{name}")
        counts = Counter(state for _, state in states).items()
        print(f"{len(states)} trials: {', '.join(f'{count} {state}' for state, count in counts)}")
        return 0
    from aroma.cli.quiet import quiet

    quiet()
    done = run_grid(grid, tasks=tasks, methods=methods, retry_failed=arguments.retry_failed, watch=_progress())
    ended = f"{len(done.finished)} now, {len(done.skipped)} earlier; failed: {len(done.failed)}"
    files = f"runs/, grid.yaml{', selection.json' if grid.select else ''}"
    print(f"Trials finished: {ended}. Results are in {grid.output}: {files}.")
    for name, failure in done.failed.items():
        print(f"failed: {name}: {failure}")
    if done.failed:
        print(f"{grid.output}/runs/TRIAL/failure.json tells more. When the cause is fixed, add --retry-failed.")
    return 1 if done.failed else 0


def _progress() -> Callable[[str, Ended, int, int], None]:
    """Return what prints a line for each trial that has ended."""
    began = time.monotonic()

    def note(name: str, ended: Ended, count: int, known: int) -> None:
        result = f"score {ended.score:.4f}" if ended.failure is None else f"failed: {ended.failure}"
        passed = timedelta(seconds=round(time.monotonic() - began))
        print(f"{passed} · {count} of {known} · {name} · {result}", file=sys.stderr)

    return note
