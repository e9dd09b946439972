"""What the folder of a grid holds: finished runs, failed ones, and what is still to come."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from aroma.errors import CheckpointError, bad_value

from ..run.files import RUNS, TrialFiles
from .attempts import Attempt, Failure, Run, read_attempt
from .grid_files import read_grid, read_selection

_FILES = TrialFiles(Path())
_ANY_OF = (_FILES.trial.name, _FILES.result.name, _FILES.failure.name)
"""Any of these makes a folder a run's."""


@dataclass(frozen=True)
class Records:
    """All that a grid's folder tells.

    Args:
        folder: The folder.
        runs: Finished runs that are reported, by name.
        selecting: Finished runs that chose settings on held-out training data.
        failures: Trials that ended with an error, of both purposes.
        unfinished: Trials that have begun and neither finished nor failed.
        selection: Content of `selection.json`; empty where there is none.
        grid: Content of `grid.yaml`; empty where there is none.
    """

    folder: Path
    runs: Sequence[Run]
    selecting: Sequence[Run]
    failures: Sequence[Failure]
    unfinished: Sequence[Attempt]
    selection: Mapping[str, Any]
    grid: Mapping[str, Any]

    @cached_property
    def methods(self) -> list[str]:
        """Labels of the methods, in the grid's order; then those that only folders know."""
        return _ordered(self.grid.get("methods") or (), (attempt.method for attempt in self._attempts))

    @cached_property
    def tasks(self) -> list[str]:
        """Names of the tasks, likewise."""
        return _ordered(self.grid.get("tasks") or (), (attempt.task for attempt in self._attempts))

    @cached_property
    def seeds(self) -> list[int]:
        """Seeds that every cell of a table is to have: the grid's, and any that a reported trial has."""
        return sorted({*(self.grid.get("seeds") or ())} | {one.seed for one in self._attempts if not one.is_selection})

    @property
    def not_begun(self) -> list[str]:
        """Trials of the grid without a folder, as `mrpc/lora-r8, seed 0`."""
        begun = {(one.task, one.method, one.seed) for one in self._attempts if not one.is_selection}
        cells = ((task, method, seed) for task in self.tasks for method in self.methods for seed in self.seeds)
        return [f"{task}/{method}, seed {seed}" for task, method, seed in cells if (task, method, seed) not in begun]

    def of(self, method: str | None = None, task: str | None = None) -> list[Run]:
        """Return the finished runs of a method and a task, None for any, by seed."""
        found = (run for run in self.runs if method in (None, run.method) and task in (None, run.task))
        return sorted(found, key=lambda run: run.seed)

    def methods_of_kind(self, *kinds: str) -> list[str]:
        """Return the labels of finished methods of these kinds, in order."""
        found = {run.method for run in self.runs if run.kind in kinds}
        return [method for method in self.methods if method in found]

    @property
    def _attempts(self) -> list[Attempt]:
        return [*self.runs, *self.selecting, *self.failures, *self.unfinished]


def load_records(folder: str | os.PathLike[str]) -> Records:
    """Read what `aroma lab run` left; adapters and checkpoints are not needed.

    Args:
        folder: The grid's output: run folders under `runs/`, and `selection.json` and `grid.yaml` where they exist.

    Raises:
        ConfigError: There is no run in the folder.
        CheckpointError: A file is damaged or edited, or two run folders hold the same task, method and seed.
    """
    root = Path(folder)
    places = sorted({found.parent for name in _ANY_OF for found in (root / RUNS).glob(f"**/{name}")})
    if not places:
        raise bad_value("folder", str(folder), "no runs there; give the output folder of `aroma lab run`")
    attempts = sorted((read_attempt(place) for place in places), key=lambda attempt: attempt.name)
    finished = [attempt for attempt in attempts if isinstance(attempt, Run)]
    runs = [run for run in finished if not run.is_selection]
    _require_single(runs)
    return Records(
        folder=root,
        runs=runs,
        selecting=[run for run in finished if run.is_selection],
        failures=[attempt for attempt in attempts if isinstance(attempt, Failure)],
        unfinished=[attempt for attempt in attempts if not isinstance(attempt, Run | Failure)],
        selection=read_selection(root / "selection.json"),
        grid=read_grid(root / "grid.yaml"),
    )


def _require_single(runs: Sequence[Run]) -> None:
    seen: dict[tuple[str, str, int], Run] = {}
    for run in runs:
        other = seen.setdefault((run.task, run.method, run.seed), run)
        if other is not run:
            raise CheckpointError(
                f"{run.folder} and {other.folder}: both hold {run.task}, {run.method}, seed {run.seed}; "
                "move one of them away"
            )


def _ordered(planned: Iterable[str], found: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*planned, *found]))
