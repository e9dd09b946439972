"""Counts what operations allocate and compute, on tensors without data."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_ATEN = torch.ops.aten


def _attention(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Operations of the two products of attention over all pairs of tokens, also of those that a mask leaves out."""
    return 2 * query.numel() * key.shape[-2] + 2 * query.shape[:-1].numel() * key.shape[-2] * value.shape[-1]


def _of_addmm_(into: Tensor, one: Tensor, other: Tensor, *_: Any, **__: Any) -> int:
    return 2 * one.numel() * other.shape[-1]


def _of_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return _attention(query, key, value)


def _of_attention_backward(_gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return 5 * _attention(query, key, value) // 2  # five products for the two, one of them made again


_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _ATEN.addmm_: _of_addmm_,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _of_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _of_attention_backward,
}
"""PyTorch's own formulas, and those that it lacks."""


class Meter(TorchDispatchMode):
    """Counts bytes that are alive, their peak, and floating-point operations, while it is entered.

    Args:
        there: Tensors that are there before and after, and do not count.

    Attributes:
        live: Bytes of the storages that are alive now.
        peak: Most bytes that were.
        flops: Floating-point operations.
    """

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._there = [tensor.untyped_storage() for tensor in there]
        self._known = {storage._cdata for storage in self._there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = _FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._known:
            return
        self._known.add(place)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.live -= size
