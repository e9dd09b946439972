"""The examples of a trial, read, checked and encoded, and the metric that scores it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from aroma.errors import bad_value

from ..specs import DataSpec, ModelSpec
from ..tasks.classification import ClassifierJob
from ..tasks.data import load_splits, load_task, names_of
from ..tasks.metrics import CHOICE_METRIC
from ..tasks.model import packaged_encoder
from ..tasks.spec import HELD_OUT
from ..tasks.task import Task
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
    """

    job: Job
    metric: str
    held_out: str
    choice: str
    traced: tuple[str, ...]

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
    if trial.task.kind == "commonsense":
        if trial.training.train_pooler != "auto":
            remedy = "a language model has no pooler; leave it out"
            raise bad_value("training.train_pooler", trial.training.train_pooler, remedy)
        from ..language.job import QuestionsJob

        questions = QuestionsJob.of_task(trial.task, model, trial.training.batch_size, reported=reported)
        return Work(questions, questions.metric, HELD_OUT, "loss", (HELD_OUT,))
    data = load_task(trial.task, reported=reported)
    task = Task.of_layout(data.kind, data.label_names, data.layout, trial.task.max_length)
    parts = {"train": data.train, HELD_OUT: data.held_out, **data.reported}
    job = ClassifierJob.make(model, task, parts, trial.training.train_pooler)
    return Work(job, data.metric, HELD_OUT, data.metric, job.evaluated)


def _work_of_data(trial: Trial, data: DataSpec, model: ModelSpec) -> Work:
    if data.task == "causal_lm":
        from ..language.job import LanguageJob, read_parts

        job: Job = LanguageJob.make(model, trial.language, data.max_length, read_parts(data, trial.language))
        return Work(job, "loss", _VALIDATION, "loss", (_VALIDATION,))
    parts = load_splits(data)
    job = ClassifierJob.make(model, Task.of(data, names_of(parts["train"])), parts, trial.training.train_pooler)
    metric = CHOICE_METRIC[data.task]
    return Work(job, metric, _VALIDATION, metric, (_VALIDATION,))
