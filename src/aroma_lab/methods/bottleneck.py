"""Bottleneck adapters: small two-layer networks within the layers of a frozen encoder."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from aroma.errors import bad_value

from .adapted_sublayer import AdaptedSublayer, Place, can_be_adapted
from .base import Method
from .modules import train_head_only

_PLACES: dict[str, tuple[str, ...]] = {
    "houlsby": (r"\.\d+\.attention\.output", r"\.\d+\.output"),
    "pfeiffer": (r"\.\d+\.output",),
}
"""How the names of the sublayers end that get an adapter, in BERT, RoBERTa and their kin."""


@dataclass(frozen=True)
class Bottleneck(Method):
    """Bottleneck adapters in an encoder of BERT's or RoBERTa's build; adapters and head train, and nothing else.

    With d the width of the encoder, an adapter has 2·d·size + size + d parameters; on RoBERTa-base the default sizes
    of `Houlsby` and `Pfeiffer` give Table 2's 0.31 M and 0.30 M. The LayerNorms, which 1902.00751 trains as well, are
    not counted in that table, and stay frozen here.

    Args:
        kind: `"houlsby"` (arXiv 1902.00751, figure 2): after attention and after the FFN, before the skip connection.
            `"pfeiffer"` (arXiv 2005.00247): after the FFN only. `AdaptedSublayer` has the equations.
        size: Neurons of the bottleneck.
    """

    kind: Place = "houlsby"
    size: int = 8

    def __post_init__(self) -> None:
        if self.kind not in _PLACES:
            raise bad_value("kind", self.kind, f"choose one of {', '.join(_PLACES)}")
        if self.size < 1:
            raise bad_value("size", self.size, "the bottleneck has at least one neuron; try 8 or 16")

    @property
    def name(self) -> str:
        """Name for tables and pictures."""
        return f"{self.kind.capitalize()} size={self.size}"

    def build(self, model: Any, planned_steps: int) -> Any:
        """Put adapters into `model`, in place; see `Method.build`.

        Raises:
            ConfigError: An encoder of another build.
        """
        places = [re.compile(f"{place}$") for place in _PLACES[self.kind]]
        sublayers = {
            name: module for name, module in model.named_modules() if any(place.search(name) for place in places)
        }
        if not sublayers or not all(map(can_be_adapted, sublayers.values())):
            raise bad_value(
                "model",
                type(model).__name__,
                "bottleneck adapters go into encoders of the build of BERT and RoBERTa (layer.N.attention.output and "
                "layer.N.output with dense, dropout and LayerNorm); compare another method on it",
            )
        train_head_only(model)
        for name, sublayer in sublayers.items():
            model.set_submodule(name, AdaptedSublayer(sublayer, self.size, self.kind))
        return model


@dataclass(frozen=True)
class Houlsby(Bottleneck):
    """Houlsby's adapters.

    Args:
        size: Neurons of the bottleneck.
    """

    kind: Place = field(default="houlsby", init=False)
    size: int = 8


@dataclass(frozen=True)
class Pfeiffer(Bottleneck):
    """Pfeiffer's adapters.

    Args:
        size: Neurons of the bottleneck.
    """

    kind: Place = field(default="pfeiffer", init=False)
    size: int = 16
