"""One run of a recipe: train, evaluate on whole sets, save."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, set_seed

from ..checkpoint import last_complete_checkpoint
from ..errors import bad_value
from ..events import ModuleSummary
from ..files import write_json
from ..tuner import AromaConfig
from .data import Examples, Splits, load_splits
from .encode import check_positions, encode, load_tokenizer
from .methods import Aroma
from .metrics import metrics_of
from .model import adapter_config, count_trainable, grow, load_classifier
from .provenance import provenance
from .recipe import Recipe
from .run_folder import EventLog, RunFolder, check_output, open_folder
from .specs import TrainSpec
from .task import Task, save_trained
from .trainer import Fit, make_trainer


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Args:
        folder: What it left.
        metrics: Metrics by split and name, each over all examples of the split.
        modules: Rank, effective rank and state of every module that could grow.
        steps: Optimizer steps taken.
        trainable: Trainable parameters at any one time: `adapter` and `head`.
        wall_seconds: Duration of this attempt.
    """

    folder: RunFolder
    metrics: dict[str, dict[str, float]]
    modules: list[ModuleSummary]
    steps: int
    trainable: dict[str, int]
    wall_seconds: float


def run_recipe(recipe: Recipe, *, resume: bool = False, progress: bool = True) -> RunResult:
    """Train what a recipe says, and leave adapter, result and all that it came from in `recipe.output`.

    Args:
        recipe: The run.
        resume: Go on from the last whole checkpoint in the folder.
        progress: Whether a progress bar is shown.

    Raises:
        ConfigError: A recipe that cannot work, a folder that is not empty, or a resume of another recipe.
        DataError: Data that cannot be used as described.
        CheckpointError: The checkpoint to resume from is damaged.
        NonFiniteError: NaN or infinity in training.
    """
    began = time.monotonic()
    # What can be refused is refused before anything is written, the cheapest first.
    folder = check_output(recipe, resume)
    config = adapter_config(recipe.adapter, recipe.training)
    splits = load_splits(recipe.data)
    check_schedule(recipe.training, config, planned_steps(recipe.training, len(splits.train)))
    assert recipe.model.name is not None, "Recipe checks it"
    tokenizer = load_tokenizer(recipe.model.name, recipe.data.max_length)
    check_positions(recipe.model.name, recipe.data.max_length)
    if recipe.training.threads is not None:
        torch.set_num_threads(recipe.training.threads)
    set_seed(recipe.training.seed)
    model = grow(load_classifier(recipe.model.name, splits.label_names, tokenizer.pad_token_id), config)
    trainable = count_trainable(model)
    open_folder(folder, recipe)
    encoded = {name: encode(part, tokenizer, recipe.data.max_length) for name, part in _by_name(splits).items()}
    fit = _fit(recipe, folder, model, tokenizer, encoded, progress)
    metrics = {
        name: evaluate(fit.trainer, recipe.data.task, data) for name, data in encoded.items() if name != "train"
    }
    save_trained(model, tokenizer, Task.of(recipe.data, splits.label_names), folder.adapter)
    result = RunResult(
        folder=folder,
        metrics=metrics,
        modules=fit.controller.summary(),
        steps=fit.trainer.state.global_step,
        trainable=trainable,
        wall_seconds=time.monotonic() - began,
    )
    write_json(folder.history, fit.trainer.state.log_history)
    write_json(folder.result, result_record(result, recipe, splits))
    return result


def planned_steps(training: TrainSpec, examples: int) -> int:
    """Return the optimizer steps of a run over `examples` training examples, as the Trainer counts them."""
    if training.max_steps is not None:
        return training.max_steps
    batches = math.ceil(examples / training.batch_size)
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


@dataclass(frozen=True)
class Prediction:
    """What a model says of a whole set.

    Args:
        metrics: Metrics by name.
        loss: Mean loss of an example.
    """

    metrics: dict[str, float]
    loss: float


def predict(trainer: Trainer, task: str, data: Any) -> Prediction:
    """Return metrics and loss of a task over all of `data`, computed in one call."""
    prediction = trainer.predict(data)
    metrics = metrics_of(task, prediction.predictions, prediction.label_ids)
    return Prediction(metrics, float(prediction.metrics["test_loss"]))


def evaluate(trainer: Trainer, task: str, data: Any) -> dict[str, float]:
    """Return the metrics of a task over all of `data`, computed in one call."""
    return predict(trainer, task, data).metrics


def result_record(result: RunResult, recipe: Recipe, splits: Splits) -> dict[str, Any]:
    """Return the content of `result.json`."""
    return {
        "metrics": result.metrics,
        "checkpoint": recipe.training.checkpoint,
        "examples": {name: len(part) for name, part in _by_name(splits).items()},
        "steps": result.steps,
        "seed": recipe.training.seed,
        "trainable_parameters": result.trainable,
        "total_rank": sum(module.rank for module in result.modules),
        "ranks": {module.name: module.rank for module in result.modules},
        "effective_ranks": {module.name: module.effective_rank for module in result.modules},
        "states": {module.name: module.state for module in result.modules},
        "wall_seconds": round(result.wall_seconds, 1),
        **provenance(),
    }


def _fit(
    recipe: Recipe, folder: RunFolder, model: Any, tokenizer: Any, encoded: dict[str, Any], progress: bool
) -> Fit:
    checkpoint = last_complete_checkpoint(folder.checkpoints)
    fit = make_trainer(
        Aroma(),
        model,
        tokenizer,
        recipe.data.task,
        recipe.training,
        folder.checkpoints,
        train=encoded["train"],
        validation=encoded["validation"],
        on_event=EventLog(folder.events, upto=_step_of(checkpoint)),
        progress=progress,
    )
    fit.train(checkpoint)
    return fit


def _by_name(splits: Splits) -> dict[str, Examples]:
    named = {"train": splits.train, "validation": splits.validation}
    return named if splits.test is None else {**named, "test": splits.test}


def _step_of(checkpoint: str | None) -> int:
    if checkpoint is None:
        return 0
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state["global_step"])
