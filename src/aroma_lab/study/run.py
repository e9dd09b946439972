"""A whole grid: first the trials of its selection, then the reported ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from aroma.errors import bad_value
from aroma.files import write_json, write_text

from ..run.trial import Trial
from .engine import Engine, Watcher
from .grid import Grid, check_methods, check_tasks, expand, report_name
from .process import WORKER_MODULE, tidy
from .selection import Candidate, candidates, choose, chosen_settings
from .status import ROUND, State, Status, of_grid, require_no_conflicts

GRID_FILE, SELECTION_FILE = "grid.yaml", "selection.json"
_HEADER = "# The whole grid, defaults included. Written by `aroma lab run`, anew each time.\n"


@dataclass(frozen=True)
class Failure:
    """A trial that has no result.

    Args:
        name: Its name.
        message: Why it failed.
        path: File that tells more; None if it is on another machine.
    """

    name: str
    message: str
    path: Path | None


@dataclass(frozen=True)
class GridOutcome:
    """The outcome of running a grid.

    Args:
        finished: Names of the trials finished now.
        failed: Trials without a result: failed now or earlier, or without a chosen setting.
        skipped: Names of the trials finished earlier.
    """

    finished: list[str] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def run_grid(
    grid: Grid,
    *,
    tasks: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    retry_failed: bool = False,
    watcher: Watcher | None = None,
    module: str = WORKER_MODULE,
) -> GridOutcome:
    """Run all trials of a grid that have no result yet, together with other machines that run the same grid.

    Args:
        grid: The grid.
        tasks: Run these tasks only; None for all.
        methods: Run these methods only; None for all.
        retry_failed: Run trials again that failed earlier.
        watcher: Is told how it goes.
        module: What runs a trial; see `TrialProcess`. Tests pass a stand-in.

    Raises:
        ConfigError: A value that cannot work, a storage that cannot be reached, or trials in the output folder or the
            study that another grid made. Nothing has been run then. Or a database that went away.
        DataError: Examples that cannot be used. Nothing has been run then, either.
    """
    part = grid.part(tasks, methods)
    tried = candidates(part)
    # Whatever is chosen, the trials differ in nothing that could be refused later.
    check_methods([*(one.trial for one in tried), *expand(part)])
    _require_own(grid.folder / GRID_FILE)
    if module == WORKER_MODULE:  # a stand-in may need no data
        over = {"finished", "conflict"} if retry_failed else {"finished", "conflict", "failed"}
        check_tasks(trial for trial, state in _states(part, Status.read(grid)) if state not in over)
    first = [one.trial for one in tried] or expand(part)
    require_no_conflicts(first, Status.read(grid).folder(""))
    with Engine(grid, watcher=watcher, module=module) as engine:
        engine.require_no_conflicts([of_grid(trial) for trial in first])
        write_text(
            grid.folder / GRID_FILE, _HEADER + yaml.safe_dump(grid.as_dict(), sort_keys=False, allow_unicode=True)
        )
        run = _GridRun(engine, retry_failed)
        if tried:
            run.run(first, later=len(expand(part)))
            run.select(grid, tried)
        run.run(expand(part, run.chosen))
        return run.outcome


def list_grid(
    grid: Grid, *, tasks: Sequence[str] | None = None, methods: Sequence[str] | None = None
) -> list[tuple[str, State]]:
    """Return the name and the state of every trial, in the order of their run; nothing is run or written.

    Args:
        grid: The grid.
        tasks: These tasks only; None for all.
        methods: These methods only; None for all.

    Raises:
        ConfigError: A value that cannot work, or a storage that cannot be reached.
    """
    return [(trial.name, state) for trial, state in _states(grid.part(tasks, methods), Status.read(grid))]


class _GridRun:
    """One run of a grid, while it lasts."""

    def __init__(self, engine: Engine, retry_failed: bool) -> None:
        self.outcome = GridOutcome()
        self.chosen: Any = None
        self._engine, self._retry_failed = engine, retry_failed

    def run(self, trials: Sequence[Trial], later: int = 0) -> None:
        """Run the trials that have no result yet."""
        status, outcome = self._engine.status(), self.outcome
        require_no_conflicts(trials, status.folder(""))
        self._engine.require_no_conflicts([of_grid(trial) for trial in trials])
        to_run = [trial for trial in trials if self._is_to_run(trial, status)]
        wanted = [of_grid(trial) for trial in to_run]
        if status.shared:  # other machines need to know what was finished here before the study was made
            skipped = (trial for trial in trials if trial.name in outcome.skipped and status.of(trial) is None)
            wanted += [of_grid(trial) for trial in skipped]
        done = len(outcome.finished) + len(outcome.skipped)
        self._engine.run(wanted, later=later, done=done, failed=len(outcome.failed))
        status = self._engine.status()
        for trial in to_run:
            if status.state(trial) == "finished":
                outcome.finished.append(trial.name)
            else:
                outcome.failed.append(Failure(trial.name, *status.failure(trial)))

    def select(self, grid: Grid, tried: Sequence[Candidate]) -> None:
        """Choose settings, write all that was tried so far, and report methods for which every setting failed."""
        status = self._engine.status()
        begun = {
            (one.task, one.method)
            for one in candidates(grid)
            if status.folder(one.trial.name).exists() or status.of(one.trial) is not None
        }
        everything = [one for one in candidates(grid) if (one.task, one.method) in begun]
        write_json(grid.folder / SELECTION_FILE, choose(everything, _outcomes(everything, status)))
        selection = choose(tried, _outcomes(tried, status))
        self.chosen = chosen_settings(selection)
        for task, method in {(one.task, one.method): None for one in tried}:
            if method not in self.chosen[task]:
                first = next(one for one in self.outcome.failed if one.name.startswith(f"select/{task}/{method}/"))
                message = f"not run, because no run of its selection finished ({first.message})"
                for seed in grid.seeds:
                    self.outcome.failed.append(Failure(report_name(task, method, seed), message, first.path))

    def _is_to_run(self, trial: Trial, status: Status) -> bool:
        """Whether a trial is to be run; if it was decided before, it is enqueued for another round."""
        state, found = status.state(trial), status.of(trial)
        if state == "finished":
            tidy(status.folder(trial.name))
            self.outcome.skipped.append(trial.name)
            return False
        if state == "failed" and not self._retry_failed:
            self.outcome.failed.append(Failure(trial.name, *status.failure(trial)))
            return False
        if found is not None and found.decided:
            again = {**of_grid(trial), ROUND: found.attributes.get(ROUND, 0) + 1}
            self._engine.study.enqueue_trial({}, user_attrs=again)
        return True


def _states(grid: Grid, status: Status) -> list[tuple[Trial, State]]:
    """Return all trials with their states.

    Until the selection has finished, any of the values that it tries stand for the chosen ones in the reported trials,
    and files alone tell their state.
    """
    tried = candidates(grid)
    states = [(one.trial, status.state(one.trial)) for one in tried]
    if all(state in ("finished", "failed") for _, state in states):
        chosen = chosen_settings(choose(tried, _outcomes(tried, status))) if tried else None
        return states + [(trial, status.state(trial)) for trial in expand(grid, chosen)]
    assumed = {task: {one.method: one.values for one in tried if one.task == task} for task in grid.tasks}
    return states + [(trial, status.state_by_name(trial.name)) for trial in expand(grid, assumed)]


def _outcomes(tried: Iterable[Candidate], status: Status) -> dict[str, Any]:
    outcomes = {one.trial.name: status.outcome(one.trial) for one in tried}
    return {name: outcome for name, outcome in outcomes.items() if outcome is not None}


def _require_own(path: Path) -> None:
    """Raise if a user's grid file is where the resolved one goes.

    Raises:
        ConfigError: It is.
    """
    if path.exists() and not path.read_text(encoding="utf-8").startswith(_HEADER):
        raise bad_value(
            "output", str(path.parent), f"{path.name} there is your own and would be overwritten; rename it"
        )
