"""Which directions of an adapter carry its answers: pure functions of arrays.

An adapted weight has the update B A, with its scale folded in. In factors for which B A = U √σ √σ Vᵀ, each calibration
batch gives one r×r matrix,

    G = (∂L/∂A) Aᵀ = Bᵀ (∂L/∂B),

the gradient with respect to P in B P A at P = 1. Here ∂L has the covariance of the score of the predictions
(`predictions.pull`). With M = mean G Gᵀ / trace and N = mean Gᵀ G, replacing 1 by P changes the predictions by about
½ ‖M^½ (1 − P) N^½‖² nats: the Fisher information, to second order and factored as in K-FAC (arXiv 1503.05671). So the
best P of rank k comes from the k largest singular values S of M^½ N^½, and S² is what a direction is worth, in the
same unit for every weight.

All arrays have a leading axis of matrices, 1 or the number of experts that share a parameter: A (matrices, r, n) and
B (matrices, m, r). Direction k of a stack is direction k of each of its matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..spectra import double

SIZES, STEP = 12, 0.7
"""Numbers of sizes that are measured, beside none, and each one's share of the size before it."""
_ROW = 1 / math.sqrt(3)
"""Norm of a row of A that is written: that of PEFT's random start, so that the adapter can be trained further."""
_ZERO = 1e-9
"""Singular values below this share of the largest are rounding."""
_FLOOR = 1e-10
"""Least eigenvalue of M and N as a share of the largest: directions that no example uses have a worth of almost 0."""


class Product(NamedTuple):
    """The factors of an update B A; B (matrices, m, r) and A (matrices, r, n)."""

    B: Tensor
    A: Tensor


class Spectrum(NamedTuple):
    """The singular value decomposition of an update; U (matrices, m, r), sigma (matrices, r), Vh (matrices, r, n).

    It is in float64. r is the rank that exists, the largest of any matrix, and at least 1.
    """

    U: Tensor
    sigma: Tensor
    Vh: Tensor


class Directions(NamedTuple):
    """The directions of an update, the most valuable first, in the coordinates of its spectrum.

    The update of the first k of them is U √σ X[:, :k] Y[:k] √σ Vᵀ.

    Args:
        X: (matrices, r, r).
        Y: (matrices, r, r).
        worth: What each direction is worth, (r,), descending; of a stack the sum over its matrices.
    """

    X: Tensor
    Y: Tensor
    worth: Tensor


def spectrum(product: Product) -> Spectrum:
    """Return the singular value decomposition of an update, without directions that are rounding."""
    left, R = torch.linalg.qr(double(product.B))
    right, S = torch.linalg.qr(double(product.A).mT)
    U, sigma, Vh = torch.linalg.svd(R @ S.mT, full_matrices=False)
    exists = sigma > _ZERO * sigma[:, :1]
    rank = max(int(exists.sum(1).max()), 1)
    return Spectrum((left @ U)[..., :rank], (sigma * exists)[:, :rank], (Vh @ right.mT)[:, :rank])


def by_size(found: Spectrum) -> Directions:
    """Return the singular directions, each worth its squared singular value (PARA, arXiv 2604.27796)."""
    one = torch.eye(found.sigma.shape[1], dtype=torch.float64, device=found.sigma.device).expand(
        len(found.sigma), -1, -1
    )
    return Directions(one, one, found.sigma.square().sum(0))


def by_effect(M: Tensor, N: Tensor) -> Directions:
    """Return the directions of an update in the metric of the predictions.

    Args:
        M: Mean of G Gᵀ over batches, (matrices, r, r), with G in the coordinates of `balanced`.
        N: Mean of Gᵀ G, likewise.
    """
    trace = M.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    is_used = trace > 0  # no example may reach an expert
    one = torch.eye(M.shape[1], dtype=M.dtype, device=M.device)
    left, left_inverse = _roots(torch.where(is_used, M / trace, one))
    right, right_inverse = _roots(torch.where(is_used, N, one))
    U, S, Vh = torch.linalg.svd(left @ right)
    worth = (S * is_used[..., 0]).square().sum(0)
    return Directions(left_inverse @ U * S[:, None], Vh @ right_inverse, worth)


def _roots(S: Tensor) -> tuple[Tensor, Tensor]:
    """Return S^½ and S^-½ of positive semidefinite matrices (matrices, r, r), none of which is zero."""
    values, Q = torch.linalg.eigh(S)
    roots = values.maximum(_FLOOR * values[:, -1:]).sqrt()[:, None]
    return Q * roots @ Q.mT, Q / roots @ Q.mT


def balanced(found: Spectrum) -> Product:
    """Return the factors in whose coordinates G is measured: B = U √σ and A = √σ Vᵀ."""
    root = found.sigma.sqrt()
    return Product(found.U * root[:, None], root[:, :, None] * found.Vh)


def cut(found: Spectrum, directions: Directions, rank: int) -> Product:
    """Return the update of the first `rank` directions, as singular directions with rows of equal norm.

    Written so, factors in a few bits do not cancel each other, as the columns of X and rows of Y may.
    """
    U, sigma, Vh = found
    if rank < sigma.shape[1]:  # of all directions, X Y is 1
        root = sigma.sqrt()
        core = root[:, :, None] * (directions.X[..., :rank] @ directions.Y[:, :rank]) * root[:, None]
        left, sigma, right = torch.linalg.svd(core)
        U, sigma, Vh = U @ left[..., :rank], sigma[:, :rank], right[:, :rank] @ Vh
    return Product(U * (sigma / _ROW)[:, None], _ROW * Vh)


# All weights together ------------------------------------------------------------------------------------------------


def worths(found: Spectrum, directions: Directions) -> Tensor:
    """Return what the directions that exist are worth, (r,), descending; empty for an update of zero."""
    return directions.worth[: int((found.sigma > 0).sum(1).max())]


def ladder(
    values: Sequence[Tensor], costs: Sequence[int], pinned: Sequence[bool], total: int, size: float | None = None
) -> list[list[int]]:
    """Return the rank of every weight at each size that is measured, ascending.

    The directions of all weights are put in one line, and each size takes as many from its beginning as store at most
    its share of the adapter's numbers.

    Args:
        values: What orders the directions of each weight, (r,), descending.
        costs: Numbers that a direction of each weight stores.
        pinned: Whether a weight keeps its first direction whatever it is worth.
        total: Numbers that the adapter stores before.
        size: A share that is measured, too.
    """
    keys = torch.cat([value.cpu() for value in values])
    lengths = torch.tensor([len(value) for value in values])
    keys[(lengths.cumsum(0) - lengths)[torch.tensor(pinned)]] = math.inf
    owners = torch.arange(len(values)).repeat_interleave(lengths)[keys.argsort(descending=True, stable=True)]
    stored = torch.tensor(costs)[owners].cumsum(0)
    whole = int(stored[-1]) / total
    shares = [whole * STEP**place for place in range(SIZES)] + ([] if size is None else [size])
    counts = {int((stored <= share * total * (1 + 1e-9)).sum()) for share in shares}
    least = max(sum(pinned), 1)
    return [
        torch.bincount(owners[:count], minlength=len(values)).tolist()
        for count in sorted({max(count, least) for count in counts})
    ]


def kept(changed: Tensor, none: Tensor) -> Tensor:
    """Return the sums from which `effect` follows, (5,), and which processes may add up.

    Args:
        changed: Divergence of each example's answers from those of the whole adapter, (examples,).
        none: The same without the adapter.
    """
    return torch.stack([changed.sum(), none.sum(), changed @ changed, changed @ none, none @ none])


def effect(sums: Tensor, examples: int) -> tuple[float, float]:
    """Return the share of the effect that is kept, 1 − Σ changed / Σ none, and its standard error over examples."""
    changed, none, squared, crossed, whole = sums.tolist()
    lost = changed / none
    spread = max(squared - 2 * lost * crossed + lost**2 * whole, 0.0) * examples / max(examples - 1, 1)
    return 1 - lost, math.sqrt(spread) / none
