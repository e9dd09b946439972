"""One step of training on tensors without data: what it keeps for backward, its peak, its operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from aroma.tuner import aroma_layers

from .architecture import ADAPTER, build, layers_of, task_of
from .attention import as_on_a_device
from .meter import Meter
from .settings import ScaleSettings

_SHORT, _SHORTER = 3, 2
"""Blocks of the models that are run in place of deeper ones, whose blocks are all alike."""


@dataclass(frozen=True)
class StepUse:
    """What forward and backward of one batch take on one device.

    Args:
        kept: Bytes that wait for backward when forward has ended.
        peak: Most bytes at any moment, beyond weights, adapter and gradients of the trained parameters.
        flops: Floating-point operations of forward and backward.
    """

    kept: int
    peak: int
    flops: int


def step_use(settings: ScaleSettings, config: Any) -> StepUse:
    """Return what a step takes.

    Of a model whose blocks are alike two short ones are run, and every further block takes what the third took: all
    three numbers are linear in the number of blocks, from two on.

    Raises:
        ConfigError: See `build`.
    """
    layers = layers_of(config)
    if layers is None or layers <= _SHORT:
        return run_step(build(settings, config), settings, config)
    short, shorter = (run_step(build(settings, config, count), settings, config) for count in (_SHORT, _SHORTER))
    more = layers - _SHORT
    return StepUse(
        kept=short.kept + more * (short.kept - shorter.kept),
        peak=short.peak + more * (short.peak - shorter.peak),
        flops=short.flops + more * (short.flops - shorter.flops),
    )


def run_step(model: Any, settings: ScaleSettings, config: Any) -> StepUse:
    """Run forward and backward of a model on the meta device, after giving it its finished components."""
    _finish_components(model, settings.rank)
    if settings.gradient_checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    batch = _batch(settings, task_of(settings, config))
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    meter = Meter([*model.parameters(), *model.buffers(), *gradients, *tensors])
    with as_on_a_device(), meter:
        loss = model(**batch).loss
        kept = meter.live
        # Not loss.backward(): what is asked for is the engine's own work.
        torch.autograd.backward(loss)
    return StepUse(kept, meter.peak, meter.flops)


def _finish_components(model: Any, rank: int) -> None:
    for layer in aroma_layers(model, ADAPTER).values():
        finished = layer.finished(ADAPTER)
        with torch.device("meta"):
            finished.append(torch.zeros(layer.out_features, rank), torch.zeros(rank, layer.in_features))


def _batch(settings: ScaleSettings, task: str) -> dict[str, Any]:
    size = (settings.batch_size, settings.sequence_length)
    tokens = torch.zeros(size, dtype=torch.long, device="meta")
    if task == "causal-lm":
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens, "use_cache": False}
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[:, 0].clone()}
