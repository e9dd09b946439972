"""What there is to run, and how far it is, without running anything."""

from __future__ import annotations

from pathlib import Path

from ..trials.files import RUNS, TrialFiles
from .expand import expand
from .select import candidates, chosen_settings, selection_of
from .spec import WHOLE, Grid, Part
from .trial_files import State, state_of


def survey(grid: Grid, part: Part = WHOLE) -> list[tuple[str, State]]:
    """Return the name and the state of every trial, in the order of their run; nothing is run or written.

    While a selection is not over, what its reported trials will be is not known; their state is told by their files.

    Raises:
        ConfigError: A value that cannot work.
    """
    runs = Path(grid.output) / RUNS
    part.check(grid)
    tried = [candidate for candidate in candidates(grid) if part.has(candidate.task, candidate.method)]
    states: list[tuple[str, State]] = [(one.trial.name, state_of(one.trial, runs / one.trial.name)) for one in tried]
    reported = expand(grid, part=part)
    if tried and all(state in ("finished", "failed") for _, state in states):
        chosen = {trial.name: trial for trial in expand(grid, chosen_settings(selection_of(tried, runs)), part)}
        reported = [chosen.get(trial.name, trial) for trial in reported]
    elif tried:
        return states + [(trial.name, _state_by_files(runs / trial.name)) for trial in reported]
    return states + [(trial.name, state_of(trial, runs / trial.name)) for trial in reported]


def _state_by_files(folder: Path) -> State:
    if TrialFiles(folder).result.exists():
        return "finished"
    if TrialFiles(folder).failure.exists():
        return "failed"
    return "interrupted" if folder.exists() else "new"
