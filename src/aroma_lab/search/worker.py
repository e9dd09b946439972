"""A worker of a search: takes tickets, runs them in processes of their own, and tells the study their scores."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from optuna.trial import Trial as OptunaTrial

from ..grid.status import Ended, Silent, Watcher
from ..grid.worker import WORKER_MODULE
from .process import Busy, TicketRun
from .space import suggest
from .spec import Search
from .storage import MISSED_BEATS, STORAGE_ERRORS, lost, no_experimental_warnings
from .study import sampler_for
from .tickets import ERROR, MACHINE, Ticket, put_missing, status_of, tickets_of

_POLL_SECONDS = 0.2
_IDLE_SECONDS = 5.0
"""So long may nothing wait or run before what is missing counts as lost: whoever made the study may still be at it."""


@dataclass(frozen=True)
class Taken:
    """A ticket that runs here."""

    number: int
    attempt: OptunaTrial
    run: TicketRun


@dataclass
class SearchWorker:
    """Takes tickets until all are done, wherever they ran; so many at a time as the search has processes.

    Args:
        search: What is searched.
        study: The study, joined.
        storage: Its storage.
        watcher: Is told how it goes.
        module: What runs a trial; see `aroma_lab.grid.worker.Worker`.
    """

    search: Search
    study: Study
    storage: RDBStorage
    watcher: Watcher = field(default_factory=Silent)
    module: str = WORKER_MODULE
    _taken: list[Taken] = field(default_factory=list)
    _last_beat: float = -math.inf
    _last_contact: float = field(default_factory=time.monotonic)
    _idle_since: float | None = None

    def run(self) -> list[Ticket]:
        """Work until every ticket is done, and return them.

        When interrupted, what runs here is stopped and handed back: it waits in the study again.

        Raises:
            ConfigError: The database went away for longer than other workers wait for a sign of life.
        """
        try:
            while not self._all_done(tickets := self._turn()):
                time.sleep(_POLL_SECONDS)
        finally:
            self._hand_back()
        return tickets

    def _turn(self) -> list[Ticket]:
        """Do once what is to be done; a database that is away for a moment is asked again in the next turn."""
        try:
            self._beat()
            self._collect()
            self._take()
            tickets = self._tickets()
            self._mend(tickets)
        except STORAGE_ERRORS as error:
            if time.monotonic() - self._last_contact > MISSED_BEATS * self.search.heartbeat:
                raise lost(self.search.storage, error) from error
            return []
        self._last_contact = time.monotonic()
        self.watcher.on_status(status_of(tickets, [taken.run.progress() for taken in self._taken]))
        return tickets

    def _tickets(self) -> list[Ticket]:
        return tickets_of(self.study.get_trials(deepcopy=False), self.search.trials)

    def _all_done(self, tickets: Sequence[Ticket]) -> bool:
        return len(tickets) == self.search.trials and all(ticket.done for ticket in tickets)

    def _beat(self) -> None:
        """Give a sign of life for all that runs here, drop what was given to others, and look for dead workers."""
        if time.monotonic() - self._last_beat < self.search.heartbeat / 2:
            return
        for taken in list(self._taken):
            self.storage.record_heartbeat(taken.attempt._trial_id)
            if not self._is_ours(taken):
                self._drop(taken)
        with no_experimental_warnings():
            fail_stale_trials(self.study)
        self._last_beat = time.monotonic()

    def _is_ours(self, taken: Taken) -> bool:
        """Whether a ticket is still ours: if no sign of life came through for too long, it was given to another."""
        return self.storage.get_trial(taken.attempt._trial_id).state is TrialState.RUNNING

    def _collect(self) -> None:
        """Tell the study, and the watcher, what has ended."""
        for taken in [taken for taken in self._taken if taken.run.has_ended]:
            failure, score = taken.run.failure(), None
            if failure is None:
                score = taken.run.score()
                self.study.tell(taken.attempt, score, skip_if_finished=True)
            elif taken.run.was_killed():
                self._give_up(taken)
            else:
                self._fail(taken, failure)
            self._drop(taken)
            self.watcher.on_end(Ended(taken.run.trial.name, failure, score, taken.run.seconds))

    def _fail(self, taken: Taken, failure: str) -> None:
        if self._is_ours(taken):
            taken.attempt.set_user_attr(ERROR, failure)
            self.study.tell(taken.attempt, state=TrialState.FAIL, skip_if_finished=True)

    def _give_up(self, taken: Taken) -> None:
        """Treat a trial whose process was killed like one whose worker died: that says nothing about the trial."""
        trial_id = taken.attempt._trial_id
        if self._is_ours(taken):
            self.storage.set_trial_state_values(trial_id, TrialState.FAIL)
            retry = self.storage.heartbeat_stale_trial_callback
            assert retry is not None, "open_storage gives it"
            retry(self.study, self.storage.get_trial(trial_id))

    def _take(self) -> None:
        """Take waiting tickets while there is room."""
        room = self.search.grid.processes - len(self._taken)
        if room <= 0:
            return
        for ticket in self._tickets():
            if room and ticket.waits and self._claim(ticket.last):
                room -= self._start(ticket)

    def _claim(self, attempt: FrozenTrial) -> bool:
        """Take an attempt, in one step of the database: no other worker can, too."""
        # The first sign of life comes before, so that a worker killed right after is noticed as well.
        self.storage.record_heartbeat(attempt._trial_id)
        try:
            return self.storage.set_trial_state_values(attempt._trial_id, TrialState.RUNNING)
        except UpdateFinishedTrialError:
            return False

    def _start(self, ticket: Ticket) -> bool:
        """Run a claimed ticket; return False, and let it wait again, if its folder is still in use."""
        self.study.sampler = sampler_for(self.search, ticket.number)
        attempt = OptunaTrial(self.study, ticket.last._trial_id)
        try:
            attempt.set_user_attr(MACHINE, platform.node())
            trial = self.search.trial(ticket.number, suggest(attempt, self.search.space))
            run = TicketRun(trial, self.search.output, self.module)
        except Busy:
            self._let_wait(attempt)
            return False
        except Exception:
            self._let_wait(attempt)
            raise
        self._taken.append(Taken(ticket.number, attempt, run))
        return True

    def _mend(self, tickets: Sequence[Ticket]) -> None:
        """Put back what a kill at a bad moment left out, once nothing waits or runs for a while."""
        if self._all_done(tickets) or any(ticket.waits or ticket.runs for ticket in tickets):
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = time.monotonic()
        elif time.monotonic() - self._idle_since > _IDLE_SECONDS:
            put_missing(self.study, self.search.trials, self.storage.heartbeat_stale_trial_callback)
            self._idle_since = None

    def _let_wait(self, attempt: OptunaTrial) -> None:
        """Let a ticket wait again, its values kept, unless it is another's by now."""
        with suppress(UpdateFinishedTrialError):
            self.storage.set_trial_state_values(attempt._trial_id, TrialState.WAITING)

    def _hand_back(self) -> None:
        taken_here = list(self._taken)
        for taken in taken_here:
            taken.run.ask_to_stop()
        for taken in taken_here:
            self._drop(taken)
        with suppress(*STORAGE_ERRORS):  # without the database, missing signs of life will tell the others
            for taken in taken_here:
                self._let_wait(taken.attempt)

    def _drop(self, taken: Taken) -> None:
        taken.run.close()
        self._taken.remove(taken)
