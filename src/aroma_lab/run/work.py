"""The examples of a trial, read, checked and encoded, and the metric that scores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from aroma.errors import DataError, bad_value

from ..specs import MADE, MADE_KINDS, DataSpec, ModelSpec
from ..tasks import memory, planted, planted_encoder
from ..tasks.classification import ClassifierJob
from ..tasks.data import load_splits, load_task
from ..tasks.metrics import language_metric
from ..tasks.model import packaged_encoder
from ..tasks.sources import read_file, read_hub
from ..tasks.spec import HELD_OUT, LANGUAGE_KINDS, TaskSpec
from ..training.job import Job, Objective
from .trial import Trial

_VALIDATION = "validation"
"""The held-out split of a recipe's data."""


@dataclass(frozen=True)
class Work:
    """A trial's task, ready to be trained on.

    Args:
        job: Its examples, of the held-out split and of those that are reported.
        metric: Name of the metric that is the score.
        held_out: Name of the held-out split.
        choice: Metric of the held-out split that a checkpoint is chosen by.
        traced: Splits that are evaluated during training, where any are.
        planted: Ranks of the right answer by module; None where it is unknown.
    """

    job: Job
    metric: str
    held_out: str
    choice: str
    traced: tuple[str, ...]
    planted: Mapping[str, int] | None = None

    @property
    def objective(self) -> Objective:
        """The job's objective; a checkpoint is chosen on the held-out split."""
        return replace(self.job.objective, choice=f"{self.held_out}_{self.choice}")


def work_of(trial: Trial) -> Work:
    """Read, check and encode what a trial trains on; of one that selects, nothing that is reported.

    Raises:
        ConfigError: An unknown task or metric, or a tokenizer that cannot be loaded.
        DataError: Examples that cannot be used.
    """
    name, reported = trial.model, trial.purpose == "report"
    if name == "minilm" and not Path(name).is_dir():
        name = str(packaged_encoder())
    model = ModelSpec(name, trial.gguf_file, trial.dtype, trial.quantization)
    if trial.data is not None:
        return _work_of_data(trial, trial.data if reported else replace(trial.data, test=None), model)
    if trial.task.kind in MADE_KINDS:
        return _work_of_made(trial, name)
    if trial.task.kind in LANGUAGE_KINDS:
        return _work_of_language(trial, model, reported)
    data = load_task(trial.task, reported=reported)
    job = ClassifierJob.make(model, data.task, data.parts, trial.training.train_pooler)
    return Work(job, data.metric, HELD_OUT, data.metric, job.evaluated)


def _work_of_language(trial: Trial, model: ModelSpec, reported: bool) -> Work:
    from ..language.job import task_job

    job = task_job(trial.task, model, trial.training.packing, reported=reported)
    return Work(job, language_metric(trial.task), HELD_OUT, "loss", (HELD_OUT,))


def _work_of_data(trial: Trial, data: DataSpec, model: ModelSpec) -> Work:
    if data.task == "causal_lm":
        from ..language.job import recipe_job

        job: Job = recipe_job(data, model, trial.training.packing)
        return Work(job, "loss", _VALIDATION, "loss", (_VALIDATION,))
    found = load_splits(data)
    job = ClassifierJob.make(model, found.task, found.parts, trial.training.train_pooler)
    return Work(job, found.metric, _VALIDATION, found.metric, (_VALIDATION,))


def _work_of_made(trial: Trial, encoder: str) -> Work:
    """Return the work of a task whose right answer is made; `encoder` is the pretrained model, if it needs one."""
    spec = trial.task
    for key in ("dtype", "quantization", "gguf_file"):
        if (value := getattr(trial, key)) not in ("float32", None):
            raise bad_value(key, value, f"a task of kind {spec.kind} is made for weights in float32; leave it out")
    seed = trial.training.seed if spec.seed is None else spec.seed
    if spec.kind == "planted_encoder":
        texts = _split_texts_of(spec)
        job = planted_encoder.encoder_job(spec, HELD_OUT, seed, encoder, texts, spec.max_length)
        return Work(job, job.metric, HELD_OUT, job.metric, job.evaluated, job.planted)
    if trial.model != MADE:
        raise bad_value("model", trial.model, f"a task of kind {spec.kind} makes its own; give {MADE}")
    job = memory.memory_job(spec, seed) if spec.kind == "memory" else planted.planted_job(spec, HELD_OUT, seed)
    return Work(job, job.metric, job.evaluated[0], job.metric, job.evaluated, job.planted)


def _split_texts_of(spec: TaskSpec) -> dict[str, list[str]]:
    """Read the texts of a planted encoder: those trained on, held out, and fresh."""
    column, where, folder = spec.text or "text", spec.field("train"), Path(spec.source or "")
    if spec.source is None or folder.is_dir():
        _, columns = read_file(where, str(folder / (spec.train or "train.jsonl")), [[column]])
    else:
        _, columns = read_hub(where, spec.train or "train", spec.source, spec.config, [[column]])
    field = spec.field("held_out")
    texts = planted_encoder.split_texts(columns[column], spec.held_out, spec.split_seed, HELD_OUT, field)
    wanted = spec.train_examples
    if wanted is not None and wanted > len(texts["train"]):
        remedy = f"{len(texts['train'])} are left beside the others; give at most so many, or null"
        raise spec.bad("train_examples", wanted, remedy, DataError)
    texts["train"] = texts["train"][:wanted]
    return texts
