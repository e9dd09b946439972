"""The state of an adapter while its model lives: its seed and its controller.

A configuration is data; everything else that an adapter needs is here. All growing layers of an adapter share one
`LiveAdapter`, so it is found also where PEFT drops the tuner (`inject_adapter_in_model`, `model.add_adapter`).
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ConfigError, bad_value
from .layer import AromaLinear

if TYPE_CHECKING:
    from .config import AromaConfig


class LiveAdapter:
    """The live state of one adapter.

    A copied or unpickled model starts without a controller: that of the original does not drive it.

    Args:
        config: Configuration of the adapter; never written to.

    Attributes:
        config: As given.
        chose_seed: Whether the configuration has a `component_seed`.
        seed: Seed of new components: `component_seed`, or else `torch.initial_seed()` when the adapter was made.
        ever_controlled: Whether a controller has ever taken a step.
        dtype_is_chosen: Whether PEFT has chosen the dtype of the pairs.
    """

    def __init__(self, config: AromaConfig) -> None:
        self.config = config
        self.chose_seed = config.component_seed is not None
        self.seed: int = torch.initial_seed() % 2**31 if config.component_seed is None else config.component_seed
        self.ever_controlled = False
        self.dtype_is_chosen = False
        self._controller: weakref.ref[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_controller": None}

    @property
    def controller(self) -> Any | None:
        """The controller that drives this adapter; None if none was attached or it is gone."""
        return self._controller() if self._controller is not None else None

    def attach_controller(self, controller: Any) -> None:
        """Remember `controller`, by a weak reference, so that saving the adapter writes its state."""
        self._controller = weakref.ref(controller)

    def method(self) -> dict[str, Any]:
        """Return the fields that decide a run, with the seed in use; JSON-able."""
        return {**self.config.method(), "component_seed": self.seed}

    def check_resumable(self, saved: dict[str, Any]) -> None:
        """Raise if `saved`, the `method()` of a checkpoint, differs; take over its seed if none was chosen.

        Raises:
            ConfigError: Naming every differing field with both values.
        """
        now = self.method() if self.chose_seed else {**self.method(), "component_seed": saved.get("component_seed")}
        differing = [name for name in now if now[name] != saved.get(name)]
        if differing:
            values = ", ".join(f"{name}={now[name]!r} (checkpoint: {saved.get(name)!r})" for name in differing)
            raise ConfigError(
                f"cannot resume with another configuration: {values}; give the checkpoint's values, or start a new run"
            )
        self.seed = now["component_seed"]


def live_adapter(model: nn.Module, adapter_name: str = "default") -> LiveAdapter:
    """Return the live state of an adapter of `model`, a PeftModel or a model with injected layers, wrapped or not.

    Raises:
        ConfigError: The model has no growing adapter of that name.
    """
    for module in model.modules():
        if isinstance(module, AromaLinear) and adapter_name in module.live:
            return module.live[adapter_name]
    raise bad_value(
        "adapter_name",
        adapter_name,
        f"{type(model).__name__} has no AROMA adapter of that name; make one with "
        "get_peft_model(model, AromaConfig(...))",
    )
