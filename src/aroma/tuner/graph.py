"""The autograd graph at the model's output, and what DistributedDataParallel sees of a growing adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import compat
from ..errors import bad_value
from .layer import AromaLinear
from .layout import PEFT_PREFIX


class GraphKeeper:
    """Forward hook of a model that gives its output the gradients a finished adapter no longer needs.

    One process: once every module is frozen and no head trains, no parameter is left in the graph. A loop may still
    take another step, with early stopping switched off or in a Trainer that resumes a finished run. The loss then gets
    a zero gradient, so that `backward` has something to do.

    Several processes: DistributedDataParallel waits in every backward for the gradient of each parameter that it found
    when the model was wrapped. Frozen pairs get theirs, zero, at the output. No layer computes anything for them, and
    autograd still stops where every module below has finished.

    Attributes:
        layers: The growing layers of the model.
    """

    def __init__(self) -> None:
        self.layers: list[AromaLinear] = []

    def __call__(self, model: nn.Module, _: Any, output: Any) -> Any:
        """Return `output`, tensors of any shape, with another graph, or None to leave it unchanged."""
        if not model.training or not torch.is_grad_enabled():
            return None
        if torch.compiler.is_compiling() and any(layer.stays_in_graph for layer in self.layers):
            # The layers evaluate frozen pairs themselves; to ask which are frozen would compile again at each freeze.
            return None
        waiting = [pair for layer in self.layers if layer.stays_in_graph for pair in _frozen_in_graph(layer)]
        if waiting:
            return _with_zero_gradients(waiting, output)
        if any(p.requires_grad for p in model.parameters()) or not any(layer.frozen_adapters for layer in self.layers):
            return None
        return _map_tensors(lambda tensor: tensor + tensor.new_zeros((), requires_grad=True), output)


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` was applied to the model, to a part of it, or to what it wraps."""
    return any(map(compat.is_compiled, model.modules()))


def hide_from_ddp(model: nn.Module, layers: Mapping[str, AromaLinear]) -> None:
    """Make DistributedDataParallel ignore the finished components of `model`.

    It would broadcast all buffers from rank 0 in every forward, though every rank has the same components. It would
    also write them in place, so that a model could not be called twice before a backward.

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
    # DDP may wrap the model, the tuner or the PeftModel; the latter two look attributes up in the model.
    compat.hide_from_ddp(model, {prefix + name for name in names for prefix in ("", "model.", PEFT_PREFIX)})


def _frozen_in_graph(layer: AromaLinear) -> list[nn.Parameter]:
    pairs = [layer.pair(name) for name in layer.frozen_adapters if name in layer.lora_A]
    return [parameter for pair in pairs for parameter in pair if parameter.requires_grad]


def _with_zero_gradients(parameters: list[nn.Parameter], output: Any) -> Any:
    """Return `output` with zero gradients for `parameters` (any shape) behind each tensor: the loss may use any."""
    node: Callable[..., Tensor] = _ZeroGradients.apply
    found = []

    def change(tensor: Tensor) -> Tensor:
        """Return a tensor (any shape) behind the zero gradients."""
        found.append(True)
        return node(tensor, *parameters)

    changed = _map_tensors(change, output)
    if not found:
        raise bad_value(
            "model",
            type(output).__name__,
            "its output has no floating-point tensor, so finished modules cannot take part in "
            "DistributedDataParallel; let the model return tensors in tuples, lists or dicts",
        )
    return changed


class _ZeroGradients(torch.autograd.Function):
    """Passes a tensor through, without a copy, and gives parameters a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *parameters: Tensor) -> Tensor:
        """Return `tensor`, of any shape."""
        ctx.parameters = parameters
        # Not a view, which could not be written to in place.
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        """Return `gradient`, shaped as the tensor, and zeros shaped as the parameters."""
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.parameters)


def _map_tensors(change: Callable[[Tensor], Tensor], output: Any) -> Any:
    """Apply `change` to the floating-point tensors (any shapes) in what a model returns, however nested."""
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
