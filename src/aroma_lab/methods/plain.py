"""Methods that are no PEFT adapters: all trains, or head, biases, nothing, or bottleneck adapters in an encoder.

The package `adapters` has bottleneck adapters too, and pins another transformers.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from aroma.errors import bad_value

from .base import Method
from .head import Head, head_of, train_head_only

_INITIAL_STD = 1e-2
"""Standard deviation of the initial weights, truncated at ±2σ, as in 1902.00751: the adapter adds next to nothing."""


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


# Bottleneck adapters -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Houlsby(Method):
    """arXiv 1902.00751, figure 2: adapters after attention and after the FFN, before the skip connection.

    With d the width of the encoder, an adapter has 2·d·size + size + d parameters; the default sizes give Table 2's
    0.31 M and, for `Pfeiffer`, 0.30 M. LayerNorms stay frozen, and are not counted in that table.

    Args:
        size: Neurons of the bottleneck.
    """

    places: ClassVar[str] = r"\.\d+\.(attention\.)?output\.dropout"
    """Pattern of the endings of the names of the modules that get an adapter."""
    activation: ClassVar[type[nn.Module]] = nn.GELU
    size: int = 8

    def build(self, model: Any, planned_steps: int) -> Any:
        """Put adapters into `model`, in place; ConfigError if its encoder is of another build."""
        found = {name: place for name, place in model.named_modules() if re.search(rf"{self.places}$", name)}
        if not found:
            remedy = "bottleneck adapters go into encoders built as BERT or RoBERTa; compare another method on it"
            raise bad_value("model", type(model).__name__, remedy)
        train_head_only(model)
        for name, place in found.items():
            dense = model.get_submodule(name.rpartition(".")[0]).dense
            adapter = _bottleneck(dense.weight, self.size, self.activation())
            model.set_submodule(name, Adapted(place, adapter, before=isinstance(place, nn.LayerNorm)))
        return model


@dataclass(frozen=True)
class Pfeiffer(Houlsby):
    """arXiv 2005.00247, as AdapterHub has it: after the FFN only; the adapter reads what LayerNorm gives alone."""

    places: ClassVar[str] = r"\.\d+\.output\.LayerNorm"
    activation: ClassVar[type[nn.Module]] = nn.ReLU
    size: int = 16


class Adapted(nn.Module):
    """A module f with an adapter: f(x) + adapter(f(x)), or, if `before`, f(x + adapter(f(x))); x is (…, d).

    Houlsby's f is the dropout after the projection back to width d, and Pfeiffer's the LayerNorm after the skip.
    """

    def __init__(self, inner: nn.Module, adapter: nn.Module, before: bool) -> None:
        super().__init__()
        self.inner, self.adapter, self.before = inner, adapter, before

    def forward(self, x: Tensor) -> Tensor:
        """Return values of the shape of `x`."""
        y: Tensor = self.inner(x)
        added: Tensor = self.adapter(y)
        result: Tensor = self.inner(x + added) if self.before else y + added
        return result


def _bottleneck(weight: Tensor, size: int, activation: nn.Module) -> nn.Module:
    down, up = nn.Linear(weight.shape[0], size), nn.Linear(size, weight.shape[0])
    for layer in (down, up):
        nn.init.trunc_normal_(layer.weight, std=_INITIAL_STD, a=-2 * _INITIAL_STD, b=2 * _INITIAL_STD)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(OrderedDict(down=down, activation=activation, up=up)).to(weight)
