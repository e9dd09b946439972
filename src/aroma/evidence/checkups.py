"""Checkups in a plain PyTorch loop: one call beside `scheduler.step()`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from ..errors import CheckpointError, bad_value
from .checkup import Checkup, Loss, check, model_loss
from .compact import compact
from .schedule import HeldOut, effort, moments
from .updates import Updates


class Checkups:
    """Asks held-out batches at a few steps of a run which directions of a LoRA adapter to keep.

    .. code-block:: python

        model = get_peft_model(base, LoraConfig(r=16))
        checkups = Checkups(model, optimizer, total_steps=1000, held_out=batches)
        for batch in training:
            model(**batch).loss.backward()
            optimizer.step()
            scheduler.step()
            checkups.step()
            optimizer.zero_grad()

    It comes right after an optimizer step: gradients of micro-batches taken before it would be those of directions
    that are no more. To resume, load adapter and optimizer as always, and then `checkups.load_state_dict(...)`.

    Under `torchrun` give the wrapped model, or DeepSpeed's engine and `engine.optimizer`, and every process its own
    held-out batches, equally many. ZeRO counts the steps of all parameters together, so under it the optimizer's state
    of what else trains, such as a head, begins anew with that of the adapter.

    Args:
        model: A model with a LoRA adapter of PEFT, wrapped or not.
        optimizer: The optimizer that trains it.
        total_steps: Planned optimizer steps.
        held_out: Batches of examples that are not trained on: a list, or a DataLoader, which is read once.
        at: When to ask, as shares of the run.
        standard_errors: How many standard errors of held-out loss a smaller adapter may cost; 0 keeps the least loss.
        loss: Loss of a model and a batch; that which the model returns by default. Put `torch.autocast` into it if the
            training uses it.
        on_event: Called with every `Checkup`.
        cost: What forward and backward of a held-out batch cost, in optimizer steps: below 1 where it is smaller.

    Attributes:
        history: The checkups so far.
        global_step: Optimizer steps so far.

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
        at: Sequence[float] = (0.2, 0.4, 0.6),
        standard_errors: float = 0.0,
        loss: Loss | None = None,
        on_event: Callable[[Checkup], None] | None = None,
        cost: float = 1.0,
    ) -> None:
        require_standard_errors(standard_errors)
        self.history: list[Checkup] = []
        self.global_step = 0
        self.total_steps = total_steps
        self._moments = moments(at, total_steps)
        self._updates = Updates(model, optimizer)
        self._held_out = HeldOut(listed(held_out))
        self._effort = effort(total_steps, len(self._moments), len(self._held_out), cost)
        self._loss, self._standard_errors, self._on_event = loss or model_loss, standard_errors, on_event
        self._updates.require_equal_ranks(
            held_out=len(self._held_out), at=self._moments, effort=self._effort, standard_errors=standard_errors
        )

    def step(self) -> Checkup | None:
        """Count an optimizer step, and have a checkup where one is due; after the last step, make the adapter compact.

        Returns:
            The checkup, if there was one.
        """
        found = self.advance(self.global_step + 1)
        if self.global_step == self.total_steps:
            self.finish()
        return found

    def advance(self, step: int) -> Checkup | None:
        """Note that `step` optimizer steps have been taken, and have a checkup where one is due."""
        self.global_step = step
        if step not in self._moments or any(found.step == step for found in self.history):
            return None
        found = check(self._updates, self._held_out, self._loss, self._effort, self._standard_errors, step)
        self.history.append(found)
        if self._on_event is not None:
            self._on_event(found)
        return found

    def finish(self) -> None:
        """Make the adapter compact; one that is sharded keeps its shape, with directions of zero."""
        if not self._updates.is_sharded:
            compact(self._updates.model, self._updates.adapter)

    def explanation(self) -> str:
        """Return one sentence on what the last checkup kept."""
        return str(self.history[-1]) if self.history else "no checkup yet"

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside adapter and optimizer; JSON can hold it."""
        return {
            "global_step": self.global_step,
            "taken": self._held_out.taken,
            "batches": len(self._held_out),
            "history": [checkup.as_dict() for checkup in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`.

        Raises:
            CheckpointError: It is of another run, or no such state.
        """
        if not isinstance(state, dict) or {*state} != {*self.state_dict()}:
            raise CheckpointError("checkups: this is no state of Checkups; give what state_dict() returned")
        if state["batches"] != len(self._held_out):
            raise CheckpointError(
                f"held_out: the run began with {state['batches']} batches, and now there are {len(self._held_out)}; "
                "give the same ones"
            )
        self.global_step, self._held_out.taken = state["global_step"], state["taken"]
        self.history = [Checkup(**checkup) for checkup in state["history"]]


def listed(held_out: Iterable[Any]) -> Sequence[Any]:
    """Return held-out batches as a list; a DataLoader is read once.

    Raises:
        ConfigError: They cannot be iterated, or are one batch.
    """
    if isinstance(held_out, list | tuple):
        return held_out
    if isinstance(held_out, str | bytes | dict) or not isinstance(held_out, Iterable):
        raise bad_value("held_out", type(held_out).__name__, "give a list of batches, or a DataLoader")
    return [*held_out]


def require_standard_errors(value: Any) -> None:
    """Raise ConfigError unless `standard_errors` is a number, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise bad_value("standard_errors", value, "give a number, 0 or more; 1 keeps fewer directions than 0")
