"""The decision as pure functions of arrays: an order of directions, and how many of the first ones to keep."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import NonFiniteError

SIZES = 8
"""Adapter sizes whose held-out loss a checkup measures, beside the base alone."""


def t_values(credits: Tensor) -> Tensor:
    """Return mean over standard error of what each direction saves, (directions,); 0 where it never does anything.

    Args:
        credits: Loss that each direction saves on each batch, (batches, directions); at least two batches.

    Raises:
        NonFiniteError: A credit is NaN or infinite.
    """
    _require_finite(credits)
    error = credits.std(0) / math.sqrt(len(credits))
    return torch.where(error > 0, credits.mean(0) / error, torch.zeros_like(error))


def ordered(scores: Tensor, alive: Tensor) -> Tensor:
    """Return the indices of the directions that are `alive`, by their scores, both (directions,), the best first."""
    order = scores.argsort(descending=True, stable=True)
    return order[alive[order]]


def sizes_to_measure(directions: int) -> list[int]:
    """Return the numbers of directions whose held-out loss is measured, evenly spread from none to all, ascending."""
    return sorted({round(directions * place / SIZES) for place in range(SIZES + 1)})


def fewest(losses: Tensor, standard_errors: float) -> int:
    """Return which size to keep: the smallest within some standard errors of the one with the least loss.

    The standard error is that of the paired difference over batches (Breiman et al., 1984, section 3.4.3).

    Args:
        losses: Held-out loss of each size on each batch, (sizes, batches), sizes ascending.
        standard_errors: How many standard errors of loss a smaller adapter may cost; 0 for the least loss.

    Raises:
        NonFiniteError: A loss is NaN or infinite.
    """
    _require_finite(losses)
    excess = losses - losses[losses.mean(1).argmin()]
    tolerated = standard_errors * excess.std(1) / math.sqrt(losses.shape[1])
    return int((excess.mean(1) <= tolerated).int().argmax())


def paired(better: Tensor, worse: Tensor) -> tuple[float, float]:
    """Return how much less one loss is than another over the same batches, both (batches,), and the standard error."""
    saved = worse - better
    return float(saved.mean()), float(saved.std() / math.sqrt(len(saved)))


def _require_finite(values: Tensor) -> None:
    """Raise NonFiniteError unless all `values` (any shape) are finite."""
    if not values.isfinite().all():
        raise NonFiniteError(
            "held-out loss: it, or its gradient, is not finite; lower the learning rate, or look at the data"
        )
