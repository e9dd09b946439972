"""The state of every trial, from the study and the files in the output folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from aroma.errors import ConfigError
from aroma.files import read_json

from ..run.files import RUNS, TrialFiles
from ..run.trial import Trial, differing_keys, load_trial
from .grid import Grid
from .process import FolderLock, failure_message
from .selection import Outcome
from .storage import MAX_RETRIES, has_file, open_storage

State = Literal["finished", "failed", "running", "interrupted", "new", "conflict"]

Attributes = dict[str, Any]
"""User attributes with which a trial is enqueued: `NAME`, `SETTINGS`, `KEY`, and `NUMBER` in a search."""

NAME = "name"
"""User attribute: the name of the trial, which is its folder below the runs."""
SETTINGS = "settings"
"""User attribute: the whole trial as JSON, so that any machine can run it; in a search, what is searched."""
KEY = "key"
"""User attribute: digest of name and settings. Trials with equal keys are the same trial."""
NUMBER = "number"
"""User attribute: number of a search's trial."""
ROUND = "round"
"""User attribute: how often the trial had been decided when it was enqueued again, as by `--retry-failed`."""
ERROR = "error"
"""User attribute of a failed trial: why. One that failed without it lost its process or machine."""
MACHINE = "machine"
"""User attribute: the host that ran the trial last."""
LOSS = "held_out_loss"
"""User attribute of a finished trial."""

_RETRIES = "retry_history"  # Optuna's system attribute: the numbers of the attempts that this one repeats


def attributes_of(name: str, settings: Mapping[str, Any], **more: Any) -> Attributes:
    """Return the attributes with which a trial is enqueued."""
    normal = json.loads(json.dumps(settings))  # tuples become lists
    key = hashlib.sha256(json.dumps([name, normal], sort_keys=True).encode()).hexdigest()
    return {NAME: name, KEY: key, SETTINGS: normal, **more}


def of_grid(trial: Trial) -> Attributes:
    """Return the attributes with which a trial of a grid is enqueued."""
    return attributes_of(trial.name, trial.as_dict())


@dataclass(frozen=True)
class Scheduled:
    """A trial of a grid or a search as its study has it.

    Two machines may enqueue the same trial at the same moment, or both enqueue a lost one again. Then only the first
    is ever run: a trial is decided as soon as one of its attempts is.

    Args:
        attempts: Its Optuna trials of the latest round, by number; at least one.
    """

    attempts: tuple[FrozenTrial, ...]

    @cached_property
    def last(self) -> FrozenTrial:
        """The attempt that counts: one with a score, else with an error, else a running, waiting, or lost one."""

        def rank(attempt: FrozenTrial) -> int:
            if attempt.state is TrialState.FAIL:
                return 1 if ERROR in attempt.user_attrs else 4
            return {TrialState.COMPLETE: 0, TrialState.RUNNING: 2, TrialState.WAITING: 3}[attempt.state]

        best = min(map(rank, self.attempts))
        ranked = [attempt for attempt in self.attempts if rank(attempt) == best]
        return ranked[-1] if best == 4 else ranked[0]

    @property
    def attributes(self) -> Attributes:
        """Its user attributes."""
        return self.last.user_attrs

    @property
    def name(self) -> str:
        """Its name, which is its folder below the runs."""
        name: str = self.attributes[NAME]
        return name

    @property
    def waits(self) -> bool:
        """Whether a machine may take it."""
        return self.last.state is TrialState.WAITING

    @property
    def runs(self) -> bool:
        """Whether a machine has it."""
        return self.last.state is TrialState.RUNNING

    @property
    def score(self) -> float | None:
        """Its held-out score; None unless it is finished."""
        return self.last.value if self.last.state is TrialState.COMPLETE else None

    @property
    def tries(self) -> int:
        """Number of attempts."""
        return len(self.last.system_attrs.get(_RETRIES, [])) + 1

    @property
    def is_lost(self) -> bool:
        """Whether its process or machine died, and it is to be retried."""
        return self.last.state is TrialState.FAIL and ERROR not in self.attributes and self.tries <= MAX_RETRIES

    @property
    def error(self) -> str | None:
        """Why it failed for good; None unless it did."""
        if self.last.state is not TrialState.FAIL or self.is_lost:
            return None
        error: str = self.attributes.get(ERROR, f"its process or machine died, {self.tries} times in a row")
        return error

    @property
    def decided(self) -> bool:
        """Whether it has a score, or failed for good."""
        return self.score is not None or self.error is not None


def scheduled_in(study: optuna.Study) -> dict[str, Scheduled]:
    """Return the trials of a study by their keys, in the order in which they were first enqueued."""
    rounds: dict[str, dict[int, list[FrozenTrial]]] = {}
    for trial in sorted(study.get_trials(deepcopy=False), key=lambda trial: trial.number):
        if KEY in trial.user_attrs:
            by_round = rounds.setdefault(trial.user_attrs[KEY], {})
            by_round.setdefault(trial.user_attrs.get(ROUND, 0), []).append(trial)
    return {key: Scheduled(tuple(by_round[max(by_round)])) for key, by_round in rounds.items()}


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


def require_no_conflicts(trials: Iterable[Trial], runs: Path) -> None:
    """Raise if the folder of a trial holds another one's result or checkpoints.

    Raises:
        ConfigError: Naming every such folder, and the keys in which the trials differ.
    """
    conflicts = [
        f"{files.root} ({', '.join(differing_keys(load_trial(files.trial), trial))})"
        for trial, files in ((trial, TrialFiles(runs / trial.name)) for trial in trials)
        if state_by_files(trial, files.root) == "conflict"
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
        scheduled: The trials in the study, by key.
        output: The output folder.
        shared: Whether the study is in a database that several machines share.
    """

    scheduled: Mapping[str, Scheduled]
    output: Path
    shared: bool

    @classmethod
    def read(cls, grid: Grid) -> Status:
        """Return what is known without writing anything.

        Raises:
            ConfigError: A storage that cannot be reached.
        """
        nothing = cls({}, grid.folder, shared=grid.storage is not None)
        if not has_file(grid.storage, grid.folder):
            return nothing
        storage = open_storage(grid.storage, grid.folder, grid.heartbeat)
        if grid.study_name not in optuna.get_all_study_names(storage):
            return nothing
        study = optuna.load_study(study_name=grid.study_name, storage=storage)
        return cls(scheduled_in(study), nothing.output, nothing.shared)

    def folder(self, name: str) -> Path:
        """Return the folder of the trial `name`."""
        return self.output / RUNS / name

    def of(self, trial: Trial) -> Scheduled | None:
        """Return a trial as the study has it; None if it was never enqueued."""
        return self.scheduled.get(of_grid(trial)[KEY])

    def state(self, trial: Trial) -> State:
        """Return the state of a trial.

        Raises:
            CheckpointError: Its `trial.json` is damaged.
        """
        found, by_files = self.of(trial), state_by_files(trial, self.folder(trial.name))
        if by_files in ("finished", "conflict") or found is None:
            return by_files
        if found.runs:
            return "running" if self.shared or FolderLock.is_held(self.output, trial.name) else "interrupted"
        if self.shared and found.decided:
            return "failed" if found.error else "finished"
        if not found.decided and by_files == "failed":
            return "interrupted"  # it waits for its next attempt
        return by_files

    def failure(self, trial: Trial) -> tuple[str, Path | None]:
        """Return why a trial failed, and the file that tells more if it is on this machine."""
        file, found = TrialFiles(self.folder(trial.name)).failure, self.of(trial)
        if found is None or found.error is None:
            return failure_message(file.parent), file
        if not file.exists():
            return f"{found.error} (on {found.attributes.get(MACHINE)})", None
        return found.error if ERROR in found.attributes else f"{found.error}; {failure_message(file.parent)}", file

    def outcome(self, trial: Trial) -> Outcome | None:
        """Return the score and loss of a trial; None if it has none."""
        file, found = TrialFiles(self.folder(trial.name)).result, self.of(trial)
        if file.exists():
            result = read_json(file)
            return Outcome(result["score"], -result[LOSS])
        if self.shared and found is not None and found.score is not None:
            return Outcome(found.score, -found.attributes[LOSS])
        return None

    def state_by_name(self, name: str) -> State:
        """Return the state of a reported trial whose settings are not chosen yet, from its files."""
        files = TrialFiles(self.folder(name))
        if files.result.exists():
            return "finished"
        if files.failure.exists():
            return "failed"
        return "interrupted" if files.root.exists() else "new"
