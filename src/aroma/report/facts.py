"""What a report of a run is made of, wherever it was learnt: a recorded folder, or a Trainer that has just ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

LORA_RANK = 8
"""Rank of the LoRA whose parameters are counted for comparison."""

Steps = Sequence[Sequence[Any]]
"""Pairs of optimizer step and number."""


class MatrixFacts(NamedTuple):
    """What became of one matrix.

    Args:
        name: Name of its module in the base model.
        rank: Rank of its update, or the mean of several.
        effective_rank: Effective rank of its update; None where unknown.
        relative_update: ‖ΔW‖_F / ‖W0‖_F; None where unknown.
    """

    name: str
    rank: float
    effective_rank: float | None = None
    relative_update: float | None = None


class Result(NamedTuple):
    """A line of the table of results.

    Args:
        name: What was evaluated.
        metrics: Metrics by name.
        kind: `"own"`: of this run; `"guess"`: of who answers without reading; `"other"`: of another run.
    """

    name: str
    metrics: Mapping[str, float]
    kind: str = "own"


@dataclass(frozen=True)
class RunFacts:
    """A training run, finished or not; what is unknown is empty or None.

    Args:
        title: What was learnt.
        about: What else its heading says, such as model and method.
        results: Lines of the table of results; the last one of this run's is the headline.
        metric: Metric that is the score.
        steps: Optimizer steps taken.
        planned_steps: Optimizer steps planned.
        seconds: Time of the run, evaluations included.
        loss: Training loss by step.
        eval_loss: Loss of evaluations by step.
        parameters: Parameters of the adapter that train at the end.
        head_parameters: Parameters that train beside the adapter.
        lora_parameters: Parameters of a LoRA of rank `LORA_RANK` on the same matrices.
        matrices: The adapted matrices in the order of the model.
        ranks: Rank by module, from each step on.
        explanation: Why the matrices grow no more, in one sentence without a full stop.
        notes: What a reader has to know before the numbers.
        measured: How it was measured, in sentences.
        settings: What differs from the defaults, by section and key.
        recipe: All settings as a file.
        versions: Versions of packages, machine, source.
        command: What to type to run it again.
    """

    title: str
    about: Sequence[str] = ()
    results: Sequence[Result] = ()
    metric: str | None = None
    steps: int = 0
    planned_steps: int | None = None
    seconds: float | None = None
    loss: Steps = ()
    eval_loss: Steps = ()
    parameters: int | None = None
    head_parameters: int | None = None
    lora_parameters: int | None = None
    matrices: Sequence[MatrixFacts] = ()
    ranks: Mapping[str, Steps] = field(default_factory=dict)
    explanation: str | None = None
    notes: Sequence[str] = ()
    measured: Sequence[str] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    recipe: str | None = None
    versions: Mapping[str, Any] = field(default_factory=dict)
    command: str | None = None
