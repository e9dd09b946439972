"""LoRA as PEFT has it, and what all methods that are PEFT adapters share."""

from __future__ import annotations

import os
import tempfile
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from aroma.errors import bad_value

from .base import Method, with_dropout
from .head import Head, base_name, find_targets, head_of, require_new_trains

ADAPTER = "default"
"""The name that PEFT gives the adapter of `get_peft_model`."""

Layer = TypeVar("Layer", bound=nn.Module)


@dataclass(frozen=True)
class PeftAdapter(Method):
    """A method whose built model is a `PeftModel` with one adapter; every one has an option `target_modules`."""

    @abstractmethod
    def config(self, targets: list[str], planned_steps: int) -> Any:
        """Return PEFT's configuration for the modules `targets`."""

    def build(self, model: Any, planned_steps: int) -> Any:
        """Wrap `model` with PEFT; see `Method.build`."""
        targets = find_targets(self.target_modules, model)  # type: ignore[attr-defined]
        return wrap(model, self.config(targets, planned_steps))

    def save(self, model: Any, folder: Path) -> None:
        """Write the adapter as PEFT does, head included; see `Method.save`."""
        with staged(folder) as staging:
            model.save_pretrained(staging)


@dataclass(frozen=True)
class LoraBase(PeftAdapter):
    """What LoRA and a LoRA that restarts share: the same rank in all modules.

    Args:
        r: Rank.
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
        self._require_dropout(self.dropout)

    @property
    def name(self) -> str:
        """Name for tables and pictures."""
        return with_dropout(f"LoRA r={self.r}", self.dropout)

    def config(self, targets: list[str], planned_steps: int) -> LoraConfig:
        """Return PEFT's configuration."""
        alpha: Any = self.r if self.alpha is None else self.alpha
        return LoraConfig(r=self.r, lora_alpha=alpha, lora_dropout=self.dropout, target_modules=targets)

    def ranks(self, model: Any) -> dict[str, int]:
        """Return the rank of every module; see `Method.ranks`."""
        return {name: layer.r[ADAPTER] for name, layer in layers_of(model, LoraLinear).items()}

    def components(self, model: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the update of every module; see `Method.components`."""
        return {name: pair_of(layer) for name, layer in layers_of(model, LoraLinear).items()}


@dataclass(frozen=True)
class Lora(LoraBase):
    """LoRA, as PEFT has it."""


def pair_of(layer: Any) -> tuple[Tensor, Tensor]:
    """Return copies of B (m, r), with the scale folded in, and A (r, n) of a layer of PEFT's LoRA."""
    scaled = layer.lora_B[ADAPTER].weight.detach() * layer.scaling[ADAPTER]
    return scaled, layer.lora_A[ADAPTER].weight.detach().clone()


def layers_of(model: nn.Module, kind: type[Layer]) -> dict[str, Layer]:
    """Return the adapted layers of a `PeftModel`, in order, by their modules' names in the base model."""
    return {base_name(name): module for name, module in model.named_modules() if isinstance(module, kind)}


def wrap(model: Any, config: Any) -> Any:
    """Wrap `model` with PEFT, so that its head trains whole beside the adapter and is saved with it.

    Args:
        model: A transformers classifier, causal language model, or model without a head.
        config: PEFT's configuration of the adapter. The head's modules are added to its `modules_to_save`, and a
            missing task type is filled in.

    Raises:
        ConfigError: A parameter that the checkpoint lacks would not train, or one of the backbone would.
    """
    if not config.task_type:  # it decides the wrapper, and whether a head trains
        causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        bare = head_of(model) == Head()
        config.task_type = "CAUSAL_LM" if causal else "FEATURE_EXTRACTION" if bare else "SEQ_CLS"
    head, given = head_of(model), config.modules_to_save or []
    config.modules_to_save = [*given, *head.modules_to_save()] or None
    wrapped = get_peft_model(model, config)
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    require_new_trains(head, trained)
    for name in trained:
        # PEFT takes every module whose name ends so.
        if ".modules_to_save." in name and not given and not head.holds(name):
            remedy = (
                f"PEFT would train it with the head, whose modules are {', '.join(head.modules)}, because their names "
                "are alike; take a method that is no PEFT adapter, such as 'bitfit'"
            )
            raise bad_value("parameter", base_name(name), remedy)
    return wrapped


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success its files replace those of `folder`, on failure they vanish."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as staging:
        yield Path(staging)
        for file in Path(staging).iterdir():
            os.replace(file, folder / file.name)
