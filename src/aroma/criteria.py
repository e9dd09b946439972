"""Frobenius norms behind the checks of equations (5) and (6), without ever forming an m×n product.

Everything is accumulated in float64 (float32 on MPS, which has no float64), so that bf16 or fp16 pairs neither round
nor overflow. Leading dimensions, written …, are a batch of equal-shaped pairs: a check of many modules is one call
and, when the results are read together, one host synchronization.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 2**20
"""Most elements of a weight that are upcast at a time: 8 MiB in float64."""

_MIN_BLOCKS = 8
"""A weight is cut into at least so many row blocks, so that small ones are not copied whole either."""


@torch.no_grad()
def product_norm_squared(b: Tensor, a: Tensor) -> Tensor:
    """Return ‖b a‖²_F = ⟨bᵀb, a aᵀ⟩ as a tensor of the batch shape.

    Args:
        b: (…, m, r), any floating dtype.
        a: (…, r, n).
    """
    return _gram_product(*_wide(b, a))


@torch.no_grad()
def difference_norm_squared(b: Tensor, a: Tensor, b0: Tensor, a0: Tensor) -> Tensor:
    """Return ‖b a − b0 a0‖²_F as a tensor of the batch shape, accurate also when the products nearly coincide.

    The difference is (b − b0) a + b0 (a − a0). With the rows of Q an orthonormal basis of the rows of a, a = L Q,
    and with a − a0 = C Q + D split into its parts inside and outside of that basis, it is

        ((b − b0) L + b0 C) Q + b0 D,

    two orthogonal terms: their squared norms add up and nothing cancels, not even when b grew as a shrank.

    Args:
        b: (…, m, r), any floating dtype.
        a: (…, r, n).
        b0: (…, m, r), the earlier b.
        a0: (…, r, n), the earlier a.
    """
    b, a, b0, a0 = _wide(b, a, b0, a0)
    change = a - a0
    L, Q = _orthonormal_rows(a)
    C = change @ Q.mT
    D = change - C @ Q
    inside = (b - b0) @ L + b0 @ C
    return inside.square().sum((-2, -1)) + _gram_product(b0, D)


@torch.no_grad()
def inner_product(B: Tensor, A: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """Return ⟨B A, b a⟩ = ⟨Bᵀ b, A aᵀ⟩ as a tensor of the batch shape.

    Args:
        B: (…, m, R), any floating dtype; R may be 0.
        A: (…, R, n).
        b: (…, m, r).
        a: (…, r, n).
    """
    B, A, b, a = _wide(B, A, b, a)
    return ((B.mT @ b) * (A @ a.mT)).sum((-2, -1))


@torch.no_grad()
def merged_norm_squared(weight: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """Return the scalar ‖W0 + B A‖²_F, the denominator of equation (6) squared.

    Summed over blocks of rows: each is merged in float64 and dropped again, which costs the m n R multiplications of
    the closed form ‖W0‖² + 2⟨W0, B A⟩ + ⟨BᵀB, A Aᵀ⟩ without its cancellation, and one small block of memory.

    Args:
        weight: W0, m×n, any floating dtype; a transposed view (Conv1D) will do.
        B: m×R with the scale folded in; R may be 0.
        A: R×n.
    """
    B, A = _wide(B, A)
    total = B.new_zeros(())
    for rows in _row_blocks(weight):
        (block,) = _wide(weight[rows])
        total += torch.linalg.vector_norm(torch.addmm(block, B[rows], A)).square()
    return total


@torch.no_grad()
def cross_term(weight: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """Return the scalar ⟨W0, b a⟩ = tr(bᵀ W0 aᵀ).

    Args:
        weight: W0, m×n, any floating dtype; a transposed view (Conv1D) will do.
        b: m×r.
        a: r×n.
    """
    b, a = _wide(b, a)
    total = b.new_zeros(())
    for rows in _row_blocks(weight):
        (block,) = _wide(weight[rows])
        total += (b[rows] * (block @ a.mT)).sum()
    return total


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors (any shapes) in the dtype that is accumulated in."""
    dtype = torch.float32 if tensors[0].device.type == "mps" else torch.float64
    return tuple(tensor.to(dtype) for tensor in tensors)


def _gram_product(b: Tensor, a: Tensor) -> Tensor:
    """Return ⟨bᵀb, a aᵀ⟩ of b (…, m, r) and a (…, r, n)."""
    # For r > 1 terms of both signs meet: where columns cancel, rounding could leave a tiny negative sum.
    return ((b.mT @ b) * (a @ a.mT)).sum((-2, -1)).clamp(min=0)


def _orthonormal_rows(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return L (…, r, k) and Q (…, k, n) with a = L Q and Q Qᵀ = I, k = min(r, n)."""
    if a.shape[-2] == 1:  # the common case is worth sparing a QR of every module
        length = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
        return length, a / torch.where(length > 0, length, 1.0)
    q, r = torch.linalg.qr(a.mT)
    return r.mT, q.mT


def _row_blocks(weight: Tensor) -> Iterator[slice]:
    """Return slices that cut the rows of a weight (m, n) into blocks."""
    m, n = weight.shape
    rows = max(1, min(-(-m // _MIN_BLOCKS), _BLOCK_ELEMENTS // max(n, 1)))
    return (slice(start, start + rows) for start in range(0, m, rows))
