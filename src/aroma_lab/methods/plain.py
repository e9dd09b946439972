"""Methods without an adapter: everything trains, or the head, or the biases, or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aroma.errors import bad_value

from .base import Method
from .head import Head, head_of, train_head_only


@dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning: all parameters train, embeddings included."""

    writes_backbone: ClassVar[bool] = True

    name = "full fine-tuning"

    def build(self, model: Any, planned_steps: int) -> Any:
        """Unfreeze everything; see `Method.build`."""
        return model.requires_grad_(True)


@dataclass(frozen=True)
class HeadOnly(Method):
    """Only the head trains; nothing is propagated back into the backbone."""

    name = "head only"

    def build(self, model: Any, planned_steps: int) -> Any:
        """Freeze the backbone; see `Method.build`.

        Raises:
            ConfigError: The model has no head.
        """
        if head_of(model) == Head():
            remedy = f"{type(model).__name__} has no head to train; leave the method out"
            raise bad_value("kind", "head_only", remedy)
        train_head_only(model)
        return model


@dataclass(frozen=True)
class BitFit(Method):
    """BitFit (arXiv 2106.10199): all bias vectors of the backbone train, its LayerNorms' included, and the head.

    In a layer of RoBERTa these are the biases of query, key and value (d each), of the attention's output and its
    LayerNorm (d each), and of the FFN: intermediate (4d), output and LayerNorm (d each).
    """

    writes_backbone: ClassVar[bool] = True

    name = "BitFit"

    def build(self, model: Any, planned_steps: int) -> Any:
        """Freeze all but biases and head; see `Method.build`.

        Raises:
            ConfigError: The backbone has no biases, as LLaMA's.
        """
        train_head_only(model)
        head = head_of(model)
        named = model.named_parameters()
        biases = [bias for name, bias in named if name.split(".")[-1] == "bias" and not head.holds(name)]
        if not biases:
            raise bad_value(
                "model", type(model).__name__, "its backbone has no bias to train; compare another method on it"
            )
        for bias in biases:
            bias.requires_grad_(True)
        return model


@dataclass(frozen=True)
class Pretrained(Method):
    """Nothing trains: the base model's own row in a table."""

    trains: ClassVar[bool] = False

    name = "pretrained"

    def build(self, model: Any, planned_steps: int) -> Any:
        """Freeze everything; see `Method.build`.

        Raises:
            ConfigError: The checkpoint lacks a part of the model, as the head of most classifiers.
        """
        if lacking := head_of(model).new:
            remedy = f"it trains nothing, and the checkpoint lacks {', '.join(lacking)}; take one that has its head"
            raise bad_value("kind", "pretrained", remedy)
        return model.requires_grad_(False)


@dataclass(frozen=True)
class Frozen(Method):
    """The floor of every training step: nothing trains, but the gradient runs through the whole backbone.

    Only `aroma bench` uses it.
    """

    name = "frozen (floor)"

    def build(self, model: Any, planned_steps: int) -> Any:
        """Freeze everything and hook the embeddings; see `Method.build`."""
        model.requires_grad_(False)
        # The output of all embeddings where they are one module: no adapter propagates back into their LayerNorm.
        embeddings = getattr(model.base_model, "embeddings", None) or model.get_input_embeddings()
        embeddings.register_forward_hook(_GradientRequest(model.dtype, model.device))
        return model


class _GradientRequest:
    """A forward hook that makes the module's output require a gradient."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._zero = torch.zeros((), dtype=dtype, device=device, requires_grad=True)

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        # A compiled graph would break at requires_grad_; in an eager one the sum would cost a copy.
        return output + self._zero if torch.compiler.is_compiling() else output.requires_grad_(True)
