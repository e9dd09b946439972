"""What AROMA hooks into an optimizer is gone when it is told to go, and what others hooked in stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from aroma import AromaCallback, attach
from trainer_runs import adapted, trainer_for

# Optimizers of torch -------------------------------------------------------------------------------------------------


def hooks_of(*parts: Any) -> list[tuple[str, int]]:
    """Number of hooks of every kind that optimizers and modules carry."""
    owners = [owner for part in parts for owner in (part.modules() if isinstance(part, nn.Module) else [part])]
    return [
        (f"{type(owner).__name__}.{name}", len(value))
        for owner in owners
        for name, value in vars(owner).items()
        if "hooks" in name and isinstance(value, dict)
    ]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile], ids=["plain", "compiled"])
def test_detaching_removes_every_hook(wrap: Callable[[Any], Any]) -> None:
    """Compiled, the controller also drops the gradients of frozen pairs before a step."""
    model = adapted()
    optimizer = adamw(model)
    own = optimizer.register_step_post_hook(lambda *_: None)
    before = hooks_of(model, optimizer)
    growth = attach(wrap(model), optimizer, total_steps=32)
    assert hooks_of(model, optimizer) != before
    growth.detach()
    growth.detach()
    assert hooks_of(model, optimizer) == before
    own.remove()


class Stop(TrainerCallback):
    """Breaks a training off after a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise RuntimeError("somebody else's error")


def test_a_training_after_one_that_broke_off_has_the_hooks_of_one(tmp_path: Any) -> None:
    model, callback = adapted(), AromaCallback()
    optimizer = adamw(model)
    before = hooks_of(model, optimizer)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    trainer = trainer_for(model, tmp_path, callback, Stop(), more={"optimizers": (optimizer, schedule)}, max_steps=3)
    with pytest.raises(RuntimeError, match="somebody else's error"):
        trainer.train()
    trainer.remove_callback(Stop)
    trainer.train()
    assert hooks_of(model, optimizer) == before
