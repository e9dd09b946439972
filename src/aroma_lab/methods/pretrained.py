"""The pretrained model as it is: what every method starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from aroma.errors import bad_value

from .base import Method
from .head import head_of


@dataclass(frozen=True)
class Pretrained(Method):
    """Nothing trains, so that the base model itself stands in a table."""

    trains: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Name for tables and pictures."""
        return "pretrained"

    def build(self, model: Any, planned_steps: int) -> Any:
        """Freeze everything; see `Method.build`.

        Raises:
            ConfigError: The checkpoint lacks a part of the model, as the head of most classifiers.
        """
        lacking = head_of(model).new
        if lacking:
            raise bad_value(
                "kind",
                "pretrained",
                f"it trains nothing, and the checkpoint lacks {', '.join(lacking)}, which would stay at a random "
                "start; take a checkpoint that has its head, or head_only",
            )
        return model.requires_grad_(False)
