"""Times of cases that take turns, and what is made of them: medians, quartiles, ratios round by round."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a measurement.

    Args:
        median: The median.
        lower: First quartile.
        upper: Third quartile.
    """

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of `values`, at least one."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)

    @classmethod
    def of_ratios(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
        """Return the spread of the quotients, each of two times of the same round, so that slow rounds cancel out."""
        return cls.of([above / below for above, below in zip(numerators, denominators, strict=True)])


@dataclass(frozen=True)
class Times:
    """Times of one case, in seconds, one entry a round.

    Args:
        forward_backward: Forward and backward.
        rest: The rest of the step: optimizer, what the method does after it, clearing of the gradients.
    """

    forward_backward: list[float]
    rest: list[float]

    @property
    def step(self) -> list[float]:
        """The whole step."""
        return [first + second for first, second in zip(self.forward_backward, self.rest, strict=True)]


class Contender(Protocol):
    """What can take turns."""

    def forward_backward(self) -> None:
        """The first part of a step."""

    def finish_step(self) -> None:
        """The second part of a step."""


def interleave(
    contenders: Sequence[Contender],
    rounds: int,
    warmup_rounds: int,
    stopwatch: Callable[..., list[float]],
    on_turn: Callable[[int], None] = lambda done: None,
) -> list[Times]:
    """Let all contenders take one step each, in order, round after round: A B C A B C …

    Whatever slows the machine down for a while then slows all of them alike.

    Args:
        contenders: Who takes turns.
        rounds: Timed rounds.
        warmup_rounds: Rounds before those.
        stopwatch: As `stopwatch_for` gives it.
        on_turn: Called with 1 after each turn.

    Returns:
        Times of every contender, in order.
    """
    times = [Times([], []) for _ in contenders]
    with no_collection():
        for number in range(warmup_rounds + rounds):
            gc.collect()
            for contender, result in zip(contenders, times, strict=True):
                first, second = stopwatch(contender.forward_backward, contender.finish_step)
                if number >= warmup_rounds:
                    result.forward_backward.append(first)
                    result.rest.append(second)
                on_turn(1)
    return times


def stopwatch_for(device: str) -> Callable[..., list[float]]:
    """Return a function that runs functions one after the other and returns the seconds each took, on the device."""
    return _time_on_gpu if device == "cuda" else _time_on_host


def _time_on_host(*parts: Callable[[], Any]) -> list[float]:
    marks = [time.perf_counter()]
    for part in parts:
        part()
        marks.append(time.perf_counter())
    return [end - start for start, end in itertools.pairwise(marks)]


def _time_on_gpu(*parts: Callable[[], Any]) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for part, mark in zip(parts, marks[1:], strict=True):
        part()
        mark.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in itertools.pairwise(marks)]


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect Python's garbage now, and then not in the middle of somebody's turn."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
