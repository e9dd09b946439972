"""What all PEFT adapters share; LoRA as PEFT has it, and LoRA of which directions are cut by held-out loss or size."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import TrainerCallback

from aroma.evidence.checkups import require_standard_errors
from aroma.evidence.compact import compact
from aroma.evidence.schedule import moments
from aroma.evidence.updates import Updates
from aroma.integrations.evidence_callback import EvidenceCallback
from aroma.integrations.held_out import hold_out

from .base import Hooks, Method
from .head import Head, base_name, find_targets, head_of

ADAPTER = "default"
"""The name that PEFT gives the adapter of `get_peft_model`."""

Layer = TypeVar("Layer", bound=nn.Module)


@dataclass(frozen=True)
class PeftAdapter(Method):
    """A method whose built model is a `PeftModel` with one adapter."""

    @abstractmethod
    def config(self, planned_steps: int) -> Any:
        """Return PEFT's configuration, with `target_modules` as in `head.find_targets`."""

    def build(self, model: Any, planned_steps: int) -> Any:
        """Wrap `model` with PEFT, so that its head trains whole and is saved with the adapter; see `Method.build`."""
        head = head_of(model)
        config = self.config(planned_steps)
        config.target_modules = set(find_targets(config.target_modules, model))
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

    def config(self, planned_steps: int) -> LoraConfig:
        """Return PEFT's configuration; see `PeftAdapter.config`."""
        alpha: Any = self.r if self.alpha is None else self.alpha
        return LoraConfig(r=self.r, lora_alpha=alpha, lora_dropout=self.dropout, target_modules=self.target_modules)

    def ranks(self, model: Any) -> dict[str, int]:
        """Return the rank of every module's update; see `Method.ranks`."""
        return {name: layer.r[ADAPTER] for name, layer in layers_of(model, LoraLinear).items()}

    def components(self, model: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the update of every module; see `Method.components`."""
        return {name: pair_of(layer) for name, layer in layers_of(model, LoraLinear).items()}


@dataclass(frozen=True)
class CutLora(Lora):
    """LoRA that starts with many directions, some of which are cut."""

    r: int = 16

    def ranks(self, model: Any) -> dict[str, int]:
        """Return how many directions of every module are not cut; see `Method.ranks`."""
        factors = {name: layer.lora_A for name, layer in layers_of(model, LoraLinear).items()}
        return {name: int(A[ADAPTER].weight.any(1).sum()) if ADAPTER in A else 0 for name, A in factors.items()}


@dataclass(frozen=True)
class Evidence(CutLora):
    """LoRA that keeps the directions which lower held-out loss; see `EvidenceCallback`.

    Args:
        at: When the checkups come, as shares of the run.
        standard_errors: How many standard errors of held-out loss a smaller adapter may cost.
        held_out_share: Share of the training set that decides, and is not trained on.
    """

    at: list[float] = field(default_factory=lambda: [0.4, 0.6])
    standard_errors: float = 0.0
    held_out_share: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        moments(self.at, 2**53)
        require_standard_errors(self.standard_errors)
        self._require(0 < self.held_out_share < 1, "held_out_share", "give a share in (0, 1), such as 0.1")

    def hold_out(self, train: Any) -> tuple[Any, Any | None]:
        """Hold out the examples that decide; see `Method.hold_out`."""
        return hold_out(train, self.held_out_share)

    def check_steps(self, steps: int) -> None:
        """Raise ConfigError if a run of `steps` optimizer steps is too short for its checkups."""
        moments(self.at, steps)

    def callbacks(
        self, model: Any, on_event: Callable[[Any], None] | None = None, early_stop: bool = True, held_out: Any = None
    ) -> list[TrainerCallback]:
        """Return the callback that has the checkups; see `Method.callbacks`."""
        checkups = EvidenceCallback(held_out, at=self.at, standard_errors=self.standard_errors, on_event=on_event)
        return [*super().callbacks(model, on_event, early_stop), checkups]


@dataclass(frozen=True)
class Truncated(CutLora):
    """LoRA whose update keeps its largest singular directions after the last step, whatever examples say.

    Args:
        size: Mean rank that stays.
        spread: `"even"`: every matrix keeps `size` directions, rounded up (LoRA-Squeeze, arXiv 2602.10993).
            `"largest"`: the largest directions of all matrices together stay (PARA, arXiv 2604.27796).
    """

    size: float = 4.0
    spread: Literal["even", "largest"] = "largest"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 <= self.size <= self.r, "size", f"give a mean rank from 0 to r={self.r}")

    def hooks(self, model: Any) -> Hooks:
        """Return what cuts after the last step; see `Method.hooks`."""
        return _Cut(self)


class _Cut(Hooks):
    def __init__(self, method: Truncated) -> None:
        self.method = method

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Cut, and make the adapter compact."""
        updates = Updates(model)
        sigma, rank = updates.to_singular_directions(), math.ceil(self.method.size)
        if self.method.spread == "even":
            kept = torch.cat([torch.arange(update.r) < rank for update in updates.each])
        else:
            order = sigma.argsort(descending=True, stable=True)
            kept = order.argsort() < round(self.method.size * len(updates.each))
        updates.cut(kept)
        compact(updates.model, updates.adapter)


def layers_of(model: nn.Module, kind: type[Layer]) -> dict[str, Layer]:
    """Return the adapted layers of a `PeftModel`, in order, by their modules' names in the base model."""
    return {base_name(name): module for name, module in model.named_modules() if isinstance(module, kind)}


def pair_of(layer: Any) -> tuple[Tensor, Tensor]:
    """Return the factors of a layer of PEFT's LoRA, as `Method.components` has them."""
    if ADAPTER not in layer.lora_A:  # cut away
        weight = layer.get_base_layer().weight
        return weight.new_zeros(layer.out_features, 0), weight.new_zeros(0, layer.in_features)
    scaled = layer.lora_B[ADAPTER].weight.detach() * layer.scaling[ADAPTER]
    return scaled, layer.lora_A[ADAPTER].weight.detach().clone()
