"""What a finished trial says of itself: the content of `result.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..methods import Method
from ..tasks.metrics import score
from ..tasks.model import count_trainable
from ..tasks.spec import HELD_OUT
from ..training.job import Prediction
from ..training.trainer import Fit
from .curve import Curve
from .history import inner_checks_of
from .spectra_record import spectra_of
from .trial import Trial
from .usage import Usage
from .work import Work


@dataclass(frozen=True)
class Finished:
    """A trial that has trained, if its method does.

    Args:
        trial: The trial.
        method: Its method.
        work: Its examples, and what they are scored by.
        fit: Its Trainer.
        planned_steps: Optimizer steps that its training section plans.
        curve: Its trainable parameters and ranks by step.
        usage: What it cost.
        provenance: Versions, revision and machine when it began: sources may be edited while it runs.
    """

    trial: Trial
    method: Method
    work: Work
    fit: Fit
    planned_steps: int
    curve: Curve
    usage: Usage
    provenance: dict[str, Any]


def result_of(finished: Finished, predictions: Mapping[str, Prediction], events: Path) -> dict[str, Any]:
    """Return the content of `result.json`.

    Args:
        finished: The trial.
        predictions: By split: the held-out and, if the trial reports, the reported examples.
        events: Its events.
    """
    trial, work, state = finished.trial, finished.work, finished.fit.trainer.state
    metrics = {split: prediction.metrics for split, prediction in predictions.items()}
    reported = {name: values for name, values in metrics.items() if name != HELD_OUT}
    return {
        "name": trial.name,
        "task": trial.task.name,
        "method": trial.method,
        "kind": trial.kind,
        "options": trial.options,
        "resolved_options": finished.method.resolved_options(),
        "seed": trial.training.seed,
        "purpose": trial.purpose,
        "metric": work.metric,
        "score": score(work.metric, reported if trial.purpose == "report" else metrics),
        "checkpoint": trial.training.checkpoint,
        "held_out": metrics[HELD_OUT],
        "held_out_loss": predictions[HELD_OUT].loss,
        "reported": reported,
        "examples": work.job.examples,
        "notes": list(work.job.notes),
        "steps": state.global_step,
        "planned_steps": finished.planned_steps,
        "stopped_early": finished.method.trains and state.global_step < finished.planned_steps,
        "parameters": _parameters(finished),
        **_ranks(finished),
        **{name: round(value, 3) for name, value in finished.usage.total().items()},
        "epoch_seconds": [round(seconds, 4) for seconds in finished.usage.epochs],
        "inner_checks": inner_checks_of(json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()),
        **finished.provenance,
    }


def _parameters(finished: Finished) -> dict[str, float]:
    changes = finished.curve.parameters
    return {
        "initial": changes[0][1],
        "average": finished.curve.average_parameters(finished.planned_steps),
        "final": changes[-1][1],
        "head": count_trainable(finished.fit.trainer.model)["head"],
    }


def _ranks(finished: Finished) -> dict[str, Any]:
    """Return ranks as the method counts them, and the spectra of the update."""
    model = finished.fit.trainer.model
    # Only a growing adapter has components of a rank of its own; the update of another is a sum of rank-one terms.
    size = getattr(finished.method, "r", 1) if finished.fit.growth is not None else 1
    ranks = finished.method.ranks(model)
    average = sum(ranks.values()) / len(ranks) if ranks else None
    return {**spectra_of(finished.method.components(model), r=size), "ranks": ranks, "average_rank": average}
