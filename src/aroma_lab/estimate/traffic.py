"""Bytes that devices exchange: in a step, a check, an outer step. Counted, not measured."""

from __future__ import annotations

from dataclasses import dataclass

from .sharding import Needs, Strategy

_DECISION = 4 * 8
"""Bytes that a check agrees on for every module: its norm and its value in float64, the largest and the smallest."""

_FLOAT = 4

LORA_RANK = 8
"""Rank of the LoRA that is compared with."""


@dataclass(frozen=True)
class Traffic:
    """Bytes; those of a step as one device sends them in a ring.

    Args:
        reduced: Gradients that are summed over the devices in one step: the payload, whatever their number.
        lora_reduced: The same of LoRA of rank 8 on the same modules.
        final_lora_reduced: The same of LoRA of the rank that the modules have in the end.
        step: What one device sends in one step.
        check: Decisions of an inner check, to every device.
        outer_step: Decisions of an outer step; every device draws the same new components by itself.
    """

    reduced: int
    lora_reduced: int
    final_lora_reduced: int
    step: int
    check: int
    outer_step: int

    @classmethod
    def of(cls, needs: Needs, strategy: Strategy, devices: int) -> Traffic:
        """Return the traffic of a training on so many devices."""
        inventory, settings = needs.inventory, needs.settings
        sides = sum(m + n for m, n in inventory.modules)
        head = sum(one.bytes for one in inventory.head)
        trained = sum(one.bytes for one in inventory.trained)
        others = (devices - 1) / devices
        step = 0.0
        if strategy == "ddp":
            step = 2 * others * trained
        elif strategy == "fsdp2":
            frozen = sum(one.bytes for one in inventory.weights)
            # Gathered for forward and again for backward, all but what lies outside the blocks, which stays.
            gathered = 2 * (frozen + trained) - inventory.root
            step = others * (gathered + trained)
        decisions = _DECISION * len(inventory.modules) if devices > 1 else 0
        return cls(
            reduced=trained,
            lora_reduced=_FLOAT * LORA_RANK * sides + head,
            final_lora_reduced=_FLOAT * (settings.rank + settings.r) * sides + head,
            step=round(step),
            check=decisions,
            outer_step=decisions,
        )
