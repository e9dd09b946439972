"""How much of an adapter stays: the sizes that are measured, what each one keeps, and which of them is chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import bad_value
from .metric import effect, ladder

KEEP = 0.998
"""Share of the effect that is kept by default."""


@dataclass(frozen=True)
class Size:
    """One size of an adapter, and what it keeps.

    Args:
        share: Share of the adapter's parameters.
        directions: How many directions stay; of stacked experts, one in each of them counts once.
        largest_rank: Largest rank of a weight.
        bytes: Bytes of A and B.
        effect: Share of the effect on the predictions that it keeps; None if no examples were given.
        standard_error: Standard error of `effect` over examples.
        loss: Mean loss of a label, the squared error where labels are numbers; None without labels.
        score: Share of right answers, of every position or label; None without labels, or where they are numbers.
    """

    share: float
    directions: int
    largest_rank: int
    bytes: int
    effect: float | None = None
    standard_error: float | None = None
    loss: float | None = None
    score: float | None = None


@dataclass(frozen=True)
class Compression:
    """What `compress` found and did.

    Args:
        curve: The sizes that were measured, ascending. The first is the model without the updates of the adapter;
            heads and other trained parameters are as trained. The last is the whole adapter.
        chosen: Index in `curve` of the size that stays.
        reason: Why that one.
        ranks: Rank of each adapted weight before and after, by its name.
        examples: How many examples were measured.
        outputs: What was compared: `"classes"`, `"labels"` or `"values"`; None without examples.
        left_alone: Names of adapted weights that cannot be cut, and stay as they are.
    """

    curve: list[Size]
    chosen: int
    reason: str
    ranks: dict[str, tuple[int, int]]
    examples: int
    outputs: str | None
    left_alone: list[str]

    @property
    def size(self) -> Size:
        """The size that stays."""
        return self.curve[self.chosen]

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON can hold it."""
        return asdict(self)

    def totals(self) -> dict[str, float]:
        """Return the numbers that a tracker shows."""
        size = self.size
        totals = {"share": size.share, "total_rank": size.directions, "largest_rank": size.largest_rank}
        return totals if size.effect is None else {**totals, "effect": size.effect}

    def __str__(self) -> str:
        none, size, whole = self.curve[0], self.size, self.curve[-1]
        kept = "stays" if size.effect is None else f"keeps {size.effect:.2%} of its effect"
        kept += "" if size.effect is None else f" (± {size.standard_error:.2%})"
        used = sum(after > 0 for _, after in self.ranks.values())
        lines = [
            f"{size.share:.1%} of the adapter {kept}: {self.reason}",
            f"{size.directions} of {whole.directions} directions in {used} of {len(self.ranks)} matrices; largest "
            f"rank {size.largest_rank} of {whole.largest_rank}; {size.bytes:,} of {whole.bytes:,} bytes",
        ]
        if size.effect is None:
            return "\n".join((*lines, "directions are ordered by size, without examples, so no effect was measured"))
        last = f"measured on {self.examples} examples without labels"
        if size.loss is not None:
            losses = f"loss {size.loss:.4g} (whole {whole.loss:.4g}, none {none.loss:.4g})"
            last = f"measured on {self.examples} examples: {losses}"
        if size.score is not None:
            last += f", right answers {size.score:.1%} (whole {whole.score:.1%}, none {none.score:.1%})"
        return "\n".join((*lines, last))


class Weight(Protocol):
    """What a plan needs to know of an adapted weight: `cost` is the numbers of a direction; see `AdaptedWeight`."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def r(self) -> int: ...  # noqa: D102
    @property
    def cost(self) -> int: ...  # noqa: D102
    @property
    def itemsize(self) -> int: ...  # noqa: D102
    @property
    def is_pinned(self) -> bool: ...  # noqa: D102


class Measured(NamedTuple):
    """What was measured on examples.

    Args:
        sums: `metric.kept` of each measured size, (sizes, 5).
        judged: Loss, right answers and judged labels of each of them, and of the whole adapter, (sizes + 1, 3).
        examples: How many examples.
        kind: What the outputs are.
    """

    sums: Tensor
    judged: Tensor
    examples: int
    kind: str


@dataclass(frozen=True)
class Limits:
    """What a person asked for; see `compress`."""

    keep: float | None = None
    size: float | None = None
    rank: int | None = None

    def require_valid(self, has_examples: bool) -> None:
        """Raise ConfigError for a value out of range, or for none that decides."""
        for field in ("keep", "size"):
            value = getattr(self, field)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 < value <= 1):
                raise bad_value(field, value, "give a share above 0 and at most 1")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise bad_value("rank", self.rank, "give the largest rank of a weight, 1 or more")
        if not has_examples and self.keep is not None:
            raise bad_value("keep", self.keep, "an effect is measured on examples; give batches, or size or rank")
        if not has_examples and self.size is None and self.rank is None:
            raise bad_value("batches", None, "without examples nothing says how much to keep; give size or rank")

    def sizes(self, weights: Sequence[Weight], values: Sequence[Tensor]) -> list[list[int]]:
        """Return the rank of every weight at each size that may stay, ascending.

        `values` orders the directions of each weight that exist, (r,), descending.
        """
        # Of a pinned update that is zero, one direction of zeros.
        pairs = zip(values, weights, strict=True)
        some = [torch.zeros(1) if one.is_pinned and not len(value) else value[: self.rank] for value, one in pairs]
        costs, pinned = [one.cost for one in weights], [one.is_pinned for one in weights]
        return ladder(some, costs, pinned, _stored(weights, _whole(weights)), self.size)

    def choose(self, sizes: Sequence[Size]) -> tuple[Size, str]:
        """Return which of the sizes that may stay does, and why."""
        keep = KEEP if (self.keep, self.size, self.rank) == (None, None, None) else self.keep
        limits = {"at most {:.4g} of its size": self.size, "at most rank {}": self.rank}
        asked = " and ".join(text.format(value) for text, value in limits.items() if value is not None)
        allowed = [one for one in sizes if self.size is None or one.share <= self.size * (1 + 1e-9)] or [sizes[0]]
        if keep is None:
            return allowed[-1], f"{asked} was asked for"
        within = f" with {asked}" if asked else ""
        enough = [one for one in allowed if (one.effect or 0.0) >= keep]
        if not enough:
            return allowed[-1], f"the largest{within}, which keeps less than {keep:.4g}"
        return enough[0], f"the smallest of {len(allowed)} sizes{within} that keeps {keep:.4g}"


def to_measure(weights: Sequence[Weight], sizes: Sequence[list[int]]) -> list[list[int]]:
    """Return the ranks that are measured: of none, and of `sizes` without the whole adapter, their reference."""
    return [[0] * len(weights), *(ranks for ranks in sizes if ranks != _whole(weights))]


def conclude(
    limits: Limits,
    weights: Sequence[Weight],
    sizes: Sequence[list[int]],
    measured: Measured | None,
    left_alone: Sequence[str],
) -> tuple[Compression, list[int]]:
    """Return what is done with an adapter, and the rank that every weight keeps.

    `sizes`: the ranks that may stay, as `Limits.sizes` returns them.
    """
    ladder = [*to_measure(weights, sizes), _whole(weights)]
    total = _stored(weights, ladder[-1])
    curve = []
    for place, ranks in enumerate(ladder):
        bytes_ = sum(rank * one.cost * one.itemsize for rank, one in zip(ranks, weights, strict=True))
        size = Size(_stored(weights, ranks) / total, sum(ranks), max(ranks), bytes_)
        if measured is not None:
            is_whole = place == len(measured.sums)
            share, error = (1.0, 0.0) if is_whole else effect(measured.sums[place], measured.examples)
            loss, right, judged = measured.judged[place].tolist()
            size = replace(size, effect=share, standard_error=error)
            if judged:
                size = replace(size, loss=loss / judged, score=None if math.isnan(right) else right / judged)
        curve.append(size)
    chosen, reason = limits.choose(curve[1 : 1 + len(sizes)])
    place = curve.index(chosen)
    pairs = {one.name: (one.r, rank) for one, rank in zip(weights, ladder[place], strict=True)}
    examples, kind = (0, None) if measured is None else (measured.examples, measured.kind)
    return Compression(curve, place, reason, pairs, examples, kind, [*left_alone]), ladder[place]


def _whole(weights: Sequence[Weight]) -> list[int]:
    return [one.r for one in weights]


def _stored(weights: Sequence[Weight], ranks: Sequence[int]) -> int:
    """Return how many numbers an adapter of these ranks stores."""
    return sum(rank * one.cost for rank, one in zip(ranks, weights, strict=True))
