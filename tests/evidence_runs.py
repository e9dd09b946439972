"""What the tests of growth by evidence share: a method that grows within sixty steps, small models, and their runs.

The tests ask for relations, not for particular births: only this file knows how long a run must be to see some.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import Trainer

import models
from aroma import AromaCallback, AromaConfig, Attachment, Event, attach
from aroma.sharding import rank, world_size
from trainer_runs import examples, tiny_bert, trainer_for

STEPS = 60
"""Optimizer steps of a run: first directions, trial, questions, and some births."""

PHASES = {"start": 5, "trial": 12, "questions": 20, "growth": 37, "after births": 41, "rest": 48}
"""An optimizer step within each phase of a run of STEPS; only the last is a multiple of four. Births at 44 follow."""

LONG = 249
LONG_METHOD: dict[str, Any] = {"trial_share": 0.065}
"""A run that is as far at the PHASES, but grows for longer: of STEPS there is room for one held-out batch after the
trial. What would be asked from step 17 on is asked at step 16, of held-out batches."""

METHOD: dict[str, Any] = {
    "growth": "evidence",
    "slots": 3,
    "significance": 0.7,
    "duel_factor": 0.01,
    "component_seed": 5,
}
"""Any direction that is steep at all soon convinces, so that matrices grow, and merge beyond three components."""

WIDTH, LAYERS = 16, 4


def keep_followed(loop: Any) -> None:
    """Let a loop keep the directions that its matrices followed last: the end of growth drops them."""
    matrices = loop.growth.controller.matrices
    stop = getattr(matrices, "stop_following", None)  # the paper's rule follows none

    def keep() -> None:
        loop.followed = [side.clone() for group in matrices._groups for side in (group.u, group.v)]
        stop()

    matrices.stop_following = keep


# A small net in a plain loop -----------------------------------------------------------------------------------------


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


def net(base: nn.Module | None = None, **changes: Any) -> Any:
    """A net that grows."""
    fields = {**METHOD, "target_modules": r"layers\.\d+", **changes}
    return get_peft_model(base or Net(), AromaConfig(**fields), autocast_adapter_dtype=False)


def loss_of(model: Any, batch: Rows) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Loop:
    """One training of a net in a plain loop, which can stop and go on.

    Several processes share every batch, so that they see the same as one.

    Args:
        model: The net, adapted; `net()` by default.
        optimizer: Makes the optimizer.
        steps: Planned steps.
        size: Examples of a batch.
        backward: Takes the gradients of a batch; loss.backward() by default.
        wrap: Makes the model one of several processes.
        noisy: How many examples there are, if they come again and again; their targets are noise then, too.
        growth: Further arguments of `attach`.
    """

    def __init__(
        self,
        model: Any = None,
        optimizer: Callable[[list[nn.Parameter]], Any] = lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        steps: int = STEPS,
        size: int = 8,
        backward: Callable[[Any, Rows], None] = lambda model, batch: loss_of(model, batch).backward(),
        wrap: Callable[[Any], Any] = lambda model: model,
        noisy: int | None = None,
        **growth: Any,
    ) -> None:
        self.model = net() if model is None else model
        self.wrapped = wrap(self.model)
        self.optimizer = optimizer(trainable(self.model))
        self.steps, self.size, self.backward, self.options = steps, size, backward, growth
        dtype = next(value.dtype for value in self.model.parameters() if value.is_floating_point())
        self.x, self.y = (part.to(dtype) for part in rows(noisy or size * steps))
        if noisy:
            self.y = self.y + torch.randn(self.y.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        self.events: list[Event] = []
        self.done = 0

    def attach(self, **options: Any) -> Attachment:
        given = {**self.options, **options}
        if "growth_batches" in given:
            given.setdefault("growth_loss", loss_of)
        self.growth = attach(
            self.wrapped, self.optimizer, total_steps=self.steps, on_event=self.events.append, **given
        )
        keep_followed(self)
        return self.growth

    def batch(self, step: int) -> Rows:
        return share((self.x, self.y), step * self.size % len(self.x), self.size)

    def go_on(self, until: int | None = None) -> Loop:
        """Train until so many steps are done."""
        if not hasattr(self, "growth"):
            self.attach()
        self.wrapped.train()
        while self.done < (self.steps if until is None else until):
            self.optimizer.zero_grad()
            self.backward(self.wrapped, self.batch(self.done))
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


def share(data: Rows, start: int, count: int) -> Rows:
    """This process's part of a batch of all."""
    x, y = (part[start + rank() : start + count : world_size()] for part in data)
    return x, y


def long() -> dict[str, Any]:
    """What makes a loop one in which held-out batches decide births."""
    return {"steps": LONG, "model": net(**LONG_METHOD)}


def by_heart(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What makes a loop one that learns noise by heart: it squeezes early, and its updates end shortened."""
    return {
        **{"steps": 2 * LONG, "model": net(Net().to(dtype), trial_share=1 / 30), "noisy": 64, "steps_per_pass": 8},
        "growth_batches": held_out(20, dtype=dtype),
    }


def held_out(
    count: int = 40, size: int = 8, dtype: torch.dtype = torch.float32, overflowing: Sequence[int] = ()
) -> list[Rows]:
    """Batches that are not trained on; the loss of some, by their numbers, is not finite."""
    x, y = rows(count * size, seed=2, dtype=dtype)
    for number in overflowing:
        y[number * size : (number + 1) * size] = torch.inf
    return [share((x, y), number * size, size) for number in range(count)]


def births(events: Sequence[Event]) -> list[tuple[int, str | None, str]]:
    """What the rule has decided: when, where, what."""
    return [(event.step, event.module, event.kind) for event in events]


def bear_everywhere(growth: Attachment) -> None:
    """Start a component of every matrix, whatever the rule says; beyond the slots the oldest one merges."""
    growth.controller.matrices.bear([(matrix, 0) for matrix in growth.controller.modules])


# A small BERT in the Trainer -----------------------------------------------------------------------------------------


def bert(base: nn.Module | None = None, half: bool = False, **changes: Any) -> Any:
    """A BERT that grows."""
    config = AromaConfig(task_type="SEQ_CLS", **{**METHOD, **changes})
    base = base or tiny_bert()
    return get_peft_model(base.bfloat16() if half else base, config, autocast_adapter_dtype=not half)


def bert_trainer(
    out: Path,
    events: list[Event] | None = None,
    model: Any = None,
    growth: dict[str, Any] | None = None,
    callbacks: Sequence[Any] = (),
    **training: Any,
) -> Trainer:
    """A Trainer of STEPS steps, one pass of which is 10."""
    callback = AromaCallback(on_event=None if events is None else events.append, **(growth or {}))
    return trainer_for(
        bert() if model is None else model, out, callback, *callbacks, **{"max_steps": STEPS, **training}
    )


def growth_dataset(count: int = 160) -> list[dict[str, Tensor]]:
    """Examples that the Trainer does not train on."""
    return examples(count, seed=11)


# Other architectures -------------------------------------------------------------------------------------------------


def grown(name: str, base: Any = None, **changes: Any) -> Any:
    """A tiny model of `models.ARCHITECTURES` that grows."""
    config = AromaConfig(**{**METHOD, **models.ARCHITECTURES[name].adapter, **changes})
    return get_peft_model(models.base(name) if base is None else base, config).eval()


class ModelLoop:
    """One training of such a model on batches of its own, in a plain loop.

    Args:
        model: The model, adapted.
        name: Its architecture.
        step: Takes the gradients of a batch; loss.backward() by default.
        optimizer: Makes the optimizer.
        steps: Planned steps.
        growth: Further arguments of `attach`.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        step: Callable[[Any, Any], None] = lambda model, batch: model(**batch).loss.backward(),
        optimizer: Callable[[list[nn.Parameter]], Any] = lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        steps: int = STEPS,
        **growth: Any,
    ) -> None:
        self.model, self.name, self.step = model, name, step
        self.optimizer = optimizer(trainable(model))
        self.events: list[Event] = []
        self.growth = attach(model, self.optimizer, total_steps=steps, on_event=self.events.append, **growth)
        keep_followed(self)
        self.done = 0

    def go_on(self, until: int = STEPS) -> ModelLoop:
        self.model.train()
        for number in range(self.done, until):
            self.step(self.model, models.batch(self.name, number))
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.done = until
        return self

    @property
    def has_grown(self) -> bool:
        """Whether a component was born by evidence."""
        return any(event.kind == "born" and event.step > PHASES["growth"] - 4 for event in self.events)


def model_batches(name: str, count: int = 20) -> list[Any]:
    """Batches that a `ModelLoop` does not train on."""
    return [models.batch(name, 1000 + number) for number in range(count)]
