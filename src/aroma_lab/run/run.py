"""The one runner: prepare a trial, train, evaluate, write everything; a killed run resumes to the bit."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from transformers import Trainer, set_seed

from aroma.errors import bad_value
from aroma.files import read_json, write_json, write_text
from aroma.sharding import refuse_together

from ..methods import METHODS, Method, make_method
from ..methods.base import INITIALIZATION_BATCHES
from ..specs import TrainSpec
from ..tasks.classification import ClassifierJob
from ..training.interrupt import saved_when_interrupted
from ..training.job import Job, TrainerKind
from ..training.trainer import Fit, logits_alone, make_trainer, training_arguments
from .folder import TrialFolder, step_of
from .machine import provenance
from .processes import join, of_first, require_as_many
from .recorder import EventLog, ProgressFile, Recorder, Usage, history_of
from .result import result_of
from .trial import Trial
from .work import Work, work_of

if TYPE_CHECKING:
    from datasets import Dataset


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
        The content of `result.json`.

    Raises:
        ConfigError: A value that cannot work, or a folder that holds something else.
        DataError: Examples that cannot be used.
        CheckpointError: A checkpoint to go on from is damaged.
        NonFiniteError: NaN or infinity in training.
    """
    usage, processes, home = Usage(), join(), TrialFolder(Path(folder))
    with refuse_together(processes.device):
        home.check(trial)
        run = None if home.result.exists() else _prepare(trial, home, processes, usage)
    if run is not None:
        if processes.is_main_process:
            home.open(trial)
            on_start(run.work.job)
        processes.wait_for_everyone()
        result = _train_and_evaluate(run, progress)
        if processes.is_main_process:
            write_json(home.result, result)
    if processes.is_main_process:
        home.clean(keep_checkpoints)
    processes.wait_for_everyone()
    return result if run is not None else dict(read_json(home.result))


@dataclass(frozen=True)
class Run:
    """A trial that has passed all checks; nothing is written yet.

    Args:
        processes: Those that train it.
        work: Its examples and what they are scored by.
        train: The examples that it trains on.
        held_out: Those that the method asks instead; see `Method.hold_out`.
        model: What is trained.
        steps: Planned optimizer steps.
        checkpoint: Where it goes on from; None: it begins.
        recorder: Records ranks, parameters and cost.
        provenance: Versions, revision and machine when it began: sources may be edited while it runs.
    """

    trial: Trial
    home: TrialFolder
    processes: PartialState
    method: Method
    work: Work
    train: Dataset
    held_out: Dataset | None
    model: Any
    steps: int
    checkpoint: str | None
    recorder: Recorder
    provenance: dict[str, Any]


def _prepare(trial: Trial, home: TrialFolder, processes: PartialState, usage: Usage) -> Run:
    """Do everything that can fail before anything is written, the cheapest first."""
    training = trial.training
    checkpoint = home.checkpoint()
    require_as_many(checkpoint)
    method = make_method(trial.kind, seeded_options(trial.kind, trial.options, training.seed))
    if not method.trains and trial.quantization is not None:
        remedy = (
            f"transformers' Trainer takes no quantised model without an adapter, and {method.name} has none; leave "
            "the method out, or evaluate the model with `aroma eval`"
        )
        raise bad_value("quantization", trial.quantization, remedy)
    if processes.num_processes > 1:
        method.require_no_data_option("it is computed by one process; start one")
    work = work_of(trial)
    if not isinstance(work.job, ClassifierJob):
        remedy = "only classification and regression have the texts that it is computed from; leave it out"
        method.require_no_data_option(remedy)
    train, held_out = method.hold_out(work.job.train)
    steps = planned_steps(training, len(train), processes.num_processes)
    if method.trains:
        check_warmup(training, steps)
        method.check_steps(steps)
    if training.threads is not None:
        torch.set_num_threads(training.threads)
    found = provenance()
    set_seed(training.seed)
    model = method.build(work.job.load_model(), steps)
    if method.data_option is not None and checkpoint is None:
        model.to(processes.device)
        method.initialize(model, draw_batches(train, work, training, processes.device))
    return Run(
        trial=trial,
        home=home,
        processes=processes,
        method=method,
        work=work,
        train=train,
        held_out=held_out,
        model=model,
        steps=steps,
        checkpoint=checkpoint,
        recorder=Recorder(method, usage),
        provenance=found,
    )


def seeded_options(kind: str, options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return a method's options; seeds that were left open are the trial's.

    What a method draws from a generator of its own, as AROMA its components, would otherwise be the same in every
    trial.
    """
    if kind not in METHODS:
        return dict(options)
    seeds = dict.fromkeys(METHODS[kind].option_types().keys() & {"seed", "component_seed"}, seed)
    return {**seeds, **{name: value for name, value in options.items() if not (name in seeds and value is None)}}


def draw_batches(train: Dataset, work: Work, training: TrainSpec, device: torch.device) -> list[Any]:
    """Return the batches that a method computes its start from, drawn without repetition with the run's seed."""
    order = torch.Generator().manual_seed(training.seed)
    loader = DataLoader(
        train,
        training.batch_size,
        shuffle=True,
        generator=order,
        collate_fn=work.objective.collator,
    )
    return [batch.to(device) for batch in islice(loader, INITIALIZATION_BATCHES)]


def planned_steps(training: TrainSpec, examples: int, processes: int = 1) -> int:
    """Return the optimizer steps of a run over `examples` training examples, as the Trainer counts them."""
    if training.max_steps is not None:
        return training.max_steps
    batches = math.ceil(examples / (training.batch_size * processes))
    return math.ceil(training.epochs * math.ceil(batches / training.gradient_accumulation_steps))


def check_warmup(training: TrainSpec, steps: int) -> None:
    """Raise ConfigError if a run of `steps` optimizer steps ends before its warm-up."""
    if training.warmup_steps >= steps:
        remedy = f"the run of {steps} optimizer steps ends before the warm-up; lower it, or train longer"
        raise bad_value("training.warmup_steps", training.warmup_steps, remedy)


def _train_and_evaluate(run: Run, progress: bool) -> dict[str, Any]:
    fit = _train(run, progress) if run.method.trains else _untrained(run)
    if run.processes.is_main_process:
        # What was trained is kept first: an evaluation may fail.
        _leave(run, fit)
    predictions = {split: run.work.job.predict(fit.trainer, split) for split in run.work.job.evaluated}
    return of_first(run.processes, lambda: result_of(run, fit, predictions))


def _train(run: Run, progress: bool) -> Fit:
    job, training, first = run.work.job, run.trial.training, run.processes.is_main_process
    sets = job.eval_sets if training.eval_steps is not None else {}
    fit = make_trainer(
        run.method,
        run.model,
        run.work.objective,
        training,
        run.home.checkpoints,
        train=run.train,
        validation={split: sets[split] for split in run.work.traced} if sets else None,
        held_out=run.held_out,
        callbacks=[run.recorder, *([ProgressFile(run.home.progress)] if first else [])],
        on_event=EventLog(run.home.events, upto=step_of(run.checkpoint)) if first else None,
        progress=progress and first,
        describe=job.describe,
    )
    with saved_when_interrupted(fit.trainer):
        fit.train(run.checkpoint)
    return fit


def _untrained(run: Run) -> Fit:
    """Return what evaluates a model that nothing trains, in the precision of those that are trained beside it."""
    objective, model = replace(run.work.objective, trainer=TrainerKind()), run.model
    loop = replace(run.trial.training, eval_steps=None, save_steps=None, checkpoint="last")
    trainer = Trainer(
        model=model,
        args=training_arguments(loop, objective, run.home.checkpoints),
        data_collator=objective.collator,
        processing_class=objective.processor,
        compute_metrics=objective.metrics,
        preprocess_logits_for_metrics=logits_alone,
    )
    trainer.accelerator.prepare_model(model, evaluation_mode=True)
    run.recorder.curve.note(0, run.method.active_parameters(model), run.method.ranks(model))
    if run.processes.is_main_process:
        EventLog(run.home.events, upto=0)
    return Fit(trainer)


def _leave(run: Run, fit: Fit) -> None:
    """Write all but the result."""
    home, model = run.home, fit.trainer.model
    curve = {"planned_steps": run.steps, **run.recorder.curve.as_dict()}
    # On one line: a curve has thousands of pairs of numbers.
    for path, value in (
        (home.curve, curve),
        (home.history, history_of(fit.trainer.state.log_history, run.work.traced)),
    ):
        write_text(path, json.dumps(value, allow_nan=False) + "\n")
    if run.trial.purpose == "report" and run.method.trains:
        shutil.rmtree(home.adapter, ignore_errors=True)  # of an attempt that was killed right here
        home.adapter.mkdir()
        run.method.save(model, home.adapter)
        run.work.job.describe(model, home.adapter)
