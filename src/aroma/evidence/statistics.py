"""The decision as pure functions of arrays: which adapter sizes are measured, and which of them is kept."""

from __future__ import annotations

import math

from torch import Tensor

from ..errors import NonFiniteError

SIZES = 8
"""Adapter sizes whose held-out loss a checkup measures, beside the base alone."""


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
    if not losses.isfinite().all():
        raise NonFiniteError("held-out loss: it is not finite; lower the learning rate, or look at the data")
    excess = losses - losses[losses.mean(1).argmin()]
    tolerated = standard_errors * excess.std(1) / math.sqrt(losses.shape[1])
    return int((excess.mean(1) <= tolerated).int().argmax())


def paired(better: Tensor, worse: Tensor) -> tuple[float, float]:
    """Return how much less one loss is than another over the same batches, both (batches,), and the standard error."""
    saved = worse - better
    return float(saved.mean()), float(saved.std() / math.sqrt(len(saved)))
