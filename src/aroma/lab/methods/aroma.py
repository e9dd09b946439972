"""AROMA itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...controller import AromaController
from ...integrations.rewarmup import Rewarmup
from ...tuner import AromaConfig
from .base import Hooks, Method, encoder_linears, with_dropout


@dataclass(frozen=True)
class Aroma(Method):
    """AROMA with its controller.

    Args:
        r: Rank of one component.
        dropout: Dropout on the input of the component in training.
        options: Further fields of `AromaConfig`.
        task_type: PEFT's task type; "SEQ_CLS" lets the head train.
    """

    r: int = 1
    dropout: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    task_type: str = "SEQ_CLS"

    @property
    def name(self) -> str:
        """Name for tables and pictures."""
        return with_dropout("AROMA" if self.r == 1 else f"AROMA r={self.r}", self.dropout)

    def build(self, model: Any, planned_steps: int) -> Any:
        """Wrap `model` with PEFT; see `Method.build`."""
        from peft import get_peft_model

        config = AromaConfig(
            **{
                "r": self.r,
                "lora_dropout": self.dropout,
                "target_modules": encoder_linears(model),
                "task_type": self.task_type,
                "component_seed": 0,
                **self.options,
            }
        )
        return get_peft_model(model, config)

    def hooks(self, model: Any, optimizer: Any, planned_steps: int) -> Growth:
        """Return the controller and the re-warm-up; see `Method.hooks`."""
        return Growth(AromaController(model, optimizer, total_steps=planned_steps), optimizer)


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
