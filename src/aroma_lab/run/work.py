"""From a trial to its job: examples that are read, checked and encoded, and what scores them."""

from __future__ import annotations

from aroma.errors import bad_value

from ..specs import LANGUAGE_KINDS, MADE, MADE_KINDS, ModelSpec
from ..tasks import memory, planted, planted_encoder
from ..tasks.classification import ClassifierJob
from ..tasks.model import packaged_encoder
from ..training.job import Job
from .trial import Trial


def job_of(trial: Trial) -> Job:
    """Read, check and encode what a trial trains on; of one that selects, nothing that is reported.

    Raises:
        ConfigError: An unknown task or metric, or a tokenizer that cannot be loaded.
        DataError: Examples that cannot be used.
    """
    name, reported = trial.model, trial.purpose == "report"
    if name == "minilm":
        name = str(packaged_encoder())
    model = ModelSpec(name, trial.gguf_file, trial.dtype, trial.quantization)
    if trial.task.kind in MADE_KINDS:
        return _made_job(trial, name)
    if trial.task.kind in LANGUAGE_KINDS:
        from ..language.job import LanguageJob

        return LanguageJob(trial.task, model, trial.training.packing, reported=reported)
    return ClassifierJob(trial.task, model, trial.training.train_pooler, reported=reported)


def _made_job(trial: Trial, encoder: str) -> Job:
    """Return the job of a task whose right answer is made; `encoder` is the pretrained model, if it needs one."""
    spec = trial.task
    for key in ("dtype", "quantization", "gguf_file"):
        if (value := getattr(trial, key)) not in ("float32", None):
            raise bad_value(key, value, f"a task of kind {spec.kind} is made for weights in float32; leave it out")
    seed = trial.training.seed if spec.seed is None else spec.seed
    if spec.kind == "planted_encoder":
        return planted_encoder.encoder_job(spec, seed, encoder)
    if trial.model != MADE:
        raise bad_value("model", trial.model, f"a task of kind {spec.kind} makes its own; give {MADE}")
    return memory.memory_job(spec, seed) if spec.kind == "memory" else planted.planted_job(spec, seed)
