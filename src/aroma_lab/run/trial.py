"""A trial: one run, fully resolved. A cell of a grid is one, and a recipe becomes one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from aroma.errors import CheckpointError, bad_value
from aroma.files import read_json, write_json

from ..specs import TaskSpec, TrainSpec

RUNS = "runs"
"""Folder, in the output of a grid, of the trials' folders."""

REPORT = "report.html"
"""Name of the page to look at, in the folder of a run or of a grid."""


class TrialFiles:
    """Names of what a run leaves in `root`; `checkpoints` of a grid's trial only while it is not finished."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.trial = root / "trial.json"  # the resolved configuration
        self.recipe = root / "recipe.yaml"  # of a run that has one
        self.adapter = root / "adapter"  # the trained parameters: the plain LoRA adapter, where it is one
        self.checkpoints = root / "checkpoints"
        self.events = root / "events.jsonl"  # of AROMA's controller, a JSON object a line
        self.history = root / "history.json"  # losses, learning rates and evaluations by optimizer step
        self.curve = root / "curve.json"  # trainable parameters and ranks by optimizer step
        self.result = root / "result.json"  # written last, so a folder that has it is a finished run's
        self.failure = root / "failure.json"  # what went wrong at the last attempt
        self.log = root / "worker.log"  # what a worker printed


@dataclass(frozen=True)
class Trial:
    """One run, fully resolved; to and from JSON.

    Args:
        name: Its folder's name below the runs, as `"mrpc/lora-r8/seed-0"`.
        model: Hub name or folder of the pretrained model, or `"minilm"`: the packaged encoder.
        task: The data, the metric, and the held-out share.
        method: Label of the method in tables, as `"lora-r8"`.
        kind: Kind of the method; one of `METHODS`.
        options: Fields of the method.
        training: The loop; its seed is the trial's.
        purpose: `"report"`: evaluated on the held-out and on the reported examples. `"select"`: on the held-out ones
            alone; the reported ones are never read.
        dtype: Type of the pretrained weights; see `ModelSpec`.
        quantization: Quantization of the pretrained weights; see `ModelSpec`.
        gguf_file: GGUF file of the pretrained model; see `ModelSpec`.
    """

    name: str
    model: str
    task: TaskSpec
    method: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    training: TrainSpec = field(default_factory=TrainSpec)
    purpose: Literal["report", "select"] = "report"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["nf4", "int8"] | None = None
    gguf_file: str | None = None

    def __post_init__(self) -> None:
        path = PurePosixPath(self.name)
        if not path.parts or path.is_absolute() or ".." in path.parts:
            raise bad_value("trial.name", self.name, "give a path below the folder of runs, as mrpc/lora-r8/seed-0")


def save_trial(trial: Trial, path: str | os.PathLike[str]) -> None:
    """Write a trial as JSON, atomically."""
    write_json(path, asdict(trial))


def load_trial(path: str | os.PathLike[str]) -> Trial:
    """Read a trial.

    Raises:
        CheckpointError: The file is missing, truncated, or edited so that it is no trial.
        ConfigError: A value that cannot work.
    """
    content = read_json(path)
    try:
        sections = {"task": TaskSpec(**content["task"]), "training": TrainSpec(**content["training"])}
        return Trial(**{**content, **sections})
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: edited, no trial ({error}); restore the file that was written") from error


def differing_keys(one: Trial, other: Trial) -> list[str]:
    """Return the dotted keys in which two trials differ, in the order of the file."""
    left, right = (_flatten(json.loads(json.dumps(asdict(trial)))) for trial in (one, other))
    return [key for key in {**left, **right} if key not in left or key not in right or left[key] != right[key]]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested `values` by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
