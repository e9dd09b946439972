"""What tests of plain loops share: a small net that grows within sixty steps, and its trainings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from aroma import AromaConfig, Attachment, Event, aroma_layers, attach
from aroma.distributed import rank, world_size

STEPS = 60
"""Optimizer steps of a run."""

SAVED_AT = 37
"""An optimizer step within an inner loop, after some merges."""

METHOD: dict[str, Any] = {
    **{"inner_check_interval": 2, "inner_tolerance": 0.5, "max_inner_steps": 4, "outer_tolerance": 1e-3},
    "component_seed": 5,
}

WIDTH, LAYERS = 16, 4


class Net(nn.Module):
    """Residual layers of tanh, without biases."""

    def __init__(self, width: int = WIDTH, layers: int = LAYERS, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        for layer in self.layers:
            layer.weight.data = torch.randn(width, width, generator=generator) / width**0.5

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.5 * torch.tanh(layer(x))
        return x


Rows = tuple[Tensor, Tensor]


def rows(count: int, seed: int = 1, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> Rows:
    """Inputs, and what a net of other weights makes of them."""
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        y = Net(width, seed=9)(x)
    return x.to(dtype), y.to(dtype)


def share(data: Rows, start: int, count: int) -> Rows:
    """This process's part of a batch of all."""
    x, y = (part[start + rank() : start + count : world_size()] for part in data)
    return x, y


def net(base: nn.Module | None = None, **changes: Any) -> Any:
    """A net that grows."""
    fields = {**METHOD, "target_modules": r"layers\.\d+", **changes}
    return get_peft_model(base or Net(), AromaConfig(**fields), autocast_adapter_dtype=False)


def loss_of(model: Any, batch: Rows) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def decisions(events: Sequence[Event]) -> list[tuple[int, str | None, str]]:
    """What the rule has decided: when, where, what."""
    return [(event.step, event.module, event.kind) for event in events]


def updates(model: Any) -> dict[str, Tensor]:
    """B A + s b a of every matrix."""
    found = {name: layer.components("default") for name, layer in aroma_layers(model).items()}
    return {name: B.detach() @ A.detach() for name, (B, A) in found.items()}


def copied(value: Any) -> Any:
    """Return a value whose tensors share nothing with the given one's."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [copied(item) for item in value]
    return value.clone() if isinstance(value, Tensor) else value


class Loop:
    """One training of a net in a plain loop, which can stop and go on.

    Several processes share every batch, so that they see the same as one.

    Args:
        model: The net, adapted; `net()` by default.
        steps: Planned steps.
        size: Examples of a batch.
        wrap: Makes the model one of several processes.
    """

    def __init__(
        self, model: Any = None, steps: int = STEPS, size: int = 8, wrap: Callable[[Any], Any] = lambda model: model
    ) -> None:
        self.model = net() if model is None else model
        self.wrapped = wrap(self.model)
        self.optimizer = torch.optim.AdamW(trainable(self.model), lr=0.01)
        self.steps, self.size = steps, size
        dtype = next(value.dtype for value in self.model.parameters() if value.is_floating_point())
        self.data = rows(size * steps, dtype=dtype)
        self.events: list[Event] = []
        self.done = 0

    def attach(self, **options: Any) -> Attachment:
        self.growth = attach(
            self.wrapped, self.optimizer, total_steps=self.steps, on_event=self.events.append, **options
        )
        return self.growth

    def go_on(self, until: int | None = None) -> Loop:
        """Train until so many steps are done."""
        if not hasattr(self, "growth"):
            self.attach()
        self.wrapped.train()
        while self.done < (self.steps if until is None else until):
            self.optimizer.zero_grad()
            loss_of(self.wrapped, share(self.data, self.done * self.size, self.size)).backward()
            self.optimizer.step()
            self.done += 1
        return self

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")

    @classmethod
    def resumed(cls, folder: Path, done: int, **options: Any) -> Loop:
        """A training that goes on from what was saved after `done` steps."""
        loop = cls(**options)
        loop.model.load_adapter(str(folder), "default", is_trainable=True)
        loop.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        loop.attach(resume_from=str(folder))
        loop.done = done
        return loop

    def came_to(self) -> dict[str, Any]:
        """Everything that a run has in memory, comparable by `assert_same`."""
        return {
            "weights": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "controller": self.growth.controller.state_dict(),
            "summary": self.growth.controller.summary(),
        }
