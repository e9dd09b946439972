"""AROMA itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from transformers import TrainerCallback

from aroma.checkpoint import save_adapter
from aroma.controller import AromaController
from aroma.events import Event
from aroma.integrations.callback import AromaCallback
from aroma.tuner import AromaConfig, aroma_layers

from ..specs import adapter_keys
from .base import with_dropout
from .growth import Growth
from .modules import find_targets
from .peft_adapter import ADAPTER, PeftAdapter, wrap

_OWN_NAMES = {"lora_dropout": "dropout"}
"""Fields of AromaConfig that a method calls otherwise."""


@dataclass(frozen=True)
class Aroma(PeftAdapter):
    """AROMA with its controller.

    In an experiment's file the fields of `AromaConfig` stand beside the others, as `max_inner_steps` or `reset`.

    Args:
        r: Rank of one component.
        dropout: Dropout on the input of the component in training.
        options: Further fields of `AromaConfig`; they are stronger than the other arguments.
        target_modules: Modules that grow; see `modules.find_targets`.
    """

    r: int = 1
    dropout: float = 0.0
    options: dict[str, Any] = field(default_factory=dict, metadata={"option": False})
    target_modules: list[str] | str | None = None

    def __post_init__(self) -> None:
        # Refused now, not when the model is built.
        self._config([])

    @classmethod
    def option_types(cls) -> dict[str, Any]:
        """Return the type of every option; see `Method.option_types`."""
        return {name: key.type for name, key in adapter_keys().items()} | super().option_types()

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Return the method with `options`; see `Method.from_options`."""
        own: dict[str, Any] = {}
        further: dict[str, Any] = {}
        for name, value in options.items():
            name = _OWN_NAMES.get(name, name)
            (own if name in super().option_types() else further)[name] = value
        return cls(**own, options=further)

    def resolved_options(self) -> dict[str, Any]:
        """Return the value of every field of `AromaConfig`; see `Method.resolved_options`."""
        config = self._config([])
        # PEFT turns lists of modules into sets.
        modules = {"target_modules": self.target_modules, "exclude_modules": self.options.get("exclude_modules")}
        return {name: getattr(config, name) for name in adapter_keys()} | modules

    @property
    def name(self) -> str:
        """Name for tables and pictures."""
        return with_dropout("AROMA" if self.r == 1 else f"AROMA r={self.r}", self.dropout)

    def build(self, model: Any, planned_steps: int) -> Any:
        """Wrap `model` with PEFT; see `Method.build`.

        Components are drawn from `torch.initial_seed()` unless the options give a `component_seed`.
        """
        return wrap(model, self._config(find_targets(self.target_modules, model)))

    def hooks(self, model: Any, optimizer: Any, planned_steps: int) -> Growth:
        """Return the controller and the re-warm-up; see `Method.hooks`."""
        return Growth(AromaController(model, optimizer, total_steps=planned_steps), optimizer)

    def callbacks(
        self, model: Any, on_event: Callable[[Event], None] | None = None, early_stop: bool = True
    ) -> list[TrainerCallback]:
        """Return AROMA's callback, which keeps its state in the Trainer's checkpoints; see `Method.callbacks`."""
        return [AromaCallback(early_stop=early_stop, on_event=on_event)]

    def ranks(self, model: Any) -> dict[str, int]:
        """Return the rank of every module, the component in training included; see `Method.ranks`."""
        return {name: layer.rank(ADAPTER) for name, layer in aroma_layers(model).items()}

    def components(self, model: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the update of every module; see `Method.components`."""
        updates = {name: layer.components(ADAPTER) for name, layer in aroma_layers(model).items()}
        return {name: (B.detach().clone(), A.detach().clone()) for name, (B, A) in updates.items()}

    def save(self, model: Any, folder: Path) -> None:
        """Write the adapter in its plain LoRA form, and its state beside it; see `Method.save`."""
        save_adapter(model, folder)

    def _config(self, targets: list[str]) -> AromaConfig:
        return AromaConfig(**{"target_modules": targets, **self._options()})

    def _options(self) -> dict[str, Any]:
        """Return all fields of `AromaConfig` that are not left to their defaults, but for the targets found."""
        return {"r": self.r, "lora_dropout": self.dropout, **self.options}
