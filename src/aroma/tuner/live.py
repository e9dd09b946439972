"""Interim: replaced by the tuner's own live state."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import bad_value
from .config import AromaConfig


class LiveAdapter:
    """The live state of one adapter."""

    def __init__(self, config: AromaConfig) -> None:
        self.config = config

    @property
    def seed(self) -> int:
        """Seed of the components' generator."""
        assert self.config.component_seed is not None
        return self.config.component_seed

    @seed.setter
    def seed(self, value: int) -> None:
        self.config.component_seed = value

    @property
    def chose_seed(self) -> bool:
        """Whether the user gave a seed."""
        return self.config._chosen_seed is not None

    @property
    def controller(self) -> Any | None:
        """The controller that drives the adapter."""
        return self.config.controller

    def attach_controller(self, controller: Any) -> None:
        """Remember a controller."""
        self.config.attach_controller(controller)

    @property
    def ever_controlled(self) -> bool:
        """Whether a controller was ever stepped."""
        return self.config.ever_controlled

    @ever_controlled.setter
    def ever_controlled(self, value: bool) -> None:
        self.config.ever_controlled = value

    def method(self) -> dict[str, Any]:
        """Return the fields that decide a run."""
        return self.config.method()

    def check_resumable(self, saved: dict[str, Any]) -> None:
        """Refuse another configuration."""
        self.config.check_resumable(saved)


def live_adapter(model: nn.Module, adapter_name: str) -> LiveAdapter:
    """Return the live adapter of a model."""
    for module in model.modules():
        configs = module.__dict__.get("peft_config")
        if configs is not None and isinstance(configs.get(adapter_name), AromaConfig):
            return LiveAdapter(configs[adapter_name])
    raise bad_value("adapter_name", adapter_name, "the model has growing layers of that name but no AromaConfig")
