"""Spectrum, effective rank and overlaps of low-rank updates, computed from their factors.

An update is B A with B m×R and A R×n. A component is r neighbouring columns of B with the same rows of A; the last may
have fewer. No m×n matrix is formed anywhere, and everything is computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NEGLIGIBLE = 1e-12
"""Share of a component's norm below which the rest of it is rounding, not a new direction."""


@torch.no_grad()
def singular_values(B: Tensor, A: Tensor) -> Tensor:
    """Return the min(R, m, n) largest singular values of B A, descending, in float64.

    With B = Q_B R_B and Aᵀ = Q_A R_A, B A has the singular values of the small core R_B R_Aᵀ, so no m×n matrix is
    formed. All others are zero.

    Args:
        B: m×R, any floating dtype.
        A: R×n, on the same device. R = 0 gives an empty result.
    """
    B, A = _double(B), _double(A)
    sigma: Tensor = torch.linalg.svdvals(_triangle(B) @ _triangle(A.mT).mT)
    return sigma


@torch.no_grad()
def effective_rank(sigma: Tensor) -> float:
    """Return exp(−Σ p_k log p_k) with p_k = σ_k / Σσ (Appendix C of the paper); 0.0 when nothing is nonzero.

    Args:
        sigma: Non-negative singular values, any shape and order.
    """
    sigma = sigma.detach().cpu().double().flatten()
    if sigma.numel() == 0 or not sigma.any():
        return 0.0
    shares = sigma / sigma.max()  # so that the sum of huge values stays finite
    shares = shares / shares.sum()
    return float(torch.special.entr(shares).sum().exp())


@torch.no_grad()
def span_overlaps(B: Tensor, A: Tensor, r: int = 1) -> Tensor:
    """Return, for every component after the first, how much of it lies in the row space of all earlier ones.

    With P the orthogonal projection onto the span of the rows of the earlier components, it is ‖b a P‖_F / ‖b a‖_F,
    which for r = 1 is ‖a P‖ / ‖a‖: 0 for a component that reads only directions of the input that none before it
    read, 1 for one that reads none of its own. A component that is zero overlaps nothing and spans nothing.

    The overlap of the left factors, with what was written before, is ``span_overlaps(A.mT, B.mT, r)``.

    Args:
        B: m×R, any floating dtype.
        A: R×n, on the same device.
        r: Rank of one component.

    Returns:
        Values in [0, 1], float64: one fewer than there are components, none where there is none.
    """
    B, A = _double(B), _double(A)
    rows = _triangle(A.mT).mT  # A in coordinates of its own row space: at most R numbers a row, the same products
    basis = rows.new_zeros(0, rows.shape[1])
    overlaps = []
    for b, a in _components(B, rows, r):
        component = _triangle(b) @ a  # few rows, with the norm and the row space of b a
        norm = torch.linalg.matrix_norm(component)
        inside = torch.linalg.matrix_norm(component @ basis.mT)
        overlaps.append((inside / norm).clamp(max=1.0) if norm > 0 else torch.zeros_like(norm))
        basis = torch.cat([basis, _new_directions(component, basis, norm)])
    return torch.stack(overlaps[1:]) if len(overlaps) > 1 else B.new_zeros(0)


def _components(B: Tensor, A: Tensor, r: int) -> list[tuple[Tensor, Tensor]]:
    """Split B (m, R) and A (R, n) into components of rank r."""
    # Torch splits nothing into one empty piece, not into none.
    return list(zip(B.split(r, dim=1), A.split(r), strict=True)) if B.shape[1] else []


def _new_directions(component: Tensor, basis: Tensor, norm: Tensor) -> Tensor:
    """Return orthonormal rows (k, n) that extend `basis` (R, n) by what `component` (r, n) adds to its span."""
    rest = component
    for _ in range(2):  # once more, because the first subtraction leaves rounding along the basis
        rest = rest - rest @ basis.mT @ basis
    _, sizes, directions = torch.linalg.svd(rest, full_matrices=False)
    new: Tensor = directions[sizes > _NEGLIGIBLE * norm]
    return new


def _triangle(matrix: Tensor) -> Tensor:
    """Return R (min(m, n), n) of the QR factorization of a matrix (m, n)."""
    triangle: Tensor = torch.linalg.qr(matrix, mode="r").R
    return triangle


def _double(matrix: Tensor) -> Tensor:
    """Return a matrix (m, n) in float64."""
    # MPS knows neither float64 nor these factorizations.
    return (matrix.cpu() if matrix.device.type == "mps" else matrix).double()
