"""What every method of comparison is: build, parameters, hooks.

.. code-block:: python

    model = method.build(model, planned_steps)
    optimizer = torch.optim.AdamW(method.parameters(model), lr=...)
    hooks = method.hooks(model, optimizer, planned_steps)
    for step, batch in enumerate(batches, start=1):
        model(**batch).loss.backward()
        hooks.before_step(step)
        optimizer.step()
        hooks.after_step(step)  # before zero_grad: AdaLoRA's allocator reads the gradients
        optimizer.zero_grad()
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from transformers.pytorch_utils import Conv1D

HEAD_NAMES = ("classifier", "score")
"""What transformers calls the heads of its classifiers; they train with every adapter, as PEFT has it for SEQ_CLS."""


class Hooks:
    """What a method does around an optimizer step; nothing, for most methods."""

    def before_step(self, step: int) -> None:
        """Called before optimizer step `step`, counted from 1, when the gradients are there."""

    def after_step(self, step: int) -> None:
        """Called after optimizer step `step`, before the gradients are cleared."""


@dataclass(frozen=True)
class Method(ABC):
    """How a pretrained transformers model is fine-tuned.

    Attributes:
        writes_backbone: Whether training writes the weights of the backbone, so that they cannot be shared between
            models.
    """

    writes_backbone: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """Name for tables and pictures."""

    @abstractmethod
    def build(self, model: Any, planned_steps: int) -> Any:
        """Adapt `model` in place, or wrap it, and freeze what does not train.

        Args:
            model: A transformers model with a head.
            planned_steps: Optimizer steps of the run.

        Returns:
            The model to train. Its head trains.
        """

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Return what the optimizer trains."""
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    def hooks(self, model: Any, optimizer: Any, planned_steps: int) -> Hooks:
        """Return what is done around each optimizer step of a model that `build` made."""
        return Hooks()


def encoder_linears(model: nn.Module) -> list[str]:
    """Return the full names of the linear modules in numbered layers: PEFT's "all-linear" without head and pooler.

    In RoBERTa these are query, key, value, attention output, intermediate and output of every layer.
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and re.search(r"\.\d+\.", name)
    ]


def train_head_only(model: nn.Module) -> None:
    """Freeze everything but the head."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in HEAD_NAMES)


def with_dropout(name: str, dropout: float) -> str:
    """Return `name`, and what is dropped if anything is."""
    return f"{name}, dropout {dropout:g}" if dropout else name
