"""LoRA, as PEFT has it, on all linear modules of the layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .base import Method, encoder_linears, with_dropout


@dataclass(frozen=True)
class Lora(Method):
    """LoRA of one rank for all modules.

    Args:
        r: Rank.
        alpha: lora_alpha; None for r, so that the scale is 1.
        dropout: Dropout on the adapter's input.
        task_type: PEFT's task type; "SEQ_CLS" lets the head train.
    """

    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    task_type: str = "SEQ_CLS"

    @property
    def name(self) -> str:
        """Name for tables and pictures."""
        return with_dropout(f"LoRA r={self.r}", self.dropout)

    def build(self, model: Any, planned_steps: int) -> Any:
        """Wrap `model` with PEFT; see `Method.build`."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self.r,
            lora_alpha=self.r if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=encoder_linears(model),
            task_type=self.task_type,
        )
        return get_peft_model(model, config)
