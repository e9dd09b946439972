"""Hooks of a model that grows: its graph at the output, and a warning; what DistributedDataParallel sees of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from ..errors import AromaWarning
from ..state import PEFT_PREFIX
from .layer import AromaLinear


class GraphKeeper:
    """Forward hook of a model that gives its output the gradients a finished adapter no longer needs.

    One process: once every module is frozen and no head trains, no parameter is left in the graph. A loop may still
    take another step (a Trainer that resumes a finished run): the loss then gets a zero gradient.

    Several processes: DistributedDataParallel waits in every backward for the gradient of each parameter that it found
    when the model was wrapped. Frozen pairs get theirs, zero, at the output. No layer computes anything for them, and
    autograd still stops where every module below has finished. `layers` are the growing layers of the model.
    """

    def __init__(self) -> None:
        self.layers: list[AromaLinear] = []
        self._has_warned = False

    def __call__(self, model: nn.Module, _: Any, output: Any) -> Any:
        """Return `output`, tensors of any shape, with another graph, or None to leave it unchanged."""
        if not model.training or not torch.is_grad_enabled():
            return None
        self._warn_if_uncontrolled()
        staying = [layer for layer in self.layers if layer.stays_in_graph]
        if staying and torch.compiler.is_compiling():
            # The layers evaluate frozen pairs themselves; to ask which are frozen would compile again at each freeze.
            return None
        waiting: list[Tensor] = [
            parameter
            for layer in staying
            for name in layer.frozen_adapters & {*layer.lora_A}
            for parameter in layer.pair(name)
            if parameter.requires_grad
        ]
        if not waiting:
            is_finished = any(layer.frozen_adapters for layer in self.layers)
            if not is_finished or any(parameter.requires_grad for parameter in model.parameters()):
                return None
            waiting = [torch.zeros((), requires_grad=True)]
        node: Callable[..., Tensor] = _ZeroGradients.apply
        return recursively_apply(lambda tensor: node(tensor, *waiting), output, test_type=_is_floating_point)

    def _warn_if_uncontrolled(self) -> None:
        """Warn, after the first optimizer step, if no controller drives an adapter: when it is saved, it is too late.

        A pair (b, a) begins with b = 0, so it has trained where b is another. A sharded one would take all ranks.
        """
        if self._has_warned or not self.layers or torch.compiler.is_compiling():
            return
        layer = self.layers[0]
        for name in layer.active_adapters:
            if name not in layer.lora_A or layer.live[name].ever_controlled or layer.live[name].controller is not None:
                continue
            b = layer.pair(name)[0]
            if type(b) is nn.Parameter and b.requires_grad and b.any():
                self._has_warned = True
                warnings.warn(
                    "This AROMA adapter is trained without its controller, as a plain LoRA: no component is ever "
                    "checked or added. Give the Trainer `callbacks=[AromaCallback()]`, or call `aroma.attach(model, "
                    "optimizer, scheduler, total_steps=...)` before a loop of your own.",
                    AromaWarning,
                    stacklevel=3,
                )
                return


def hide_from_ddp(model: nn.Module, layers: Mapping[str, AromaLinear]) -> None:
    """Make DistributedDataParallel ignore the finished components of `model`.

    It would broadcast all buffers from rank 0 in every forward, in place, so that a model could not be called twice
    before a backward. `layers` are the growing layers by their names in the model.
    """
    names = {
        f"{key}.lora_finished.{adapter}.{side}"
        for key, layer in layers.items()
        for adapter in layer.lora_finished
        for side in "AB"
    }
    # DDP may wrap the model, the tuner or the PeftModel; the latter two look attributes up in the model.
    hidden = {prefix + name for name in names for prefix in ("", "model.", PEFT_PREFIX)}
    hidden |= {*getattr(model, "_ddp_params_and_buffers_to_ignore", ())}
    model._ddp_params_and_buffers_to_ignore = sorted(hidden)  # type: ignore[assignment]


def _is_floating_point(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


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
