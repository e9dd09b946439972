"""One trial from its description to its result; a killed one goes on where its last checkpoint was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, set_seed

from aroma.errors import bad_value
from aroma.files import read_json, write_json, write_text

from ..methods import Method
from ..methods.registry import METHODS, make_method
from ..training.trainer import Fit, make_trainer, training_arguments
from .curve import CurveRecorder
from .folder import TrialFolder, step_of
from .history import history_of
from .progress_file import ProgressFile
from .provenance import provenance
from .recipe_run import check_warmup, planned_steps
from .result import Finished, result_of
from .run_folder import EventLog
from .trial import Trial
from .usage import Usage
from .work import Work, work_of


@dataclass(frozen=True)
class _Material:
    """What a trial needs before it can train.

    Args:
        method: Its method.
        work: Its examples and what they are scored by.
        steps: Planned optimizer steps.
    """

    method: Method
    work: Work
    steps: int


def run_trial(trial: Trial, folder: Path, progress: bool = False) -> dict[str, Any]:
    """Train, evaluate on whole sets, and leave all that is known of the run in `folder`.

    Of a method that trains nothing only the evaluation is left.

    A finished trial is not run again: its result is returned. One that was interrupted goes on from its last
    checkpoint, and ends as if it had not been.

    Args:
        trial: What to run.
        folder: Its folder; new, empty, or left by this very trial.
        progress: Whether a progress bar is shown.

    Returns:
        The content of `result.json`.

    Raises:
        ConfigError: A value that cannot work, or a folder that holds something else.
        DataError: Examples that cannot be used.
        NonFiniteError: NaN or infinity in training.
    """
    usage = Usage()
    home = TrialFolder(Path(folder))
    home.check(trial)
    if not home.result.exists():
        material = _prepare(trial)
        home.open(trial)
        write_json(home.result, _run(trial, material, home, usage, progress))
    home.clean()
    result: dict[str, Any] = read_json(home.result)
    return result


def _prepare(trial: Trial) -> _Material:
    """Do what can go wrong before anything is written."""
    method = make_method(trial.kind, seeded_options(trial.kind, trial.options, trial.training.seed))
    if not method.trains and trial.quantization is not None:
        raise bad_value(
            "quantization",
            trial.quantization,
            f"transformers' Trainer takes no quantised model without an adapter, and {method.name} has none; leave "
            "the method out, or evaluate the model with `aroma eval`",
        )
    work = work_of(trial)
    steps = planned_steps(trial.training, len(work.job.train))
    if method.trains:
        check_warmup(trial.training, steps)
    return _Material(method, work, steps)


def seeded_options(kind: str, options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return a method's options, in which the seeds that were left open are the trial's.

    What a method draws from a generator of its own, as AROMA its components, would else be the same in every trial.
    """
    if kind not in METHODS:
        return dict(options)
    seeds = dict.fromkeys(METHODS[kind].option_types().keys() & {"seed", "component_seed"}, seed)
    return {**seeds, **{name: value for name, value in options.items() if not (name in seeds and value is None)}}


def _run(trial: Trial, material: _Material, home: TrialFolder, usage: Usage, progress: bool) -> dict[str, Any]:
    if trial.training.threads is not None:
        torch.set_num_threads(trial.training.threads)
    found = provenance()
    set_seed(trial.training.seed)
    job = material.work.job
    model = material.method.build(job.load_model(), material.steps)
    recorder = CurveRecorder(material.method, usage)
    if material.method.trains:
        fit = _fit(trial, material, model, recorder, home, progress)
    else:
        fit = _untrained(trial, material, model, recorder, home)
    finished = Finished(trial, material.method, material.work, fit, material.steps, recorder.curve, usage, found)
    _leave(finished, home, list(job.watched))
    # What was trained is kept first: an evaluation may fail.
    predictions = {split: job.predict(fit.trainer, split) for split in job.evaluated}
    return result_of(finished, predictions, home.events)


def _fit(
    trial: Trial,
    material: _Material,
    model: Any,
    recorder: CurveRecorder,
    home: TrialFolder,
    progress: bool,
) -> Fit:
    checkpoint = home.checkpoint()
    job = material.work.job
    fit = make_trainer(
        material.method,
        model,
        job.objective,
        trial.training,
        home.checkpoints,
        train=job.train,
        validation=job.watched if trial.training.eval_steps is not None else None,
        callbacks=[recorder, ProgressFile(home.progress)],
        on_event=EventLog(home.events, upto=step_of(checkpoint)),
        progress=progress,
    )
    fit.train(checkpoint)
    return fit


def _untrained(trial: Trial, material: _Material, model: Any, recorder: CurveRecorder, home: TrialFolder) -> Fit:
    """Return what evaluates a model that nothing trains, in the precision of those that are trained beside it."""
    objective = material.work.job.objective
    loop = replace(trial.training, eval_steps=None, save_steps=None, checkpoint="last")
    trainer = Trainer(
        model=model,
        args=training_arguments(loop, objective, home.checkpoints),
        data_collator=objective.collator,
        processing_class=objective.processor,
        compute_metrics=objective.metrics,
        preprocess_logits_for_metrics=lambda outputs, labels: outputs[0] if isinstance(outputs, tuple) else outputs,
    )
    trainer.accelerator.prepare_model(model, evaluation_mode=True)
    recorder.curve.note(0, material.method.active_parameters(model), material.method.ranks(model))
    EventLog(home.events, upto=0)
    return Fit(trainer)


def _leave(finished: Finished, home: TrialFolder, splits: list[str]) -> None:
    """Write all but the result."""
    log = finished.fit.trainer.state.log_history
    _write_compactly(home.curve, {"planned_steps": finished.planned_steps, **finished.curve.as_dict()})
    _write_compactly(home.history, history_of(log, splits))
    if finished.trial.purpose == "report" and finished.method.trains:
        shutil.rmtree(home.adapter, ignore_errors=True)  # of an attempt that was killed right here
        home.adapter.mkdir()
        finished.method.save(finished.fit.trainer.model, home.adapter)
        finished.work.job.describe(finished.fit.trainer.model, home.adapter)


def _write_compactly(path: Path, value: Any) -> None:
    """Write JSON on one line: a curve has thousands of pairs of numbers."""
    write_text(path, json.dumps(value, allow_nan=False) + "\n")
