"""Bottleneck adapters: small two-layer networks within the layers of a frozen encoder."""

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
class Bottleneck(Method):
    """Bottleneck adapters in an encoder of BERT's or RoBERTa's build; adapters and head train, and nothing else.

    With d the width of the encoder, an adapter has 2·d·size + size + d parameters; on RoBERTa-base the default sizes
    of `Houlsby` and `Pfeiffer` give Table 2's 0.31 M and 0.30 M. The LayerNorms, which 1902.00751 trains as well, are
    not counted in that table, and stay frozen here.

    Args:
        size: Neurons of the bottleneck.
    """

    kind: ClassVar[str]
    sublayers: ClassVar[str]
    """Pattern of the endings of the names of the sublayers that get an adapter."""
    size: int = 8

    @property
    def name(self) -> str:
        """Name for tables and pictures."""
        return f"{self.kind.capitalize()} size={self.size}"

    def build(self, model: Any, planned_steps: int) -> Any:
        """Put adapters into `model`, in place; see `Method.build`.

        Raises:
            ConfigError: An encoder of another build.
        """
        named = model.named_modules()
        sublayers = {name: module for name, module in named if re.search(rf"{self.sublayers}$", name)}
        if not sublayers or not all(map(_can_be_adapted, sublayers.values())):
            remedy = (
                "bottleneck adapters go into encoders of the build of BERT and RoBERTa (layer.N.attention.output and "
                "layer.N.output with dense, dropout and LayerNorm); compare another method on it"
            )
            raise bad_value("model", type(model).__name__, remedy)
        train_head_only(model)
        for name, sublayer in sublayers.items():
            model.set_submodule(name, AdaptedSublayer(sublayer, self.size, self.kind))
        return model


@dataclass(frozen=True)
class Houlsby(Bottleneck):
    """arXiv 1902.00751, figure 2: after attention and after the FFN, before the skip connection."""

    kind: ClassVar[str] = "houlsby"
    sublayers: ClassVar[str] = r"\.\d+\.(attention\.)?output"


@dataclass(frozen=True)
class Pfeiffer(Bottleneck):
    """arXiv 2005.00247: after the FFN only."""

    kind: ClassVar[str] = "pfeiffer"
    sublayers: ClassVar[str] = r"\.\d+\.output"
    size: int = 16


class AdaptedSublayer(nn.Module):
    """Takes the place of `…layer.N.attention.output` or `…layer.N.output`, which it keeps as `sublayer`.

    .. code-block:: text

        adapter(x) = up(f(down(x)))                               nearly 0 at the start
        h = dropout(dense(x))                                     the sublayer's projection back to width d
        y = LayerNorm(h + skip)                                   without an adapter
        y = LayerNorm(h + adapter(h) + skip)                      Houlsby: after the projection, before the skip
        y = LayerNorm(h + adapter(LayerNorm(h + skip)) + skip)    Pfeiffer: reads what the layer would have returned

    Pfeiffer's is the best of that paper's search, and what AdapterHub calls `pfeiffer`: the pretrained LayerNorm
    stands before the adapter and after it, and the adapter's residual is taken before the first. Activations are
    theirs, too: GELU in Houlsby's, ReLU in Pfeiffer's.

    Args:
        sublayer: Module with `dense`, `dropout` and `LayerNorm`; see `_can_be_adapted`.
        size: Neurons of the bottleneck.
        kind: `"houlsby"` or `"pfeiffer"`.
    """

    def __init__(self, sublayer: Any, size: int, kind: str) -> None:
        super().__init__()
        self.sublayer = sublayer
        self.kind = kind
        weight = sublayer.dense.weight
        width = weight.shape[0]
        down, up = nn.Linear(width, size), nn.Linear(size, width)
        for layer in (down, up):
            nn.init.trunc_normal_(layer.weight, std=_INITIAL_STD, a=-2 * _INITIAL_STD, b=2 * _INITIAL_STD)
            nn.init.zeros_(layer.bias)
        activation = nn.GELU() if kind == "houlsby" else nn.ReLU()
        self.adapter = nn.Sequential(OrderedDict(down=down, activation=activation, up=up)).to(weight)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Map the sublayer's hidden states (…, n) and its input, the skip, (…, d) to (…, d)."""
        h = self.sublayer.dropout(self.sublayer.dense(hidden_states))
        skipped = h + input_tensor
        added = self.adapter(h if self.kind == "houlsby" else self.sublayer.LayerNorm(skipped))
        result: Tensor = self.sublayer.LayerNorm(skipped + added)
        return result


def _can_be_adapted(sublayer: nn.Module) -> bool:
    """Whether a module is built as BERT's `BertSelfOutput` and `BertOutput` are."""
    parts = dict(sublayer.named_children())
    kinds = {"dense": nn.Linear, "dropout": nn.Dropout, "LayerNorm": nn.LayerNorm}
    return parts.keys() == kinds.keys() and all(isinstance(parts[name], kind) for name, kind in kinds.items())
