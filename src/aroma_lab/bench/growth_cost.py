"""What the controller costs: the inner check, spread over the steps between two, and one outer step."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aroma.tuner import AromaConfig

from ..methods import Aroma
from .cases import Case
from .contestant import Contestant

_COMPONENTS = 8
"""Finished components of every module at the beginning."""

_CHECK_INTERVAL = 2
"""Steps between inner checks in the measurement: fewer than in a training, so that it takes less time. What one check
costs does not depend on it."""


@dataclass(frozen=True)
class GrowthCost:
    """Cost of the controller on an AROMA model with all modules growing, in milliseconds.

    Args:
        step_ms: An ordinary optimizer step: forward, backward, optimizer; the controller left out.
        uncheck_ms: The controller in a step without a check.
        check_ms: The controller in a step with an inner check.
        check_interval: Steps from one check to the next in a training with default settings.
        outer_ms: One outer step in which every module keeps its component: check, merge, reset, norms of the weights.
        repeats: How often each was measured; the times are medians.
    """

    step_ms: float
    uncheck_ms: float
    check_ms: float
    check_interval: int
    outer_ms: float
    repeats: int

    @property
    def amortised_ms(self) -> float:
        """The controller in an inner loop, a step on average."""
        return self.uncheck_ms + (self.check_ms - self.uncheck_ms) / self.check_interval

    @property
    def amortised_fraction(self) -> float:
        """The same as a fraction of an ordinary step."""
        return self.amortised_ms / self.step_ms

    @property
    def outer_fraction(self) -> float:
        """An outer step as a fraction of an ordinary step."""
        return self.outer_ms / self.step_ms


def growth_cost(
    model: Any,
    batch: dict[str, Tensor],
    seed: int,
    repeats: int,
    stopwatch: Callable[..., list[float]],
    on_repeat: Callable[[int], None] = lambda done: None,
) -> GrowthCost:
    """Train an AROMA model for real, and time its controller.

    Args:
        model: A classifier that may be changed.
        batch: Its input with labels.
        seed: Seed of the adapter's weights.
        repeats: Inner loops, each of two steps.
        stopwatch: As `timing.stopwatch_for` gives it.
        on_repeat: Called with 1 after each of them.
    """
    contestant = Contestant(Case("growth", _growing_method(), components=_COMPONENTS), model, batch, seed)
    controller = contestant.hooks.controller
    ordinary: list[float] = []
    controlled: list[float] = []
    outer: list[float] = []
    contestant.forward_backward()  # the optimizer makes its state, memory is claimed for the first time
    for _ in range(repeats):
        for _ in range(_CHECK_INTERVAL):
            times = stopwatch(
                contestant.forward_backward, contestant.optimizer_step, contestant.method_step, contestant.clear
            )
            ordinary.append(times[0] + times[1] + times[3])
            controlled.append(times[2])
        outer += stopwatch(controller.outer_step)
        on_repeat(1)
    return GrowthCost(
        step_ms=_median_ms(ordinary),
        uncheck_ms=_median_ms(controlled[::_CHECK_INTERVAL]),
        check_ms=_median_ms(controlled[_CHECK_INTERVAL - 1 :: _CHECK_INTERVAL]),
        check_interval=AromaConfig.inner_check_interval,
        outer_ms=_median_ms(outer),
        repeats=repeats,
    )


def _growing_method() -> Aroma:
    """Return AROMA whose inner loops end only when they are told to, and whose components are all kept."""
    return Aroma(
        options={
            "inner_check_interval": _CHECK_INTERVAL,
            "inner_tolerance": 1e-12,
            "max_inner_steps": 10**9,
            "outer_tolerance": None,
            "rewarmup_steps": 0,
        }
    )


def _median_ms(seconds: list[float]) -> float:
    return 1000 * statistics.median(seconds)
