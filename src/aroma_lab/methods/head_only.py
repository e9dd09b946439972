"""The head alone, on a frozen backbone: what can be had without adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .base import Method, train_head_only


@dataclass(frozen=True)
class HeadOnly(Method):
    """Only the classification head trains; nothing is propagated back into the backbone."""

    @property
    def name(self) -> str:
        """Name for tables and pictures."""
        return "head only"

    def build(self, model: Any, planned_steps: int) -> Any:
        """Freeze the backbone; see `Method.build`."""
        train_head_only(model)
        return model
