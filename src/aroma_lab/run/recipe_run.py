"""One run of a recipe: train, evaluate on whole sets, save."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from aroma.checkpoint import last_complete_checkpoint, save_adapter
from aroma.errors import bad_value
from aroma.events import ModuleSummary
from aroma.files import write_json
from aroma.sharding import world_size
from aroma.tuner import AromaConfig

from ..methods import Aroma
from ..methods.lora import wrap
from ..specs import TrainSpec
from ..tasks.model import adapter_config, count_trainable
from ..training.job import Job
from ..training.trainer import Fit, make_trainer
from .processes import Processes, require_as_many
from .provenance import provenance
from .recipe import Recipe
from .run_folder import EventLog, RunFolder, check_output, open_folder


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Args:
        folder: What it left.
        metrics: Metrics by split and name, each over all examples of the split.
        modules: Rank, effective rank and state of every module that could grow.
        steps: Optimizer steps taken.
        trainable: Trainable parameters at any one time: `adapter` and `head`.
        examples: Numbers of examples by split, of training too.
        notes: What became of examples that did not fit.
        wall_seconds: Duration of this attempt.
    """

    folder: RunFolder
    metrics: dict[str, dict[str, float]]
    modules: list[ModuleSummary]
    steps: int
    trainable: dict[str, int]
    examples: dict[str, int]
    notes: tuple[str, ...]
    wall_seconds: float


def run_recipe(
    recipe: Recipe, *, resume: bool = False, progress: bool = True, on_note: Callable[[str], None] = lambda note: None
) -> RunResult:
    """Train what a recipe says, and leave adapter, result and all that it came from in `recipe.output`.

    Under torchrun every process calls this; they train replicas, and the first one writes.

    Args:
        recipe: The run.
        resume: Go on from the last whole checkpoint in the folder.
        progress: Whether a progress bar is shown.
        on_note: Called, before the training, with what became of examples that did not fit.

    Raises:
        ConfigError: A recipe that cannot work, a folder that is not empty, or a resume of another recipe.
        DataError: Data that cannot be used as described.
        CheckpointError: The checkpoint to resume from is damaged.
        NonFiniteError: NaN or infinity in training.
    """
    began = time.monotonic()
    processes = Processes.join()
    with processes.together():
        prepared = _prepare(recipe, resume, processes.number)
    folder, job, model = prepared.folder, prepared.job, prepared.model
    trainable = count_trainable(model)
    if processes.is_first:
        open_folder(folder, recipe)
        for note in job.notes:
            on_note(note)
    processes.wait()
    fit = _fit(recipe, prepared, progress, writes=processes.is_first)
    # Before the evaluation, which may fail, as of a text that is too long to be continued.
    if processes.is_first:
        save_adapter(model, folder.adapter)
        job.describe(model, folder.adapter)
    metrics = {split: job.predict(fit.trainer, split).metrics for split in job.evaluated}
    result = RunResult(
        folder=folder,
        metrics=metrics,
        modules=fit.controller.summary(),
        steps=fit.trainer.state.global_step,
        trainable=trainable,
        examples=job.examples,
        notes=job.notes,
        wall_seconds=time.monotonic() - began,
    )
    if processes.is_first:
        write_json(folder.history, fit.trainer.state.log_history)
        write_json(folder.result, result_record(result, recipe))
    return result


@dataclass(frozen=True)
class _Prepared:
    """A run that nothing has refused; nothing is written yet."""

    folder: RunFolder
    job: Job
    model: Any
    checkpoint: str | None


def _prepare(recipe: Recipe, resume: bool, processes: int) -> _Prepared:
    # What can be refused is refused before anything is written, the cheapest first.
    folder = check_output(recipe, resume)
    checkpoint = last_complete_checkpoint(folder.checkpoints)
    require_as_many(checkpoint)
    config = adapter_config(recipe.adapter, recipe.training, recipe.data.task)
    job = job_of(recipe)
    check_schedule(recipe.training, config, planned_steps(recipe.training, len(job.train), processes))
    if recipe.training.threads is not None:
        torch.set_num_threads(recipe.training.threads)
    set_seed(recipe.training.seed)
    return _Prepared(folder, job, wrap(job.load_model(), config), checkpoint)


def job_of(recipe: Recipe) -> Job:
    """Read, check and encode what a recipe trains on.

    Raises:
        ConfigError: A tokenizer that cannot be loaded, or that does not fit the data.
        DataError: Data that cannot be used as described.
    """
    if recipe.data.task == "causal_lm":
        from ..language.job import LanguageJob

        return LanguageJob.of_recipe(recipe)
    from ..tasks.classification import ClassifierJob

    return ClassifierJob.of_recipe(recipe)


def planned_steps(training: TrainSpec, examples: int, processes: int = 1) -> int:
    """Return the optimizer steps of a run over `examples` training examples, as the Trainer counts them."""
    if training.max_steps is not None:
        return training.max_steps
    batches = math.ceil(examples / (training.batch_size * processes))
    return math.ceil(training.epochs * math.ceil(batches / training.gradient_accumulation_steps))


def check_schedule(training: TrainSpec, config: AromaConfig, steps: int) -> None:
    """Refuse a run that is over before its warm-up or its first inner check.

    Args:
        training: The loop.
        config: The adapter.
        steps: Planned optimizer steps.

    Raises:
        ConfigError: Naming the field that does not fit.
    """
    check_warmup(training, steps)
    config.resolve_inner_steps(steps)


def check_warmup(training: TrainSpec, steps: int) -> None:
    """Refuse a run of `steps` optimizer steps that is over before its warm-up.

    Raises:
        ConfigError: The warm-up is longer.
    """
    if training.warmup_steps >= steps:
        raise bad_value(
            "training.warmup_steps",
            training.warmup_steps,
            f"the run of {steps} optimizer steps ends before the warm-up; lower it, or train longer",
        )


def result_record(result: RunResult, recipe: Recipe) -> dict[str, Any]:
    """Return the content of `result.json`."""
    return {
        "metrics": result.metrics,
        "checkpoint": recipe.training.checkpoint,
        "examples": result.examples,
        "notes": list(result.notes),
        "steps": result.steps,
        "seed": recipe.training.seed,
        "trainable_parameters": result.trainable,
        "total_rank": sum(module.rank for module in result.modules),
        "ranks": {module.name: module.rank for module in result.modules},
        "effective_ranks": {module.name: module.effective_rank for module in result.modules},
        "states": {module.name: module.state for module in result.modules},
        "wall_seconds": round(result.wall_seconds, 1),
        "processes": world_size(),
        **provenance(),
    }


def _fit(recipe: Recipe, prepared: _Prepared, progress: bool, writes: bool) -> Fit:
    folder, job, checkpoint = prepared.folder, prepared.job, prepared.checkpoint
    fit = make_trainer(
        Aroma(),
        prepared.model,
        job.objective,
        recipe.training,
        folder.checkpoints,
        train=job.train,
        validation=job.watched["validation"],
        on_event=EventLog(folder.events, upto=_step_of(checkpoint)) if writes else None,
        progress=progress,
        describe=job.describe,
    )
    fit.train(checkpoint)
    return fit


def _step_of(checkpoint: str | None) -> int:
    if checkpoint is None:
        return 0
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state["global_step"])
