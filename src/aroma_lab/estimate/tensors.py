"""The tensors of a model with an adapter: shapes and bytes, on the meta device or real."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aroma.tuner import AromaLinear
from aroma.tuner.finished import FinishedComponents

from .model import (
    ADAPTER,
    EstimateSettings,
    adapted_layers,
    build,
    layers_of,
    leading_layers,
    packed_weights,
)


class TensorSize(NamedTuple):
    """Shape of a tensor, and bytes of an element."""

    shape: tuple[int, ...]
    itemsize: int

    @property
    def bytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.itemsize

    def shard(self, devices: int) -> TensorSize:
        """Return the largest part that FSDP2 gives to one of `devices`: it splits along the first dimension."""
        if not self.shape:
            return self
        return TensorSize((-(-self.shape[0] // devices), *self.shape[1:]), self.itemsize)

    def flat_shard(self, devices: int) -> TensorSize:
        """Return the part that ZeRO gives to one of `devices`: it splits the elements in a row."""
        return TensorSize((-(-math.prod(self.shape) // devices),), self.itemsize)


@dataclass(frozen=True)
class Inventory:
    """The tensors of a model with an adapter.

    Args:
        parameters: Number of the base model's parameters, including a trained head.
        modules: (m, n) of every adapted matrix: a module, or an expert of a parameter.
        weights: Frozen parameters; of quantised layers the packed bytes.
        constants: Bytes of scales and code tables of quantised layers.
        buffers: Bytes of the base model's buffers.
        pairs: Adapter matrices in training.
        head: Other trained parameters.
        block: Bytes of the largest block, which FSDP2 gathers as one, including its pairs.
        root: Bytes outside all blocks.
    """

    parameters: int
    modules: tuple[tuple[int, int], ...]
    weights: tuple[TensorSize, ...]
    constants: int
    buffers: int
    pairs: tuple[TensorSize, ...]
    head: tuple[TensorSize, ...]
    block: int
    root: int

    @property
    def trained(self) -> tuple[TensorSize, ...]:
        """Everything that the optimizer holds."""
        return (*self.pairs, *self.head)


def inventory_of(settings: EstimateSettings, config: Any) -> Inventory:
    """List the tensors of the model of `settings`.

    With adapted experts two short models are built, and each further block has what the second has more than the
    first: the matrices of a large model are tens of thousands of modules.
    """
    layers, short = layers_of(config), leading_layers(config) + 1
    if not settings.target_parameters or layers is None or layers <= short + 1:
        return take_inventory(build(settings, config), settings.dtype)
    less, more = (take_inventory(build(settings, config, count), settings.dtype) for count in (short, short + 1))
    return _continued(less, more, layers - short - 1)


def _continued(less: Inventory, more: Inventory, blocks: int) -> Inventory:
    """Return the inventory of a model that is longer than that of `more` by `blocks` times what `less` has fewer."""
    changed: dict[str, Any] = {}
    for name in ("modules", "weights", "pairs", "head"):
        added = Counter(getattr(more, name)) - Counter(getattr(less, name))
        changed[name] = getattr(more, name) + tuple(added.elements()) * blocks
    for name in ("parameters", "constants", "buffers", "root"):
        changed[name] = getattr(more, name) + blocks * (getattr(more, name) - getattr(less, name))
    return replace(more, **changed)


def take_inventory(model: Any, dtype: str) -> Inventory:
    """List the tensors of a model with an adapter, on the meta device or real; a tied weight counts once.

    Args:
        dtype: Of its weights, as in the settings; it says how quantised layers are stored.
    """
    layers = adapted_layers(model)
    pairs = {id(factor[ADAPTER].weight) for layer in layers for factor in (layer.lora_A, layer.lora_B)}
    finished = {
        id(buffer)
        for layer in layers
        if isinstance(layer, AromaLinear)
        for buffer in layer.finished(ADAPTER).buffers()
    }
    quantised = {id(weight) for weight in packed_weights(model)}
    sizes: dict[int, TensorSize] = {}
    groups: dict[str, list[TensorSize]] = {"weights": [], "pairs": [], "head": []}
    constants = parameters = 0
    for parameter in model.parameters():
        size = TensorSize(tuple(parameter.shape), parameter.element_size())
        if id(parameter) in quantised:
            size = _packed(dtype, parameter)
            constants += _constants_bytes(dtype, parameter)
        sizes[id(parameter)] = size
        kind = "pairs" if id(parameter) in pairs else "head" if parameter.requires_grad else "weights"
        groups[kind].append(size)
        parameters += parameter.numel() if kind == "weights" else 0
    block, blocks = _blocks(model, sizes)
    return Inventory(
        parameters=parameters,
        modules=tuple(
            (layer.out_features, layer.in_features)
            for layer in layers
            for _ in range(getattr(layer, "num_experts", 1))
        ),
        weights=tuple(groups["weights"]),
        constants=constants,
        buffers=_storage_bytes([buffer for buffer in model.buffers() if id(buffer) not in finished]),
        pairs=tuple(groups["pairs"]),
        head=tuple(groups["head"]),
        block=block,
        root=sum(size.bytes for size in sizes.values()) - blocks,
    )


def finished_bytes(inventory: Inventory, settings: EstimateSettings) -> int:
    """Return the bytes of all finished components, including the padding of their last chunk."""
    if not settings.rank:
        return 0
    sizes: dict[tuple[int, int], int] = {}
    for m, n in {*inventory.modules}:
        with torch.device("meta"):
            finished = FinishedComponents(n, m)
            finished.append(torch.zeros(m, settings.rank), torch.zeros(settings.rank, n))
        sizes[m, n] = _storage_bytes([*finished.buffers()])
    return sum(sizes[shape] for shape in inventory.modules)


def _packed(dtype: str, weight: Tensor) -> TensorSize:
    """Return the size of the bytes in which bitsandbytes holds a weight, (m, n) or (E, m, n)."""
    return TensorSize((-(-weight.numel() // 2), 1) if dtype == "nf4" else tuple(weight.shape), 1)


def _constants_bytes(dtype: str, weight: Tensor) -> int:
    """Return the bytes of the scales and code tables of a weight (m, n)."""
    if dtype == "int8":
        return 4 * weight.shape[0]
    # 64 weights share a scale of one byte, and 256 scales share one of four (double quantization). Four bytes each
    # are also the entries of both code tables, and the mean of the scales.
    blocks = -(-weight.numel() // 64)
    return blocks + 4 * (-(-blocks // 256) + 16 + 256 + 1)


def _blocks(model: Any, sizes: dict[int, TensorSize]) -> tuple[int, int]:
    """Return the bytes of the largest block, and of all blocks."""
    names = set(getattr(model.get_base_model(), "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    # An embedding may be among them, and a block within a block counts once.
    inner = {id(module) for block in blocks for module in block.modules() if module is not block}
    found = [sum(sizes[id(p)].bytes for p in block.parameters()) for block in blocks if id(block) not in inner]
    return max(found, default=0), sum(found)


def _storage_bytes(tensors: list[Tensor]) -> int:
    storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())
