"""Bytes of an optimizer's state, by what it keeps of every trained tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from .inventory import Held

_STEP = 4
"""PyTorch counts the steps of every parameter in a float32."""

_SMALLEST_IN_8_BITS, _BLOCK, _CODE_TABLES = 4096, 256, 2 * 256 * 4
"""bitsandbytes: smaller tensors stay in float32; numbers that share a scale; two tables that all tensors share."""


def state_bytes(optimizer: str, trained: Iterable[Held]) -> int:
    """Return the bytes of the state of `optimizer`, a name of the settings, over the tensors that it trains."""
    tensors = [one for one in trained if one.bytes]
    total = sum(_STATES[optimizer](one) for one in tensors)
    if optimizer == "adamw8bit" and any(_is_in_8_bits(one) for one in tensors):
        total += _CODE_TABLES
    return total


def _adamw(one: Held) -> int:
    return 2 * one.bytes + _STEP


def _adafactor(one: Held) -> int:
    if len(one.shape) < 2:
        return one.bytes + _STEP
    *outer, rows, columns = one.shape
    return math.prod(outer) * (rows + columns) * one.itemsize + _STEP


def _adamw_8bit(one: Held) -> int:
    elements = math.prod(one.shape)
    if not _is_in_8_bits(one):
        return 2 * 4 * elements
    return 2 * (elements + 4 * -(-elements // _BLOCK))


def _is_in_8_bits(one: Held) -> bool:
    return math.prod(one.shape) >= _SMALLEST_IN_8_BITS


_STATES: dict[str, Callable[[Held], int]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw_8bit,
    "adafactor": _adafactor,
    "sgd": lambda one: 0,
    "sgd-momentum": lambda one: one.bytes,
}
