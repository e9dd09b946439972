"""An event for every decision of a growing adapter, and a summary of every matrix."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

EventKind = Literal["checked", "merged", "frozen", "finished"]


@dataclass(frozen=True)
class Event:
    """One decision of Algorithm 1.

    Args:
        kind: `"checked"`: an inner check of one matrix. `"merged"`: the component was kept.
            `"frozen"`: the matrix has stopped growing. `"finished"`: every matrix is frozen.
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
