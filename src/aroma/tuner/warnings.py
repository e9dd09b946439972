"""Warnings of what looks right and is not: a training that does not grow, a head that does not train."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

from ..errors import AromaWarning

if TYPE_CHECKING:
    from .config import AromaConfig

HEADS = {"SEQ_CLS": SEQ_CLS_HEAD_NAMES, "TOKEN_CLS": SEQ_CLS_HEAD_NAMES, "QUESTION_ANS": ["qa_outputs"]}
"""Names of the heads that PEFT trains whole, by task type."""


def warn_uncontrolled() -> None:
    """Warn that an adapter was trained without a controller, so that it did not grow."""
    warnings.warn(
        "This AROMA adapter was trained without its controller, as a plain LoRA: no component was ever checked or "
        "added. Give the Trainer `callbacks=[AromaCallback()]`, or call `aroma.attach(model, optimizer, scheduler, "
        "total_steps=...)` before a loop of your own.",
        stacklevel=3,
    )


def warn_frozen_head(model: nn.Module, config: AromaConfig) -> None:
    """Warn where the weights of a head are frozen: PEFT trains them only if it knows the task.

    Args:
        model: The model, with its growing layers.
        config: Of the adapter.
    """
    if config.task_type is not None or config.modules_to_save or config.inference_mode:
        return
    for name in sorted({name for names in HEADS.values() for name in names}):
        head = getattr(model, name, None)
        weights = [*head.named_parameters()] if isinstance(head, nn.Module) else []
        if weights and not any(weight.requires_grad for key, weight in weights if "lora_" not in key):
            warnings.warn(
                f"task_type=None: the weights of the head {name!r} of {type(model).__name__} are frozen: a new one "
                f"keeps its random start. Give AromaConfig the task_type, or modules_to_save=[{name!r}]",
                AromaWarning,
                stacklevel=2,
            )
            return
