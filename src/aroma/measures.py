"""The measurements of Algorithm 1 for all modules at once: batched by shape, one host sync each.

O((m + n) r) work and memory a module; nothing of size m × n is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .criteria import (
    cross_term,
    difference_norm_squared,
    inner_product,
    merged_norm_squared,
    product_norm_squared,
)

Pair = tuple[Tensor, Tensor]
"""A component b (m, r), a (r, n)."""


@dataclass(frozen=True)
class PairSnapshot:
    """The components at the previous inner check.

    Args:
        norms: ‖b a‖_F of every active module; empty before the first check of an inner loop, where b started at 0.
        pairs: Copies of the components; only kept where the criterion needs more than their norms.
    """

    norms: list[float] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """Return the copies by name, for a checkpoint."""
        return {f"snapshot.{i}.{n}": t for i, pair in enumerate(self.pairs) for n, t in zip("ba", pair, strict=True)}

    @classmethod
    def restore(cls, norms: list[float], tensors: Mapping[str, Tensor], like: Sequence[Pair]) -> PairSnapshot:
        """Rebuild a snapshot from a checkpoint, on the devices of the pairs `like`, b (m, r) and a (r, n)."""
        if "snapshot.0.b" not in tensors:
            return cls(norms)
        pairs = [
            (tensors[f"snapshot.{i}.b"].to(b.device), tensors[f"snapshot.{i}.a"].to(a.device))
            for i, (b, a) in enumerate(like)
        ]
        return cls(norms, pairs)


def pair_norms(pairs: Sequence[Pair]) -> list[float]:
    """Return ‖b a‖_F of every pair b (m, r), a (r, n)."""
    return _batched(lambda b, a: product_norm_squared(b, a).sqrt(), [*pairs])


def inner_values(
    pairs: Sequence[Pair], earlier: PairSnapshot, criterion: str
) -> tuple[list[float | None], PairSnapshot]:
    """Return the left side of (5) for every pair, and the snapshot for the next check.

    Args:
        pairs: Components of the active modules, b (m, r) and a (r, n).
        earlier: Snapshot of the previous check.
        criterion: `"norm_change"`, (‖b a‖ − ‖b' a'‖) / ‖b' a'‖, or `"update_change"`, ‖b a − b' a'‖ / ‖b' a'‖.

    Returns:
        Values, None where the earlier norm is 0 and the ratio is undefined; the new snapshot.
    """
    if criterion == "norm_change":
        norms = pair_norms(pairs)
        changes = [now - before for now, before in zip(norms, earlier.norms, strict=True)] if earlier.norms else []
        snapshot = PairSnapshot(norms)
    elif earlier.pairs:
        # To where the pairs are: the model may have been moved since.
        joined = [(b, a, b0.to(b), a0.to(a)) for (b, a), (b0, a0) in zip(pairs, earlier.pairs, strict=True)]
        flat = _batched(_norm_and_change, joined)
        norms, changes = flat[::2], flat[1::2]
        snapshot = PairSnapshot(norms, _copies(pairs))
    else:
        norms, changes = pair_norms(pairs), []
        snapshot = PairSnapshot(norms, _copies(pairs))
    if not changes:
        return [None] * len(pairs), snapshot
    return [change / norm if norm > 0 else None for change, norm in zip(changes, earlier.norms, strict=True)], snapshot


def outer_value(update_norm: float, weight_norm: float) -> float | None:
    """Return the left side of (6), `update_norm` / `weight_norm`; None where any update of a zero weight is new."""
    if weight_norm > 0:
        return update_norm / weight_norm
    return None if update_norm > 0 else 0.0


def weight_norms(weights: Sequence[Callable[[], Tensor]], updates: Sequence[Pair]) -> list[float]:
    """Return ‖W0 + B A‖_F of every module, from scratch.

    Args:
        weights: W0 (m, n) of every module, by call: a quantised weight is dequantised, and a sharded one gathered, one
            module at a time.
        updates: Finished components B (m, R), A (R, n), scale folded in.
    """
    squares = [merged_norm_squared(weight(), B, A) for weight, (B, A) in zip(weights, updates, strict=True)]
    return _to_host([square.clamp_min(0).sqrt() for square in squares])


@torch.no_grad()
def relative_norms(weights: Sequence[Callable[[], Tensor]], updates: Sequence[Pair]) -> list[float | None]:
    """Return ‖B A‖_F / ‖W0‖_F of every module; None where W0 is 0 and its update is not.

    If parameters are sharded, all ranks call this together.

    Args:
        weights: W0 (m, n) of every module, as for `weight_norms`.
        updates: The whole updates B (m, R), A (R, n), scale folded in.
    """
    nothing = [(B[:, :0], A[:0]) for B, A in updates]
    norms = zip(pair_norms(updates), weight_norms(weights, nothing), strict=True)
    return [outer_value(update, weight) for update, weight in norms]


def grown_norms(
    weights: Sequence[Callable[[], Tensor]],
    updates: Sequence[Pair],
    added: Sequence[Pair],
    norms: Sequence[float],
) -> list[float]:
    """Return ‖W0 + B A + b a‖_F of every module from `norms`, ‖W0 + B A‖_F: one component at a time.

    Args:
        weights: W0 (m, n) of every module, by call.
        updates: Finished components before the merge, B (m, R), A (R, n), scale folded in.
        added: The component that is merged, scale folded into b.
        norms: ‖W0 + B A‖_F.
    """
    squares = []
    crosses = [cross_term(weight(), b, a) for weight, (b, a) in zip(weights, added, strict=True)]
    for cross, (B, A), (b, a), norm in zip(crosses, updates, added, norms, strict=True):
        both = cross + inner_product(B, A, b, a)
        squares.append((norm**2 + 2 * both + product_norm_squared(b, a)).clamp_min(0).sqrt())
    return _to_host(squares)


def _norm_and_change(b: Tensor, a: Tensor, b0: Tensor, a0: Tensor) -> Tensor:
    """Return ‖b a‖_F and ‖b a − b0 a0‖_F, (k, 2), of stacked pairs (k, m, r) and (k, r, n)."""
    return torch.stack([product_norm_squared(b, a), difference_norm_squared(b, a, b0, a0)], dim=-1).sqrt()


def _copies(pairs: Sequence[Pair]) -> list[Pair]:
    """Return copies of pairs b (m, r), a (r, n)."""
    return [(b.detach().clone(), a.detach().clone()) for b, a in pairs]


@torch.no_grad()
def _batched(measure: Callable[..., Tensor], items: Sequence[tuple[Tensor, ...]]) -> list[float]:
    """Apply `measure` to all items, equal shapes stacked into one call, and return its values in item order.

    `measure` maps stacked tensors (k, …) to (k,) or (k, c); the c values of an item follow one another.
    """
    groups: dict[Any, list[int]] = {}
    for place, tensors in enumerate(items):
        groups.setdefault(tuple((t.shape, t.device, t.dtype) for t in tensors), []).append(place)
    order = [index for indices in groups.values() for index in indices]
    stacked = [
        measure(*map(torch.stack, zip(*(items[i] for i in indices), strict=True))) for indices in groups.values()
    ]
    if not stacked:
        return []
    width = stacked[0].reshape(len(next(iter(groups.values()))), -1).shape[1]
    flat = _to_host([value.reshape(-1) for value in stacked])
    placed = [0.0] * len(flat)
    for position, index in enumerate(order):
        placed[index * width : (index + 1) * width] = flat[position * width : (position + 1) * width]
    return placed


def _to_host(values: Sequence[Tensor]) -> list[float]:
    """Bring values (any shapes) to the host in one go: the one sync of a measurement."""
    if not values:
        return []
    device = values[0].device
    host: list[float] = torch.cat([value.reshape(-1).to(device) for value in values]).tolist()
    return host
