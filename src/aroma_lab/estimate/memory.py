"""Bytes: what a step keeps and needs at its peak, what happens between steps, and what lies on each device."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface

from aroma.criteria import cross_term, inner_product, product_norm_squared
from aroma.tuner import AromaLinear, fused, layer

from .model import (
    ADAPTER,
    ATTENTION,
    EstimateSettings,
    adapted_layers,
    build,
    layers_of,
    leading_layers,
    length_of,
    task_of,
)
from .tensors import Inventory, TensorSize

Strategy = Literal["one", "ddp", "fsdp2", "zero1", "zero2", "zero3"]

_SHARDED: dict[Strategy, tuple[str, ...]] = {
    "fsdp2": ("weights", "gradients", "state"),
    "zero1": ("state",),
    "zero2": ("gradients", "state"),
    "zero3": ("weights", "gradients", "state"),
}
"""What is sharded; the rest is whole on every device."""

_ZERO3_LIVE = 10**9
"""Elements that ZeRO-3 gathers at most before it frees some, DeepSpeed's default."""


# One step on tensors without data ------------------------------------------------------------------------------------


class Meter(TorchDispatchMode):
    """Counts the bytes of storages made while it is entered.

    Args:
        existing: Tensors that exist before and after, and do not count.

    Attributes:
        live: Bytes of the storages that are alive now.
        peak: The most that were alive at any time.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: int = 0
        self.peak: int = 0
        self._existing = [tensor.untyped_storage() for tensor in existing]
        self._known = {storage._cdata for storage in self._existing}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return
        self._known.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


class StepBytes(NamedTuple):
    """What forward and backward of one batch take on one device.

    Args:
        kept: Bytes that wait for backward when forward has ended.
        peak: The most bytes at any time, beyond weights, adapter and gradients of the trained parameters.
    """

    kept: int
    peak: int


def step_bytes(settings: EstimateSettings, config: Any) -> StepBytes:
    """Return what a step takes.

    If the blocks of a model are alike, two short models are run, and each further block takes what the third took:
    from two blocks on, both numbers are linear in the number of blocks.

    Raises:
        ConfigError: See `build`.
    """
    layers, short = layers_of(config), leading_layers(config) + 2
    if layers is None or layers <= short + 1:
        return run_step(build(settings, config), settings, config)
    longer, shorter = (run_step(build(settings, config, count), settings, config) for count in (short + 1, short))
    return StepBytes(
        *(more + (layers - short - 1) * (more - less) for more, less in zip(longer, shorter, strict=True))
    )


def run_step(model: Any, settings: EstimateSettings, config: Any) -> StepBytes:
    """Run forward and backward of a model on the meta device, after giving it its finished components."""
    for one in adapted_layers(model) if settings.rank else ():
        if isinstance(one, AromaLinear):
            with torch.device("meta"):
                B, A = torch.zeros(one.out_features, settings.rank), torch.zeros(settings.rank, one.in_features)
                one.finished(ADAPTER).append(B, A)
    if settings.gradient_checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    batch = _batch(settings, config)
    given = [*(parameter.grad for parameter in trained), *batch.values()]
    meter = Meter([*model.parameters(), *model.buffers(), *(one for one in given if isinstance(one, Tensor))])
    with as_on_a_device(), meter:
        loss = model(**batch).loss
        kept = meter.live
        torch.autograd.backward(loss)  # not loss.backward(), which does more than the engine does
    return StepBytes(kept, meter.peak)


def _batch(settings: EstimateSettings, config: Any) -> dict[str, Any]:
    size = (settings.batch_size, length_of(settings, config))
    tokens = torch.zeros(size, dtype=torch.long, device="meta")
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if task_of(settings, config) == "causal-lm":
        return {**batch, "labels": tokens, "use_cache": False}
    return {**batch, "labels": tokens[:, 0].clone()}


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend as a fused kernel does, which keeps query, key, value, result and one number a row.

    There is no padding of tokens. `query` is (batch, heads, length, size); `key` and `value` may have fewer heads, and
    values that are smaller than queries (latent attention) are padded to their size, as for FlashAttention.

    Returns:
        The result, (batch, length, heads, size), and no attention weights.
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    fused_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    missing = query.shape[-1] - value.shape[-1]
    padded = F.pad(value, (0, missing)) if missing else value
    result = fused_attention(query, key, padded, 0.0, causal, attn_mask=None, scale=scaling)[0]
    return result[..., : value.shape[-1]].transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Drop as a GPU does, which keeps a mask of one byte per number."""
    return torch.native_dropout(input, p, training)[0] if training and p > 0 else input


def _histc(input: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    """Return the counts of tokens by expert, (bins,), which have no values here."""
    return input.new_empty(bins)


class _GroupedMm(torch.autograd.Function):
    """Grouped matmuls in a precision of which PyTorch has no tensors without data: it keeps what they keep."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Map x (S, n) with weight (E, n, m) to (S, m)."""
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        ctx.shapes = x.shape, weight.shape
        return x.new_empty(x.shape[0], weight.shape[2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return gradients of x (S, n) and weight (E, n, m) for that of the result (S, m)."""
        made = [
            gradient.new_empty(shape) if needed else None
            for shape, needed in zip(ctx.shapes, ctx.needs_input_grad, strict=True)
        ]
        return made[0], made[1]


def _grouped_mm(x: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
    """Map x (S, n) with weight (E, n, m) to (S, m); `offs` (E,) has no values here."""
    result: Tensor = _GroupedMm.apply(x, weight)  # type: ignore[no-untyped-call, unused-ignore]
    return result


@contextmanager
def as_on_a_device() -> Iterator[None]:
    """Make tensors without data take the same path as real ones.

    AROMA's layer uses plain operations for tensors without data, as it does under tracing, and PyTorch has no autocast
    for them. Here the memory of the layer's own fused operation is wanted.
    """
    changes: list[tuple[Any, str, Any]] = [
        (layer, "is_traced", lambda x: False),
        (layer, "autocast_dtype", lambda x: None),
        (fused, "autocast_dtype", lambda x: None),
        (F, "dropout", _dropout),
        (F, "grouped_mm", _grouped_mm),
        (torch, "autocast", lambda *_, **__: nullcontext()),
        (torch, "histc", _histc),
    ]
    with ExitStack() as stack:
        for where, name, value in changes:
            stack.enter_context(patch.object(where, name, value))
        yield


# Between two steps ---------------------------------------------------------------------------------------------------


def inner_check_bytes(inventory: Inventory, settings: EstimateSettings) -> int:
    """Return the bytes that an inner check needs: the pairs of one shape, stacked and in float64."""
    peak = 0
    for (m, n), count in Counter(inventory.modules).items():
        with torch.device("meta"):
            pairs = [(torch.zeros(m, settings.r), torch.zeros(settings.r, n)) for _ in range(count)]
        with Meter() as meter:
            product_norm_squared(*map(torch.stack, zip(*pairs, strict=True))).sqrt()
        peak = max(peak, meter.peak)
    return peak


def outer_step_bytes(inventory: Inventory, settings: EstimateSettings) -> int:
    """Return the bytes that an outer step needs for one module at a time: its norm, or its new storage."""
    peak, R, r = 0, settings.rank, settings.r
    for m, n in {*inventory.modules}:
        with torch.device("meta"):
            weight = torch.zeros(m, n, dtype=getattr(torch, settings.weight_dtype))
            b, a, B, A = torch.zeros(m, r), torch.zeros(r, n), torch.zeros(m, R), torch.zeros(R, n)
        with Meter([weight, b, a, B, A]) as meter:
            cross_term(weight, b, a)
            inner_product(B, A, b, a)
        dequantised = 2 * m * n if settings.is_quantised else 0
        # While a new storage is filled, the old one exists too. The new one is among the finished components.
        peak = max(peak, meter.peak + dequantised, 4 * (m + n) * R)
    return peak


# The optimizer's state -----------------------------------------------------------------------------------------------


def state_bytes(optimizer: str, trained: Iterable[TensorSize]) -> int:
    """Return the bytes of the state of `optimizer`, a name of the settings, over the tensors that it trains."""
    tensors = [size for size in trained if size.bytes]
    total = sum(_state_bytes(optimizer, size) for size in tensors)
    if optimizer == "adamw8bit" and any(math.prod(size.shape) >= _IN_8_BITS for size in tensors):
        total += 2 * 256 * 4  # two code tables that all tensors share
    return total


_IN_8_BITS = 4096
"""Elements from which on bitsandbytes keeps the state of a tensor in 8 bits."""


def _state_bytes(optimizer: str, size: TensorSize) -> int:
    elements = math.prod(size.shape)
    if optimizer == "adamw":
        return 2 * size.bytes + 4  # PyTorch counts the steps of every parameter in a float32
    if optimizer == "adamw8bit":
        # 256 numbers share a scale.
        return 2 * (elements + 4 * -(-elements // 256)) if elements >= _IN_8_BITS else 2 * 4 * elements
    if optimizer == "adafactor" and len(size.shape) >= 2:
        *outer, rows, columns = size.shape
        return math.prod(outer) * (rows + columns) * size.itemsize + 4
    return {"adafactor": size.bytes + 4, "sgd-momentum": size.bytes, "sgd": 0}[optimizer]


# On each device ------------------------------------------------------------------------------------------------------


PARTS = {
    "weights": "base weights",  # in their dtype, or packed
    "constants": "scales of quantised weights",  # and code tables
    "buffers": "buffers of the base model",
    "pairs": "adapter in training",
    "finished": "finished components",  # including padding
    "head": "trained head",  # and whatever else trains
    "gradients": "gradients",
    "optimizer": "optimizer state",  # with ZeRO also its own copy of what trains
    "buckets": "buckets for reduction",  # copies of the gradients (DDP, ZeRO)
    "gathered": "gathered parameters",  # sharded ones that are whole at one time (FSDP2, ZeRO-3)
    "kept": "kept for backward",
    "step_extra": "peak of a step, beyond that",
    "between_extra": "checks and growth, beyond a step",  # or the optimizer
}
"""Parts of a device's memory, by their names in JSON, with their labels in tables. Their sum is the peak."""


@dataclass(frozen=True)
class Needs:
    """What a training needs, from which the bytes on any number of devices follow.

    Args:
        settings: What is estimated.
        inventory: The model's tensors.
        step: One step on one device.
        finished: Bytes of the finished components.
        between: Bytes of the larger of an inner check and an outer step; 0 for LoRA.
    """

    settings: EstimateSettings
    inventory: Inventory
    step: StepBytes
    finished: int
    between: int

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """The strategies that can train it."""
        return get_args(Strategy)

    def on(self, strategy: Strategy, devices: int = 1) -> dict[str, int]:
        """Return the bytes of `PARTS` on the device that holds most of `devices`, and their sum as `total`.

        With one device all strategies are alike.
        """
        if devices == 1:
            strategy = "one"
        inventory, is_zero = self.inventory, strategy.startswith("zero")

        def held(kind: str, sizes: Iterable[TensorSize]) -> list[TensorSize]:
            if kind not in _SHARDED.get(strategy, ()):
                return [*sizes]
            return [size.flat_shard(devices) if is_zero else size.shard(devices) for size in sizes]

        gradients, stepped = _bytes(held("gradients", inventory.trained)), held("state", inventory.trained)
        # Intermediates of an optimizer are as large as what it trains.
        between = max(self.between, gradients)
        found = {
            "weights": _bytes(held("weights", inventory.weights)),
            "constants": inventory.constants,
            "buffers": inventory.buffers,
            "pairs": _bytes(held("weights", inventory.pairs)),
            "finished": self.finished,
            "head": _bytes(held("weights", inventory.head)),
            "gradients": gradients,
            "optimizer": state_bytes(self.settings.optimizer, stepped) + (_bytes(stepped) if is_zero else 0),
            "buckets": _bytes(inventory.trained) if strategy == "ddp" or is_zero else 0,
            "gathered": self._gathered(strategy),
            "kept": self.step.kept,
            "step_extra": self.step.peak - self.step.kept,
            "between_extra": max(0, between - self.step.peak),
        }
        return {**found, "total": sum(found.values())}

    def _gathered(self, strategy: Strategy) -> int:
        inventory = self.inventory
        if strategy == "fsdp2":  # what lies outside the blocks for the whole step, and of the blocks one and the next
            return inventory.root + 2 * inventory.block
        if strategy == "zero3":
            sizes = (*inventory.weights, *inventory.trained)
            elements = sum(math.prod(size.shape) for size in sizes)
            live = math.ceil(_bytes(sizes) * min(1, _ZERO3_LIVE / elements))
            return max(live, *(size.bytes for size in sizes))  # one parameter is always whole
        return 0


def _bytes(sizes: Iterable[TensorSize]) -> int:
    return sum(size.bytes for size in sizes)
