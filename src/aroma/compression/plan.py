"""How much of an adapter stays: the sizes that are measured, what each one keeps, and which of them is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

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
        kept = "" if size.effect is None else f" and {size.effect:.2%} of its effect (± {size.standard_error:.2%})"
        used = sum(after > 0 for _, after in self.ranks.values())
        lines = [
            f"{size.share:.1%} of the adapter{kept} stays: {self.reason}",
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


class Weight(NamedTuple):
    """What a plan knows of an adapted weight: its name and rank, numbers of a direction, bytes of a number."""

    name: str
    r: int
    cost: int
    itemsize: int
    is_pinned: bool


class Measured(NamedTuple):
    """What was measured on examples.

    Args:
        sums: `metric.kept` of each size of a plan's ladder, (sizes, 5).
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
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1
            ):
                raise bad_value(field, value, "give a share above 0 and at most 1, such as 0.2 of the size")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise bad_value("rank", self.rank, "give the largest rank of a weight, 1 or more")
        if not has_examples and self.keep is not None:
            raise bad_value("keep", self.keep, "an effect is measured on examples; give batches, or size or rank")
        if not has_examples and self.size is None and self.rank is None:
            raise bad_value("batches", None, "without examples nothing says how much to keep; give size or rank")

    def plan(self, weights: Sequence[Weight], values: Sequence[Tensor]) -> Plan:
        """Return the sizes to measure; `values` orders the directions of each weight, (r,), descending."""
        total = sum(weight.r * weight.cost for weight in weights)
        # Of a pinned update that is zero, one direction of zeros.
        pairs = zip(values, weights, strict=True)
        some = [torch.zeros(1) if one.is_pinned and not len(value) else value for value, one in pairs]
        capped = [value[: self.rank] for value in some]
        costs, pinned = [weight.cost for weight in weights], [weight.is_pinned for weight in weights]
        sizes = ladder(capped, costs, pinned, total, self.size)
        return Plan(self, weights, total, sizes)


@dataclass(frozen=True)
class Plan:
    """The sizes of an adapter that are measured.

    Args:
        limits: What a person asked for.
        weights: The adapted weights.
        total: Numbers that the adapter stores.
        allowed: Rank of every weight at each size that may stay, ascending.
    """

    limits: Limits
    weights: Sequence[Weight]
    total: int
    allowed: list[list[int]]

    @property
    def whole(self) -> list[int]:
        """Rank of every weight of the whole adapter, whose answers are the others' reference."""
        return [weight.r for weight in self.weights]

    @property
    def ladder(self) -> list[list[int]]:
        """Rank of every weight at each size to measure, ascending, from none to less than all."""
        return [[0] * len(self.weights), *(ranks for ranks in self.allowed if ranks != self.whole)]

    def ranks(self, place: int) -> list[int]:
        """Return the rank of every weight at a size of the curve, by its index."""
        return [*self.ladder, self.whole][place]

    def curve(self, measured: Measured | None) -> list[Size]:
        """Return the sizes of the ladder and the whole adapter, with what was measured of each."""
        sizes = [self._size(ranks) for ranks in (*self.ladder, self.whole)]
        if measured is None:
            return sizes
        kept = [*(effect(sums, measured.examples) for sums in measured.sums), (1.0, 0.0)]
        found = []
        for size, (share, error), (loss, right, judged) in zip(sizes, kept, measured.judged.tolist(), strict=True):
            labels = {} if not judged else {"loss": loss / judged, "score": None if right != right else right / judged}
            found.append(replace(size, effect=share, standard_error=error, **labels))
        return found

    def _size(self, ranks: Sequence[int]) -> Size:
        stored = [rank * weight.cost for rank, weight in zip(ranks, self.weights, strict=True)]
        size = sum(count * weight.itemsize for count, weight in zip(stored, self.weights, strict=True))
        return Size(sum(stored) / self.total, sum(ranks), max(ranks), size)

    def choose(self, curve: Sequence[Size]) -> tuple[int, str]:
        """Return the index in `curve` of what stays, and why."""
        keep, size, rank = self.limits.keep, self.limits.size, self.limits.rank
        keep = KEEP if keep is None and size is None and rank is None else keep
        limits = {"at most {:.4g} of its size": size, "at most rank {}": rank}
        asked = " and ".join(text.format(value) for text, value in limits.items() if value is not None)
        sizes = range(1, 1 + len(self.allowed))
        allowed = [place for place in sizes if size is None or curve[place].share <= size * (1 + 1e-9)] or [1]
        if keep is None:
            return allowed[-1], f"{asked} were asked for"
        within = f" with {asked}" if asked else ""
        enough = [place for place in allowed if (curve[place].effect or 0.0) >= keep]
        if not enough:
            return allowed[-1], f"the largest{within}, which keeps less than {keep:.4g}"
        return enough[0], f"the smallest of {len(allowed)} sizes{within} that keeps {keep:.4g}"
