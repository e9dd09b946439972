"""The state of every trial, from the study and the files in the output folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from aroma.errors import ConfigError, bad_value
from aroma.files import read_json

from ..run.files import RUNS, TrialFiles
from ..run.trial import Trial, differing, differing_keys, load_trial
from .grid import KEY, NAME, NUMBER, SETTINGS, Grid, attributes_of
from .process import failure_message, is_locked
from .storage import MAX_RETRIES, has_file, open_storage

State = Literal["finished", "failed", "running", "interrupted", "new", "conflict"]

# User attributes of a trial in its study, beside those of grid.py.
ROUND = "round"
"""How often the trial had been decided when it was enqueued again, as by `--retry-failed`."""
ERROR = "error"
"""Why a failed trial failed. One that failed without it lost its process or machine."""
REPLACED = "replaced by other settings"
"""The error of an attempt that was withdrawn before it ran."""
MACHINE = "machine"
"""The host that ran the trial last."""
LOSS = "held_out_loss"
"""Of a finished trial."""

_RETRIES = "retry_history"  # Optuna's system attribute: the numbers of the attempts that this one repeats


@dataclass(frozen=True)
class Scheduled:
    """A trial of a grid or a search as its study has it.

    Args:
        attempt: The attempt that counts.
    """

    attempt: FrozenTrial

    @property
    def attributes(self) -> dict[str, Any]:
        """Its user attributes."""
        return self.attempt.user_attrs

    @property
    def name(self) -> str:
        """Its name, which is its folder below the runs."""
        return str(self.attributes[NAME])

    @property
    def score(self) -> float | None:
        """Its held-out score; None unless it is finished."""
        return self.attempt.value if self.attempt.state is TrialState.COMPLETE else None

    @property
    def tries(self) -> int:
        """Number of attempts."""
        return len(self.attempt.system_attrs.get(_RETRIES, [])) + 1

    @property
    def is_lost(self) -> bool:
        """Whether its process or machine died, and it is to be retried."""
        return self.attempt.state is TrialState.FAIL and ERROR not in self.attributes and self.tries <= MAX_RETRIES

    @property
    def error(self) -> str | None:
        """Why it failed for good; None unless it did."""
        if self.attempt.state is not TrialState.FAIL or self.is_lost:
            return None
        return str(self.attributes.get(ERROR, f"its process or machine died, {self.tries} times in a row"))

    @property
    def decided(self) -> bool:
        """Whether it has a score, or failed for good."""
        return self.score is not None or self.error is not None


def scheduled_in(study: optuna.Study) -> dict[str, Scheduled]:
    """Return the trials of a study by their keys, in the order in which they were first enqueued.

    Two machines may enqueue the same trial at the same moment, or both enqueue a lost one again. Then only the first
    is ever run: a trial is decided as soon as one of its attempts is. Of the attempts of the latest round, one with a
    score counts, else one with an error, else a running, a waiting, or the last lost one.
    """

    def rank(attempt: FrozenTrial) -> tuple[int, int, int]:
        lost = attempt.state is TrialState.FAIL and ERROR not in attempt.user_attrs
        order = [TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING]
        place = len(order) if lost else order.index(attempt.state)
        return -attempt.user_attrs.get(ROUND, 0), place, -attempt.number if lost else attempt.number

    attempts: dict[str, list[FrozenTrial]] = {}
    for attempt in sorted(study.get_trials(deepcopy=False), key=lambda attempt: attempt.number):
        if KEY in attempt.user_attrs and attempt.user_attrs.get(ERROR) != REPLACED:
            attempts.setdefault(attempt.user_attrs[KEY], []).append(attempt)
    return {key: Scheduled(min(several, key=rank)) for key, several in attempts.items()}


def state_by_files(trial: Trial, folder: Path) -> State:
    """Return what the files in a trial's folder say of it.

    `"conflict"`: another trial, with a result or checkpoints that would be lost, is in the folder. Another one without
    them is worthless, and the trial counts as new.

    Raises:
        CheckpointError: `trial.json` is damaged.
    """
    files = TrialFiles(folder)
    if not files.trial.exists():
        return "new"
    finished, failed = files.result.exists(), files.failure.exists()
    if differing_keys(load_trial(files.trial), trial):
        has_checkpoint = files.checkpoints.is_dir() and any(files.checkpoints.iterdir())
        return "conflict" if finished or (has_checkpoint and not failed) else "new"
    return "finished" if finished else "failed" if failed else "interrupted"


def require_no_conflicts(trials: Iterable[Trial], output: Path) -> None:
    """Raise `ConfigError` if the folders of trials hold results or checkpoints of others, naming what differs."""
    conflicts = [
        f"{folder} ({', '.join(differing_keys(load_trial(TrialFiles(folder).trial), trial))})"
        for trial, folder in ((trial, output / RUNS / trial.name) for trial in trials)
        if state_by_files(trial, folder) == "conflict"
    ]
    if conflicts:
        raise ConfigError(
            f"output: {len(conflicts)} of its runs were made by another grid, and nothing is overwritten. Give "
            f"another output, undo the change, or move these away (differing keys in brackets): {'; '.join(conflicts)}"
        )


@dataclass(frozen=True)
class Status:
    """What is known of the trials of a grid.

    The files decide about trials that ran into this output folder, so that a folder can be removed to run its trial
    again. A database also knows of trials that ran on other machines.

    Args:
        scheduled: The trials in its study, by key.
    """

    grid: Grid
    scheduled: Mapping[str, Scheduled]

    @classmethod
    def read(cls, grid: Grid) -> Status:
        """Return what is known without writing anything."""
        if not has_file(grid.storage, grid.folder):
            return cls(grid, {})
        storage = open_storage(grid.storage, grid.folder, grid.heartbeat)
        if grid.study_name not in optuna.get_all_study_names(storage):
            return cls(grid, {})
        return cls(grid, scheduled_in(optuna.load_study(study_name=grid.study_name, storage=storage)))

    @property
    def shared(self) -> bool:
        """Whether the study is in a database, which several machines may share."""
        return self.grid.storage is not None

    def files(self, trial: Trial) -> TrialFiles:
        """Return the names of the files of a trial."""
        return TrialFiles(self.grid.folder / RUNS / trial.name)

    def of(self, trial: Trial) -> Scheduled | None:
        """Return a trial as the study has it; None if it was never enqueued."""
        return self.scheduled.get(attributes_of(trial.name, trial.as_dict())[KEY])

    def state(self, trial: Trial) -> State:
        """Return the state of a trial."""
        found, by_files = self.of(trial), state_by_files(trial, self.files(trial).root)
        if by_files in ("finished", "conflict") or found is None:
            return by_files
        if found.attempt.state is TrialState.RUNNING:
            return "running" if self.is_running(found) else "interrupted"
        if self.shared and found.decided:
            return "failed" if found.error else "finished"
        if by_files == "failed" and not found.decided:
            return "interrupted"  # it waits for its next attempt
        return by_files

    def is_running(self, one: Scheduled) -> bool:
        """Whether a machine runs a trial: in a database it is lost without signs of life, in a journal its lock is."""
        is_taken = one.attempt.state is TrialState.RUNNING
        return is_taken and (self.shared or is_locked(self.grid.folder, one.name))

    def failure(self, trial: Trial) -> tuple[str, Path | None]:
        """Return why a trial failed, and the file that tells more if it is on this machine."""
        file, found = self.files(trial).failure, self.of(trial)
        if found is not None and not file.exists():
            return f"{found.error} (on {found.attributes.get(MACHINE)})", None
        return failure_message(file.parent), file

    def outcome(self, trial: Trial) -> tuple[float, float] | None:
        """Return the score of a trial, and its loss; None if it has none."""
        file, found = self.files(trial).result, self.of(trial)
        if file.exists():
            result = read_json(file)
            return result["score"], result[LOSS]
        if self.shared and found is not None and found.score is not None:
            return found.score, found.attributes[LOSS]
        return None

    def require_same_settings(self, wanted: Iterable[Mapping[str, Any]]) -> None:
        """Raise `ConfigError` for trials that run now, or were finished on any machine, with other settings."""
        settings = {attributes[NAME]: attributes for attributes in wanted}
        for key, one in self.scheduled.items():
            ours = settings.get(one.name)
            if ours is None or ours[KEY] == key:
                continue
            keys = ", ".join(differing(ours[SETTINGS], one.attributes[SETTINGS]))
            if self.is_running(one):
                raise bad_value("study", self.grid.study_name, f"{one.name} runs now with another {keys}; wait")
            if one.score is not None and (self.shared or NUMBER in one.attributes):
                remedy = "use the same file on all machines, or give another study"
                raise bad_value("study", self.grid.study_name, f"{one.name} was run with another {keys}; {remedy}")
