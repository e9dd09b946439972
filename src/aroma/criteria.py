"""The measurements behind the checks of equations (5) and (6), without ever forming an m×n product.

Everything is accumulated in float64 (float32 on MPS, which has no float64), so that bf16 or fp16 pairs neither round
nor overflow. All matrices are measured together, with one host synchronization.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""A component b (m, r), a (r, n)."""

_BLOCK_ELEMENTS = 2**20
"""Most elements of a weight that are upcast at a time: 8 MiB in float64."""

_MIN_BLOCKS = 8
"""A weight is cut into at least so many row blocks, so that small ones are not copied whole either."""


@torch.no_grad()
def pair_norms(pairs: Sequence[Pair]) -> list[float]:
    """Return ‖b a‖_F = √⟨bᵀb, a aᵀ⟩ of every pair b (m, r), a (r, n), of any floating dtypes.

    Pairs of equal shapes are stacked and measured as one.
    """
    groups: dict[Any, list[int]] = {}
    for place, pair in enumerate(pairs):
        groups.setdefault(tuple((t.shape, t.device, t.dtype) for t in pair), []).append(place)
    squares = []
    for places in groups.values():
        b, a = (_wide(torch.stack([pairs[place][side] for place in places])) for side in (0, 1))
        squares.append(((b.mT @ b) * (a @ a.mT)).sum((-2, -1)))
    return [norm for _, norm in sorted(zip(chain(*groups.values()), _square_roots(squares), strict=True))]


@torch.no_grad()
def difference(pair: Pair, earlier: Pair) -> Pair:
    """Return b a − b0 a0 as a pair (m, 2 r), (2 r, n), of b (m, r), a (r, n), and b0, a0 on any device."""
    (b, a), (b0, a0) = pair, earlier
    return torch.cat([b, b0.to(b)], dim=1), torch.cat([a, -a0.to(a)])


@torch.no_grad()
def weight_norms(weights: Sequence[Callable[[], Tensor]], updates: Sequence[Pair]) -> list[float]:
    """Return ‖W0 + B A‖_F of every matrix, the denominator of equation (6).

    Summed over blocks of rows: each is merged and dropped again, which costs the m n R multiplications of the closed
    form ‖W0‖² + 2⟨W0, B A⟩ + ⟨BᵀB, A Aᵀ⟩ without its cancellation, and one small block of memory.

    Args:
        weights: W0 (m, n) of every matrix, any floating dtype, by call: a quantised weight is dequantised, and a
            sharded one gathered, one at a time.
        updates: Finished components B (m, R), A (R, n), scale folded in; R may be 0.
    """
    return _square_roots([_merged_square(weight(), B, A) for weight, (B, A) in zip(weights, updates, strict=True)])


def relative_norms(weights: Sequence[Callable[[], Tensor]], updates: Sequence[Pair]) -> list[float | None]:
    """Return ‖B A‖_F / ‖W0‖_F of every matrix; None where W0 is 0 and its update is not.

    `weights`, W0 (m, n), and `updates`, whole B (m, R) and A (R, n), are as for `weight_norms`.
    """
    norms = weight_norms(weights, [(B[:, :0], A[:0]) for B, A in updates])
    return [outer_value(update, weight) for update, weight in zip(pair_norms(updates), norms, strict=True)]


def inner_value(change: float, earlier_norm: float) -> float | None:
    """Return the left side of (5), `change` / `earlier_norm`; None where the earlier component was 0."""
    return change / earlier_norm if earlier_norm > 0 else None


def outer_value(update_norm: float, weight_norm: float) -> float | None:
    """Return the left side of (6), `update_norm` / `weight_norm`; None where any update of a zero weight is new."""
    if weight_norm > 0:
        return update_norm / weight_norm
    return None if update_norm > 0 else 0.0


def _merged_square(weight: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """Return the scalar ‖W0 + B A‖²_F of W0 (m, n), B (m, R), A (R, n)."""
    m, n = weight.shape
    rows = max(1, min(-(-m // _MIN_BLOCKS), _BLOCK_ELEMENTS // max(n, 1)))
    B, A = _wide(B), _wide(A)
    total = B.new_zeros(())
    for block, left in zip(weight.split(rows), B.split(rows), strict=True):
        total += torch.linalg.vector_norm(torch.addmm(_wide(block), left, A)).square()
    return total


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor (any shape) in the dtype that is accumulated in."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _square_roots(squares: Sequence[Tensor]) -> list[float]:
    """Bring the square roots of squares (any shapes) to the host in one go."""
    if not squares:
        return []
    # Where terms cancel, rounding may leave a tiny negative sum.
    found = torch.cat([square.reshape(-1).to(squares[0].device) for square in squares]).clamp_min(0).sqrt()
    host: list[float] = found.tolist()
    return host
