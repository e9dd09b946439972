"""LoRA, as PEFT has it, on all linear modules of the layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor

from aroma.errors import bad_value

from .base import with_dropout
from .modules import find_targets
from .peft_adapter import ADAPTER, PeftAdapter, layers_of, wrap


@dataclass(frozen=True)
class Lora(PeftAdapter):
    """LoRA of one rank for all modules.

    Args:
        r: Rank.
        alpha: lora_alpha; None for r, so that the scale is 1.
        dropout: Dropout on the adapter's input.
        target_modules: Modules to adapt; see `modules.find_targets`.
    """

    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: list[str] | str | None = None

    def __post_init__(self) -> None:
        if self.r < 1:
            raise bad_value("r", self.r, "the rank is 1 or more")
        check_dropout(self.dropout)

    @property
    def name(self) -> str:
        """Name for tables and pictures."""
        return with_dropout(f"LoRA r={self.r}", self.dropout)

    def build(self, model: Any, planned_steps: int) -> Any:
        """Wrap `model` with PEFT; see `Method.build`."""
        from peft import LoraConfig

        config = LoraConfig(
            r=self.r,
            lora_alpha=self.r if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=find_targets(self.target_modules, model),
        )
        return wrap(model, config)

    def ranks(self, model: Any) -> dict[str, int]:
        """Return the rank of every module; see `Method.ranks`."""
        return {name: layer.r[ADAPTER] for name, layer in layers_of(model, LoraLinear).items()}

    def components(self, model: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the update of every module; see `Method.components`."""
        return {name: pair_of(layer) for name, layer in layers_of(model, LoraLinear).items()}


def pair_of(layer: Any) -> tuple[Tensor, Tensor]:
    """Return copies of B (m, r), the scale folded in, and A (r, n) of a layer of PEFT's LoRA."""
    scaled = layer.lora_B[ADAPTER].weight.detach() * layer.scaling[ADAPTER]
    return scaled, layer.lora_A[ADAPTER].weight.detach().clone()


def check_dropout(dropout: float) -> None:
    """Raise ConfigError for what is no dropout."""
    if not 0 <= dropout < 1:
        raise bad_value("dropout", dropout, "give a probability in [0, 1)")
