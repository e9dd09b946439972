"""Full fine-tuning: every weight trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .base import Method


@dataclass(frozen=True)
class Full(Method):
    """All parameters train, embeddings included."""

    writes_backbone: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Name for tables and pictures."""
        return "full fine-tuning"

    def build(self, model: Any, planned_steps: int) -> Any:
        """Let everything train; see `Method.build`."""
        return model.requires_grad_(True)
