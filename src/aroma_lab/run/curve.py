"""Trainable parameters and ranks by optimizer step, recorded while the Trainer works."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from aroma.errors import CheckpointError, NonFiniteError

from ..methods import Method
from .usage import Usage

Changes = list[list[int]]
"""Pairs of optimizer step and value; a value holds from its step on, until the next pair's."""


class Curve:
    """A run's trainable parameters and ranks as step functions. Step 0 is the start.

    Attributes:
        parameters: Parameters that train, the head's left out.
        total_rank: Sum of the ranks; empty for a method without.
        ranks: Rank by module.
    """

    def __init__(self) -> None:
        self.parameters: Changes = []
        self.total_rank: Changes = []
        self.ranks: dict[str, Changes] = {}

    def note(self, step: int, parameters: int, ranks: dict[str, int]) -> None:
        """Record how things are after optimizer step `step`."""
        _note(self.parameters, step, parameters)
        for name, rank in ranks.items():
            _note(self.ranks.setdefault(name, []), step, rank)
        if ranks:
            _note(self.total_rank, step, sum(ranks.values()))

    def average_parameters(self, planned_steps: int) -> float:
        """Return the parameters that trained in an optimizer step, averaged over the planned ones.

        After an early stop the last value counts for the steps that were not taken.
        """
        ends = [step for step, _ in self.parameters[1:]] + [planned_steps]
        areas = [
            value * (min(end, planned_steps) - min(step, planned_steps))
            for (step, value), end in zip(self.parameters, ends, strict=True)
        ]
        return sum(areas) / planned_steps

    def as_dict(self) -> dict[str, Any]:
        """Return the curve, JSON-able."""
        return {"parameters": self.parameters, "total_rank": self.total_rank, "ranks": self.ranks}

    def state_dict(self) -> dict[str, Any]:
        """Return the curve for a checkpoint, where the Trainer sorts keys: the modules keep their order in a list."""
        return {**self.as_dict(), "ranks": [[name, changes] for name, changes in self.ranks.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.parameters, self.total_rank = list(state["parameters"]), list(state["total_rank"])
        self.ranks = {name: list(changes) for name, changes in state["ranks"]}


class CurveRecorder(TrainerCallback, ExportableState):
    """Records the curve and the training time of a run; both go on where a resumed run goes on.

    It has to be called after the method's own callbacks: what they do is part of a step, and its outcome is recorded.

    Args:
        method: Made the model.
        usage: Counts the training time.

    Attributes:
        curve: What was recorded.
    """

    def __init__(self, method: Method, usage: Usage) -> None:
        self.curve = Curve()
        self._method = method
        self._usage = usage

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any, **kwargs: Any
    ) -> None:
        """Record the start, or go on from a checkpoint.

        Raises:
            CheckpointError: The checkpoint has no record of what came before it.
        """
        if state.global_step > 0:
            saved = state.stateful_callbacks.get(type(self).__name__)
            if saved is None:
                raise CheckpointError("trainer_state.json: the checkpoint is no trial's; begin the trial anew")
            self.curve.load_state_dict(saved["attributes"]["curve"])
            self._usage.load_state_dict(saved["attributes"]["usage"])
        else:
            self._note(0, model)
        self._usage.begin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any, **kwargs: Any
    ) -> None:
        """Record the step."""
        self._usage.end_step(state.epoch)
        self._note(state.global_step, model)
        self._usage.begin()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the evaluation out of the training time."""
        self._usage.begin()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the checkpoint out of the training time."""
        self._usage.begin()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Stop at a loss or gradient that is not finite: its model would still predict, and be scored.

        Raises:
            NonFiniteError: It is not.
        """
        for name in ("loss", "grad_norm"):
            if not math.isfinite((logs or {}).get(name, 0.0)):
                raise NonFiniteError(
                    f"{name}={(logs or {})[name]} at optimizer step {state.global_step}: training has diverged; lower "
                    "the learning rate, or look at the data"
                )

    def state(self) -> dict[str, Any]:
        """Return what the Trainer stores in a checkpoint."""
        attributes = {"curve": self.curve.state_dict(), "usage": self._usage.state_dict()}
        return {"args": {}, "attributes": attributes}

    def _note(self, step: int, model: Any) -> None:
        self.curve.note(step, self._method.active_parameters(model), self._method.ranks(model))


def _note(changes: Changes, step: int, value: int) -> None:
    if not changes or changes[-1][1] != value:
        changes.append([step, value])
