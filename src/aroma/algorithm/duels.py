"""The duels of growth by evidence: which unused directions win a batch, and how surely they win more than chance.

`evidence.py` has the equations, and lets the rule decide by them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

_THETAS = (np.arange(1, 200) / 200) / 2 + 0.5
"""Grid of the mixture: probabilities of heads above one half."""


class Reading(NamedTuple):
    """What one batch says of all matrices, in module order.

    Args:
        unused: z, the steepness of the unused directions, (matrices, P); NaN where the batch overflowed,
            −∞ where there is no such direction.
        moves: Steepness along the moves of the components, (matrices, S); NaN where there is none, or none known.
        pending: Whether a matrix has a component of which no move is known yet, (matrices,).
    """

    unused: np.ndarray
    moves: np.ndarray
    pending: np.ndarray


def duel(reading: Reading, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Return for every unused direction whether it won the batch, and whether it was judged at all.

    A matrix is not judged while the move of one of its components is unknown, or by a batch that overflowed; none is
    judged while components train of which no move is known.

    Args:
        reading: What the batch says of all matrices.
        factor: κ.

    Returns:
        Heads and judged, boolean, (matrices, P).
    """
    known = ~np.isnan(reading.moves)
    if not known.any() and reading.pending.any():
        nothing = np.zeros(reading.unused.shape, dtype=bool)
        return nothing, nothing
    values = np.where(known, reading.moves, 0.0)
    everywhere = values.sum() / max(known.sum(), 1)  # where nothing trains, any descent wins
    counts = known.sum(1)
    own = np.where(counts > 0, values.sum(1) / np.maximum(counts, 1), everywhere)
    rival = np.maximum(own, everywhere)[:, None]
    judged = ~reading.pending[:, None] & np.isfinite(reading.unused)
    return judged & (reading.unused > 0) & (reading.unused > factor * rival), judged


@lru_cache(maxsize=4096)
def log_evidence(heads: int, flips: int) -> float:
    """Return log E of `heads` among `flips`: the mean over θ in (½, 1) of (2θ)^heads (2(1 − θ))^tails."""
    exponents = heads * np.log(2 * _THETAS) + (flips - heads) * np.log(2 - 2 * _THETAS)
    top = exponents.max()
    return float(top + np.log(np.exp(exponents - top).mean()))


def log_mean(logarithms: Sequence[float]) -> float:
    """Return the logarithm of the mean of what `logarithms` are of."""
    top = max(logarithms)
    return top + math.log(sum(math.exp(value - top) for value in logarithms) / len(logarithms))


def directions_that_convince(logarithms: Sequence[float], threshold: float) -> list[int]:
    """Return the directions of a matrix along which components are born, those that won most first.

    A birth takes the money of its direction: 1 is left of it.

    Args:
        logarithms: log E of every direction alone.
        threshold: −log α, over 0.
    """
    left, found = [*logarithms], []
    while log_mean(left) >= threshold:
        found.append(max(range(len(left)), key=left.__getitem__))
        left[found[-1]] = 0.0
    return found


def flips_to_birth(significance: float) -> int:
    """Return how many batches in a row all unused directions of a matrix must win for a birth at `significance`."""
    threshold = -math.log(significance)
    return next(flips for flips in range(1, 10_000) if log_evidence(flips, flips) >= threshold)
