"""LoRA that keeps the directions which lower held-out loss: `aroma.evidence`; and its rivals, cut without data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft.tuners.lora import Linear as LoraLinear
from transformers import TrainerCallback

from aroma.evidence.checkups import require_standard_errors
from aroma.evidence.compact import compact
from aroma.evidence.schedule import moments
from aroma.evidence.updates import Updates
from aroma.integrations.evidence_callback import EvidenceCallback
from aroma.integrations.held_out import hold_out

from .lora import ADAPTER, Lora, layers_of


@dataclass(frozen=True)
class Evidence(Lora):
    """LoRA with checkups; see `EvidenceCallback`.

    Args:
        at: When the checkups come, as shares of the run.
        standard_errors: How many standard errors of held-out loss a smaller adapter may cost.
        held_out_share: Share of the training set that decides, and is not trained on.
    """

    r: int = 16
    at: list[float] = field(default_factory=lambda: [0.4, 0.6])
    standard_errors: float = 0.0
    held_out_share: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        moments(self.at, 2**53)
        require_standard_errors(self.standard_errors)
        self._require(0 < self.held_out_share < 1, "held_out_share", "give a share in (0, 1), such as 0.1")

    def hold_out(self, train: Any) -> tuple[Any, Any | None]:
        """Hold out the examples that decide; see `Method.hold_out`."""
        return hold_out(train, self.held_out_share)

    def check_steps(self, steps: int) -> None:
        """Raise ConfigError if a run of `steps` optimizer steps is too short for its checkups."""
        moments(self.at, steps)

    def callbacks(
        self, model: Any, on_event: Callable[[Any], None] | None = None, early_stop: bool = True, held_out: Any = None
    ) -> list[TrainerCallback]:
        """Return the callback that has the checkups; see `Method.callbacks`."""
        checkups = EvidenceCallback(held_out, at=self.at, standard_errors=self.standard_errors, on_event=on_event)
        return [*super().callbacks(model, on_event, early_stop), checkups]

    def ranks(self, model: Any) -> dict[str, int]:
        """Return how many directions of every module are not cut; see `Method.ranks`."""
        return directions_of(model)


@dataclass(frozen=True)
class Truncated(Lora):
    """LoRA whose update keeps its largest singular directions after the last step, whatever examples say.

    Args:
        size: Mean rank that stays.
        spread: `"even"`: every matrix keeps `size` directions, rounded up (LoRA-Squeeze, arXiv 2602.10993).
            `"largest"`: the largest directions of all matrices together stay (PARA, arXiv 2604.27796).
    """

    r: int = 16
    size: float = 4.0
    spread: Literal["even", "largest"] = "largest"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 <= self.size <= self.r, "size", f"give a mean rank from 0 to r={self.r}")

    def callbacks(
        self, model: Any, on_event: Callable[[Any], None] | None = None, early_stop: bool = True, held_out: Any = None
    ) -> list[TrainerCallback]:
        """Return the callback that cuts; see `Method.callbacks`."""
        return [*super().callbacks(model, on_event, early_stop), _Cut(self)]

    def ranks(self, model: Any) -> dict[str, int]:
        """Return how many directions of every module are not cut; see `Method.ranks`."""
        return directions_of(model)


class _Cut(TrainerCallback):
    def __init__(self, method: Truncated) -> None:
        self.method = method

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Cut, and make the adapter compact."""
        updates = Updates(model)
        sigma, rank = updates.to_singular_directions(), math.ceil(self.method.size)
        if self.method.spread == "even":
            kept = torch.cat([torch.arange(update.r) < rank for update in updates.each])
        else:
            order = sigma.argsort(descending=True, stable=True)
            kept = order.argsort() < round(self.method.size * len(updates.each))
        updates.cut(kept)
        compact(updates.model, updates.adapter)


def directions_of(model: Any) -> dict[str, int]:
    """Return how many directions of every module of a LoRA are not cut, by the module's name in the base model."""
    factors = {name: layer.lora_A for name, layer in layers_of(model, LoraLinear).items()}
    return {name: int(A[ADAPTER].weight.any(1).sum()) if ADAPTER in A else 0 for name, A in factors.items()}
