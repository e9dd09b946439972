"""AROMA itself, with `AromaConfig`'s own fields as options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import TrainerCallback

from aroma.checkpoint import save_adapter
from aroma.integrations.callback import AromaCallback
from aroma.tuner import AromaConfig, aroma_layers

from ..specs import ADAPTER_KEYS
from .lora import ADAPTER, PeftAdapter


@dataclass(frozen=True, init=False)
class Aroma(PeftAdapter):
    """AROMA with its controller.

    Components are drawn from `torch.initial_seed()` unless the options give a `component_seed`.

    Args:
        **options: Fields of `AromaConfig`; `target_modules` as in `head.find_targets`.
    """

    defaults: ClassVar[dict[str, Any]] = {}
    """Fields whose default is not that of `AromaConfig`."""
    without: ClassVar[frozenset[str]] = frozenset()
    """Fields that are no options."""

    options: dict[str, Any]

    def __init__(self, **options: Any) -> None:
        object.__setattr__(self, "options", options)  # the class is frozen
        self.config()  # an impossible value is refused now, not when the model is built

    @classmethod
    def option_types(cls) -> dict[str, Any]:
        """Return the type of every option; see `Method.option_types`."""
        return {name: kind for name, (kind, _) in ADAPTER_KEYS.items() if name not in cls.without}

    def config(self, planned_steps: int = 0) -> AromaConfig:
        """Return the configuration; see `PeftAdapter.config`."""
        return AromaConfig(**{"target_modules": None, **self.defaults, **self.options})

    def callbacks(
        self, model: Any, on_event: Callable[[Any], None] | None = None, early_stop: bool = True
    ) -> list[TrainerCallback]:
        """Return AROMA's own callback; see `Method.callbacks`."""
        return [AromaCallback(early_stop=early_stop, on_event=on_event)]

    def ranks(self, model: Any) -> dict[str, int]:
        """Return the rank of every module, the component in training included; see `Method.ranks`."""
        return {name: layer.rank(ADAPTER) for name, layer in aroma_layers(model, ADAPTER).items()}

    def active_parameters(self, model: Any) -> int:
        """Return the parameters of the components in training; see `Method.active_parameters`.

        DistributedDataParallel needs a gradient of frozen ones, too.
        """
        layers = [layer for layer in aroma_layers(model, ADAPTER).values() if not layer.is_frozen(ADAPTER)]
        return sum((layer.in_features + layer.out_features) * layer.r[ADAPTER] for layer in layers)

    def check_steps(self, steps: int) -> None:
        """Raise ConfigError if a run of `steps` optimizer steps is too short for an inner loop."""
        self.config().resolve_inner_steps(steps)

    def components(self, model: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the update of every module; see `Method.components`."""
        updates = {name: layer.components(ADAPTER) for name, layer in aroma_layers(model, ADAPTER).items()}
        return {name: (B.detach().clone(), A.detach().clone()) for name, (B, A) in updates.items()}

    def save(self, model: Any, folder: Path) -> None:
        """Write the adapter in its plain LoRA form, and its state beside it; see `Method.save`."""
        save_adapter(model, folder)


@dataclass(frozen=True, init=False)
class ReLora(Aroma):
    """ReLoRA 1×8 (section 4.1): AROMA without (5) and (6), so that every module has the same number of components.

    Each component trains for the same number of optimizer steps, that of the run divided by `max_components` unless
    `max_inner_steps` is given, and is always kept. The backbone is not written.
    """

    defaults: ClassVar[dict[str, Any]] = {"inner_tolerance": None, "outer_tolerance": None, "max_components": 8}
    without: ClassVar[frozenset[str]] = frozenset(
        ("inner_tolerance", "inner_check_interval", "inner_criterion", "outer_tolerance", "min_components")
    )
