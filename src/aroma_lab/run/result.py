"""The content of `result.json`: settings, metrics, parameters, ranks, spectra, cost and provenance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from aroma.errors import NonFiniteError, bad_value
from aroma.integrations.callback import AromaCallback
from aroma.spectra import effective_rank, singular_values

from ..methods.head import head_of
from ..tasks.metrics import score
from ..tasks.model import count_trainable
from ..tasks.planted import compare_ranks
from ..training.job import Prediction

if TYPE_CHECKING:
    from .run import Run


def result_of(run: Run, predictions: Mapping[str, Prediction]) -> dict[str, Any]:
    """Return the content of `result.json`.

    Args:
        predictions: By split: the held-out and, if the trial reports, the reported examples.
    """
    trial, method, job, recorder = run.trial, run.method, run.job, run.recorder
    curve, model, trainer = recorder.curve, run.model, recorder.trainer
    steps, callbacks = (trainer.state.global_step, trainer.callback_handler.callbacks) if trainer else (0, [])
    controller = next((one.controller for one in callbacks if isinstance(one, AromaCallback)), None)
    ranks, components = method.ranks(model), method.components(model)
    held_out = predictions[job.evaluated[0]]
    reported = {split: one.metrics for split, one in predictions.items() if one is not held_out}
    # Made tasks are always evaluated on fresh examples too. A recipe may have none but those that validate.
    is_reported = bool(reported) and trial.purpose == "report"
    of_rank_one = sum(B.shape[0] + A.shape[1] for B, A in components.values())
    average = curve.average_parameters(run.steps)
    result: dict[str, Any] = {
        "name": trial.name,
        "task": trial.task.name,
        "method": trial.method,
        "kind": trial.kind,
        "options": trial.options,
        "seed": trial.training.seed,
        "purpose": trial.purpose,
        "metric": job.metric,
        "score": score(job.metric, reported if is_reported else {job.evaluated[0]: held_out.metrics}),
        "checkpoint": trial.training.checkpoint,
        "held_out": held_out.metrics,
        "held_out_loss": held_out.loss,
        "reported": reported,
        "guessed": {split: guess for split in predictions if (guess := job.guess(split))},
        "examples": job.examples,
        "notes": list(job.notes),
        "steps": steps,
        "planned_steps": run.steps,
        "stopped_early": method.trains and steps < run.steps,
        "parameters": {
            "initial": curve.parameters[0][1],
            "average": average,
            "final": curve.parameters[-1][1],
            "head": count_trainable(model)["head"],
        },
        "head_modules": [*head_of(model).modules],
        **spectra_of(components),
        "ranks": ranks,  # as the method counts them
        "average_rank": _mean(ranks),
        "total_rank": sum(ranks.values()),
        "trained_rank": average / of_rank_one if of_rank_one else None,
        **{name: round(value, 3) for name, value in recorder.cost().items()},
        "train_seconds": round(recorder.train_seconds, 3),
        "processes": run.processes.num_processes,
        **run.provenance,
    }
    if controller is not None:
        result["relative_updates"] = controller.relative_updates()
        result["states"] = {module.name: module.state for module in controller.summary()}
        result["explanation"] = controller.explanation()
    if job.planted is not None:
        began = {name: changes[0][1] for name, changes in curve.ranks.items()}
        result["planted"] = compare_ranks(job.planted, ranks, began)
    return result


def spectra_of(components: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Return the effective ranks (Appendix C) of a model's updates by module name, and their mean (None without any).

    Args:
        components: B (m, R) and A (R, n) of the whole update, the scale folded in; R = 0 of a module at rank 0.

    Raises:
        NonFiniteError: An update holds NaN or infinity.
    """
    for name, factors in components.items():
        for factor, matrix in zip("BA", factors, strict=True):
            if not matrix.isfinite().all():
                remedy = "its update holds NaN or infinity: training has diverged; lower the learning rate"
                raise bad_value(f"{name}.{factor}", "not finite", remedy, NonFiniteError)
    effective_ranks = {name: effective_rank(singular_values(B, A)) for name, (B, A) in components.items()}
    return {"effective_rank": _mean(effective_ranks), "effective_ranks": effective_ranks}


def _mean(values: Mapping[str, float]) -> float | None:
    return sum(values.values()) / len(values) if values else None
