"""Takes waiting trials from an Optuna study, runs them in processes of their own, and tells the study their scores.

Every machine runs the same loop. The study decides who runs what: a waiting trial is taken in one atomic step, a lost
one waits again, and no trial is added that was not asked for, so there is no overshoot.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from aroma.files import read_json

from ..run.files import RUNS, TrialFiles
from ..run.trial import Trial
from .grid import KEY, NAME, Grid
from .nursery import Nursery, can_fork
from .process import WORKER_MODULE, Running, TrialProcess, take_lock
from .status import (
    ERROR,
    LOSS,
    MACHINE,
    REPLACED,
    Scheduled,
    Status,
    require_no_conflicts,
    scheduled_in,
    state_by_files,
)
from .storage import MAX_RETRIES, MISSED_BEATS, STORAGE_ERRORS, open_storage, storage_error

_POLL_SECONDS = 0.2
_JOURNAL_BEAT_SECONDS = 1.0


class Ended(NamedTuple):
    """A trial that has ended on this machine, with why it failed, or with its held-out score."""

    name: str
    failure: str | None
    score: float | None
    seconds: float


class Progress(NamedTuple):
    """How far a study is: numbers of trials over all machines, and what this one has run since the last call."""

    total: int
    done: int
    failed: int
    running: list[Running]
    ended: list[Ended]


Watch = Callable[[Progress], None]
"""Is told a few times a second how a study goes."""


class Engine:
    """Runs trials of a study on this machine; a context manager, which closes the storage.

    Args:
        grid: The grid, or the search.
        watch: Is told how it goes.
        module: What runs a trial; see `TrialProcess`. Tests pass a stand-in.

    Raises:
        ConfigError: A storage that cannot be opened, or went away.
    """

    def __init__(self, grid: Grid, watch: Watch | None = None, module: str = WORKER_MODULE) -> None:
        self._grid, self._watch, self._module = grid, watch, module
        self.storage = open_storage(grid.storage, grid.folder, grid.heartbeat)
        try:
            self.study = optuna.create_study(
                study_name=grid.study_name, storage=self.storage, direction="maximize", load_if_exists=True
            )
        except STORAGE_ERRORS as error:
            raise storage_error(grid.storage, error) from error
        self._nursery: Nursery | None = None
        self._running: list[TrialProcess] = []
        self._ended: list[Ended] = []
        self._last_beat, self._last_contact = -math.inf, time.monotonic()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._nursery is not None:
            self._nursery.close()
        if isinstance(self.storage, RDBStorage):
            self.storage.engine.dispose()
        if isinstance(error, STORAGE_ERRORS):
            raise storage_error(self._grid.storage, error) from error

    def status(self) -> Status:
        """Return what is known of the trials."""
        return Status(self._grid, scheduled_in(self.study))

    def run(self, wanted: Sequence[Mapping[str, Any]]) -> list[Scheduled]:
        """Enqueue trials that the study lacks, and run trials until all are decided, here or on other machines.

        When interrupted, the trials that run here are stopped and wait in the study again.

        Args:
            wanted: Attributes of the trials, in the order in which they are to be run.

        Returns:
            The trials as the study has them, in the order given.

        Raises:
            ConfigError: A folder holds another trial.
        """
        by_key = {attributes[KEY]: attributes for attributes in wanted}
        self._retire_others(wanted)
        scheduled: list[Scheduled] = []
        try:
            while len(scheduled) < len(by_key) or not all(one.decided for one in scheduled):
                if scheduled:
                    time.sleep(_POLL_SECONDS)
                scheduled = self._turn(by_key)
                self._report(scheduled, len(by_key))
        finally:
            self._hand_back()
        return scheduled

    def serve(self, idle_seconds: float) -> int:
        """Run whatever waits in the study, until nothing has waited or run for so long; return how many have ended."""
        last_busy, count = time.monotonic(), 0
        try:
            while time.monotonic() - last_busy <= idle_seconds:
                scheduled = self._turn(None)
                count += self._report(scheduled, len(scheduled))
                if self._running or not all(one.decided for one in scheduled):
                    last_busy = time.monotonic()
                time.sleep(_POLL_SECONDS)
        finally:
            self._hand_back()
        return count

    def _retire_others(self, wanted: Sequence[Mapping[str, Any]]) -> None:
        """Fail what was enqueued with other settings, and has not run, so that no worker takes it.

        It counts as never enqueued, so that it comes back with its settings.
        """
        keys = {attributes[NAME]: attributes[KEY] for attributes in wanted}
        for key, one in scheduled_in(self.study).items():
            if keys.get(one.name, key) != key and not one.decided and not one.is_lost:
                with suppress(UpdateFinishedTrialError):
                    self.storage.set_trial_user_attr(one.attempt._trial_id, ERROR, REPLACED)
                    self.storage.set_trial_state_values(one.attempt._trial_id, TrialState.FAIL)

    def _turn(self, wanted: Mapping[str, Mapping[str, Any]] | None) -> list[Scheduled]:
        """Run one scheduling iteration; a database that is away for a moment is asked again in the next one."""
        try:
            self._beat()
            self._collect()
            scheduled = self._enqueue(wanted)
            if self._take(scheduled):
                scheduled = self._scheduled(wanted)
        except STORAGE_ERRORS:
            if time.monotonic() - self._last_contact > MISSED_BEATS * self._grid.heartbeat:
                raise
            time.sleep(_POLL_SECONDS)
            return []
        self._last_contact = time.monotonic()
        return scheduled

    def _scheduled(self, wanted: Mapping[str, Any] | None) -> list[Scheduled]:
        found = scheduled_in(self.study)
        return list(found.values()) if wanted is None else [found[key] for key in wanted if key in found]

    def _enqueue(self, wanted: Mapping[str, Mapping[str, Any]] | None) -> list[Scheduled]:
        """Enqueue what the study lacks, and again what lost its process or machine; return what it then has."""
        scheduled = self._scheduled(wanted)
        there = {one.attributes[KEY] for one in scheduled}
        missing = [attributes for key, attributes in (wanted or {}).items() if key not in there]
        lost = [one.attempt for one in scheduled if one.is_lost]
        for attributes in missing:
            self.study.enqueue_trial({}, user_attrs=dict(attributes))
        for attempt in lost:
            RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES)(self.study, attempt)
        return self._scheduled(wanted) if missing or lost else scheduled

    def _take(self, scheduled: Sequence[Scheduled]) -> bool:
        """Take waiting trials while there is room; return whether any was taken."""
        took = False
        for one in scheduled:
            if len(self._running) >= self._grid.processes:
                break
            # The lock comes before the study, so that a trial of a journal that runs without one has lost its machine.
            waits = one.attempt.state is TrialState.WAITING
            lock = take_lock(self._grid.folder, one.name) if waits else None
            if lock is None:
                continue
            try:
                claimed = self._claim(one.attempt)
            except BaseException:  # a database that is away must not leave this command locked out by itself
                os.close(lock)
                raise
            if claimed:
                self._start(one.attempt, lock)
                took = True
            else:
                os.close(lock)
        return took

    def _claim(self, attempt: FrozenTrial) -> bool:
        """Take an attempt in one atomic step: no other machine can take it, too."""
        if isinstance(self.storage, RDBStorage):
            # The first sign of life comes before, so that a machine that is killed right after is noticed as well.
            self.storage.record_heartbeat(attempt._trial_id)
        try:
            return self.storage.set_trial_state_values(attempt._trial_id, TrialState.RUNNING)
        except UpdateFinishedTrialError:
            return False

    def _start(self, attempt: FrozenTrial, lock: int) -> None:
        try:
            self.storage.set_trial_user_attr(attempt._trial_id, MACHINE, platform.node())
            trial = self._grid.trial_of(self.study, attempt)
            require_no_conflicts([trial], self._grid.folder)
            folder = self._grid.folder / RUNS / trial.name
            state = state_by_files(trial, folder)
            if state == "finished":  # a machine was killed between the end of its trial and its message to the study
                self._tell_score(trial, attempt._trial_id)
                os.close(lock)
                return
            if state == "new" and TrialFiles(folder).trial.exists():
                shutil.rmtree(folder)  # another trial's, without a result or a checkpoint
            nursery = self._nursery_of_trials()
            self._running.append(
                TrialProcess(trial, attempt._trial_id, self._grid.folder, lock, self._module, nursery)
            )
        except BaseException:
            try:
                self._let_wait(attempt._trial_id)
            finally:
                os.close(lock)
            raise

    def _nursery_of_trials(self) -> Nursery | None:
        """Return what forks trials; None where each imports for itself, as a stand-in does, which imports little."""
        if self._module != WORKER_MODULE or not can_fork():
            return None
        if self._nursery is not None and not self._nursery.is_alive:  # as where memory ran out
            self._nursery.close()
            self._nursery = None
        if self._nursery is None:
            self._nursery = Nursery()
        return self._nursery

    def _beat(self) -> None:
        """Give a sign of life, drop what was given to others, and look for trials that lost their machine."""
        interval = self._grid.heartbeat / 2 if isinstance(self.storage, RDBStorage) else _JOURNAL_BEAT_SECONDS
        if time.monotonic() - self._last_beat < interval:
            return
        if isinstance(self.storage, RDBStorage):
            for process in list(self._running):
                self.storage.record_heartbeat(process.attempt)
                if self.storage.get_trial(process.attempt).state is not TrialState.RUNNING:
                    self._drop(process)
            fail_stale_trials(self.study)
        else:
            self._free_orphans()
        self._last_beat = time.monotonic()

    def _free_orphans(self) -> None:
        """Let trials of a journal wait again whose command was killed: they are running, but nobody has their lock."""
        here = {process.attempt for process in self._running}
        for attempt in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            lock = None
            if attempt._trial_id not in here and NAME in attempt.user_attrs:
                lock = take_lock(self._grid.folder, attempt.user_attrs[NAME])
            if lock is not None:
                if self.storage.get_trial(attempt._trial_id).state is TrialState.RUNNING:
                    self._let_wait(attempt._trial_id)
                os.close(lock)

    def _collect(self) -> None:
        """Tell the study which trials have ended; one whose process was killed is tried again."""
        for process in [process for process in self._running if process.has_ended()]:
            failure, score = process.failure(), None
            # An attempt that is over was given to another machine, because ours was held up for too long.
            with suppress(UpdateFinishedTrialError):
                if failure is None:
                    score = self._tell_score(process.trial, process.attempt)
                else:
                    if not process.was_killed():
                        self.storage.set_trial_user_attr(process.attempt, ERROR, failure)
                    self.storage.set_trial_state_values(process.attempt, TrialState.FAIL)
                self._ended.append(Ended(process.trial.name, failure, score, process.seconds))
            self._drop(process)

    def _tell_score(self, trial: Trial, attempt: int) -> float:
        result = read_json(TrialFiles(self._grid.folder / RUNS / trial.name).result)
        self.storage.set_trial_user_attr(attempt, LOSS, result[LOSS])
        self.storage.set_trial_state_values(attempt, TrialState.COMPLETE, [result["score"]])
        return float(result["score"])

    def _report(self, scheduled: Sequence[Scheduled], total: int) -> int:
        """Tell the watcher how it goes; return how many trials have ended here since the last call."""
        ended, self._ended = self._ended, []
        if self._watch is not None and scheduled:
            running = [process.progress() for process in self._running]
            done = sum(one.score is not None for one in scheduled)
            failed = sum(one.error is not None for one in scheduled)
            self._watch(Progress(total, done, failed, running, ended))
        return len(ended)

    def _let_wait(self, attempt: int) -> None:
        """Let an attempt wait again, its values kept, unless it is another machine's by now."""
        with suppress(UpdateFinishedTrialError):
            self.storage.set_trial_state_values(attempt, TrialState.WAITING)

    def _hand_back(self) -> None:
        for process in self._running:
            process.ask_to_stop()
        for process in list(self._running):
            process.stop()
            with suppress(*STORAGE_ERRORS):  # without the database, missing signs of life will tell the others
                self._let_wait(process.attempt)
            self._drop(process)

    def _drop(self, process: TrialProcess) -> None:
        """End a process and give its folder back."""
        process.stop()
        os.close(process.lock)
        self._running.remove(process)
