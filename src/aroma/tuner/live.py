"""What is true of an adapter while its model lives: its seed, its controller, and the save that is under way.

A configuration is data; everything else that an adapter needs is here. All growing layers of an adapter share one
`LiveAdapter`, so it is found also where PEFT drops the tuner (`inject_adapter_in_model`, `model.add_adapter`).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..about import UNKNOWN
from ..errors import CheckpointError, ConfigError, bad_value
from .layer import AromaLinear

if TYPE_CHECKING:
    from .config import AromaConfig
    from .layout import PlainAdapter


@dataclass(frozen=True)
class Snapshot:
    """An adapter at the moment its tensors were collected: what the files beside the tensors need to know.

    Args:
        config: The configuration that PEFT writes next.
        plain: What is known of the collected tensors.
        exported: The controller's `state_dict()`; None without a controller.
        step: The controller's optimizer step; None without one.
    """

    config: AromaConfig
    plain: PlainAdapter
    exported: dict[str, Any] | None
    step: int | None


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
        dtype_is_settled: Whether PEFT has chosen the dtype of the pairs.
        about: What is saved of the outputs of its model.
    """

    def __init__(self, config: AromaConfig) -> None:
        self.config = config
        self.chose_seed = config.component_seed is not None
        self.seed: int = torch.initial_seed() % 2**31 if config.component_seed is None else config.component_seed
        self.ever_controlled = False
        self.dtype_is_settled = False
        self.about = UNKNOWN
        self._controller: weakref.ref[Any] | None = None
        self._snapshot: Snapshot | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_controller": None, "_snapshot": None}

    # The controller --------------------------------------------------------------------------------------------------

    @property
    def controller(self) -> Any | None:
        """The controller that drives this adapter; None if none was attached or it is gone."""
        return self._controller() if self._controller is not None else None

    def attach_controller(self, controller: Any) -> None:
        """Remember `controller`, by a weak reference, so that saving the adapter writes its state."""
        self._controller = weakref.ref(controller)

    # What decides a run ----------------------------------------------------------------------------------------------

    def method(self) -> dict[str, Any]:
        """Return the fields that decide a run, with the seed in use; JSON-able."""
        return {**self.config.method(), "component_seed": self.seed}

    def check_resumable(self, saved: dict[str, Any]) -> None:
        """Raise if `saved`, the `method()` of a checkpoint, differs; take over its seed if none was chosen.

        Raises:
            ConfigError: Naming every differing field with both values.
            CheckpointError: It is of a rule that only earlier versions had.
        """
        if (growth := saved.get("growth", "paper")) != "paper":
            remedy = "an earlier version grew it by a rule that is gone; load the adapter and start a new run"
            raise bad_value("aroma_state.json: growth", growth, remedy, CheckpointError)
        now = self.method()
        if not self.chose_seed:
            now["component_seed"] = saved.get("component_seed")
        differing = [name for name in now if now[name] != saved.get(name)]
        if differing:
            values = ", ".join(f"{name}={now[name]!r} (checkpoint: {saved.get(name)!r})" for name in differing)
            raise ConfigError(
                f"cannot resume with another configuration: {values}. Resume with the checkpoint's values, or start "
                "a new run."
            )
        self.seed = now["component_seed"]

    # A save ----------------------------------------------------------------------------------------------------------

    def collected(self, config: AromaConfig, plain: PlainAdapter, exported: dict[str, Any] | None) -> None:
        """Remember what was collected until PEFT writes `config`; an earlier snapshot is forgotten."""
        self._snapshot = Snapshot(config, plain, exported, self._step)
        _waiting[id(config)] = self

    def take_snapshot(self, config: AromaConfig) -> Snapshot | None:
        """Return the snapshot that was taken for `config` if no step was made since; it is forgotten."""
        snapshot, self._snapshot = self._snapshot, None
        return snapshot if snapshot and snapshot.config is config and snapshot.step == self._step else None

    @property
    def _step(self) -> int | None:
        return self.controller.global_step if self.controller is not None else None


_waiting: weakref.WeakValueDictionary[int, LiveAdapter] = weakref.WeakValueDictionary()
"""Adapters whose tensors were collected, by the id of the configuration that PEFT will write next.

PEFT collects tensors through the tuner's class, then calls `save_pretrained` of the configuration, and passes nothing
from the first to the second.
"""


def take_collected(config: AromaConfig) -> tuple[LiveAdapter, Snapshot] | None:
    """Return the adapter whose tensors were collected for `config`, and its snapshot; only once for each collection.

    None if nothing was collected, or a step was made since: then `config` is written as the data it is.
    """
    live = _waiting.pop(id(config), None)
    snapshot = live.take_snapshot(config) if live is not None else None
    return (live, snapshot) if live is not None and snapshot is not None else None


def live_adapter(model: nn.Module, adapter_name: str = "default") -> LiveAdapter:
    """Return the live state of an adapter of `model`.

    Args:
        model: A PeftModel, an AromaModel, or a model with injected layers, wrapped or not.
        adapter_name: Name of the adapter.

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
