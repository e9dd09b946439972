"""What a trial trains and is scored by."""

from __future__ import annotations

from dataclasses import dataclass

from ..specs import ModelSpec
from ..tasks.classification import ClassifierJob
from ..tasks.load import load_task
from ..tasks.spec import HELD_OUT
from ..tasks.task import Task
from ..training.job import Job
from .trial import Trial

PACKAGED_MODEL = "minilm"
"""Name of the encoder that comes with pip."""


@dataclass(frozen=True)
class Work:
    """A trial's task, ready to be trained on.

    Args:
        job: Its examples; `held_out` is among its splits, and the others are reported.
        metric: Name of the metric that is the score.
    """

    job: Job
    metric: str


def work_of(trial: Trial) -> Work:
    """Read, check and encode what a trial trains on; of one that selects, not what is reported.

    Raises:
        ConfigError: An unknown task or metric, or a tokenizer that cannot be loaded.
        DataError: Examples that cannot be used.
    """
    model = ModelSpec(_model_name(trial.model), dtype=trial.dtype, quantization=trial.quantization)
    reported = trial.purpose == "report"
    if trial.task.kind == "commonsense":
        from ..language.questions_job import QuestionsJob

        questions = QuestionsJob.of_task(trial.task, model, trial.training.batch_size, reported=reported)
        return Work(questions, questions.metric)
    data = load_task(trial.task, reported=reported)
    task = Task.of_layout(data.kind, data.label_names, data.layout, trial.task.max_length)
    parts = {"train": data.train, HELD_OUT: data.held_out, **data.reported}
    return Work(ClassifierJob.make(model, task, parts, choice=f"{HELD_OUT}_{data.metric}"), data.metric)


def _model_name(name: str) -> str:
    if name != PACKAGED_MODEL:
        return name
    from ..tasks.model import packaged_encoder

    return str(packaged_encoder())
