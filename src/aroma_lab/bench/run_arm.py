"""One method of a whole run, ready to train: model, optimizer, hooks, and what is known of its ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aroma.tuner import aroma_layers

from ..methods import Hooks
from ..specs import TrainSpec
from .replay import Replayer
from .run_data import Batch


@dataclass
class Arm:
    """One method in training. A step is `train`, `grow`, `clear`.

    Args:
        name: One of those in `accounting`.
        label: Name for tables and pictures.
        model: The adapted model.
        optimizer: Over what trains.
        scheduler: Of its learning rate.
        hooks: What the method does around an optimizer step.
        training: The loop.
        replays: Whether its ranks follow a plan by the number of the step, so that it can grow in a step in which it
            did not train.
        total_rank: Tells the sum of its ranks.
    """

    name: str
    label: str
    model: Any
    optimizer: Any
    scheduler: Any
    hooks: Hooks
    training: TrainSpec
    replays: bool
    total_rank: Callable[[], int]
    _taken: int = 0
    _random_state: tuple[Tensor, list[Tensor]] | None = None

    @contextmanager
    def own_randomness(self) -> Iterator[None]:
        """Draw random numbers, as dropout does, from a stream that is the arm's alone, whoever else takes turns."""
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            if self._random_state is None:
                torch.manual_seed(self.training.seed)
            else:
                torch.set_rng_state(self._random_state[0])
                torch.cuda.set_rng_state_all(self._random_state[1])
            yield
            self._random_state = (torch.get_rng_state(), torch.cuda.get_rng_state_all())

    def train(self, batches: Sequence[Batch], step_optimizer: bool = True) -> None:
        """Forward and backward over all `batches`, and the optimizer's step."""
        device = next(iter(batches[0].values())).device.type
        for batch in batches:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=self.training.bf16):
                loss = self.model(**batch).loss / len(batches)
            loss.backward()
        if self.training.max_grad_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.training.max_grad_norm)
        if step_optimizer:
            self._taken += 1
            self.hooks.before_step(self._taken)
            self.optimizer.step()

    def grow(self, step: int) -> None:
        """Do what the method does after optimizer step `step`."""
        # What plans by its own steps, as AdaLoRA's budget does, is told how many it has taken.
        self.hooks.after_step(step if self.replays else self._taken)

    def clear(self) -> None:
        """Drop the gradients, and step the schedule of the learning rate."""
        self.scheduler.step()
        self.optimizer.zero_grad()

    def warm_up(self, batches: Sequence[Batch]) -> None:
        """Let the libraries allocate what they need, and leave what is trained for real as it was."""
        self.train(batches, step_optimizer=False)
        if self.replays:
            self.optimizer.step()  # a reset needs moments, and the first step measured may come after it
        self.optimizer.zero_grad()

    @property
    def trainable(self) -> int:
        """Number of trainable parameters of the adapter."""
        return sum(p.numel() for name, p in self.model.named_parameters() if p.requires_grad and is_adapter(name))

    @property
    def finished(self) -> int:
        """Number of modules that train no further component."""
        return sum(layer.is_frozen("default") for layer in aroma_layers(self.model).values())

    @property
    def is_over(self) -> bool:
        """Whether no module trains a component any more."""
        return self.finished == len(aroma_layers(self.model)) > 0


class Follow(Hooks):
    """Lets a plan decide what grows.

    Args:
        replayer: Carries it out.
    """

    def __init__(self, replayer: Replayer) -> None:
        self._replayer = replayer

    def after_step(self, step: int) -> None:
        """Carry out what the plan says of `step`."""
        self._replayer.step(step)


def is_adapter(parameter_name: str) -> bool:
    """Whether a trainable parameter belongs to the adapter; AdaLoRA's singular values do, too."""
    return ".lora_" in parameter_name
