"""What a method does around an optimizer step, and the callback that calls it inside the Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aroma.errors import CheckpointError


class Hooks:
    """What a method does around an optimizer step; nothing, for most methods.

    What it remembers from step to step, and what it changed in the model beside the trained parameters, is in its
    state: trained parameters, optimizer, schedule and this state together make a resumed run exact.
    """

    def before_step(self, step: int) -> None:
        """Called before optimizer step `step`, counted from 1, when the gradients are there."""

    def after_step(self, step: int) -> None:
        """Called after optimizer step `step`, before the gradients are cleared."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of what an exact resume needs beside the trained parameters; safetensors can hold them."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict()`, after the trained parameters; into a model just built, or one of later in the run.

        Raises:
            CheckpointError: The state is of another method or model.
        """
        require_keys(state, set())


class HooksCallback(TrainerCallback):
    """Calls a method's hooks inside the Trainer, around every optimizer step, while the gradients are there.

    To resume, call `load_state_dict` before `Trainer.train(resume_from_checkpoint=...)`.

    Args:
        make_hooks: Called with model, optimizer and planned optimizer steps when the training begins.

    Attributes:
        hooks: The hooks of the current or last training; None before the first.
    """

    def __init__(self, make_hooks: Callable[[Any, Any, int], Hooks]) -> None:
        self._make_hooks = make_hooks
        self._saved: dict[str, Tensor] | None = None
        self.hooks: Hooks | None = None

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Keep what `hooks.state_dict()` returned, until the training that goes on from there begins."""
        self._saved = state

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any,
        optimizer: Any,
        **kwargs: Any,
    ) -> None:
        """Make the hooks; on resume, give them their state.

        Raises:
            CheckpointError: A resumed training without the state of its hooks, or with one of another method.
        """
        self.hooks = self._make_hooks(model, optimizer, state.max_steps)
        if state.global_step > 0 and self._saved is None:
            raise CheckpointError(
                f"hooks: the training goes on from step {state.global_step}, and nobody restored what the method "
                "remembers; call load_state_dict of this callback with the checkpoint's state before training"
            )
        if self._saved is not None:
            self.hooks.load_state_dict(self._saved)
            self._saved = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any, **kwargs: Any
    ) -> None:
        """Call `before_step`."""
        if _is_over(state):
            # Without gradients the step changes nothing.
            optimizer.zero_grad(set_to_none=True)
            return
        self._running().before_step(state.global_step + 1)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any,
        lr_scheduler: Any,
        **kwargs: Any,
    ) -> None:
        """Call `after_step`; the learning rate that was used is the one that is logged."""
        if _is_over(state):
            return
        used = [group["lr"] for group in optimizer.param_groups]
        self._running().after_step(state.global_step + 1)
        if hasattr(lr_scheduler, "_last_lr"):
            lr_scheduler._last_lr = used

    def _running(self) -> Hooks:
        assert self.hooks is not None, "the Trainer calls on_train_begin first"
        return self.hooks


def _is_over(state: TrainerState) -> bool:
    """Whether all planned steps are taken; the Trainer takes another where such a run is resumed, before it stops."""
    return state.global_step >= state.max_steps


def require_keys(state: dict[str, Tensor], expected: set[str]) -> None:
    """Check that a state has the `expected` keys and no others.

    Raises:
        CheckpointError: Naming the first key too few or too many.
    """
    for key in sorted(expected ^ set(state)):
        what = "is missing" if key in expected else "belongs to none of this method's"
        raise CheckpointError(f"hooks: {key!r} {what} in the saved state; use a checkpoint of this very run")
