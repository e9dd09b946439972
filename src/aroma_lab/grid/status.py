"""How far a grid is, and how long the rest will take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from ..run.trial import Trial


@dataclass(frozen=True)
class Running:
    """A trial that is being run.

    Args:
        trial: The trial.
        step: Optimizer steps taken, as the worker last wrote.
        planned: Optimizer steps of the run; None until the worker has written.
        seconds_per_step: Pace of this attempt; None until two steps are known.
    """

    trial: Trial
    step: int
    planned: int | None
    seconds_per_step: float | None


@dataclass(frozen=True)
class GridStatus:
    """How far a grid is.

    Args:
        total: Number of trials, those of a selection included.
        done: Number of finished trials.
        failed: Number of failed trials.
        running: What is being run.
        seconds_left: Estimate of the time left; None while too little is known.
    """

    total: int
    done: int
    failed: int
    running: tuple[Running, ...]
    seconds_left: float | None


@dataclass(frozen=True)
class Ended:
    """A trial that has just ended.

    Args:
        name: Its name.
        failure: What it failed of; None if it finished.
        score: Its score; None if it failed.
        seconds: Seconds of this attempt.
    """

    name: str
    failure: str | None
    score: float | None
    seconds: float


class Watcher(Protocol):
    """Who is told how a grid goes."""

    def on_status(self, status: GridStatus) -> None:
        """Called a few times a second."""

    def on_end(self, ended: Ended) -> None:
        """Called after every trial."""


class Silent:
    """A watcher who says nothing."""

    def on_status(self, status: GridStatus) -> None:
        """Do nothing."""

    def on_end(self, ended: Ended) -> None:
        """Do nothing."""


class Pace:
    """Seconds per planned optimizer step, learned from finished and running trials.

    Per *planned* step, so that runs that stop early make the estimate of others of their kind shorter.
    """

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._planned: dict[tuple[str, str], int] = {}

    def add(self, trial: Trial, planned: int, seconds: float) -> None:
        """Learn from a finished trial: its planned optimizer steps, and its seconds in all."""
        self._seconds[_kind(trial)].append(seconds / planned)
        self._planned[_length(trial)] = planned

    def seconds_left(self, running: Sequence[Running], waiting: Sequence[Trial], processes: int) -> float | None:
        """Return an estimate of the time until all trials have ended; None while too little is known.

        Steps left over steps per second: of finished trials of the same task and method where there are some, else of
        running ones, else of the same task, else of all.
        """
        for one in running:
            if one.planned is not None:
                self._planned[_length(one.trial)] = one.planned
        rates = _Rates(self._seconds, running)
        left = [self._left(rates, one.trial, one.step) for one in running]
        rest = [self._left(rates, trial, 0) for trial in waiting]
        known = [seconds for seconds in (*left, *rest) if seconds is not None]
        if len(known) < len(left) + len(rest):
            return None
        # The end is not before the work is done by all processes together, nor before the longest trial's.
        return max(sum(known) / processes, max(known, default=0.0))

    def _left(self, rates: _Rates, trial: Trial, step: int) -> float | None:
        planned = trial.training.max_steps or self._planned.get(_length(trial))
        rate = rates.of(trial)
        return None if planned is None or rate is None else max(0, planned - step) * rate


class _Rates:
    """Seconds per step by task and method, from the best source there is."""

    def __init__(self, finished: dict[tuple[str, str], list[float]], running: Sequence[Running]) -> None:
        self._finished = finished
        self._running: dict[tuple[str, str], list[float]] = defaultdict(list)
        for one in running:
            if one.seconds_per_step is not None:
                self._running[_kind(one.trial)].append(one.seconds_per_step)

    def of(self, trial: Trial) -> float | None:
        kind = _kind(trial)
        known = {**self._running, **{key: values for key, values in self._finished.items() if values}}
        same_task = [rate for (task, _), rates in known.items() if task == kind[0] for rate in rates]
        everything = [rate for rates in known.values() for rate in rates]
        for rates in (known.get(kind), same_task, everything):
            if rates:
                return fmean(rates)
        return None


def _kind(trial: Trial) -> tuple[str, str]:
    return trial.task.name, trial.method


def _length(trial: Trial) -> tuple[str, str]:
    """Trials of one task and purpose are taken to have the same number of steps where they give epochs."""
    return trial.task.name, trial.purpose
