"""AdaLoRA, as PEFT has it, with what PEFT leaves to the user's loop: the allocator, called after every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import bad_value
from .base import Hooks, Method, encoder_linears, with_dropout


@dataclass(frozen=True)
class AdaLora(Method):
    """AdaLoRA: the budget shrinks from `init_r` to `target_r` a module on average, spent where it matters most.

    PEFT's forward adds the orthogonality term to the loss whenever the model is given labels.

    Args:
        init_r: Rank of every module at the start.
        target_r: Average rank at the end.
        alpha: PEFT's lora_alpha, which AdaLoRA divides by the rank; None for `init_r`, so that the scale is 1.
        dropout: Dropout on the adapter's input.
        initial_share: Share of the planned steps before the budget shrinks (tinit).
        final_share: Share of the planned steps after it has shrunk (tfinal).
        interval: Optimizer steps between two allocations (deltaT).
        orthogonality: Weight of the orthogonality term.
        task_type: PEFT's task type; "SEQ_CLS" lets the head train.
    """

    init_r: int = 12
    target_r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    initial_share: float = 0.0
    final_share: float = 0.0
    interval: int = 1
    orthogonality: float = 0.5
    task_type: str = "SEQ_CLS"

    def __post_init__(self) -> None:
        # At equal ranks there would be nothing to allocate, and PEFT's allocator fails with an error of torch's.
        if not 0 < self.target_r < self.init_r:
            raise bad_value("target_r", self.target_r, f"give 1 or more, and less than init_r={self.init_r}")

    @property
    def name(self) -> str:
        """Name for tables and pictures."""
        return with_dropout(f"AdaLoRA r={self.init_r}→{self.target_r}", self.dropout)

    def build(self, model: Any, planned_steps: int) -> Any:
        """Wrap `model` with PEFT; see `Method.build`."""
        from peft import AdaLoraConfig, get_peft_model

        config = AdaLoraConfig(
            init_r=self.init_r,
            target_r=self.target_r,
            lora_alpha=self.init_r if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            tinit=int(self.initial_share * planned_steps),
            tfinal=int(self.final_share * planned_steps),
            deltaT=self.interval,
            orth_reg_weight=self.orthogonality,
            total_step=planned_steps,
            target_modules=encoder_linears(model),
            task_type=self.task_type,
        )
        return get_peft_model(model, config)

    def hooks(self, model: Any, optimizer: Any, planned_steps: int) -> Hooks:
        """Return the call of the allocator; see `Method.hooks`."""
        return _Allocation(model)


class _Allocation(Hooks):
    def __init__(self, model: Any) -> None:
        self._tuner = model.base_model

    def after_step(self, step: int) -> None:
        self._tuner.update_and_allocate(step)
