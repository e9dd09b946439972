"""A case that trains: model, optimizer, hooks, and the two parts of its step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cases import Case

PLANNED_STEPS = 10_000
"""Length of the run that the methods are told of; they are measured at its beginning."""

_LEARNING_RATE = 1e-4


class Contestant:
    """One case, ready to train on one batch again and again.

    Args:
        case: The case.
        model: A classifier that the case may change; see `shapes.copy_model`.
        batch: Its input with labels.
        seed: Seed of the adapter's weights.

    Attributes:
        case: The case.
        model: The adapted model.
        optimizer: AdamW over what trains; None where nothing does.
        hooks: What the method does around an optimizer step; None without an optimizer.
    """

    def __init__(self, case: Case, model: Any, batch: dict[str, Tensor], seed: int) -> None:
        self.case = case
        self.model = case.build(model, PLANNED_STEPS, seed)
        self._call = _compiled(self.model, case.key) if case.compiled else self.model
        self._batch = batch
        self._steps = 0
        self.optimizer: Any = None
        self.hooks: Any = None
        parameters = case.method.parameters(self.model)
        if parameters:
            self.optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=0.0)
            self.hooks = case.method.hooks(self.model, self.optimizer, PLANNED_STEPS)

    def forward(self) -> Tensor:
        """Return the loss."""
        loss: Tensor = self._call(**self._batch).loss
        return loss

    def forward_backward(self) -> None:
        """Forward, and backward as far as anything asks for a gradient."""
        self.forward().backward()

    def optimizer_step(self) -> None:
        """Step the optimizer, the learning rate being what the method wants it to be."""
        self._steps += 1
        if self.optimizer is not None:
            self.hooks.before_step(self._steps)
            self.optimizer.step()

    def method_step(self) -> None:
        """Do what the method does after an optimizer step."""
        if self.optimizer is not None:
            self.hooks.after_step(self._steps)

    def clear(self) -> None:
        """Drop the gradients."""
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    def finish_step(self) -> None:
        """All of the step that is not forward and backward."""
        self.optimizer_step()
        self.method_step()
        self.clear()

    def step(self) -> None:
        """One whole step."""
        self.forward_backward()
        self.finish_step()


def _compiled(model: Any, key: str) -> Callable[..., Any]:
    """Return a compiled call of `model` in a code object of its own.

    PyTorch keeps compiled graphs by code object: in a common one, each case would look through the graphs of all
    others at every call, and from the eighth on silently run uncompiled.
    """

    def call(**batch: Tensor) -> Any:
        return model(**batch)

    call.__code__ = call.__code__.replace(co_name=f"call_{key}")
    return torch.compile(call)
