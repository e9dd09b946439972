"""The floor of every cost: nothing trains, and yet the gradient runs through the whole backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .base import Method


@dataclass(frozen=True)
class Frozen(Method):
    """A frozen model whose embedding output asks for a gradient, so that backward runs through all of it."""

    @property
    def name(self) -> str:
        """Name for tables and pictures."""
        return "frozen (floor)"

    def build(self, model: Any, planned_steps: int) -> Any:
        """Freeze everything and hook the embeddings; see `Method.build`."""
        model.requires_grad_(False)
        # The output of all embeddings where they are one module: no adapter propagates back into their LayerNorm.
        embeddings = getattr(model.base_model, "embeddings", None) or model.get_input_embeddings()
        embeddings.register_forward_hook(_GradientRequest(model.dtype, model.device))
        return model


class _GradientRequest:
    """A forward hook after which the gradient of a module's output is wanted."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._zero = torch.zeros((), dtype=dtype, device=device, requires_grad=True)

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        # A compiled graph would break at requires_grad_; in an eager one the sum would cost a copy.
        return output + self._zero if torch.compiler.is_compiling() else output.requires_grad_(True)
