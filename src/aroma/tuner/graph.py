"""What a growing adapter does to the graph of a training step at the model's output, and what DDP may see of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import bad_value
from .layer import AromaLinear
from .layout import PEFT_PREFIX

_IGNORED = "_ddp_params_and_buffers_to_ignore"
"""Where DistributedDataParallel looks for names that it is to leave alone."""


class GraphKeeper:
    """Forward hook of a model: gives its output what a finished adapter no longer gives it.

    In one process, when every module is frozen and there is no head to train, no parameter is left in the graph. A
    loop may well take another step then: with early stopping switched off, or a Trainer that resumes a run that was
    over. The loss then gets a gradient, which is zero, so that `backward` has something to do.

    In several processes DistributedDataParallel waits in every backward for the gradient of each parameter that it
    found when the model was wrapped. Frozen pairs get theirs, zero, at the output: no layer computes anything for
    them, and autograd still stops where every module below has finished.

    Attributes:
        layers: The growing layers of the model.
    """

    def __init__(self) -> None:
        self.layers: list[AromaLinear] = []

    def __call__(self, model: nn.Module, _: Any, output: Any) -> Any:
        """Return `output` with another graph, or None to leave it as it is."""
        if not model.training or not torch.is_grad_enabled():
            return None
        if torch.compiler.is_compiling() and any(layer.stays_in_graph for layer in self.layers):
            # The layers evaluate frozen pairs themselves; to ask for these is to compile again at every freezing.
            return None
        waiting = [pair for layer in self.layers if layer.stays_in_graph for pair in _frozen_in_graph(layer)]
        if waiting:
            return _with_zero_gradients(waiting, output)
        if any(p.requires_grad for p in model.parameters()) or not any(layer.frozen_adapters for layer in self.layers):
            return None
        return _map_tensors(lambda tensor: tensor + tensor.new_zeros((), requires_grad=True), output)


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` was applied to the model, to a part of it, or to what it wraps."""
    return any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in model.modules())


def hide_from_ddp(model: nn.Module, layers: Mapping[str, AromaLinear]) -> None:
    """Let DistributedDataParallel leave the finished components of `model` alone.

    It would send all buffers from rank 0 to the others in every forward: of ours, all components there are, which
    every rank has anyway. And in place, so that nobody could call the model twice before a backward.

    Args:
        model: The model that the layers are in.
        layers: Its growing layers, by their names in it.
    """
    names = {
        f"{key}.lora_finished.{adapter}.{name}"
        for key, layer in layers.items()
        for adapter, finished in layer.lora_finished.items()
        for name, _ in finished.named_buffers()
    }
    # As the model is wrapped: by itself, as the tuner, or as a PeftModel, which both look attributes up in the model.
    prefixed = {prefix + name for name in names for prefix in ("", "model.", PEFT_PREFIX)}
    setattr(model, _IGNORED, sorted({*getattr(model, _IGNORED, ()), *prefixed}))


def _frozen_in_graph(layer: AromaLinear) -> list[nn.Parameter]:
    pairs = [layer.pair(name) for name in layer.frozen_adapters if name in layer.lora_A]
    return [parameter for pair in pairs for parameter in pair if parameter.requires_grad]


def _with_zero_gradients(parameters: list[nn.Parameter], output: Any) -> Any:
    """Return `output` with zero gradients for `parameters` behind each of its tensors: the loss may come from any."""
    found = []

    def change(tensor: Tensor) -> Tensor:
        found.append(True)
        changed: Tensor = _ZeroGradients.apply(tensor, *parameters)
        return changed

    changed = _map_tensors(change, output)
    if not found:
        raise bad_value(
            "model",
            type(output).__name__,
            "AROMA finds no floating-point tensor in what the model returns, so finished modules could not take part "
            "in DistributedDataParallel; let it return tensors in tuples, lists or dicts",
        )
    return changed


class _ZeroGradients(torch.autograd.Function):
    """Passes a tensor through, without a copy, and gives parameters a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        # Not a view, which nobody could write to in place.
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.parameters)


def _map_tensors(change: Callable[[Tensor], Tensor], output: Any) -> Any:
    """Change the floating-point tensors of what a model returns: tensors, in tuples, lists, dicts, `ModelOutput`s."""
    if isinstance(output, Tensor):
        return change(output) if output.is_floating_point() else output
    if isinstance(output, tuple | list):
        items = [_map_tensors(change, item) for item in output]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    if isinstance(output, dict):
        for name, item in [*output.items()]:
            changed = _map_tensors(change, item)
            if changed is not item:
                output[name] = changed
    return output
