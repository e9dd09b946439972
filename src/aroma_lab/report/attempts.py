"""One trial as its folder tells: finished, failed, or neither yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..run.files import TrialFiles
from .checks import read_record, require_keys, require_types

_TRIAL_KEYS = ("name", "model", "task", "method", "kind", "options", "training", "purpose")
# Of what a table computes with or groups by; a wrong one would else surface in the midst of a table.
_TRIAL_TYPES = {"model": "a text", "options": "a mapping"}
_RESULT_TYPES = {
    "metric": "a text",
    "score": "a number",
    "examples": "a mapping",
    "steps": "a whole number",
    "planned_steps": "a whole number",
    "parameters": "a mapping",
    "epoch_seconds": "a list",
    "versions": "a mapping",
}
_RESULT_KEYS = (*_RESULT_TYPES, "stopped_early", "git_revision", "platform", "device", "cpu_count", "threads")
_PARAMETER_TYPES = {"initial": "a number", "average": "a number", "head": "a number"}


@dataclass(frozen=True)
class Attempt:
    """One trial of a grid, as its folder tells.

    Args:
        folder: Its run folder.
        trial: Content of `trial.json`, the resolved configuration.
    """

    folder: Path
    trial: Mapping[str, Any]

    @property
    def files(self) -> TrialFiles:
        """What lies where in its folder."""
        return TrialFiles(self.folder)

    @property
    def name(self) -> str:
        """Name of the trial, as `mrpc/lora-r8/seed-0`."""
        return str(self.trial["name"])

    @property
    def task(self) -> str:
        """Name of the task."""
        return str(self.trial["task"]["name"])

    @property
    def method(self) -> str:
        """Label of the method."""
        return str(self.trial["method"])

    @property
    def kind(self) -> str:
        """Kind of the method."""
        return str(self.trial["kind"])

    @property
    def options(self) -> Mapping[str, Any]:
        """Options of the method that were given."""
        return self.trial["options"]

    @property
    def training(self) -> Mapping[str, Any]:
        """Settings of the loop."""
        return self.trial["training"]

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.training["seed"])

    @property
    def is_selection(self) -> bool:
        """Whether it chose a setting on held-out training data, rather than being reported."""
        return self.trial["purpose"] == "select"


@dataclass(frozen=True)
class Run(Attempt):
    """A finished trial.

    Args:
        folder: Its run folder.
        trial: Content of `trial.json`.
        result: Content of `result.json`.
    """

    result: Mapping[str, Any]

    @property
    def score(self) -> float:
        """The task's metric on the reported examples (held-out ones for a selection), in [-1, 1]."""
        return float(self.result["score"])

    @property
    def trains(self) -> bool:
        """Whether anything trained; the pretrained model as it is has taken no step."""
        return int(self.result["steps"]) > 0


@dataclass(frozen=True)
class Failure(Attempt):
    """A trial that ended with an error.

    Args:
        folder: Its run folder.
        trial: Content of `trial.json`.
        message: Name of the error and what it said, in one line.
    """

    message: str


def read_attempt(place: Path) -> Attempt:
    """Read a run folder; one with a result is a finished run, whatever failed there before.

    Raises:
        CheckpointError: A file is missing, damaged or edited.
    """
    files = TrialFiles(place)
    trial = read_record(files.trial)
    require_keys(files.trial, trial, _TRIAL_KEYS)
    require_types(files.trial, trial, _TRIAL_TYPES)
    require_keys(f"{files.trial}, task", trial["task"], ("name",))
    require_types(f"{files.trial}, training", trial["training"], {"seed": "a whole number"})
    if files.result.exists():
        result = read_record(files.result)
        require_keys(files.result, result, _RESULT_KEYS)
        require_types(files.result, result, _RESULT_TYPES)
        require_types(f"{files.result}, parameters", result["parameters"], _PARAMETER_TYPES)
        of_split = dict.fromkeys(["train", *result["examples"]], "a whole number")
        require_types(f"{files.result}, examples", result["examples"], of_split)
        return Run(place, trial, result)
    if files.failure.exists():
        failure = read_record(files.failure)
        require_keys(files.failure, failure, ("error", "message"))
        return Failure(place, trial, " ".join(f"{failure['error']}: {failure['message']}".split()))
    return Attempt(place, trial)
