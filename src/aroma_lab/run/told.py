"""What a finished run tells of its adapter: data, settings and metrics, in its state and in its model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from aroma.about import About, Fact, Score
from aroma.card import Subject, files_beside, write_card
from aroma.saved import read_config
from aroma.tuner.state import STATE_FILE, read_state, tell

from .trial import Trial

_CONFIG = "adapter_config.json"


def tell_of_adapter(
    adapter: Path, trial: Trial, result: Mapping[str, Any], held_out: str, label_names: tuple[str, ...] | None
) -> None:
    """Write into an adapter's state and card what is known once its run was evaluated; nothing if it is no adapter.

    Args:
        adapter: Folder of what was trained.
        result: Content of `result.json`.
        held_out: Name of the held-out split.
        label_names: Names of a classifier's labels; None where there are none.
    """
    if not (adapter / _CONFIG).exists():
        return
    splits = {**result["reported"], held_out: result["held_out"]}
    examples = result["examples"]
    scores = tuple(Score(name.replace("_", " "), examples.get(name), values) for name, values in splits.items())
    data: dict[str, Fact] = {"data set": _name_of(trial)}
    if "train" in examples:
        data["training examples"] = examples["train"]
    config = read_config(adapter)
    if not (adapter / STATE_FILE).exists():
        labels = None if label_names is None else len(label_names)
        about = About(label_names, labels, data=data, settings=_settings_of(trial), scores=scores)
        write_card(adapter, Subject(config, result["ranks"], about, files=files_beside(adapter)))
        return
    known = About.from_json(read_state(adapter)["about"])
    state = tell(adapter, replace(known, data={**data, **known.data, "data set": data["data set"]}, scores=scores))
    write_card(adapter, Subject.of(config, state, files=files_beside(adapter)))


def _name_of(trial: Trial) -> str:
    """Return how a trial's data are called: by their name on the hub, or by their files, without their folders."""
    if trial.data is None:
        return trial.task.name
    if trial.data.name is None:
        return ", ".join(Path(part).name for part in (trial.data.train or "").split("+")) or str(trial.data.task)
    name = Path(trial.data.name).name if Path(trial.data.name).exists() else trial.data.name
    return name if trial.data.config is None else f"{name} ({trial.data.config})"


def _settings_of(trial: Trial) -> dict[str, Fact]:
    training = trial.training
    options = {
        f"{trial.kind} {key}": value for key, value in trial.options.items() if isinstance(value, str | int | float)
    }
    return {
        **({"epochs": training.epochs} if training.max_steps is None else {"optimizer steps": training.max_steps}),
        "batch size": training.batch_size * training.gradient_accumulation_steps,
        "learning rate": training.learning_rate,
        "seed": training.seed,
        **options,
    }
