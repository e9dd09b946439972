"""AROMA's controller around the optimizer's step, for loops without the Trainer."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from aroma.controller import AromaController
from aroma.errors import CheckpointError
from aroma.integrations.rewarmup import Rewarmup
from aroma.matrices import GrowingMatrix

from .hooks import Hooks

_STATE = "controller"
_KEPT = "tensors."
_UPDATES = "updates."


class Growth(Hooks):
    """Calls the controller after every step, and lets the learning rate climb as it says.

    Args:
        controller: The controller.
        optimizer: The optimizer that it drives.

    Attributes:
        controller: The controller.
    """

    def __init__(self, controller: AromaController, optimizer: Any) -> None:
        self.controller = controller
        self._optimizer = optimizer
        self._rewarmup = Rewarmup()

    def before_step(self, step: int) -> None:
        """Scale the learning rate for this step."""
        self._rewarmup.begin(self._optimizer, self.controller.lr_factor)

    def after_step(self, step: int) -> None:
        """Give the learning rate back, and step the controller."""
        self._rewarmup.end(self._optimizer, None)
        self.controller.step()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the controller's state, and the update of every module as an adapter's file has it."""
        exported = self.controller.state_dict()
        text = json.dumps(exported["state"]).encode()
        state = {_STATE: torch.frombuffer(bytearray(text), dtype=torch.uint8)}
        state |= {f"{_KEPT}{name}": tensor.detach().clone() for name, tensor in exported["tensors"].items()}
        for index, module in enumerate(self.controller.modules):
            B, A = module.components(module.pair)
            state[f"{_UPDATES}{index}.B"] = B.detach().clone()
            state[f"{_UPDATES}{index}.A"] = A.detach().clone()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict()`; see `Hooks.load_state_dict`."""
        if _STATE not in state or f"{_UPDATES}{len(self.controller.modules) - 1}.B" not in state:
            raise CheckpointError("hooks: the saved state is not of an AROMA run on these modules; use its checkpoint")
        for index, module in enumerate(self.controller.modules):
            self._load_update(module, state[f"{_UPDATES}{index}.B"], state[f"{_UPDATES}{index}.A"])
        tensors = {key.removeprefix(_KEPT): value for key, value in state.items() if key.startswith(_KEPT)}
        packed = json.loads(bytes(state[_STATE].tolist()))
        self.controller.load_state_dict({"state": packed, "tensors": tensors})

    def _load_update(self, module: GrowingMatrix, B: Tensor, A: Tensor) -> None:
        """Do as PEFT does at the load of an adapter: all of the update is finished, and the pair starts at b = 0."""
        adapter = self.controller.adapter_name
        _, a = module.pair
        module.layer.start_pair(adapter, a.detach())
        module.layer.finished(adapter).load_state_dict({"A": A, "B": B})
