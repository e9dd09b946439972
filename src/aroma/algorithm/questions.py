"""What the answers of growth by evidence say, where the trial ends and where growth does.

A batch answers with credit_k, the loss that direction k of an update saves; `evidence.py` says what is asked.
"""

from __future__ import annotations

import math

import numpy as np

LEAST_OF_AVERAGE = 0.25
"""What a direction must save to stay, as a share of what one saves on average."""

SMALL_SHARE, SMALL_SHARE_EARLY = 0.05, 0.01
"""Share of Σ σ² over all directions of all updates that the smallest ones have together, which are asked about where
growth ends, and in an early squeeze."""

NEEDLESS_SHARE = 0.001
"""What those that go may save together, as a share of what the trial saved."""


def saves_together(credits: np.ndarray, significance: float) -> bool:
    """Return whether the batches say at significance α that all updates together save loss.

    With the updates at strength 0 that is whether they point downhill there.

    Args:
        credits: What every direction saves, by batch, (batches, matrices, S); NaN where there is none.
        significance: α.
    """
    _, chance = _t_test(np.nan_to_num(credits).sum((1, 2)))
    return float(chance) < significance


def directions_to_keep(credits: np.ndarray, significance: float) -> np.ndarray:
    """Return which directions save loss surely enough to stay, (matrices, S).

    Those are candidates that save a quarter or more of what a direction saves on average; one that is no candidate
    counts as saving nothing. Before the others have converged, a direction that is not needed saves a little in their
    place. Noise that was learnt by heart has a negative credit; where nothing is there to learn, nothing stays, but
    in one of 1/α matrices.

    Args:
        credits: What every direction saves, by batch, (batches, matrices, S); NaN where there is none.
        significance: α.
    """
    known = np.nan_to_num(credits)
    saved = np.where(candidates(known, significance), known.mean(0), 0.0)
    average = saved.sum() / max(np.isfinite(credits[0]).sum(), 1)
    found: np.ndarray = (saved > 0) & (saved >= LEAST_OF_AVERAGE * average)
    return found


def undecided_directions(credits: np.ndarray, significance: float | None) -> np.ndarray:
    """Return which directions may still be needed, (matrices, S).

    Those are all of a matrix whose whole update surely saves loss, but for what costs more than its standard error.

    Args:
        credits: What every direction saves, by batch, (batches, matrices, S); NaN where there is none.
        significance: α; None where nothing is known, so that the update of a matrix need not save loss.
    """
    return _above(-1, np.nan_to_num(credits), significance)


def keep_one_if_undecided(kept: np.ndarray, credits: np.ndarray) -> np.ndarray:
    """Return `kept`, with the best direction of every matrix of which nothing stays, unless its update costs loss.

    Where learning begins late, the batches say little of any matrix, so it keeps as much as LoRA with r = 1 has. It
    keeps none if its update as a whole costs more than the standard error of that, or if it has none.

    Args:
        kept: Which directions stay, (matrices, S).
        credits: What every direction saves, by batch, (batches, matrices, S); NaN where there is none.
    """
    t, _ = _t_test(np.nan_to_num(credits).sum(2))
    best = np.where(np.isnan(credits[0]), -np.inf, credits.mean(0)).argmax(1)
    spared = ~kept.any(1) & (t > -1)
    found: np.ndarray = kept | (spared[:, None] & (np.arange(kept.shape[1]) == best[:, None]))
    return found


def candidates(credits: np.ndarray, significance: float) -> np.ndarray:
    """Return which directions may stay, (matrices, S).

    A matrix has two ways to show that it needs components, at α/2 each, so that one that needs none has candidates
    with a chance of at most α. Its whole update saves loss: then many directions may do so that are too weak to show
    it by themselves, and those stay whose mean credit exceeds its standard error. Or single directions save loss.

    Args:
        credits: What every direction saves, by batch, (batches, matrices, S).
        significance: α.
    """
    found: np.ndarray = _above(1, credits, significance) | saves_loss(credits, significance / 2)
    return found


def _above(least: float, credits: np.ndarray, significance: float | None) -> np.ndarray:
    """Return which directions have t > `least`, of matrices whose whole update saves loss at α/2, (matrices, S)."""
    found: np.ndarray = _t_test(credits)[0] > least
    if significance is not None:
        found &= (_t_test(credits.sum(2))[1] < significance / 2)[:, None]
    return found


def saves_loss(credits: np.ndarray, significance: float) -> np.ndarray:
    """Return which directions save loss by themselves at significance α, (matrices, S).

    By Holm's procedure within each matrix: the direction with the largest t is held to α / S, the next one to
    α / (S − 1), and so on up to the first that fails. The chance that any of a matrix's directions passes without
    saving loss is α.

    Args:
        credits: What every direction saves, by batch, (batches, matrices, S).
        significance: α.
    """
    t, chance = _t_test(credits)
    order = np.argsort(-t, axis=1, kind="stable")
    levels = significance / np.arange(credits.shape[2], 0, -1)
    passes = np.logical_and.accumulate(np.take_along_axis(chance, order, 1) < levels, axis=1)
    found = np.zeros_like(passes)
    np.put_along_axis(found, order, passes, 1)
    return found


def smallest_directions(sizes: np.ndarray, share: float) -> np.ndarray:
    """Return which directions are small, (matrices, S): the smallest, with at most this share of Σ σ² together.

    Args:
        sizes: σ, (matrices, S); NaN where there is no direction.
        share: In [0, 1].
    """
    squares = np.nan_to_num(sizes).ravel() ** 2
    order = np.argsort(squares, kind="stable")
    small = np.zeros(squares.shape, dtype=bool)
    small[order] = squares[order].cumsum() <= share * squares.sum()
    found: np.ndarray = small.reshape(sizes.shape) & ~np.isnan(sizes)
    return found


def directions_to_drop(credits: np.ndarray, sizes: np.ndarray, small: np.ndarray, saved: float) -> np.ndarray:
    """Return which small directions go, (matrices, S).

    The smallest is the first. One goes unless all that go would then save more than they did at their least, by more
    than `NEEDLESS_SHARE` of what the trial saved. So what costs loss makes no room for what saves some.

    Args:
        credits: What every direction saves, by batch, with the small ones at half strength, (batches, matrices, S).
        sizes: σ, (matrices, S).
        small: Which directions are small, (matrices, S).
        saved: What the trial saved.
    """
    dropped = np.zeros_like(small)
    together = least = 0.0
    for matrix, k in np.argwhere(small)[np.argsort(sizes[small], kind="stable")]:
        found = together + credits[:, matrix, k].mean()
        if found <= least + NEEDLESS_SHARE * max(saved, 0.0):
            together, least, dropped[matrix, k] = found, min(least, found), True
    return dropped


def strength_of_least_loss(whole: np.ndarray, half: np.ndarray) -> float:
    """Return the share of all updates at which the loss is least, in [½, 1).

    Its slope is taken to be linear between the two, as that of a quadratic loss is.

    Args:
        whole: What every direction saves at full strength, by batch, (batches, matrices, S); below 0 together.
        half: The same at half strength.
    """
    overshoot, missing = -whole.sum((1, 2)).mean(), max(half.sum((1, 2)).mean(), 0.0)
    return float(0.5 + 0.5 * missing / (missing + overshoot))


def _t_test(credits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return t and its chance where nothing is saved, over the first dimension, (batches, …)."""
    batches = len(credits)
    saved, error = credits.mean(0), credits.std(0, ddof=1) / math.sqrt(batches)
    t = np.divide(saved, error, out=np.where(saved > 0, np.inf, -np.inf), where=error > 0)
    # Above a half, α would let in directions that cost loss.
    return t, np.where(saved > 0, upper_tail(t, batches - 1), 1.0)


def upper_tail(t: np.ndarray, degrees: int) -> np.ndarray:
    """Return P(T > t), any shape, for Student's t; Abramowitz and Stegun, 26.7.3 and 26.7.4, which are exact."""
    theta = np.arctan(t / math.sqrt(degrees))
    cosine, term = np.cos(theta), np.sin(theta)
    inside = np.zeros_like(theta)
    if degrees % 2:
        term = 2 / math.pi * term * cosine
        inside = 2 / math.pi * theta
    for power in range(degrees % 2 + 2, degrees + 1, 2):
        inside = inside + term
        term = term * cosine**2 * (power - 1) / power
    return (1 - inside) / 2
