"""LoRA as PEFT has it, and what all methods that are PEFT adapters share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from peft import (
    LoraConfig,
    get_peft_model,
)
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from .base import Method
from .head import Head, base_name, find_targets, head_of

ADAPTER = "default"
"""The name that PEFT gives the adapter of `get_peft_model`."""

Layer = TypeVar("Layer", bound=nn.Module)

Product = tuple[Tensor, Tensor]
"""B (m, R), with the scale folded in, and A (R, n)."""


@dataclass(frozen=True)
class PeftAdapter(Method):
    """A method whose built model is a `PeftModel` with one adapter; every one has an option `target_modules`."""

    @abstractmethod
    def config(self, targets: list[str], planned_steps: int) -> Any:
        """Return PEFT's configuration for the modules `targets`."""

    def build(self, model: Any, planned_steps: int) -> Any:
        """Wrap `model` with PEFT, so that its head trains whole and is saved with the adapter; see `Method.build`."""
        head = head_of(model)
        config = self.config(find_targets(self.target_modules, model), planned_steps)  # type: ignore[attr-defined]
        causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        # It decides the wrapper, and whether a head trains.
        config.task_type = "CAUSAL_LM" if causal else "FEATURE_EXTRACTION" if head == Head() else "SEQ_CLS"
        config.modules_to_save = head.modules_to_save() or None
        return get_peft_model(model, config)

    def save(self, model: Any, folder: Path) -> None:
        """Write the adapter as PEFT does, head included; see `Method.save`."""
        model.save_pretrained(folder)


@dataclass(frozen=True)
class Lora(PeftAdapter):
    """LoRA, as PEFT has it.

    Args:
        r: Rank of all modules at the start.
        alpha: lora_alpha; None for r, so that the scale is 1.
        dropout: Dropout on the adapter's input.
        target_modules: Modules to adapt; see `head.find_targets`.
    """

    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: list[str] | str | None = None

    def __post_init__(self) -> None:
        self._require(self.r >= 1, "r", "the rank is 1 or more")
        self._require(0 <= self.dropout < 1, "dropout", "give a probability in [0, 1)")

    def config(self, targets: list[str], planned_steps: int) -> LoraConfig:
        """Return PEFT's configuration."""
        alpha: Any = self.r if self.alpha is None else self.alpha
        return LoraConfig(r=self.r, lora_alpha=alpha, lora_dropout=self.dropout, target_modules=targets)

    def ranks(self, model: Any) -> dict[str, int]:
        """Return the rank of every module's update; see `Method.ranks`."""
        return {name: layer.r[ADAPTER] for name, layer in layers_of(model, LoraLinear).items()}

    def components(self, model: Any) -> dict[str, Product]:
        """Return the update of every module; see `Method.components`."""
        return {name: pair_of(layer) for name, layer in layers_of(model, LoraLinear).items()}


def layers_of(model: nn.Module, kind: type[Layer]) -> dict[str, Layer]:
    """Return the adapted layers of a `PeftModel`, in order, by their modules' names in the base model."""
    return {base_name(name): module for name, module in model.named_modules() if isinstance(module, kind)}


def pair_of(layer: Any) -> Product:
    """Return copies of the factors of a layer of PEFT's LoRA; of one whose adapter was cut away, of rank 0."""
    if ADAPTER not in layer.lora_A:
        weight = layer.get_base_layer().weight
        return weight.new_zeros(layer.out_features, 0), weight.new_zeros(0, layer.in_features)
    scaled = layer.lora_B[ADAPTER].weight.detach() * layer.scaling[ADAPTER]
    return scaled, layer.lora_A[ADAPTER].weight.detach().clone()
