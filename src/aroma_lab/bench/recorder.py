"""From the controller's events to a rank trajectory: of a run that goes on, or of one that left its folder."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aroma.errors import CheckpointError, DataError, bad_value
from aroma.events import Event
from aroma.files import read_json

from ..run.run_folder import RunFolder
from .trajectory import Change, Trajectory

TRAJECTORY_FILE = "trajectory.json"
"""Name of the file in which `aroma bench run` leaves the trajectory that it replayed or recorded."""


class TrajectoryRecorder:
    """Makes a trajectory of a controller's events; subscribe it, or call it with every event in order.

    Args:
        modules: Names of the growing modules in module order, where they are known before the first event.
    """

    def __init__(self, modules: Sequence[str] = ()) -> None:
        self._ranks: dict[str, int] = dict.fromkeys(modules, 0)
        self._component_rank: int | None = None
        self._checks: list[int] = []
        self._changes: dict[int, dict[str, Change]] = {}
        self._last_step = 0

    def __call__(self, event: Event) -> None:
        """Take in one event.

        Raises:
            DataError: Its rank or its step does not follow from the events before it.
        """
        if event.step < self._last_step:
            raise bad_value("step", event.step, f"an event of step {self._last_step} comes before it", DataError)
        self._last_step = event.step
        if event.module is None:
            return
        self._require_rank(event, event.module)
        if event.kind == "checked" and event.step not in self._checks[-1:]:
            self._checks.append(event.step)
        if event.kind in ("merged", "frozen"):
            self._change(event, event.module)

    def changes_at(self, step: int) -> Sequence[Change]:
        """Return what happened after optimizer step `step`, in module order."""
        return list(self._changes.get(step, {}).values())

    def is_check(self, step: int) -> bool:
        """Whether an inner check was made after optimizer step `step`; asked before a later one is recorded."""
        return step in self._checks[-1:]

    def trajectory(self, steps: int | None = None) -> Trajectory:
        """Return what has been recorded so far.

        Args:
            steps: Optimizer steps of the run; those of the last event where they are not known.

        Raises:
            DataError: The events do not make a trajectory.
        """
        changes = tuple(change for changed in self._changes.values() for change in changed.values())
        rank = self._component_rank or 1  # without any merge it makes no difference
        return Trajectory(tuple(self._ranks), rank, steps or self._last_step, tuple(self._checks), changes)

    def _require_rank(self, event: Event, module: str) -> None:
        before = self._ranks.get(module, 0)
        if event.kind == "merged" and self._component_rank is None:
            self._component_rank = event.rank
        grown = (self._component_rank or 0) if event.kind == "merged" else 0
        if event.rank != before + grown:
            raise bad_value(
                "rank",
                event.rank,
                f"{module} had rank {before} before this event of step {event.step}; a trajectory begins at rank 0 "
                "and misses nothing, so give a run that started afresh and was not edited",
                DataError,
            )
        self._ranks[module] = event.rank

    def _change(self, event: Event, module: str) -> None:
        changes = self._changes.setdefault(event.step, {})
        earlier = changes.get(module, Change(event.step, module, merged=False, frozen=False))
        changes[module] = dataclasses.replace(
            earlier, merged=earlier.merged or event.kind == "merged", frozen=earlier.frozen or event.kind == "frozen"
        )


def read_trajectory(path: str | os.PathLike[str]) -> Trajectory:
    """Read the trajectory of a run.

    Args:
        path: Folder of a run (`aroma train`, `aroma demo`) with its events, or of an `aroma bench run` with the
            trajectory that it left.

    Raises:
        DataError: There are no events, or they make no trajectory; file and line are named.
        CheckpointError: A file is not the JSON that a run writes.
    """
    folder = Path(path)
    if (folder / TRAJECTORY_FILE).is_file():
        return Trajectory.from_dict(read_json(folder / TRAJECTORY_FILE))
    run = RunFolder(folder)
    if not run.events.is_file():
        remedy = f"there is no {run.events.name} in it; give the folder that `aroma train` or `aroma demo` left"
        raise bad_value("--trajectory", str(path), remedy, DataError)
    recorder = TrajectoryRecorder()
    for number, event in _events(run.events):
        try:
            recorder(event)
        except (DataError, TypeError) as error:
            raise DataError(f"{run.events}, line {number}: {error}") from error
    try:
        return recorder.trajectory(_steps_of(run))
    except DataError as error:
        raise DataError(f"{run.events}: {error}") from error


def _events(path: Path) -> Iterator[tuple[int, Event]]:
    """Yield the events of a file with the numbers of their lines; one that a kill cut short at the end is left out."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            return
        try:
            yield number, Event(**json.loads(line))
        except (json.JSONDecodeError, TypeError) as error:
            reason = f"not an event as AROMA writes it ({error}); the file was edited, give another run"
            raise DataError(f"{path}, line {number}: {reason}") from error


def _steps_of(run: RunFolder) -> int | None:
    """Return the optimizer steps that a finished run says it took; None where it does not."""
    if not run.result.is_file():
        return None
    result: Any = read_json(run.result)
    if not isinstance(result, dict):
        raise CheckpointError(f"{run.result}: not the result of a run; give another run")
    steps: int | None = result.get("steps")
    return steps
