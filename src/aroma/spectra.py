"""Spectrum and effective rank of low-rank updates, computed from their factors in float64; no m×n matrix is formed."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def singular_values(B: Tensor, A: Tensor) -> Tensor:
    """Return the min(R, m, n) largest singular values of B A, descending, in float64.

    With B = Q_B R_B and Aᵀ = Q_A R_A, B A has the singular values of the small core R_B R_Aᵀ, so no m×n matrix is
    formed. All others are zero.

    Args:
        B: m×R, any floating dtype.
        A: R×n, on the same device. R = 0 gives an empty result.
    """
    B, A = double(B), double(A)
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


def _triangle(matrix: Tensor) -> Tensor:
    """Return R (min(m, n), n) of the QR factorization of a matrix (m, n)."""
    triangle: Tensor = torch.linalg.qr(matrix, mode="r").R
    return triangle


def double(matrix: Tensor) -> Tensor:
    """Return a matrix, or several (…, m, n), in float64."""
    # MPS knows neither float64 nor these factorizations.
    return (matrix.cpu() if matrix.device.type == "mps" else matrix).double()
