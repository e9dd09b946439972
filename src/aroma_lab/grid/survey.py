"""What there is to run, and how far it is, without running anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..run.files import RUNS, TrialFiles
from ..run.trial import Trial
from .expand import check_methods, expand
from .select import Candidate, candidates, chosen_settings, selection_of
from .spec import WHOLE, Grid, Part
from .trial_files import State, state_of


def survey(grid: Grid, part: Part = WHOLE) -> list[tuple[str, State]]:
    """Return the name and the state of every trial, in the order of their run; nothing is run or written.

    While a selection is not over, what its reported trials will be is not known; their state is told by their files.

    Raises:
        ConfigError: A value that cannot work, a method's option among them.
    """
    runs = Path(grid.output) / RUNS
    part.check(grid)
    tried = [candidate for candidate in candidates(grid) if part.has(candidate.task, candidate.method)]
    reported = expand(grid, part=part)
    check_methods([*(candidate.trial for candidate in tried), *reported])
    states: list[tuple[str, State]] = [(one.trial.name, state_of(one.trial, runs / one.trial.name)) for one in tried]
    if tried and all(state in ("finished", "failed") for _, state in states):
        chosen = {trial.name: trial for trial in expand(grid, chosen_settings(selection_of(tried, runs)), part)}
        reported = [chosen.get(trial.name, trial) for trial in reported]
    elif tried:
        return states + [(trial.name, _state_by_files(runs / trial.name)) for trial in reported]
    return states + [(trial.name, state_of(trial, runs / trial.name)) for trial in reported]


def due(grid: Grid, tried: Sequence[Candidate], part: Part = WHOLE, *, retry_failed: bool = False) -> list[Trial]:
    """Return the trials that a run would begin or go on with; those that are over need none of their data.

    While a selection is not over, any of the values that it tries stand for the chosen ones.

    Args:
        grid: The grid.
        tried: The candidates of the part.
        part: Which of its trials.
        retry_failed: Count those that failed earlier.

    Raises:
        ConfigError: A value that cannot work.
    """
    runs = Path(grid.output) / RUNS
    waiting = {"new", "interrupted", *(["failed"] if retry_failed else [])}
    selecting = [one.trial for one in tried if state_of(one.trial, runs / one.trial.name) in waiting]
    if selecting:
        assumed = {task: {one.method: one.values for one in tried if one.task == task} for task in grid.tasks}
        later = expand(grid, assumed, part)
        return [*selecting, *(trial for trial in later if _state_by_files(runs / trial.name) in waiting)]
    chosen = chosen_settings(selection_of(list(tried), runs)) if tried else None
    return [trial for trial in expand(grid, chosen, part) if state_of(trial, runs / trial.name) in waiting]


def _state_by_files(folder: Path) -> State:
    if TrialFiles(folder).result.exists():
        return "finished"
    if TrialFiles(folder).failure.exists():
        return "failed"
    return "interrupted" if folder.exists() else "new"
