"""A whole grid: the trials of its selection, then the reported ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from aroma.errors import bad_value
from aroma.files import write_json, write_text
from aroma.outputs import open_folder

from ..run.trial import Trial
from .grid import Grid, check_trials, expand
from .selection import Selected, select
from .trials import RUNNER, Ended, Runs, State, Watch, run_all

GRID_FILE, SELECTION_FILE = "grid.yaml", "selection.json"
_MARK = "Written by `aroma lab run`, anew each time."


class Outcome(NamedTuple):
    """Names of the trials that finished now, why others failed, by name, and names of those that had finished."""

    finished: list[str]
    failed: dict[str, str]
    skipped: list[str]


def selection_of(grid: Grid, runs: Runs) -> dict[tuple[str, str], Selected]:
    """Return how far the selection is, by task and method."""
    pairs = product(grid.tasks, grid.methods) if grid.select is not None else ()
    return {pair: select(grid, *pair, runs.ended) for pair in pairs}


def trials_of(grid: Grid, runs: Runs) -> dict[str, Trial]:
    """Return the trials that have ended or are due, by name: those that select, and then those that are reported."""
    found = selection_of(grid, runs)
    chosen = {pair: one.chosen for pair, one in found.items() if one.is_final and one.chosen is not None}
    tried = [one.trial for selected in found.values() for one in selected.tried]
    return {trial.name: trial for trial in tried + expand(grid, None if grid.select is None else chosen)}


def run_grid(
    grid: Grid,
    *,
    tasks: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    retry_failed: bool = False,
    watch: Watch = lambda *_: None,
    runner: str = RUNNER,
) -> Outcome:
    """Run all trials of a grid that have no result yet, with other commands on the same folder.

    Args:
        tasks: Run these tasks only; None for all.
        methods: Run these methods only; None for all.
        retry_failed: Run trials again that failed earlier.
        watch: Called with every trial that ends.
        runner: Module that runs a trial; see `RUNNER`.

    Raises:
        ConfigError: A value that cannot work, or trials in the output folder that another grid made. Nothing has been
            run then.
        DataError: Examples that cannot be used. Nothing has been run then, either.
    """
    folder = Path(grid.output)
    open_folder("output", folder)
    file = folder / GRID_FILE
    if file.exists() and _MARK not in file.read_text(encoding="utf-8"):
        raise bad_value("output", grid.output, f"{GRID_FILE} there is your own and would be overwritten; rename it")
    part, runs = grid.part(tasks, methods), Runs(folder)

    def due() -> dict[str, Trial]:
        trials = trials_of(part, runs)
        runs.require_own(trials.values())
        return trials

    for trial in due().values():
        failure = runs.files(trial.name).failure
        if failure.exists() and (retry_failed or runs.state(trial) == "new"):  # new: other settings failed
            failure.unlink()
    if runner == RUNNER:
        # Whatever is chosen, the reported trials differ in nothing that could be refused later.
        everything = [*due().values(), *expand(part)]
        check_trials(everything, [trial for trial in everything if runs.ended(trial.name) is None])
    text = yaml.safe_dump(asdict(grid), sort_keys=False, allow_unicode=True)
    write_text(file, f"# The grid as it ran. {_MARK}\n{text}")

    def note(name: str, ended: Ended, count: int, known: int) -> None:
        _write_selection(grid, runs)
        watch(name, ended, count, known)

    ran = run_all(runs, grid.processes, due, note, runner)
    _write_selection(grid, runs)
    ends = {name: runs.ended(name) or Ended(failure="its files were removed") for name in due()}
    failed = {name: end.failure for name, end in ends.items() if end.failure is not None}
    finished = [name for name in ends if name not in failed]
    earlier = [name for name in finished if name not in ran]
    return Outcome([name for name in finished if name in ran], failed, earlier)


def list_grid(grid: Grid) -> list[tuple[str, State]]:
    """Return the name and the state of every trial that is known by now, in the order of their run; writes nothing.

    Reported trials are known once the selection of their task and method has ended.
    """
    runs = Runs(Path(grid.output))
    return [(name, runs.state(trial)) for name, trial in trials_of(grid, runs).items()]


def _write_selection(grid: Grid, runs: Runs) -> None:
    """Write the choices made so far in the whole grid; other commands may run other parts of it."""
    selection: dict[str, dict[str, Any]] = {}
    for (task, method), selected in selection_of(grid, runs).items():
        if any(runs.ended(one.trial.name) for one in selected.tried):
            selection.setdefault(task, {})[method] = selected.entry
    if selection:
        write_json(runs.output / SELECTION_FILE, selection)
