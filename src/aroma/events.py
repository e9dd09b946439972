"""An event for every decision of a growing adapter, and a summary of every matrix."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

EventKind = Literal["checked", "merged", "frozen", "finished"]


@dataclass(frozen=True)
class Event:
    """One decision of Algorithm 1.

    Args:
        kind: `"checked"`: an inner check of one matrix. `"merged"`: its component trains no more, and stays.
            `"frozen"`: it has stopped growing. `"finished"`: every matrix has.
        step: Optimizer steps taken since training began.
        outer_step: Outer step p, counted from 1, in which it happened.
        inner_step: Optimizer steps t taken in that inner loop.
        module: Name of the matrix's module; None for `"finished"`.
        value: Left side of (5) for `"checked"`, of (6) for `"merged"` and `"frozen"`; None where undefined.
        rank: Rank of the matrix's finished components after the event; their sum for `"finished"`.
        converged: Whether the matrix has the inner label after the event.
    """

    kind: EventKind
    step: int
    outer_step: int
    inner_step: int
    module: str | None
    value: float | None
    rank: int
    converged: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the event as a JSON-able dict."""
        return asdict(self)


@dataclass(frozen=True)
class ModuleSummary:
    """What became of one matrix.

    Args:
        name: Name of its module in the base model.
        rank: Rank of its update, the component in training included once it has moved.
        effective_rank: Effective rank of its update (Appendix C).
        state: `"training"`, `"converged"` (has the inner label) or `"frozen"`.
        inner_value: Left side of (5) at its last inner check, None where undefined.
        outer_value: Left side of (6) at its last outer check, None before the first.
    """

    name: str
    rank: int
    effective_rank: float
    state: Literal["training", "converged", "frozen"]
    inner_value: float | None
    outer_value: float | None


class Summary(list[ModuleSummary]):
    """What became of all matrices, in module order; printed, a short table by kind of matrix."""

    def __str__(self) -> str:
        kinds: dict[str, list[ModuleSummary]] = {}
        for matrix in self:
            kinds.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", matrix.name), []).append(matrix)
        rows = [("matrices", "", "ranks", "total", "effective", "frozen")]
        rows += [(kind, *_of_kind(matrices)) for kind, matrices in kinds.items()]
        if len(kinds) > 1:
            rows.append(("all", *_of_kind(self)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        first, *others = widths
        return "\n".join(
            "  ".join([row[0].ljust(first), *(text.rjust(width) for text, width in zip(row[1:], others, strict=True))])
            for row in rows
        )


def _of_kind(matrices: list[ModuleSummary]) -> tuple[str, str, str, str, str]:
    """Return count, range and sum of ranks, sum of effective ranks, and how many are frozen, as text."""
    ranks = [matrix.rank for matrix in matrices]
    spread = str(min(ranks)) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
    effective = sum(matrix.effective_rank for matrix in matrices)
    frozen = sum(matrix.state == "frozen" for matrix in matrices)
    return str(len(ranks)), spread, str(sum(ranks)), f"{effective:.1f}", str(frozen)
