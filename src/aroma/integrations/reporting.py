"""The report of a training: ranks noted while it trains, and the page at its end."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import re
import time
import warnings
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import PurePath
from typing import Any

import torch
from torch import nn
from transformers import TrainerState, TrainingArguments

from ..controller import AromaController
from ..errors import AromaWarning, OutputError
from ..events import ModuleSummary
from ..files import write_text
from ..outputs import new_file
from ..report.run import LORA_RANK, MatrixFacts, Result, RunFacts, run_page

_PACKAGES = ("aroma-peft", "torch", "transformers", "peft", "accelerate")
EVALUATION_COSTS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
"""What the Trainer adds to the metrics of an evaluation, which says nothing of the model."""
_NO_SETTINGS = ("peft_type", "peft_version", "base_model_name_or_path", "output_dir")
"""Fields that are no one's choice of how to train."""
_SECRET = re.compile("token|password|secret|key", re.IGNORECASE)
"""Names of fields whose values are left out."""


class TrainingRecord:
    """Notes what a report needs while the Trainer works, and writes the report.

    Args:
        path: HTML file to write; one that is there is replaced.

    Raises:
        OutputError: Nothing can be written there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = new_file("report", path, force=True)
        self._ranks: dict[str, list[list[int]]] = {}
        self._began, self._resumed_at = 0.0, 0
        self._found: list[tuple[ModuleSummary, float | None]] = []

    def begin(self, controller: AromaController, state: TrainerState) -> None:
        """Begin with the controller of a training, new or resumed; all ranks call this."""
        self._found, self._began, self._resumed_at = [], time.monotonic(), state.global_step
        self._ranks = {name: [[state.global_step, rank]] for name, rank in controller.ranks().items()}
        controller.subscribe(lambda event: self._note(event.module, event.step, event.rank))

    def _note(self, name: str | None, step: int, rank: Any) -> None:
        """Note the rank of a matrix from a step on."""
        changes = self._ranks.get(name or "")
        if changes is not None and changes[-1][1] != rank:
            changes.append([step, rank])

    def end(self, controller: AromaController, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        """Measure the matrices, and write the report; all ranks call this, and the first one writes."""
        updates = controller.relative_updates()
        self._found = [(one, updates[one.name]) for one in controller.summary()]
        for one, _ in self._found:  # the component in training counts once it has moved
            self._note(one.name, state.global_step, one.rank)
        self.write(controller, args, state, model)

    def write(
        self, controller: AromaController | None, args: TrainingArguments, state: TrainerState, model: nn.Module
    ) -> None:
        """Write the report of a training that has ended; of one that has not, nothing.

        Warns:
            AromaWarning: It cannot be written. The trained model is worth more than its report.
        """
        if controller is None or not self._found or not state.is_world_process_zero:
            return
        page = run_page(self._facts(controller, args, state, model))
        try:
            write_text(self._path, page)
        except OutputError as error:
            warnings.warn(f"report: {error}; the training itself is whole", AromaWarning, stacklevel=2)

    def _facts(
        self, controller: AromaController, args: TrainingArguments, state: TrainerState, model: nn.Module
    ) -> RunFacts:
        config, log, resumed = controller.config, state.log_history, self._resumed_at
        evaluations = _evaluations(log)
        if config.task_type == "CAUSAL_LM":  # TRL adds entropy and others, which say less
            losses = {step: one["loss"] for step, one in evaluations.items() if "loss" in one}
            evaluations = {step: {"loss": loss, "perplexity": math.exp(loss)} for step, loss in losses.items()}
        ends = sorted({min(evaluations), max(evaluations)}) if evaluations else []
        named = [name for step in ends[-1:] for name in evaluations[step] if "loss" not in name]
        return RunFacts(
            title=_title_of(model),
            about=["AROMA", f"seed {args.seed}"],
            results=[
                Result(f"evaluation at step {step}" if step else "before training", evaluations[step], kind)
                for step, kind in ((step, "own" if step else "guess") for step in ends)
            ],
            metric=named[0] if named else "loss",
            steps=state.global_step,
            planned_steps=state.max_steps,
            seconds=time.monotonic() - self._began,
            loss=[(entry["step"], entry["loss"]) for entry in log if "loss" in entry],
            eval_loss=[(step, one["loss"]) for step, one in evaluations.items() if "loss" in one],
            parameters=config.r * _sides(controller.matrices.active()),
            lora_parameters=LORA_RANK * _sides(controller.modules),
            matrices=[MatrixFacts(one.name, one.rank, one.effective_rank, update) for one, update in self._found],
            ranks=self._ranks,
            explanation=controller.explanation(),
            notes=[f"Resumed at optimizer step {resumed}; the time is that since then."] if resumed else [],
            settings={"AromaConfig": _differing(config), "TrainingArguments": _differing(args)},
            versions=_versions(),
        )


def _sides(matrices: Iterable[Any]) -> int:
    """Return the sum of m + n over matrices: the parameters of one component of each."""
    return sum(one.layer.in_features + one.layer.out_features for one in matrices)


def _title_of(model: nn.Module) -> str:
    """Return the pretrained model's name, or its class where it has none."""
    base = getattr(model, "get_base_model", lambda: model)()
    return PurePath(getattr(getattr(base, "config", None), "name_or_path", "") or type(base).__name__).name


def _evaluations(log: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Return the metrics of all evaluations by optimizer step."""
    found: dict[int, dict[str, float]] = {}
    for entry in log:
        metrics = {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
        numbers = {name: value for name, value in metrics.items() if isinstance(value, float | int)}
        kept = {name: value for name, value in numbers.items() if not name.endswith(EVALUATION_COSTS)}
        if kept:
            found.setdefault(int(entry["step"]), {}).update(kept)
    return found


def _differing(settings: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are not at their defaults, secrets and folders left out."""
    written, found = settings.to_dict(), {}
    for field in dataclasses.fields(settings):
        value, default = written.get(field.name), getattr(field.default, "value", field.default)
        is_said = isinstance(value, str | int | float | bool | list) and value not in ("", [], default)
        is_left_out = field.name in _NO_SETTINGS or _SECRET.search(field.name) or os.path.isabs(str(value))
        if field.init and is_said and not is_left_out and not (default is None and value is False):
            found[field.name] = value
    return found


def _versions() -> dict[str, Any]:
    packages = {name: metadata.version(name) for name in _PACKAGES}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"python": platform.python_version(), **packages, "platform": platform.platform(), "device": device}
