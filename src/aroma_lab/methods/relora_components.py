"""ReLoRA as the paper compares it: components of rank one in turn, written through AROMA without its checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .aroma import Aroma
from .base import with_dropout

_OF_THE_CHECKS = (
    "inner_tolerance",
    "inner_check_interval",
    "inner_criterion",
    "outer_tolerance",
    "min_components",
)
"""Options of AROMA that mean nothing without its checks."""


@dataclass(frozen=True)
class Relora(Aroma):
    """ReLoRA 1×8 (section 4.1): AROMA without (5) and (6), so that every module has the same number of components.

    Each component trains for the same number of optimizer steps and is kept whatever it came to. The backbone is not
    written: `ReLora` is the method that merges into it.

    Args:
        max_components: Components of every module, one after the other.
        max_inner_steps: Optimizer steps of one component; None: the planned steps divided by `max_components`.
    """

    max_components: int = 8
    max_inner_steps: int | None = None

    @classmethod
    def option_types(cls) -> dict[str, Any]:
        """Return the type of every option: those of AROMA but for its checks; see `Method.option_types`."""
        return {name: kind for name, kind in super().option_types().items() if name not in _OF_THE_CHECKS}

    @property
    def name(self) -> str:
        """Name for tables and pictures."""
        return with_dropout(f"ReLoRA {self.r}×{self.max_components}", self.dropout)

    def _options(self) -> dict[str, Any]:
        return {
            **super()._options(),
            "inner_tolerance": None,
            "outer_tolerance": None,
            "max_components": self.max_components,
            "max_inner_steps": self.max_inner_steps,
        }
