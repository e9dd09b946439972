"""Bytes: kept for backward, of the optimizer's state, at the peak."""

from __future__ import annotations

import gc
import multiprocessing
import warnings
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from aroma.cli.quiet import quiet
from aroma.errors import AromaWarning

from ..run.machine import end_with_parent, peak_bytes
from .cases import FLOOR, Contender, select_cases
from .models import BenchSettings, make_batch, make_model


class _Kept:
    """What autograd holds in place of a tensor, so that it can be seen whether it still holds it."""

    def __init__(self, tensor: Tensor) -> None:
        # Detached: the output of a node would hold the node, which holds this, and neither would ever be freed.
        self.tensor = tensor.detach()


def kept_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Return the bytes that a forward pass keeps for its backward pass.

    A tensor counts with its whole storage, since a view keeps that alive, and each storage counts once. Parameters
    and buffers of `model` do not count. The number is exact, and the same on every run.
    """
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        holder = _Kept(tensor)
        kept.add(holder)
        return holder

    own = _storages((*model.parameters(), *model.buffers()))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        loss = forward()
    # What the graph has freed by now does not wait for backward.
    storages = _storages([holder.tensor for holder in kept])
    del loss
    return sum(size for place, size in storages.items() if place not in own)


def optimizer_bytes(optimizer: Any) -> int:
    """Return the bytes of the optimizer's state; 0 for None."""
    return sum(_storages(_state_tensors(optimizer)).values())


def peak_resident_bytes(settings: BenchSettings, key: str) -> int | None:
    """Return the peak resident memory of a fresh process that trains one case for two steps.

    Warns:
        AromaWarning: The process failed, for example because memory ran out; then it is None.
    """
    with fresh_process() as process:
        try:
            return process.submit(_train_two_steps, settings, key).result()
        except (RuntimeError, MemoryError) as error:
            said = f"{key}: the process that measures its peak memory failed ({error}), so it has none"
            warnings.warn(said, AromaWarning, stacklevel=2)
            return None


def fresh_process() -> ProcessPoolExecutor:
    """Return a process that has nothing of this one, and ends when this one is killed."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=_begin)


def _begin() -> None:
    end_with_parent()
    quiet()


def _train_two_steps(settings: BenchSettings, key: str) -> int:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    model = make_model(settings)
    case = select_cases([key], compiled=False)[0 if key == FLOOR else 1]
    contender = Contender(case, model, make_batch(model, settings), settings.seed)
    for _ in range(2):  # the second step has the optimizer's state from its beginning
        contender.step()
    return peak_bytes()


def peak_of(contender: Contender, settings: BenchSettings) -> int | None:
    """Return the peak memory of a case; None on a CPU if it is compiled, since the compiler would be the peak."""
    if settings.device == "cuda":
        return _peak_gpu_bytes(contender)
    return None if contender.case.compiled else peak_resident_bytes(settings, contender.case.key)


def _peak_gpu_bytes(contender: Contender) -> int:
    """Return the peak GPU memory of a case as if no other model were on the device.

    That is what a step needs beyond what was there before, plus the model and the optimizer's state, which were.
    """
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender.step()
    contender.clear()
    torch.cuda.synchronize()
    model = contender.model
    resident = _storages((*model.parameters(), *model.buffers(), *_state_tensors(contender.optimizer)))
    return torch.cuda.max_memory_allocated() - before + sum(resident.values())


def _state_tensors(optimizer: Any) -> list[Tensor]:
    if optimizer is None:
        return []
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def _storages(tensors: Iterable[Tensor]) -> dict[tuple[torch.device, int], int]:
    """Return address and bytes of every storage that holds one of `tensors`."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {(storage.device, storage.data_ptr()): storage.nbytes() for storage in storages if storage.nbytes()}
