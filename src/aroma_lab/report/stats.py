"""Means, deviations, and paired differences with their bootstrap intervals."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

RESAMPLES = 10_000
"""Resamples of a bootstrap."""
CONFIDENCE = 0.95
"""Confidence level of an interval."""
_BOOTSTRAP_SEED = 0

Scores = Mapping[tuple[str, int], float]
"""Scores by task and seed."""

Verdict = Literal["better", "tied", "worse"]


@dataclass(frozen=True)
class Spread:
    """Mean and deviation of a quantity over seeds.

    Args:
        mean: The mean.
        std: Sample standard deviation (n − 1); None for a single value.
        count: Number of values.
    """

    mean: float
    std: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Return the spread of `values`; None where there are none."""
        if not values:
            return None
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, len(values))


@dataclass(frozen=True)
class Difference:
    """Paired difference of two methods: same task, same seed.

    Args:
        mean: Mean over tasks of the mean over seeds.
        interval: Its 95 % bootstrap interval; None where a task has a single pair, which tells nothing of the spread.
        pairs: Number of pairs by task.
    """

    mean: float
    interval: tuple[float, float] | None
    pairs: Mapping[str, int]

    @property
    def verdict(self) -> Verdict | None:
        """Whether the interval lies above zero, holds it, or lies below; None without an interval."""
        if self.interval is None:
            return None
        low, high = self.interval
        return "better" if low > 0 else "worse" if high < 0 else "tied"

    @property
    def single(self) -> list[str]:
        """Tasks with a single pair."""
        return [task for task, count in self.pairs.items() if count == 1]


def paired_difference(scores: Scores, baseline: Scores) -> Difference | None:
    """Return how much more `scores` are than `baseline`; None where they share no task and seed.

    The interval is the percentile bootstrap's: the seeds of each task are drawn anew with replacement, task by task,
    a pair staying a pair. Tasks are taken as given: it says nothing of tasks that were not run.
    """
    pairs: dict[str, list[float]] = {}
    for task, seed in scores:
        if (task, seed) in baseline:
            pairs.setdefault(task, []).append(scores[task, seed] - baseline[task, seed])
    if not pairs:
        return None
    counts = {task: len(differences) for task, differences in pairs.items()}
    mean = statistics.fmean(statistics.fmean(differences) for differences in pairs.values())
    return Difference(mean, _interval(list(pairs.values())) if min(counts.values()) > 1 else None, counts)


def _interval(samples: Sequence[Sequence[float]]) -> tuple[float, float]:
    import numpy as np
    from scipy.stats import bootstrap

    def mean_of_means(*drawn: Any, axis: int) -> Any:
        return np.mean([np.mean(sample, axis=axis) for sample in drawn], axis=0)

    found = bootstrap(
        [np.asarray(sample) for sample in samples],
        mean_of_means,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(_BOOTSTRAP_SEED),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
