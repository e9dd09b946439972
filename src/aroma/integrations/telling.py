"""What the Trainer knows of a run, for the card of the adapter: data, settings, and metrics of evaluations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from transformers import TrainerState, TrainingArguments

from ..about import About, Fact, Score

_READERS = ("csv", "json", "parquet", "text", "arrow", "pandas", "generator", "packaged")
"""What `datasets` calls a data set that was read from files, or made: no name that would say anything."""
EVALUATION_COSTS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
"""What the Trainer adds to the metrics of an evaluation, which says nothing of the model."""


def tell_of_run(about: About, args: TrainingArguments, state: TrainerState, training: Any, scores: Any) -> About:
    """Return what is known, with the data and settings of a run that begins or goes on.

    Args:
        about: What is known.
        args: The Trainer's.
        state: The Trainer's.
        training: The training set; None if unknown.
        scores: Of a run that goes on, the scores of its checkpoint as JSON has them; else None.
    """
    data: dict[str, Fact] = {}
    if name := _name_of(training):
        data["data set"] = name
    if (count := _count(training)) is not None:
        data["training examples"] = count
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else None
    settings: dict[str, Fact | None] = {
        "epochs": state.num_train_epochs if args.max_steps <= 0 else None,
        "batch size": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning rate": args.learning_rate,
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "weight decay": args.weight_decay,
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "mixed precision": precision,
        "seed": args.seed,
    }
    known = {name: value for name, value in settings.items() if value is not None}
    return replace(about, data=data, settings=known, scores=tuple(Score(**one) for one in scores or ()))


def with_score(scores: Iterable[Score], score: Score) -> tuple[Score, ...]:
    """Return the scores with one more, which replaces an earlier one of its set."""
    return tuple({**{one.set: one for one in scores}, score.set: score}.values())


def scores_at(scores: Iterable[Score], state: TrainerState, step: int) -> tuple[Score, ...]:
    """Return the scores that the model had at optimizer step `step`, by the Trainer's history."""
    examples = {score.set: score.examples for score in scores}
    found = [score for entry in state.log_history if (score := score_of(entry)) is not None and score.step == step]
    return tuple(replace(score, examples=examples.get(score.set)) for score in found)


def score_of(metrics: Mapping[str, Any], step: int | None = None, examples: Any = None) -> Score | None:
    """Return the metrics of an evaluation; None if there are none among `metrics`.

    Args:
        metrics: As the Trainer gives them, or an entry of its history, each name with the prefix of its set.
        step: Optimizer step; that of the entry by default.
        examples: The examples.
    """
    prefix = next((name.rpartition("_")[0] for name in metrics if name.rpartition("_")[2] == "runtime"), "")
    if not prefix.startswith("eval"):
        return None
    values = {
        name.removeprefix(f"{prefix}_"): float(value)
        for name, value in metrics.items()
        if name.startswith(f"{prefix}_")
        and isinstance(value, int | float)
        and math.isfinite(value)
        and name.removeprefix(f"{prefix}_") not in EVALUATION_COSTS
    }
    name = prefix.removeprefix("eval").strip("_") or "evaluation set"
    return Score(name, _count(examples), values, metrics.get("step") if step is None else step) if values else None


def _count(examples: Any) -> int | None:
    """Return the number of examples; None for a stream, and where there are none."""
    try:
        return None if examples is None else len(examples)
    except TypeError:
        return None


def _name_of(examples: Any) -> str | None:
    """Return what `datasets` knows as the name of a data set."""
    info = getattr(examples, "info", None)
    name, config = getattr(info, "dataset_name", None), getattr(info, "config_name", None)
    if not isinstance(name, str) or name in _READERS:
        return None
    return f"{name} ({config})" if isinstance(config, str) and config not in ("default", name) else name
