"""Who tries what: a search of N trials is N tickets in its study, each taken by one worker at a time.

Optuna by itself counts trials after the fact, so that N workers overshoot, and its grid sampler may give one point to
two of them. Here the N trials wait in the study from the start, and a worker takes one in a single step of the
database. Ticket i has the i-th point, whoever takes it. What waits beyond the first N is never run, so it does no harm
if two machines put tickets there at the same moment. A ticket whose worker died has a further attempt, a new Optuna
trial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ..grid.status import GridStatus, Running
from .storage import MOST_RETRIES

ERROR = "error"
"""User attribute of a trial that ran and failed: why. A trial that failed without it has lost its worker."""
MACHINE = "machine"
"""User attribute of a trial: the host that ran it last."""

_RETRIES = "retry_history"  # Optuna's, of a trial that tries again what others, by number, did not finish


@dataclass(frozen=True)
class Ticket:
    """One of the N trials of a search.

    Args:
        number: Counts from 0; decides the point, where the sampler is not adaptive.
        attempts: Its Optuna trials, in order; all but the last lost their workers.
    """

    number: int
    attempts: tuple[FrozenTrial, ...]

    @property
    def last(self) -> FrozenTrial:
        """The attempt that counts."""
        return self.attempts[-1]

    @property
    def waits(self) -> bool:
        """Whether a worker may take it."""
        return self.last.state is TrialState.WAITING

    @property
    def runs(self) -> bool:
        """Whether a worker has it."""
        return self.last.state is TrialState.RUNNING

    @property
    def complete(self) -> bool:
        """Whether it has a score."""
        return self.last.state is TrialState.COMPLETE

    @property
    def is_lost(self) -> bool:
        """Whether its worker died, and it is still to be tried again."""
        failed = self.last.state is TrialState.FAIL and ERROR not in self.last.user_attrs
        return failed and len(self.attempts) <= MOST_RETRIES

    @property
    def error(self) -> str | None:
        """Why it failed for good; None unless it did."""
        if self.last.state is not TrialState.FAIL or self.is_lost:
            return None
        error: str = self.last.user_attrs.get(ERROR, f"its worker died, {len(self.attempts)} times in a row")
        return error

    @property
    def done(self) -> bool:
        """Whether nothing more will come of it."""
        return self.complete or self.error is not None


def tickets_of(trials: Iterable[FrozenTrial], count: int) -> list[Ticket]:
    """Return the first `count` tickets among the trials of a study, fewer if there are fewer."""
    by_number = sorted(trials, key=lambda trial: trial.number)
    first = [trial for trial in by_number if not trial.system_attrs.get(_RETRIES)]
    next_of: dict[int, FrozenTrial] = {}
    for trial in by_number:
        if trial.system_attrs.get(_RETRIES):
            next_of.setdefault(trial.system_attrs[_RETRIES][-1], trial)
    return [Ticket(number, _attempts(trial, next_of)) for number, trial in enumerate(first[:count])]


def put_missing(study: Study, count: int, retry: Callable[[Study, FrozenTrial], None] | None) -> None:
    """Put into the study what it lacks: tickets up to `count`, and the next attempts of lost ones.

    Args:
        study: The study.
        count: Number of tickets there are to be.
        retry: Optuna's callback that queues a lost trial again; see `open_storage`.
    """
    tickets = tickets_of(study.get_trials(deepcopy=False), count)
    for _ in range(count - len(tickets)):
        study.enqueue_trial({})
    for ticket in tickets:
        if ticket.is_lost and retry is not None:
            retry(study, ticket.last)


def best_of(tickets: Sequence[Ticket]) -> Ticket | None:
    """Return the ticket with the highest score, of equal ones the first; None where none has a score."""
    return max((ticket for ticket in tickets if ticket.complete), key=_score, default=None)


def status_of(tickets: Sequence[Ticket], running: Sequence[Running]) -> GridStatus:
    """Return how far a search is, over all machines.

    Args:
        tickets: All its tickets.
        running: What runs here.
    """
    seconds = [ticket.last.duration.total_seconds() for ticket in tickets if ticket.complete and ticket.last.duration]
    at_work = sum(ticket.runs for ticket in tickets)
    left = sum(not ticket.done for ticket in tickets) - at_work / 2  # what runs is half-way, on the average
    return GridStatus(
        total=len(tickets),
        done=sum(ticket.complete for ticket in tickets),
        failed=sum(ticket.error is not None for ticket in tickets),
        running=tuple(running),
        seconds_left=fmean(seconds) * left / at_work if seconds and at_work else None,
    )


def _score(ticket: Ticket) -> float:
    assert ticket.last.value is not None, "a complete trial has a value"
    return ticket.last.value


def _attempts(trial: FrozenTrial, next_of: dict[int, FrozenTrial]) -> tuple[FrozenTrial, ...]:
    attempts = [trial]
    while attempts[-1].number in next_of:
        attempts.append(next_of[attempts[-1].number])
    return tuple(attempts)
