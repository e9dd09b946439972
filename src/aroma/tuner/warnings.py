"""Warnings of what looks right and is not: a training that does not grow, a head that does not train."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

from ..errors import AromaWarning
from .layer import AromaLinear

if TYPE_CHECKING:
    from .config import AromaConfig

HEADS = {"SEQ_CLS": SEQ_CLS_HEAD_NAMES, "TOKEN_CLS": SEQ_CLS_HEAD_NAMES, "QUESTION_ANS": ["qa_outputs"]}
"""Names of the heads that PEFT trains whole, by task type."""


class UncontrolledWatch:
    """Forward hook of a model that warns, after the first optimizer step, that an adapter trains without a controller.

    When it is saved, the training is over. A pair (b, a) begins with b = 0, so it has trained where b is another.

    Attributes:
        layers: The growing layers of the model.
    """

    def __init__(self) -> None:
        self.layers: list[AromaLinear] = []

    def __call__(self, model: nn.Module, *_: Any) -> None:
        """Look at one layer, as long as its pair is 0; a sharded one would take all ranks."""
        if not self.layers or not model.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        layer = self.layers[0]
        for name in layer.active_adapters:
            if name not in layer.lora_A or layer.live[name].ever_controlled or layer.live[name].controller is not None:
                continue
            b = layer.pair(name)[0]
            if type(b) is nn.Parameter and b.requires_grad and b.any():
                self.layers = []  # once is enough
                warnings.warn(
                    "This AROMA adapter is trained without its controller, as a plain LoRA: no component is ever "
                    "checked or added. Give the Trainer `callbacks=[AromaCallback()]`, or call `aroma.attach(model, "
                    "optimizer, scheduler, total_steps=...)` before a loop of your own.",
                    stacklevel=2,
                )
                return


def warn_frozen_head(model: nn.Module, config: AromaConfig, targets: Any) -> None:
    """Warn where the weights of a head are frozen: PEFT trains them only if it knows the task.

    Args:
        model: The model, with its growing layers.
        config: Of the adapter.
        targets: Its `target_modules`, as they were given.
    """
    found = {name: getattr(model, name, None) for names in HEADS.values() for name in names}
    heads = {name: head for name, head in found.items() if isinstance(head, nn.Module)}
    trains = {*(config.modules_to_save or ())}.intersection(heads)
    grows = targets != "all-linear" and any(
        isinstance(module, AromaLinear) for head in heads.values() for module in head.modules()
    )
    if heads and config.task_type is None and not config.inference_mode and not trains and not grows:
        name = next(iter(heads))
        warnings.warn(
            f"task_type=None: the weights of the head {name!r} of {type(model).__name__} are frozen: a new one keeps "
            f"its random start. Give AromaConfig the task_type, or modules_to_save=[{name!r}]",
            AromaWarning,
            stacklevel=2,
        )
