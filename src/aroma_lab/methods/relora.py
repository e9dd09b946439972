"""ReLoRA as the AROMA paper compares it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .aroma import Aroma

_CHECKS = {"inner_tolerance", "inner_check_interval", "inner_criterion", "outer_tolerance", "min_components"}
"""Options of AROMA that mean nothing without its checks."""


@dataclass(frozen=True)
class ReLora(Aroma):
    """ReLoRA 1×8 (section 4.1): AROMA without (5) and (6), so that every module has the same number of components.

    Each component trains for the same number of optimizer steps and is always kept. The backbone is not written.

    Args:
        max_components: Components of every module, one after the other.
        max_inner_steps: Optimizer steps of one component; None: the planned steps divided by `max_components`.
    """

    max_components: int = 8
    max_inner_steps: int | None = None

    @classmethod
    def option_types(cls) -> dict[str, Any]:
        """Return the type of every option: AROMA's without those of its checks; see `Method.option_types`."""
        return {name: kind for name, kind in super().option_types().items() if name not in _CHECKS}

    def _config_fields(self) -> dict[str, Any]:
        lengths = {"max_components": self.max_components, "max_inner_steps": self.max_inner_steps}
        return super()._config_fields() | {"inner_tolerance": None, "outer_tolerance": None} | lengths
