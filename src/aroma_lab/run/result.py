"""The content of `result.json`: settings, metrics, parameters, ranks, spectra, cost and provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from aroma.errors import NonFiniteError, bad_value
from aroma.spectra import effective_rank, singular_values, span_overlaps

from ..methods import Method
from ..tasks.metrics import score
from ..tasks.model import count_trainable
from ..training.job import Prediction
from ..training.trainer import Fit
from .recorder import Recorder, inner_checks_of
from .trial import Trial
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
        recorder: What was recorded of it.
        processes: How many processes trained it.
        provenance: Versions, revision and machine.
    """

    trial: Trial
    method: Method
    work: Work
    fit: Fit
    planned_steps: int
    recorder: Recorder
    processes: int
    provenance: dict[str, Any]


def result_of(finished: Finished, predictions: Mapping[str, Prediction], events: Path) -> dict[str, Any]:
    """Return the content of `result.json`.

    Args:
        finished: The trial.
        predictions: By split: the held-out and, if the trial reports, the reported examples.
        events: File of its events.
    """
    trial, work, usage = finished.trial, finished.work, finished.recorder.usage
    steps = finished.fit.trainer.state.global_step
    held_out = predictions[work.held_out]
    reported = {split: predictions[split].metrics for split in work.reported}
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
        # A recipe without test examples reports those that it was validated on.
        "score": score(work.metric, reported or {work.held_out: held_out.metrics}),
        "checkpoint": trial.training.checkpoint,
        "held_out": held_out.metrics,
        "held_out_loss": held_out.loss,
        "reported": reported,
        "examples": work.job.examples,
        "notes": list(work.job.notes),
        "steps": steps,
        "planned_steps": finished.planned_steps,
        "stopped_early": finished.method.trains and steps < finished.planned_steps,
        "parameters": _parameters(finished),
        **_ranks(finished),
        **{name: round(value, 3) for name, value in usage.total().items()},
        "epoch_seconds": [round(seconds, 4) for seconds in usage.epochs],
        "inner_checks": inner_checks_of(json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()),
        "processes": finished.processes,
        **finished.provenance,
    }


def _parameters(finished: Finished) -> dict[str, float]:
    curve = finished.recorder.curve
    return {
        "initial": curve.parameters[0][1],
        "average": curve.average_parameters(finished.planned_steps),
        "final": curve.parameters[-1][1],
        "head": count_trainable(finished.fit.trainer.model)["head"],
    }


def _ranks(finished: Finished) -> dict[str, Any]:
    """Return ranks as the method counts them, the spectra of the update, and how the modules of AROMA ended."""
    model, growth = finished.fit.trainer.model, finished.fit.growth
    # Only a growing adapter has components of a rank of its own; the update of another is a sum of rank-one terms.
    size = getattr(finished.method, "r", 1) if growth is not None else 1
    ranks = finished.method.ranks(model)
    modules = finished.fit.controller.summary() if growth is not None else []
    return {
        **spectra_of(finished.method.components(model), r=size),
        "ranks": ranks,
        "average_rank": sum(ranks.values()) / len(ranks) if ranks else None,
        "total_rank": sum(ranks.values()),
        "states": {module.name: module.state for module in modules},
    }


def spectra_of(components: Mapping[str, tuple[Tensor, Tensor]], r: int = 1) -> dict[str, Any]:
    """Return the spectra of a model's updates, JSON-able.

    Args:
        components: B (m, R) and A (R, n) of the whole update by module name, the scale folded in; a module that was
            adapted and ended at rank 0 has R = 0.
        r: Rank of one component, for the overlaps.

    Returns:
        - ``ranks``: by module, how many columns of B and rows of A make a product that is not zero, at most
          min(m, n). Two components in one direction count twice, as in the paper.
        - ``effective_ranks``: by module (Appendix C).
        - ``singular_values``: by module, descending, min(R, m, n) of them.
        - ``overlaps``: by module, for each component after the first, how much of it lies in the span of the right
          factors of the earlier ones, in [0, 1]; see `aroma.spectra.span_overlaps`.
        - ``average_rank``, ``effective_rank``: means over the modules; None where there are none.

    Raises:
        NonFiniteError: An update holds NaN or infinity.
    """
    for name, factors in components.items():
        _require_finite(name, *factors)
    values = {name: singular_values(B, A) for name, (B, A) in components.items()}
    ranks = {name: _rank(B, A) for name, (B, A) in components.items()}
    effective_ranks = {name: effective_rank(sigma) for name, sigma in values.items()}
    return {
        "average_rank": _mean(ranks),
        "effective_rank": _mean(effective_ranks),
        "ranks": ranks,
        "effective_ranks": effective_ranks,
        "singular_values": {name: sigma.tolist() for name, sigma in values.items()},
        "overlaps": {name: span_overlaps(B, A, r).tolist() for name, (B, A) in components.items()},
    }


def _rank(B: Tensor, A: Tensor) -> int:
    used = (B != 0).any(dim=0) & (A != 0).any(dim=1)
    return min(int(used.sum()), B.shape[0], A.shape[1])


def _mean(values: Mapping[str, float]) -> float | None:
    return sum(values.values()) / len(values) if values else None


def _require_finite(name: str, B: Tensor, A: Tensor) -> None:
    for factor, matrix in (("B", B), ("A", A)):
        if not matrix.isfinite().all():
            raise bad_value(
                f"{name}.{factor}",
                "not finite",
                "its update holds NaN or infinity: training has diverged; lower the learning rate",
                NonFiniteError,
            )
