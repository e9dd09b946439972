"""Which finished runs a figure shows, and what their folders say."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aroma.errors import DataError, bad_value

from ..report.attempts import Run, read_attempt
from ..report.checks import read_record, require_keys
from ..report.records import load_records
from ..run.files import TrialFiles
from .style import Style, style_of


@dataclass(frozen=True)
class Finished:
    """The finished runs of some folders that report; those that chose settings are left out.

    Args:
        runs: The runs, by seed.
        methods: Labels of the methods, in the order of the grids, also of those that have not finished a run.
        tasks: Names of the tasks that have finished runs, in the order of the grids.
    """

    runs: tuple[Run, ...]
    methods: tuple[str, ...]
    tasks: tuple[str, ...]

    def of_task(self, task: str) -> Finished:
        """Return those of one task."""
        return Finished(tuple(run for run in self.runs if run.task == task), self.methods, (task,))


@dataclass(frozen=True)
class MethodRuns:
    """The runs of one method on one task, by seed.

    Args:
        method: Label of the method.
        style: How it is drawn.
        runs: Its runs, at least one.
    """

    method: str
    style: Style
    runs: tuple[Run, ...]


def find_runs(folders: Sequence[str | os.PathLike[str]]) -> Finished:
    """Return the finished runs of `folders`, each the output of a grid, or the folder of one run.

    Raises:
        DataError: There is none in one of the folders.
        ConfigError: One of the folders holds no runs at all.
        CheckpointError: A record is damaged.
    """
    runs: dict[Path, Run] = {}
    methods: list[str] = []
    tasks: list[str] = []
    for folder in folders:
        here = _read_folder(Path(folder))
        if not here.runs:
            remedy = "no run in it that reports has finished; wait for one, or give another folder"
            raise bad_value("FOLDER", str(folder), remedy, DataError)
        runs |= {run.folder.resolve(): run for run in here.runs}
        methods += here.methods
        tasks += here.tasks
    by_seed = sorted(runs.values(), key=lambda run: run.seed)
    return Finished(tuple(by_seed), tuple(dict.fromkeys(methods)), tuple(dict.fromkeys(tasks)))


def by_method(finished: Finished) -> list[MethodRuns]:
    """Group runs of one task by method; a method looks the same whatever others are shown.

    Raises:
        DataError: Two runs are of the same method and seed.
    """
    groups = []
    for index, label in enumerate(finished.methods):
        runs = tuple(run for run in finished.runs if run.method == label)
        _require_distinct(runs)
        if runs:
            groups.append(MethodRuns(label, style_of(index), runs))
    return groups


def only(field: str, wanted: Iterable[str] | None, known: Sequence[str]) -> list[str]:
    """Return those of `known` that are `wanted`, in the order wanted; all if None.

    Raises:
        ConfigError: One is not known.
    """
    if wanted is None:
        return list(known)
    chosen = list(dict.fromkeys(wanted))
    for name in chosen:
        if name not in known:
            raise bad_value(field, name, f"no finished run has it; there are {', '.join(known)}")
    return chosen


def curve_of(run: Run) -> dict[str, Any]:
    """Return content of `curve.json`: trainable parameters and ranks by step.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    curve = read_record(run.files.curve)
    require_keys(run.files.curve, curve, ("parameters", "total_rank", "ranks"))
    return dict(curve)


def history_of(run: Run) -> dict[str, Any]:
    """Return content of `history.json`: losses and evaluations by step.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    history = read_record(run.files.history)
    require_keys(run.files.history, history, ("evaluations",))
    return dict(history)


def _read_folder(folder: Path) -> Finished:
    if not TrialFiles(folder).trial.is_file():
        records = load_records(folder)
        tasks = tuple(task for task in records.tasks if records.of(task=task))
        return Finished(tuple(records.runs), tuple(records.methods), tasks)
    run = read_attempt(folder)
    runs = (run,) if isinstance(run, Run) and not run.is_selection else ()
    return Finished(runs, (run.method,), (run.task,))


def _require_distinct(runs: Sequence[Run]) -> None:
    seen: dict[int, Run] = {}
    for run in runs:
        other = seen.setdefault(run.seed, run)
        if other is not run:
            raise bad_value(
                "FOLDER",
                str(run.folder),
                f"of the same task, method and seed as {other.folder}; give one of them",
                DataError,
            )
