"""Bytes: kept for backward, of the optimizer's state, at the peak."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class _Kept:
    """What autograd holds in place of a tensor, so that it can be seen whether it still holds it."""

    def __init__(self, tensor: Tensor) -> None:
        # Detached: the output of a node would hold the node, which holds this, and neither would ever go.
        self.tensor = tensor.detach()


def kept_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Return the bytes that a forward pass keeps for its backward pass.

    A tensor counts with its whole storage, which a view keeps alive, and a storage counts once. Parameters and buffers
    of `model` are there anyway and do not count. The number is exact and the same on every run.

    Args:
        forward: Computes the loss.
        model: The model that it calls.
    """
    kept: list[weakref.ref[_Kept]] = []

    def pack(tensor: Tensor) -> _Kept:
        holder = _Kept(tensor)
        kept.append(weakref.ref(holder))
        return holder

    own = set(_storages((*model.parameters(), *model.buffers())))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        loss = forward()
    # What the graph has let go of by now would not wait for backward. What it holds has an address of its own.
    alive = [holder.tensor for reference in kept if (holder := reference()) is not None]
    storages = _storages(alive)
    del loss
    return sum(size for place, size in storages.items() if place not in own)


def optimizer_bytes(optimizer: Any) -> int:
    """Return the bytes of the optimizer's state; 0 for no optimizer."""
    return sum(_storages(_state_tensors(optimizer)).values())


def trainable_parameters(model: nn.Module) -> int:
    """Return the number of parameters that train, the head's included."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def peak_gpu_bytes(step: Callable[[], Any], model: nn.Module, optimizer: Any) -> int:
    """Return the peak of a case's GPU memory, as if no other model were on the device.

    That is what `step` needs beyond what was there before, and model and optimizer state, which were.
    """
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    resident = _storages((*model.parameters(), *model.buffers(), *_state_tensors(optimizer)))
    return torch.cuda.max_memory_allocated() - before + sum(resident.values())


def _state_tensors(optimizer: Any) -> list[Tensor]:
    if optimizer is None:
        return []
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def _storages(tensors: Iterable[Tensor]) -> dict[tuple[torch.device, int], int]:
    """Return place and bytes of every storage that holds one of `tensors`."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {(storage.device, storage.data_ptr()): storage.nbytes() for storage in storages if storage.nbytes()}
