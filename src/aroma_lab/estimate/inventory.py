"""What lies on a device for the whole run: weights, components in training, finished ones, trained heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aroma.tuner import aroma_layers
from aroma.tuner.finished import FinishedComponents

from .architecture import ADAPTER
from .quantised import StandIn, constants_bytes, packed_shape
from .settings import ScaleSettings


@dataclass(frozen=True)
class Held:
    """One tensor.

    Args:
        shape: Its shape.
        itemsize: Bytes of an element.
    """

    shape: tuple[int, ...]
    itemsize: int

    @property
    def bytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.itemsize

    def shard(self, devices: int) -> Held:
        """Return the largest part that one of `devices` has: FSDP2 splits along the first dimension."""
        if not self.shape:
            return self
        return Held((-(-self.shape[0] // devices), *self.shape[1:]), self.itemsize)


@dataclass(frozen=True)
class Inventory:
    """The tensors of a model with a growing adapter.

    Args:
        parameters: Number of the base model's parameters, a trained head's included.
        modules: (m, n) of every growing module.
        weights: Frozen parameters; of quantised layers the packed bytes.
        constants: Bytes of scales and code tables of quantised layers.
        buffers: Bytes of the base model's buffers.
        pairs: Components in training.
        head: Trained parameters beside them.
        block: Bytes of the largest block, which FSDP2 gathers as one, its pairs included.
        root: Bytes outside all blocks.
    """

    parameters: int
    modules: tuple[tuple[int, int], ...]
    weights: tuple[Held, ...]
    constants: int
    buffers: int
    pairs: tuple[Held, ...]
    head: tuple[Held, ...]
    block: int
    root: int

    @property
    def trained(self) -> tuple[Held, ...]:
        """Everything that the optimizer holds."""
        return (*self.pairs, *self.head)


def take_inventory(model: Any, dtype: str) -> Inventory:
    """Count a model with a growing adapter, on the meta device or real; a tied weight counts once.

    Args:
        model: The model.
        dtype: Of its weights, as in the settings; it says how the stand-ins of quantised layers are stored.
    """
    layers = aroma_layers(model, ADAPTER)
    in_training = {id(parameter) for layer in layers.values() for parameter in layer.pair(ADAPTER)}
    finished = {
        id(storage)
        for layer in layers.values()
        for storage in (layer.finished(ADAPTER).storage_A, layer.finished(ADAPTER).storage_B)
    }
    quantised = {id(module.weight): module for module in model.modules() if isinstance(module, StandIn)}
    held: dict[int, Held] = {}
    groups: dict[str, list[Held]] = {"weights": [], "pairs": [], "head": []}
    constants = parameters = 0
    for parameter in model.parameters():
        one = Held(tuple(parameter.shape), parameter.element_size())
        if id(parameter) in quantised:
            one = Held(packed_shape(dtype, parameter), 1)
            constants += constants_bytes(dtype, parameter)
        held[id(parameter)] = one
        kind = "pairs" if id(parameter) in in_training else "head" if parameter.requires_grad else "weights"
        groups[kind].append(one)
        parameters += parameter.numel() if kind == "weights" else 0
    block, blocks = _blocks(model, held)
    return Inventory(
        parameters=parameters,
        modules=tuple((layer.out_features, layer.in_features) for layer in layers.values()),
        weights=tuple(groups["weights"]),
        constants=constants,
        buffers=_buffer_bytes(model, finished),
        pairs=tuple(groups["pairs"]),
        head=tuple(groups["head"]),
        block=block,
        root=sum(one.bytes for one in held.values()) - blocks,
    )


def finished_bytes(inventory: Inventory, settings: ScaleSettings) -> int:
    """Return the bytes of all finished components, the padding of their last chunk included."""
    sizes: dict[tuple[int, int], int] = {}
    for m, n in {*inventory.modules}:
        with torch.device("meta"):
            finished = FinishedComponents(n, m)
            finished.append(torch.zeros(m, settings.rank), torch.zeros(settings.rank, n))
        sizes[m, n] = sum(_storage_bytes(tensor) for tensor in (finished.storage_A, finished.storage_B))
    return sum(sizes[shape] for shape in inventory.modules)


def _blocks(model: nn.Module, held: dict[int, Held]) -> tuple[int, int]:
    """Return the bytes of the largest block, and of all."""
    names = set(getattr(model.get_base_model(), "_no_split_modules", None) or ())  # type: ignore[operator]
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    # An embedding may be among them, and a block within a block counts once.
    inner = {id(module) for block in blocks for module in block.modules() if module is not block}
    sizes = [sum(held[id(p)].bytes for p in block.parameters()) for block in blocks if id(block) not in inner]
    return max(sizes, default=0), sum(sizes)


def _buffer_bytes(model: nn.Module, finished: set[int]) -> int:
    storages = {}
    for buffer in model.buffers():
        if id(buffer) not in finished:
            storage = buffer.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _storage_bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
