"""What Algorithm 1 needs for a while between two steps: checks of norms, and the growth of the storages."""

from __future__ import annotations

from collections import Counter

import torch

from aroma.criteria import cross_term, inner_product, product_norm_squared

from .inventory import Inventory
from .meter import Meter
from .settings import ScaleSettings

_FLOAT, _SIXTEEN_BITS = 4, 2


def inner_check_bytes(inventory: Inventory, settings: ScaleSettings) -> int:
    """Return the bytes that an inner check needs: the pairs of one shape, stacked and in float64."""
    peak = 0
    for (m, n), count in Counter(inventory.modules).items():
        with torch.device("meta"):
            pairs = [(torch.zeros(m, settings.r), torch.zeros(settings.r, n)) for _ in range(count)]
        with Meter() as meter:
            product_norm_squared(*map(torch.stack, zip(*pairs, strict=True))).sqrt()
        peak = max(peak, meter.peak)
    return peak


def outer_step_bytes(inventory: Inventory, settings: ScaleSettings) -> int:
    """Return the bytes that an outer step needs for one module at a time: its norm, or its new storage."""
    return max((_of_module(m, n, settings) for m, n in {*inventory.modules}), default=0)


def _of_module(m: int, n: int, settings: ScaleSettings) -> int:
    R, r = settings.rank, settings.r
    with torch.device("meta"):
        weight = torch.zeros(m, n, dtype=getattr(torch, settings.weight_dtype))
        b, a, B, A = torch.zeros(m, r), torch.zeros(r, n), torch.zeros(m, R), torch.zeros(R, n)
    with Meter([weight, b, a, B, A]) as meter:
        cross_term(weight, b, a)
        inner_product(B, A, b, a)
    dequantised = _SIXTEEN_BITS * m * n if settings.is_quantised else 0
    # While a new storage is filled, the old one is there too; the new one is counted among the finished components.
    growth = _FLOAT * (m + n) * R
    return max(meter.peak + dequantised, growth)
