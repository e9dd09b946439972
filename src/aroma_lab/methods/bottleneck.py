"""Bottleneck adapters: small two-layer networks within the layers of a frozen encoder of BERT's or RoBERTa's build.

The package `adapters` has them too, and pins another transformers.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from aroma.errors import bad_value

from .base import Method
from .head import train_head_only

_INITIAL_STD = 1e-2
"""Standard deviation of the initial weights, truncated at ±2σ, as in 1902.00751: the adapter adds next to nothing."""


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
        named = model.named_modules()
        found = {name: module for name, module in named if re.search(rf"{self.places}$", name)}
        parents = [model.get_submodule(name.rpartition(".")[0]) for name in found]
        parts = {"dense", "dropout", "LayerNorm"}
        if not parents or any({name for name, _ in one.named_children()} != parts for one in parents):
            remedy = (
                "bottleneck adapters go into encoders of the build of BERT and RoBERTa (layer.N.attention.output and "
                "layer.N.output with dense, dropout and LayerNorm); compare another method on it"
            )
            raise bad_value("model", type(model).__name__, remedy)
        train_head_only(model)
        for (name, module), parent in zip(found.items(), parents, strict=True):
            adapter = _bottleneck(parent.dense.weight, self.size, self.activation())
            model.set_submodule(name, Adapted(module, adapter, before=isinstance(module, nn.LayerNorm)))
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
