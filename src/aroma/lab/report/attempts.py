"""One trial as its folder tells: finished, failed, or neither yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...files import read_json
from ..trials.files import TrialFiles

_TRIAL_KEYS = ("name", "model", "task", "method", "kind", "options", "training", "purpose")
_RESULT_KEYS = (
    "metric",
    "score",
    "examples",
    "steps",
    "planned_steps",
    "stopped_early",
    "parameters",
    "epoch_seconds",
)
_PROVENANCE_KEYS = ("versions", "git_revision", "platform", "device", "cpu_count", "threads")


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
    trial = read_json(files.trial)
    require_keys(files.trial, trial, _TRIAL_KEYS)
    require_keys(f"{files.trial}, task", trial["task"], ("name",))
    require_keys(f"{files.trial}, training", trial["training"], ("seed",))
    if files.result.exists():
        result = read_json(files.result)
        require_keys(files.result, result, _RESULT_KEYS + _PROVENANCE_KEYS)
        return Run(place, trial, result)
    if files.failure.exists():
        failure = read_json(files.failure)
        require_keys(files.failure, failure, ("error", "message"))
        return Failure(place, trial, " ".join(f"{failure['error']}: {failure['message']}".split()))
    return Attempt(place, trial)


def require_keys(where: Path | str, content: object, keys: Iterable[str]) -> None:
    """Raise unless `content`, read at `where`, is a mapping that has `keys`.

    Raises:
        CheckpointError: It is not.
    """
    missing = list(keys) if not isinstance(content, Mapping) else [key for key in keys if key not in content]
    if missing or not isinstance(content, Mapping):
        raise CheckpointError(
            f"{where}: edited, or of another version: {', '.join(missing) or 'a mapping'} missing; restore the file, "
            "or remove the run's folder and run it again"
        )
