"""What a run's result says of the update of every module: ranks, singular values, overlaps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from aroma.errors import NonFiniteError, bad_value
from aroma.spectra import effective_rank, singular_values, span_overlaps


def spectra_of(components: Mapping[str, tuple[Tensor, Tensor]], r: int = 1) -> dict[str, Any]:
    """Return the spectra of a model's updates, JSON-able.

    Args:
        components: B (m, R) and A (R, n) of the whole update by module name, the scale folded in; a module that was
            adapted and ended at rank 0 has R = 0.
        r: Rank of one component, for the overlaps.

    Returns:
        - ``ranks``: by module, how many columns of B and rows of A make a product that is not zero, at most
          min(m, n). Two components in one direction count twice, as in the paper.
        - ``effective_ranks``: by module (Appendix C).
        - ``singular_values``: by module, descending, min(R, m, n) of them.
        - ``overlaps``: by module, for each component after the first, how much of it lies in the span of the right
          factors of the earlier ones, in [0, 1]; see `aroma.spectra.span_overlaps`.
        - ``average_rank``, ``effective_rank``: means over the modules; None where there are none.

    Raises:
        NonFiniteError: An update holds NaN or infinity.
    """
    for name, factors in components.items():
        _require_finite(name, *factors)
    values = {name: singular_values(B, A) for name, (B, A) in components.items()}
    ranks = {name: _rank(B, A) for name, (B, A) in components.items()}
    effective_ranks = {name: effective_rank(sigma) for name, sigma in values.items()}
    return {
        "average_rank": _mean(ranks),
        "effective_rank": _mean(effective_ranks),
        "ranks": ranks,
        "effective_ranks": effective_ranks,
        "singular_values": {name: sigma.tolist() for name, sigma in values.items()},
        "overlaps": {name: span_overlaps(B, A, r).tolist() for name, (B, A) in components.items()},
    }


def _rank(B: Tensor, A: Tensor) -> int:
    used = (B != 0).any(dim=0) & (A != 0).any(dim=1)
    return min(int(used.sum()), B.shape[0], A.shape[1])


def _mean(values: Mapping[str, float]) -> float | None:
    return sum(values.values()) / len(values) if values else None


def _require_finite(name: str, B: Tensor, A: Tensor) -> None:
    for factor, matrix in (("B", B), ("A", A)):
        if not matrix.isfinite().all():
            raise bad_value(
                f"{name}.{factor}",
                "not finite",
                "its update holds NaN or infinity: training has diverged; lower the learning rate",
                NonFiniteError,
            )
