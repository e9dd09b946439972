"""The one runner, read from top to bottom: check, prepare, train, evaluate, write; a killed run resumes to the bit."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback, set_seed

from aroma.checkpoint import verify_checkpoint
from aroma.distributed import processes_of_node, refuse_together
from aroma.errors import CheckpointError, bad_value
from aroma.files import read_json, write_json, write_text
from aroma.outputs import new_folder, open_folder

from ..methods import Hooks, Method, make_method
from ..specs import LANGUAGE_KINDS, MADE, MADE_KINDS, ModelSpec, TrainSpec
from ..tasks import memory, planted, planted_encoder
from ..tasks.classification import ClassifierJob
from ..tasks.model import packaged_encoder, placed
from ..training.job import Job
from ..training.trainer import Bar, MethodTrainer, make_optimizer, training_arguments
from .machine import provenance
from .recorder import EventLog, Recorder, history_of
from .result import result_of
from .trial import Trial, TrialFiles, differing_keys, load_trial, save_trial


def run_trial(
    trial: Trial,
    folder: Path,
    *,
    progress: bool = False,
    keep_checkpoints: bool = False,
    on_start: Callable[[Job], None] = lambda job: None,
) -> dict[str, Any]:
    """Train, evaluate on whole sets, and leave all that is known of the run in `folder`.

    A method that trains nothing is only evaluated. A finished trial is not run again: its result is returned. One
    that was interrupted goes on from its last checkpoint, and ends as if it had not been.

    Under torchrun every process calls this; they train replicas, and the first one writes.

    Args:
        folder: Its folder; new, empty, or left by this very trial.
        progress: Whether a progress bar is shown.
        keep_checkpoints: Whether the checkpoints stay when the trial is finished.
        on_start: Called by the first process when nothing was refused, and the folder holds nothing but the trial.

    Returns:
        The content of `result.json`, in the first process.

    Raises:
        ConfigError: A value that cannot work, or a folder that holds something else.
        DataError: Examples that cannot be used.
        CheckpointError: A checkpoint to go on from is damaged.
        NonFiniteError: NaN or infinity in training.
    """
    processes, files = join(), TrialFiles(Path(folder))
    with refuse_together():
        _check_folder(trial, files)
        run = None if files.result.exists() else _prepare(trial, files, processes)
    if run is None:
        result = dict(read_json(files.result))
    else:
        if processes.is_main_process:
            files.root.mkdir(parents=True, exist_ok=True)
            save_trial(trial, files.trial)
            on_start(run.job)
        processes.wait_for_everyone()
        result = _train_and_evaluate(run, progress)
    if processes.is_main_process:
        files.failure.unlink(missing_ok=True)
        if not keep_checkpoints:
            shutil.rmtree(files.checkpoints, ignore_errors=True)
    processes.wait_for_everyone()
    return result


def join() -> PartialState:
    """Join the processes that torchrun started, or be the only one; each has one device."""
    return PartialState(cpu=not torch.accelerator.is_available())


# The folder ----------------------------------------------------------------------------------------------------------


def _check_folder(trial: Trial, files: TrialFiles) -> None:
    """Refuse a folder of another trial, and one that cannot be written to; nothing is left there."""
    if files.trial.exists():
        open_folder("folder", files.root)
        if differing := differing_keys(trial, load_trial(files.trial)):
            remedy = f"it differs in {', '.join(differing)}. Give another folder, or move that one away"
            raise bad_value("folder", str(files.root), f"the trial there was made with other settings: {remedy}")
        return
    new_folder("folder", files.root, "give another folder")


def resumable_checkpoint(files: TrialFiles) -> Path | None:
    """Return the latest checkpoint that the run can go on from; None if it has to begin anew.

    One that a kill cut off is passed over, and so is one after which the training was over: the Trainer would take
    one more step before it stops.
    """
    found = sorted(files.checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    return next((path for path in reversed(found) if _is_resumable(path)), None)


def _is_resumable(checkpoint: Path) -> bool:
    try:
        verify_checkpoint(checkpoint)
    except CheckpointError:
        return False
    control = read_json(checkpoint / "trainer_state.json")["stateful_callbacks"]["TrainerControl"]
    return not control["args"]["should_training_stop"]


def require_as_many(checkpoint: Path) -> None:
    """Raise ConfigError for a checkpoint of another number of processes: the batches would differ."""
    # The Trainer saves the random numbers of every process of a machine in a file of its own.
    before, now = max(1, len([*checkpoint.glob("rng_state_*.pth")])), processes_of_node()
    if before != now:
        remedy = f"{checkpoint} is of {before} on this machine, and a step would have other examples; start {before}"
        raise bad_value("--nproc-per-node", now, remedy)


# Before anything is written ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A trial that has passed all checks; nothing is written yet.

    Args:
        processes: Those that train it.
        job: Its examples and what they are scored by.
        steps: Planned optimizer steps.
        checkpoint: Where it goes on from; None: it begins.
        provenance: Versions, revision and machine when it began: sources may be edited while it runs.
    """

    trial: Trial
    files: TrialFiles
    processes: PartialState
    method: Method
    job: Job
    model: Any
    steps: int
    checkpoint: Path | None
    recorder: Recorder
    provenance: dict[str, Any]


def _prepare(trial: Trial, files: TrialFiles, processes: PartialState) -> Run:
    """Do everything that can fail before anything is written, the cheapest first."""
    training = trial.training
    method = make_method(trial.kind, trial.options)
    recorder, checkpoint = Recorder(method), resumable_checkpoint(files)
    if checkpoint is not None:
        require_as_many(checkpoint)
    job = job_of(trial)
    steps = planned_steps(training, len(job.rows["train"]), processes.num_processes)
    if method.trains:
        if training.warmup_steps >= steps:
            remedy = f"the run of {steps} optimizer steps ends before the warm-up; lower it, or train longer"
            raise bad_value("training.warmup_steps", training.warmup_steps, remedy)
        method.check_steps(steps)
    if training.threads is not None:
        torch.set_num_threads(training.threads)
    found = provenance()
    set_seed(training.seed)
    model = method.build(job.load_model(), steps)
    return Run(trial, files, processes, method, job, model, steps, checkpoint, recorder, found)


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


def planned_steps(training: TrainSpec, examples: int, processes: int = 1) -> int:
    """Return the optimizer steps of a run over `examples` training examples, as the Trainer counts them."""
    if training.max_steps is not None:
        return training.max_steps
    batches = math.ceil(examples / (training.batch_size * processes))
    return math.ceil(training.epochs * math.ceil(batches / training.gradient_accumulation_steps))


# Training and evaluation ---------------------------------------------------------------------------------------------


def _train_and_evaluate(run: Run, progress: bool) -> dict[str, Any]:
    first, training = run.processes.is_main_process, run.trial.training
    if run.method.trains:
        _train(run, progress and first)
    else:
        placed(run.model)
        if training.bf16:  # as accelerate has it for the models that are trained beside it
            run.model.forward = torch.autocast(run.processes.device.type, torch.bfloat16)(run.model.forward)
        run.recorder.note(0, run.model)
    if first:  # the trained model is saved before an evaluation may fail
        _leave(run)
    predictions = {split: run.job.predict(run.model, split, training.batch_size) for split in run.job.evaluated}
    if not first:
        return {}
    result = result_of(run, predictions)
    write_json(run.files.result, result)
    return result


def _train(run: Run, progress: bool) -> None:
    method, job, training, bar = run.method, run.job, run.trial.training, Bar()
    at = 0 if run.checkpoint is None else int(run.checkpoint.name.partition("-")[2])
    log = EventLog(run.files.events, upto=at) if run.processes.is_main_process else None
    own = method.callbacks(run.model, on_event=log, early_stop=training.early_stop)
    trainer = (job.trainer_class or MethodTrainer)(
        job=job,
        hooks=next((callback for callback in own if isinstance(callback, Hooks)), None),
        model=run.model,
        args=training_arguments(training, job, run.files.checkpoints),
        data_collator=job.collator,
        train_dataset=job.rows["train"],
        eval_dataset=job.rows[job.evaluated[0]] if training.eval_steps is not None else None,
        processing_class=job.tokenizer,
        callbacks=[*own, run.recorder, *([bar] if progress else [])],  # what a method does is part of a step
        optimizers=(make_optimizer(run.model, training), None),
    )
    trainer.remove_callback(PrinterCallback)  # stands in for the tqdm bar, and would print every log line
    run.recorder.trainer = trainer
    try:
        trainer.train(resume_from_checkpoint=None if run.checkpoint is None else str(run.checkpoint))
    finally:
        if bar.training_bar is not None:
            bar.training_bar.close()  # after an error or Ctrl-C; else the message would stand in the bar's line


def _leave(run: Run) -> None:
    """Write all but the result; on one line, for a curve has thousands of pairs of numbers."""
    files, trainer = run.files, run.recorder.trainer
    curve = {"planned_steps": run.steps, **vars(run.recorder.curve)}
    history = history_of(trainer.state.log_history if trainer else [], run.job.evaluated[0])
    for path, value in ((files.curve, curve), (files.history, history)):
        write_text(path, json.dumps(value, allow_nan=False) + "\n")
    if run.trial.purpose == "report" and run.method.trains:
        shutil.rmtree(files.adapter, ignore_errors=True)  # of an attempt that was killed right here
        files.adapter.mkdir()
        run.method.save(run.model, files.adapter)
        run.job.describe(files.adapter)
