"""Takes waiting trials from an Optuna study, runs them in processes of their own, and tells the study their scores.

Every machine runs the same loop. The study decides who runs what: a waiting trial is taken in one atomic step, a lost
one waits again, and no trial is added that was not asked for, so there is no overshoot.
"""

from __future__ import annotations

import math
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from aroma.errors import ConfigError, bad_value
from aroma.files import read_json

from ..run.files import RUNS, TrialFiles
from ..run.trial import Trial, differing
from .grid import Grid
from .process import WORKER_MODULE, FolderLock, Running, TrialProcess
from .status import (
    ERROR,
    KEY,
    LOSS,
    MACHINE,
    NAME,
    NUMBER,
    SETTINGS,
    Attributes,
    Scheduled,
    Status,
    require_no_conflicts,
    scheduled_in,
    state_by_files,
)
from .storage import MISSED_BEATS, STORAGE_ERRORS, open_storage, retry, storage_lost

_POLL_SECONDS = 0.2
_JOURNAL_BEAT_SECONDS = 1.0


@dataclass(frozen=True)
class Progress:
    """How far a study is, over all machines.

    Args:
        total: Number of trials.
        done: Number of finished trials.
        failed: Number of failed trials.
        running: The trials that run on this machine.
        seconds_left: Estimate of the time left (ETA); None while too little is known.
    """

    total: int
    done: int
    failed: int
    running: tuple[Running, ...]
    seconds_left: float | None


class Watcher(Protocol):
    """Is told how a study goes."""

    def on_progress(self, progress: Progress) -> None:
        """Called a few times a second."""

    def on_end(self, name: str, failure: str | None, score: float | None, seconds: float) -> None:
        """Called when a trial has ended on this machine, with why it failed, or with its held-out score."""


def trial_of_grid(study: optuna.Study, attempt: FrozenTrial) -> Trial:
    """Return the trial of a grid, which the study holds complete.

    Raises:
        ConfigError: It is a search's.
    """
    if NUMBER in attempt.user_attrs:
        raise bad_value("study", study.study_name, "it is a search's; give the search file")
    return Trial.from_dict(attempt.user_attrs[SETTINGS])


@dataclass(frozen=True)
class _Taken:
    """A trial that this machine has; without a process if it has a result already."""

    trial: Trial
    attempt_id: int
    lock: FolderLock
    process: TrialProcess | None


class Engine:
    """Runs trials of a study on this machine; a context manager, which closes the storage.

    Args:
        grid: Gives the output folder, the study, its storage, and the number of trials at a time.
        make_trial: Makes the trial of an attempt that this machine has taken; a search samples it.
        watcher: Is told how it goes.
        module: What runs a trial; see `TrialProcess`. Tests pass a stand-in.

    Raises:
        ConfigError: A storage that cannot be opened.
    """

    def __init__(
        self,
        grid: Grid,
        make_trial: Callable[[optuna.Study, FrozenTrial], Trial] = trial_of_grid,
        watcher: Watcher | None = None,
        module: str = WORKER_MODULE,
    ) -> None:
        self._grid, self._make_trial, self._watcher, self._module = grid, make_trial, watcher, module
        self.storage = open_storage(grid.storage, grid.folder, grid.heartbeat)
        self.study = optuna.create_study(
            study_name=grid.study_name, storage=self.storage, direction="maximize", load_if_exists=True
        )
        self._taken: list[_Taken] = []
        self._last_beat, self._last_contact = -math.inf, time.monotonic()
        self._ended = 0
        self._eta = _Eta()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(self.storage, RDBStorage):
            self.storage.engine.dispose()
        if isinstance(error, STORAGE_ERRORS):
            raise storage_lost(self._grid.storage, error) from error

    def status(self) -> Status:
        """Return what is known of the trials."""
        return Status(scheduled_in(self.study), self._grid.folder, shared=self._grid.storage is not None)

    def require_no_conflicts(self, wanted: Sequence[Attributes]) -> None:
        """Refuse trials that run now, or were finished on any machine, with other settings.

        Raises:
            ConfigError: Naming the first, and the keys in which it differs.
        """
        settings = {attributes[NAME]: attributes for attributes in wanted}
        shared = self._grid.storage is not None
        for key, one in scheduled_in(self.study).items():
            ours = settings.get(one.name)
            if ours is None or ours[KEY] == key:
                continue
            keys = ", ".join(differing(ours[SETTINGS], one.attributes[SETTINGS]))
            if one.runs and (shared or FolderLock.is_held(self._grid.folder, one.name)):
                raise ConfigError(f"study={self.study.study_name!r}: {one.name} runs now with another {keys}; wait")
            if one.score is not None and shared:
                remedy = "use the same file on all machines, or give another study"
                raise bad_value("study", self.study.study_name, f"{one.name} was run with another {keys}; {remedy}")

    def run(self, wanted: Sequence[Attributes], *, later: int = 0, done: int = 0, failed: int = 0) -> list[Scheduled]:
        """Enqueue trials that the study lacks, and run trials until all are decided, here or on other machines.

        When interrupted, the trials that run here are stopped and wait in the study again.

        Args:
            wanted: The trials, in the order in which they are to be run.
            later: Number of trials that will be run afterwards, for the watcher.
            done: Number of trials that had finished before, likewise.
            failed: Number of trials that had failed before, likewise.

        Returns:
            The trials as the study has them, in the order given.

        Raises:
            ConfigError: The database was away for longer than others wait for a sign of life, or a folder holds
                another trial.
        """
        by_key = {attributes[KEY]: attributes for attributes in wanted}
        self._retire_others(wanted)
        scheduled: list[Scheduled] = []
        try:
            while len(scheduled) < len(by_key) or not all(one.decided for one in scheduled):
                if scheduled:
                    time.sleep(_POLL_SECONDS)
                scheduled = self._turn(by_key)
                self._report(scheduled, len(by_key) + later, done, failed)
        finally:
            self._hand_back()
        return scheduled

    def serve(self, idle_seconds: float) -> int:
        """Run whatever waits in the study, until nothing has waited or run for so long; return how many trials ended.

        Raises:
            ConfigError: See `run`.
        """
        last_busy = time.monotonic()
        try:
            while time.monotonic() - last_busy <= idle_seconds:
                scheduled = self._turn(None)
                self._report(scheduled, len(scheduled))
                if self._taken or not all(one.decided for one in scheduled):
                    last_busy = time.monotonic()
                time.sleep(_POLL_SECONDS)
        finally:
            self._hand_back()
        return self._ended

    def _retire_others(self, wanted: Sequence[Attributes]) -> None:
        """Fail what was enqueued with other settings, and has not run, so that no worker takes it."""
        keys = {attributes[NAME]: attributes[KEY] for attributes in wanted}
        for key, one in scheduled_in(self.study).items():
            if keys.get(one.name, key) != key and not one.decided and not one.is_lost:
                with suppress(UpdateFinishedTrialError):
                    self.storage.set_trial_user_attr(one.last._trial_id, ERROR, "replaced by other settings")
                    self.storage.set_trial_state_values(one.last._trial_id, TrialState.FAIL)

    def _turn(self, wanted: Mapping[str, Attributes] | None) -> list[Scheduled]:
        """Run one scheduling iteration; a database that is away for a moment is asked again in the next one."""
        try:
            self._beat()
            self._collect()
            scheduled = self._enqueue(wanted)
            if self._take(scheduled):
                scheduled = self._scheduled(wanted)
        except STORAGE_ERRORS as error:
            if time.monotonic() - self._last_contact > MISSED_BEATS * self._grid.heartbeat:
                raise storage_lost(self._grid.storage, error) from error
            time.sleep(_POLL_SECONDS)
            return []
        self._last_contact = time.monotonic()
        return scheduled

    def _scheduled(self, wanted: Mapping[str, Attributes] | None) -> list[Scheduled]:
        found = scheduled_in(self.study)
        return list(found.values()) if wanted is None else [found[key] for key in wanted if key in found]

    def _enqueue(self, wanted: Mapping[str, Attributes] | None) -> list[Scheduled]:
        """Enqueue what the study lacks, and again what lost its process or machine; return what it then has."""
        scheduled = self._scheduled(wanted)
        there = {one.attributes[KEY] for one in scheduled}
        missing = [attributes for key, attributes in (wanted or {}).items() if key not in there]
        lost = [one.last for one in scheduled if one.is_lost]
        for attributes in missing:
            self.study.enqueue_trial({}, user_attrs=attributes)
        for attempt in lost:
            retry(self.study, attempt)
        return self._scheduled(wanted) if missing or lost else scheduled

    def _take(self, scheduled: Sequence[Scheduled]) -> bool:
        """Take waiting trials while there is room; return whether any was taken."""
        before = len(self._taken)
        for one in scheduled:
            if len(self._taken) >= self._grid.processes:
                break
            # The lock comes before the study, so that a trial of a journal that runs without one has lost its machine.
            lock = FolderLock.take(self._grid.folder, one.name) if one.waits else None
            if lock is not None and not self._claim(one.last):
                lock.release()
            elif lock is not None:
                self._start(one.last, lock)
        return len(self._taken) > before

    def _claim(self, attempt: FrozenTrial) -> bool:
        """Take an attempt in one atomic step: no other machine can take it, too."""
        if isinstance(self.storage, RDBStorage):
            # The first sign of life comes before, so that a machine that is killed right after is noticed as well.
            self.storage.record_heartbeat(attempt._trial_id)
        try:
            return self.storage.set_trial_state_values(attempt._trial_id, TrialState.RUNNING)
        except UpdateFinishedTrialError:
            return False

    def _start(self, attempt: FrozenTrial, lock: FolderLock) -> None:
        runs = self._grid.folder / RUNS
        try:
            self.storage.set_trial_user_attr(attempt._trial_id, MACHINE, platform.node())
            trial = self._make_trial(self.study, attempt)
            folder = runs / trial.name
            require_no_conflicts([trial], runs)
            state = state_by_files(trial, folder)
            if state == "new" and TrialFiles(folder).trial.exists():
                shutil.rmtree(folder)  # another trial's, without a result or a checkpoint
            # A machine may have been killed between the end of its trial and its message to the study.
            process = None if state == "finished" else TrialProcess(trial, folder, lock, self._module)
        except BaseException:
            self._let_wait(attempt._trial_id)
            lock.release()
            raise
        self._taken.append(_Taken(trial, attempt._trial_id, lock, process))

    def _beat(self) -> None:
        """Give a sign of life, drop what was given to others, and look for trials that lost their machine."""
        interval = self._grid.heartbeat / 2 if isinstance(self.storage, RDBStorage) else _JOURNAL_BEAT_SECONDS
        if time.monotonic() - self._last_beat < interval:
            return
        if isinstance(self.storage, RDBStorage):
            for taken in list(self._taken):
                self.storage.record_heartbeat(taken.attempt_id)
                if self.storage.get_trial(taken.attempt_id).state is not TrialState.RUNNING:
                    self._drop(taken)
            fail_stale_trials(self.study)
        else:
            self._free_orphans()
        self._last_beat = time.monotonic()

    def _free_orphans(self) -> None:
        """Let trials of a journal wait again whose command was killed: they are running, but nobody has their lock."""
        here = {taken.attempt_id for taken in self._taken}
        for attempt in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            lock = None
            if attempt._trial_id not in here and NAME in attempt.user_attrs:
                lock = FolderLock.take(self._grid.folder, attempt.user_attrs[NAME])
            if lock is not None:
                if self.storage.get_trial(attempt._trial_id).state is TrialState.RUNNING:
                    self._let_wait(attempt._trial_id)
                lock.release()

    def _collect(self) -> None:
        """Tell the study and the watcher which trials have ended."""
        for taken in list(self._taken):
            if taken.process is not None and not taken.process.has_ended():
                continue
            failure = None if taken.process is None else taken.process.failure()
            # An attempt that is over was given to another machine, because ours was held up for too long.
            with suppress(UpdateFinishedTrialError):
                score = self._tell(taken, failure)
                self._ended += 1
                if self._watcher is not None and taken.process is not None:
                    self._watcher.on_end(taken.trial.name, failure, score, taken.process.seconds)
            self._drop(taken)

    def _tell(self, taken: _Taken, failure: str | None) -> float | None:
        """Tell the study the score, or the error unless the process was killed: then the trial is tried again."""
        if failure is None:
            result = read_json(TrialFiles(self._grid.folder / RUNS / taken.trial.name).result)
            self.storage.set_trial_user_attr(taken.attempt_id, LOSS, result[LOSS])
            self.storage.set_trial_state_values(taken.attempt_id, TrialState.COMPLETE, [result["score"]])
            return float(result["score"])
        if taken.process is not None and not taken.process.was_killed():
            self.storage.set_trial_user_attr(taken.attempt_id, ERROR, failure)
        self.storage.set_trial_state_values(taken.attempt_id, TrialState.FAIL)
        return None

    def _report(self, scheduled: Sequence[Scheduled], total: int, done: int = 0, failed: int = 0) -> None:
        if self._watcher is None or not scheduled:
            return
        running = tuple(taken.process.progress() for taken in self._taken if taken.process is not None)
        done += sum(one.score is not None for one in scheduled)
        failed += sum(one.error is not None for one in scheduled)
        total += done + failed - sum(one.decided for one in scheduled)
        shares = sum(one.step / one.planned for one in running if one.planned)
        left = self._eta.seconds_left(done + failed + shares, total)
        self._watcher.on_progress(Progress(total, done, failed, running, left))

    def _let_wait(self, attempt_id: int) -> None:
        """Let an attempt wait again, its values kept, unless it is another machine's by now."""
        with suppress(UpdateFinishedTrialError):
            self.storage.set_trial_state_values(attempt_id, TrialState.WAITING)

    def _hand_back(self) -> None:
        taken_here = list(self._taken)
        for taken in taken_here:
            if taken.process is not None:
                taken.process.ask_to_stop()
        for taken in taken_here:
            if taken.process is not None:
                taken.process.stop()
            with suppress(*STORAGE_ERRORS):  # without the database, missing signs of life will tell the others
                self._let_wait(taken.attempt_id)
            self._drop(taken)

    def _drop(self, taken: _Taken) -> None:
        if taken.process is not None:
            taken.process.stop()
        taken.lock.release()
        self._taken.remove(taken)


class _Eta:
    """Estimates the time left from the trials done so far, running ones in part. All count as equally long."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._first: float | None = None

    def seconds_left(self, done: float, total: int) -> float | None:
        """Return the estimate for so many of all trials done; None while too little is known."""
        if self._first is None:
            self._first = done
        new = done - self._first
        return (time.monotonic() - self._began) * (total - done) / new if new > 0 else None
