"""The paired difference of every method to a baseline, as a table has it: column, cells, notes, and a sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from .formats import counted, signed_points
from .records import Records
from .stats import CONFIDENCE, RESAMPLES, Difference, Scores, paired_difference
from .table import Cell, Column, empty_cell

_FEW_SEEDS = 10
"""Below so many seeds a table says that its intervals are too narrow."""


@dataclass(frozen=True)
class Comparison:
    """Differences of methods to a baseline, of runs of the same task and seed.

    Args:
        records: The runs.
        baseline: Label of the method that the others are compared with.
        scores_of: Returns the scores of a method, by task and seed.
        task: The only task that is compared; None: the mean over all.
    """

    records: Records
    baseline: str
    scores_of: Callable[[str], Scores]
    task: str | None = None

    @property
    def column(self) -> Column:
        """The column of the differences."""
        prefix = "" if self.task is None else f"{self.task}_"
        keys = tuple(prefix + key for key in ("difference", "difference_low", "difference_high", "difference_pairs"))
        title = f"− {self.baseline}" if self.task is None else self.task
        return Column(f"{title} [{CONFIDENCE:.0%}]", keys)

    @property
    def cells(self) -> list[Cell]:
        """The difference of every method, with its interval."""
        return [self._cell(difference) for difference in self.differences.values()]

    @property
    def notes(self) -> list[str]:
        """Which methods have no interval, and why."""
        reasons: dict[str, list[str]] = {}
        for method, difference in self.differences.items():
            if difference is not None and difference.single:
                reasons.setdefault(", ".join(difference.single), []).append(method)
        return [
            f"No interval for {', '.join(methods)}: a single seed shared with {self.baseline} on {tasks} tells "
            "nothing of the spread."
            for tasks, methods in reasons.items()
        ]

    def sentence(self, what: str = "Difference") -> str:
        """Return how the differences, of `what`, and their intervals were computed."""
        seeds: Sequence[int] = self.records.seeds
        mean = ", mean over the tasks" if self.task is None else ""
        text = (
            f"{what} to {self.baseline}: of runs of the same task and seed, in points{mean}; interval: "
            f"{CONFIDENCE:.0%} bootstrap, percentiles of {RESAMPLES:,} resamples of the seeds of each task."
        )
        if 1 < len(seeds) < _FEW_SEEDS:
            text += f" With {len(seeds)} seeds such an interval is narrower than it should be."
        return text

    @cached_property
    def differences(self) -> dict[str, Difference | None]:
        """The difference of every method; None for those without a pair."""
        theirs = self._compared(self.baseline)
        return {method: paired_difference(self._compared(method), theirs) for method in self.records.methods}

    def _compared(self, method: str) -> Scores:
        scores = self.scores_of(method)
        return {key: score for key, score in scores.items() if self.task in (None, key[0])}

    def _cell(self, difference: Difference | None) -> Cell:
        if difference is None:
            return empty_cell(self.column)
        tasks = self.records.tasks if self.task is None else [self.task]
        pairs, planned = sum(difference.pairs.values()), len(tasks) * len(self.records.seeds)
        text = f"{signed_points(difference.mean)} [no interval]"
        low, high = difference.interval or (None, None)
        if low is not None and high is not None:
            text = f"{signed_points(difference.mean)} [{signed_points(low)}, {signed_points(high)}]"
        if pairs != planned:
            text += f" ({pairs} of {counted(planned, 'pair')})"
        return Cell(text, (difference.mean, low, high, pairs))
