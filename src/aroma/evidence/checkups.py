"""Checkups in a plain PyTorch loop, and of a finished adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from ..errors import CheckpointError, bad_value
from .checkup import Checkup, Loss, check, model_loss
from .compact import compact
from .schedule import HeldOut, batches_each, moments
from .updates import Updates


class Checkups:
    """Cuts a LoRA adapter, at a few steps of a run, to the directions that lower the loss of held-out batches.

    .. code-block:: python

        model = get_peft_model(base, LoraConfig(r=16, lora_alpha=16))
        checkups = Checkups(model, optimizer, total_steps=1000, held_out=batches)
        for batch in training:
            model(**batch).loss.backward()
            optimizer.step()
            scheduler.step()
            checkups.step()
            optimizer.zero_grad()

    Call `step` right after the optimizer step: a checkup rewrites the directions, so gradients from before it are
    stale. To resume, load adapter and optimizer as always, and then `checkups.load_state_dict(...)`.

    Under `torchrun` give the wrapped model, or DeepSpeed's engine and `engine.optimizer`, and every process its own
    held-out batches, equally many. ZeRO keeps one step count for all parameters, so a checkup there also resets the
    optimizer state of everything else that trains, such as a head.

    Args:
        model: A model with a LoRA adapter of PEFT, wrapped or not.
        optimizer: The optimizer that trains it.
        total_steps: Planned optimizer steps.
        held_out: Batches of examples that are not trained on: a list, or a DataLoader, which is read once.
        at: When the checkups come, as shares of the run.
        standard_errors: How many standard errors of held-out loss a smaller adapter may cost; 0 keeps the least loss.
        loss: Loss of a model and a batch; by default the loss that the model returns. Put `torch.autocast` into it if
            the training uses it.
        on_event: Called with every `Checkup`.
        cost: Cost of a training step on a held-out batch, in optimizer steps; below 1 for smaller batches.

    Attributes:
        history: The checkups so far.

    Raises:
        ConfigError: No LoRA adapter, too few batches, or a value out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        total_steps: int,
        held_out: Iterable[Any],
        *,
        at: Sequence[float] = (0.4, 0.6),
        standard_errors: float = 0.0,
        loss: Loss | None = None,
        on_event: Callable[[Checkup], None] | None = None,
        cost: float = 1.0,
    ) -> None:
        require_standard_errors(standard_errors)
        self.history: list[Checkup] = []
        self._is_finished = False
        self._step, self._total_steps, self._moments = 0, total_steps, moments(at, total_steps)
        self._updates, self._held_out = Updates(model, optimizer), HeldOut(held_out)
        self._count = batches_each(total_steps, len(self._moments), len(self._held_out), cost)
        self._loss, self._standard_errors, self._on_event = loss or model_loss, standard_errors, on_event
        self._updates.require_equal_ranks(held_out=len(self._held_out), at=self._moments, batches_each=self._count)

    def step(self) -> Checkup | None:
        """Count an optimizer step, and return its checkup, if one is due; after the last, make the adapter compact."""
        found = self.advance(self._step + 1)
        if self._step == self._total_steps:
            self.finish()
        return found

    def advance(self, step: int) -> Checkup | None:
        """Note that `step` optimizer steps have been taken, and run a checkup if one is due."""
        self._step = step
        if step not in self._moments or any(found.step == step for found in self.history):
            return None
        found = check(self._updates, self._held_out, self._loss, self._count, self._standard_errors, step)
        self.history.append(found)
        if self._on_event is not None:
            self._on_event(found)
        return found

    def finish(self) -> None:
        """Make the adapter compact; one that is sharded keeps its shape, with directions of zero."""
        if not self._updates.is_sharded and not self._is_finished:
            self._is_finished = True
            self._updates.forget()  # its state has the old shapes, and the loop may take further steps
            compact(self._updates.model, self._updates.adapter)

    def explanation(self) -> str:
        """Return one sentence on what the last checkup kept."""
        return str(self.history[-1]) if self.history else "no checkup yet"

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside adapter and optimizer; JSON can hold it."""
        of_batches = {"taken": self._held_out.taken, "batches": len(self._held_out)}
        return {"step": self._step, **of_batches, "history": [checkup.as_dict() for checkup in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`.

        Raises:
            CheckpointError: It is of a run with other held-out batches, or no such state.
        """
        if not isinstance(state, dict) or {*state} != {*self.state_dict()}:
            raise CheckpointError("checkups: this is no state of Checkups; give what state_dict() returned")
        if state["batches"] != len(self._held_out):
            raise CheckpointError(
                f"held_out: the run began with {state['batches']} batches, and now there are {len(self._held_out)}; "
                "give the same ones"
            )
        self._step, self._held_out.taken = state["step"], state["taken"]
        self.history = [Checkup(**checkup) for checkup in state["history"]]


def compress(
    model: nn.Module, held_out: Iterable[Any], *, standard_errors: float = 0.0, loss: Loss | None = None
) -> Checkup:
    """Keep the directions of a finished LoRA adapter that lower the loss of held-out batches, and make it compact.

    .. code-block:: python

        model = PeftModel.from_pretrained(base, "adapter")
        print(compress(model, held_out_batches))
        model.save_pretrained("smaller")

    Args:
        model: A model with an active LoRA adapter of PEFT, in one process.
        held_out: As for `Checkups`. The loss of every batch is measured at every size.
        standard_errors: As for `Checkups`.
        loss: As for `Checkups`.

    Raises:
        ConfigError: No LoRA adapter, too few batches, a sharded model, or a value out of range.
    """
    require_standard_errors(standard_errors)
    updates, batches = Updates(model), HeldOut(held_out)
    found = check(updates, batches, loss or model_loss, len(batches), standard_errors, 0)
    compact(model)
    return found


def require_standard_errors(value: Any) -> None:
    """Raise ConfigError unless `standard_errors` is a number, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise bad_value("standard_errors", value, "give a number, 0 or more; 1 keeps fewer directions than 0")
