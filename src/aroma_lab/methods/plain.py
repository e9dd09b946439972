"""Methods without an adapter: everything trains, or the head, or the biases, or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from aroma.errors import bad_value

from .base import Method
from .head import Head, head_of, train_head_only


@dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning: all parameters train, embeddings included."""

    writes_backbone: ClassVar[bool] = True

    def build(self, model: Any, planned_steps: int) -> Any:
        """Unfreeze everything; see `Method.build`."""
        return model.requires_grad_(True)


@dataclass(frozen=True)
class HeadOnly(Method):
    """Only the head trains; nothing is propagated back into the backbone."""

    def build(self, model: Any, planned_steps: int) -> Any:
        """Freeze the backbone; ConfigError if the model has no head."""
        if head_of(model) == Head():
            remedy = f"{type(model).__name__} has no head to train; leave the method out"
            raise bad_value("kind", "head_only", remedy)
        train_head_only(model)
        return model


@dataclass(frozen=True)
class BitFit(Method):
    """BitFit (arXiv 2106.10199): all bias vectors of the backbone train, its LayerNorms' included, and the head."""

    writes_backbone: ClassVar[bool] = True

    def build(self, model: Any, planned_steps: int) -> Any:
        """Freeze all but biases and head; ConfigError if the backbone has no biases, as LLaMA's."""
        train_head_only(model)
        head, named = head_of(model), model.named_parameters()
        biases = [bias for name, bias in named if name.split(".")[-1] == "bias" and not head.holds(name)]
        if not biases:
            remedy = "its backbone has no bias to train; compare another method on it"
            raise bad_value("model", type(model).__name__, remedy)
        for bias in biases:
            bias.requires_grad_(True)
        return model


@dataclass(frozen=True)
class Pretrained(Method):
    """Nothing trains: the base model's own row in a table."""

    trains: ClassVar[bool] = False

    def build(self, model: Any, planned_steps: int) -> Any:
        """Freeze everything; ConfigError if the checkpoint lacks a part of the model, as a head."""
        if lacking := head_of(model).new:
            remedy = f"it trains nothing, and the checkpoint lacks {', '.join(lacking)}; take one that has its head"
            raise bad_value("kind", "pretrained", remedy)
        return model.requires_grad_(False)


@dataclass(frozen=True)
class Frozen(Method):
    """The floor of every training step: nothing trains, but the gradient runs through the whole backbone.

    Only `aroma bench` uses it.
    """

    def build(self, model: Any, planned_steps: int) -> Any:
        """Freeze everything and let the output of the embeddings require a gradient; see `Method.build`."""
        model.requires_grad_(False)
        # The output of all embeddings where they are one module: no adapter propagates back into their LayerNorm.
        embeddings = getattr(model.base_model, "embeddings", None) or model.get_input_embeddings()
        embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
        return model
