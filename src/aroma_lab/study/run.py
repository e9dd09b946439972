"""A whole grid: first the trials of its selection, then the reported ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from aroma.errors import bad_value
from aroma.files import write_text
from aroma.outputs import open_folder

from ..run.trial import Trial
from .engine import Engine, Watch
from .grid import Chosen, Grid, attributes_of, check_methods, check_tasks, expand
from .process import WORKER_MODULE, tidy
from .selection import Candidate, Outcome, candidates, choose, chosen_settings, finals, widened, write_selection
from .status import ROUND, State, Status, require_no_conflicts

GRID_FILE, SELECTION_FILE = "grid.yaml", "selection.json"
_HEADER = "# The whole grid, defaults included. Written by `aroma lab run`, anew each time.\n"


class Failure(NamedTuple):
    """A trial that failed now or earlier, or has no chosen setting; no file tells more if it is elsewhere."""

    name: str
    message: str
    path: Path | None


class GridOutcome(NamedTuple):
    """Names of the trials that finished now, those that failed, and names of those that had finished earlier."""

    finished: list[str]
    failed: list[Failure]
    skipped: list[str]


def run_grid(
    grid: Grid,
    *,
    tasks: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    retry_failed: bool = False,
    watch: Watch | None = None,
    module: str = WORKER_MODULE,
) -> GridOutcome:
    """Run all trials of a grid that have no result yet, together with other machines that run the same grid.

    Args:
        tasks: Run these tasks only; None for all.
        methods: Run these methods only; None for all.
        retry_failed: Run trials again that failed earlier.
        watch: Is told how it goes.
        module: What runs a trial; see `TrialProcess`. Tests pass a stand-in.

    Raises:
        ConfigError: A value that cannot work, a storage that cannot be reached, or trials in the output folder or the
            study that another grid made. Nothing has been run then. Or a database that went away.
        DataError: Examples that cannot be used. Nothing has been run then, either.
    """
    open_folder("output", grid.folder)
    part = grid.part(tasks, methods)
    tried = candidates(part)
    first = [trial for trial, _ in tried] or expand(part)
    _require_own(grid.folder / GRID_FILE)
    if module == WORKER_MODULE:  # a stand-in needs neither methods nor data
        # Whatever is chosen, the trials differ in nothing that could be refused later.
        check_methods([*first, *expand(part)])
        over = {"finished", "conflict"} if retry_failed else {"finished", "conflict", "failed"}
        check_tasks(trial for trial, state in _states(part, Status.read(grid)) if state not in over)
    require_no_conflicts(first, grid.folder)
    with Engine(grid, watch, module) as engine:
        engine.status().require_same_settings(attributes_of(trial.name, trial.as_dict()) for trial in first)
        resolved = yaml.safe_dump(grid.as_dict(), sort_keys=False, allow_unicode=True)
        write_text(grid.folder / GRID_FILE, _HEADER + resolved)
        outcome = GridOutcome([], [], [])
        _run_stage(engine, first, retry_failed, outcome)
        while further := _due(part, tried, engine.status()):
            tried = [*tried, *further]
            _run_stage(engine, [trial for trial, _ in further], retry_failed, outcome)
        if tried:
            chosen = _select(grid, tried, engine.status(), outcome)
            _run_stage(engine, expand(part, chosen), retry_failed, outcome)
    return outcome


def list_grid(
    grid: Grid, *, tasks: Sequence[str] | None = None, methods: Sequence[str] | None = None
) -> list[tuple[str, State]]:
    """Return the name and the state of every trial, in the order of their run; nothing is run or written."""
    return [(trial.name, state) for trial, state in _states(grid.part(tasks, methods), Status.read(grid))]


def serve(grid: Grid, idle_seconds: float, watch: Watch | None = None, *, module: str = WORKER_MODULE) -> int:
    """Run trials that another command enqueued, until nothing has waited or run for some time.

    The study of a grid holds its trials, so that only output, study, storage and processes of `grid` count.

    Returns:
        The number of trials that ended here.

    Raises:
        ConfigError: A storage that cannot be reached or went away, a study that searches something else, or a folder
            that holds another trial.
    """
    open_folder("output", grid.folder)
    with Engine(grid, watch, module) as engine:
        return engine.serve(idle_seconds)


def _run_stage(engine: Engine, trials: Sequence[Trial], retry_failed: bool, outcome: GridOutcome) -> None:
    status = engine.status()
    attributes = {trial.name: attributes_of(trial.name, trial.as_dict()) for trial in trials}
    require_no_conflicts(trials, status.grid.folder)
    status.require_same_settings(attributes.values())
    to_run, wanted = [], []
    for trial in trials:
        state, found = status.state(trial), status.of(trial)
        if state == "finished":
            tidy(status.files(trial).root)
            outcome.skipped.append(trial.name)
            if status.shared and found is None:  # other machines need to know what was finished before the study
                wanted.append(attributes[trial.name])
        elif state == "failed" and not retry_failed:
            outcome.failed.append(Failure(trial.name, *status.failure(trial)))
        else:
            to_run.append(trial)
            wanted.append(attributes[trial.name])
            if found is not None and found.decided:
                again = {**attributes[trial.name], ROUND: found.attributes.get(ROUND, 0) + 1}
                engine.study.enqueue_trial({}, user_attrs=again)
    engine.run(wanted)
    status = engine.status()
    for trial in to_run:
        if status.state(trial) == "finished":
            outcome.finished.append(trial.name)
        else:
            outcome.failed.append(Failure(trial.name, *status.failure(trial)))


def _select(grid: Grid, tried: Sequence[Candidate], status: Status, outcome: GridOutcome) -> Chosen:
    """Choose settings, write all that was tried so far, and report methods for which every setting failed."""

    def begun(trial: Trial) -> bool:
        return status.files(trial).root.exists() or status.of(trial) is not None

    everything = _all_candidates(grid, status)
    pairs = {one.pair for one in everything if begun(one.trial)}
    everything = [one for one in everything if one.pair in pairs]
    selection = _choose(grid, everything, status)
    write_selection(grid.folder / SELECTION_FILE, selection)
    chosen = chosen_settings(selection)
    for task, method in dict.fromkeys(one.pair for one in tried):
        if method not in chosen[task]:
            first = next(one for one in outcome.failed if one.name.startswith(f"select/{task}/{method}/"))
            message = f"not run, because no setting of its selection finished with every seed ({first.message})"
            missing = [f"{task}/{method}/seed-{seed}" for seed in grid.seeds]
            outcome.failed.extend(Failure(name, message, first.path) for name in missing)
    return chosen


def _states(grid: Grid, status: Status) -> list[tuple[Trial, State]]:
    """Return all trials with their states. Until the selection has finished, the reported trials are new."""
    tried = _all_candidates(grid, status)
    states = [(trial, status.state(trial)) for trial, _ in tried]
    if all(state in ("finished", "failed") for _, state in states):
        chosen = chosen_settings(_choose(grid, tried, status)) if tried else None
        return states + [(trial, status.state(trial)) for trial in expand(grid, chosen)]
    assumed = chosen_settings(choose(grid, tried, {trial.name: (0.0, 0.0) for trial, _ in tried}))
    return states + [(trial, "new") for trial in expand(grid, assumed)]


def _all_candidates(grid: Grid, status: Status) -> list[Candidate]:
    """Return what a selection tries, with what it was widened by so far, its finals, and those due next."""
    tried = candidates(grid)
    while further := _due(grid, tried, status):
        tried += further
    return tried


def _due(grid: Grid, tried: Sequence[Candidate], status: Status) -> list[Candidate]:
    """Return the next candidates of the tasks and methods whose candidates have all ended."""
    if grid.select is None:
        return []
    open_pairs = {one.pair for one in tried if status.state(one.trial) not in ("finished", "failed")}
    ended = [one for one in tried if one.pair not in open_pairs]
    outcomes = _outcomes(ended, status)
    return widened(grid, ended, outcomes) or finals(grid, ended, outcomes)


def _choose(grid: Grid, tried: Sequence[Candidate], status: Status) -> dict[str, dict[str, Any]]:
    return choose(grid, tried, _outcomes(tried, status))


def _outcomes(tried: Sequence[Candidate], status: Status) -> dict[str, Outcome]:
    outcomes = {trial.name: status.outcome(trial) for trial, _ in tried}
    return {name: outcome for name, outcome in outcomes.items() if outcome is not None}


def _require_own(path: Path) -> None:
    """Raise `ConfigError` if a user's grid file is where the resolved one goes."""
    if path.exists() and not path.read_text(encoding="utf-8").startswith(_HEADER):
        remedy = f"{path.name} there is your own and would be overwritten; rename it"
        raise bad_value("output", str(path.parent), remedy)
