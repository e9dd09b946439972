"""Records a run while the Trainer works: ranks and parameters by step, cost, events, history."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from aroma.checkpoint import record_save
from aroma.errors import NonFiniteError
from aroma.events import Event
from aroma.files import write_text

from ..methods import Method

Changes = list[list[int]]
"""Pairs of optimizer step and value; a value holds from its step on, until the next pair's."""


class Curve:
    """A run's trainable parameters and ranks as step functions. Step 0 is the start.

    Attributes:
        parameters: Parameters that train, the head's left out.
        ranks: Rank by module.
    """

    def __init__(self) -> None:
        self.parameters: Changes = []
        self.ranks: dict[str, Changes] = {}

    def note(self, step: int, parameters: int, ranks: dict[str, int]) -> None:
        """Record the state after optimizer step `step`."""
        noted = [(self.parameters, parameters)]
        noted += [(self.ranks.setdefault(name, []), rank) for name, rank in ranks.items()]
        for changes, value in noted:
            if not changes or changes[-1][1] != value:
                changes.append([step, value])

    def average_parameters(self, planned_steps: int) -> float:
        """Return the parameters that trained in a planned optimizer step, on average; after an early stop the last."""
        ends = [step for step, _ in self.parameters[1:]] + [planned_steps]
        areas = [
            value * (min(end, planned_steps) - min(step, planned_steps))
            for (step, value), end in zip(self.parameters, ends, strict=True)
        ]
        return sum(areas) / planned_steps


class Recorder(TrainerCallback, ExportableState):
    """Records the curve and the cost of a run, across resumes, and the files of its checkpoints.

    It is called after the method's own callbacks: what they do is part of a step, and its outcome is recorded. In
    checkpoints it keeps the loss since the last log, too; else a resumed Trainer would log the mean of fewer steps.

    Attributes:
        trainer: What trains, or None.
        method: The method that trains.
        curve: Its ranks and parameters.
        train_seconds: Time of all optimizer steps. Evaluations, checkpoints and recording do not count.
    """

    trainer: Any = None

    def __init__(self, method: Method) -> None:
        self.method = method
        self.curve, self.train_seconds, self._gpu_mib = Curve(), 0.0, 0.0
        self._began, self._since = time.monotonic(), 0.0

    def note(self, step: int, model: Any) -> None:
        """Record ranks and parameters after optimizer step `step`."""
        self.curve.note(step, self.method.active_parameters(model), self.method.ranks(model))

    def cost(self) -> dict[str, float]:
        """Return the cost so far, of earlier attempts up to their last checkpoint too."""
        gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
        return {"wall_seconds": time.monotonic() - self._began, "peak_gpu_memory_mib": max(self._gpu_mib, gpu)}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Record the start, or go on from a checkpoint."""
        if state.global_step == 0:
            self.note(0, model)
        else:
            saved = state.stateful_callbacks[type(self).__name__]["attributes"]
            vars(self.curve).update(saved["curve"], ranks=dict(saved["curve"]["ranks"]))
            self._began -= saved["cost"]["wall_seconds"]
            self.train_seconds, self._gpu_mib = saved["train_seconds"], saved["cost"]["peak_gpu_memory_mib"]
            self.trainer._tr_loss = torch.tensor(saved["loss"], device=args.device)
            self.trainer._globalstep_last_logged = saved["logged"]
        self._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Record the step."""
        before = self._since
        self._begin()
        self.train_seconds += self._since - before
        self.note(state.global_step, model)
        self._begin()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Exclude the evaluation from the training time."""
        self._begin()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the checkpoint's files, so that a run resumes from whole ones only; AromaCallback records its own."""
        if self.curve.parameters and self.trainer is not None and self.trainer.has_hooks:
            record_save(args, state)
        self._begin()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Raise NonFiniteError at a loss or gradient that is not finite: the model would still be scored."""
        for name in ("loss", "grad_norm"):
            if not math.isfinite((logs or {}).get(name, 0.0)):
                raise NonFiniteError(
                    f"{name}={logs[name]} at optimizer step {state.global_step}: training has diverged; lower the "
                    "learning rate, or look at the data"
                )

    def state(self) -> dict[str, Any]:
        """Return what the Trainer stores in a checkpoint, where it sorts keys: modules keep their order in a list."""
        return {
            "args": {},
            "attributes": {
                "curve": {**vars(self.curve), "ranks": [*self.curve.ranks.items()]},
                "train_seconds": self.train_seconds,
                "cost": self.cost(),
                "loss": float(getattr(self.trainer, "_tr_loss", 0.0)),
                "logged": getattr(self.trainer, "_globalstep_last_logged", 0),
            },
        }

    def _begin(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._since = time.perf_counter()


class EventLog:
    """Writes events as they happen, a JSON object a line; a killed run keeps what it wrote.

    Args:
        path: The file; made if missing.
        upto: Optimizer step that the run resumes from; later events of an earlier attempt are dropped.
    """

    def __init__(self, path: str | os.PathLike[str], upto: int) -> None:
        self._path = Path(path)
        written = self._path.read_text(encoding="utf-8").splitlines(keepends=True) if self._path.exists() else []
        whole = (line for line in written if line.endswith("\n"))
        write_text(self._path, "".join(line for line in whole if json.loads(line)["step"] <= upto))

    def __call__(self, event: Event) -> None:
        """Append one event."""
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(event.as_dict()) + "\n")


def history_of(log: Iterable[dict[str, Any]], split: str) -> dict[str, Any]:
    """Return the content of `history.json`: the Trainer's `log_history`, with the evaluations of a split."""
    history: dict[str, list[Any]] = {"loss": [], "learning_rate": [], "evaluations": []}
    for entry in log:
        for name in ("loss", "learning_rate"):
            if name in entry:
                history[name].append([entry["step"], entry[name]])
        # Sorted, because they are in the checkpoint that a resumed run goes on from.
        metrics = {key.removeprefix(f"eval_{split}_"): entry[key] for key in sorted(entry) if f"eval_{split}_" in key}
        if metrics:
            history["evaluations"].append({"step": entry["step"], "split": split, **metrics})
    return history
