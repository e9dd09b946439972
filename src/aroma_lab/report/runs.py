"""Runs as pandas frames, from the folders that `aroma lab run` leaves or the table that `aroma lab collect` makes.

A frame has one row for each run. Its plain columns are what tables group by and compute with; the columns `trial` and
`result` hold the whole records. Both sources go through the same checks.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from aroma.errors import CheckpointError, bad_value
from aroma.files import replacing

from ..run.files import RUNS, TrialFiles
from .records import (
    CURVE,
    FAILURE,
    HISTORY,
    OF_RUN,
    OF_TABLE,
    RESULT,
    TRIAL,
    check,
    read_grid,
    read_record,
    read_selection,
)

TABLE = "runs.parquet"
"""Name of the table of runs, in the output folder of a grid."""

Run = Any
"""A row of a frame, as `itertuples` gives it; attributes are the columns, see `_row`."""

_NESTED = ("trial", "result", "curve", "evaluations", "ended")
"""Columns of the table of runs that are JSON."""
_NOT_KEPT = ("singular_values", "overlaps")
"""Long parts of a result that no table and no figure reads, and the table of runs leaves out."""


@dataclass(frozen=True)
class Runs:
    """All runs of a grid.

    Args:
        source: Folder or file they were read from.
        rows: What frames have of each run, by name, finished or not; see `_row`.
        selection: Content of `selection.json`; empty if there is none.
        grid: Content of `grid.yaml`; empty if there is none.
    """

    source: Path
    rows: Sequence[Mapping[str, Any]]
    selection: Mapping[str, Any]
    grid: Mapping[str, Any]

    @cached_property
    def reported(self) -> pd.DataFrame:
        """Finished runs that are reported, by name."""
        return _frame(row for row in self.rows if row["state"] == "finished" and not row["selects"])

    @cached_property
    def selecting(self) -> pd.DataFrame:
        """Finished runs that chose settings on held-out training examples, by name."""
        return _frame(row for row in self.rows if row["state"] == "finished" and row["selects"])

    @cached_property
    def failed(self) -> pd.DataFrame:
        """Runs of both purposes that ended with an error, by name."""
        return _frame(row for row in self.rows if row["state"] == "failed")

    @cached_property
    def unfinished(self) -> pd.DataFrame:
        """Runs that have begun, and have neither finished nor failed, by name."""
        return _frame(row for row in self.rows if row["state"] == "unfinished")

    @cached_property
    def methods(self) -> list[str]:
        """Labels of the methods, in the grid's order, then those that only runs name."""
        return self._ordered("method", self.grid.get("methods"))

    @cached_property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the same order."""
        return self._ordered("task", self.grid.get("tasks"))

    @cached_property
    def seeds(self) -> list[int]:
        """Seeds that every cell of a table should have: the grid's, and those of all reported runs."""
        return sorted({*(self.grid.get("seeds") or ()), *(row["seed"] for row in self.rows if not row["selects"])})

    @cached_property
    def finished_methods(self) -> list[str]:
        """Labels of the methods that have a reported run, in order."""
        present = set(self.reported.method)
        return [method for method in self.methods if method in present]

    @property
    def not_begun(self) -> list[str]:
        """Cells of the grid without a run, as `mrpc/lora-r8, seed 0`."""
        begun = {(row["task"], row["method"], row["seed"]) for row in self.rows if not row["selects"]}
        cells = ((task, method, seed) for task in self.tasks for method in self.methods for seed in self.seeds)
        return [f"{task}/{method}, seed {seed}" for task, method, seed in cells if (task, method, seed) not in begun]

    def of(self, method: str | None = None, task: str | None = None) -> pd.DataFrame:
        """Return the reported runs of a method and a task, by seed; None: of any."""
        frame = self.reported
        if method is not None:
            frame = frame[frame.method == method]
        if task is not None:
            frame = frame[frame.task == task]
        return frame.sort_values("seed", kind="stable")

    def methods_of_kind(self, kind: str) -> list[str]:
        """Return the labels of finished methods of a kind, in order."""
        present = set(self.reported.method[self.reported.kind == kind])
        return [method for method in self.methods if method in present]

    def _ordered(self, column: str, planned: Iterable[str] | None) -> list[str]:
        frames = (self.reported, self.selecting, self.failed, self.unfinished)
        return list(dict.fromkeys([*(planned or ()), *(name for frame in frames for name in frame[column])]))


def read_runs(source: str | os.PathLike[str]) -> Runs:
    """Read the runs of a grid. Adapters and checkpoints are not needed.

    Args:
        source: Output folder of a grid, with run folders under `runs/` or else a table of runs `runs.parquet`; or the
            file of such a table; or the folder of one run.

    Raises:
        ConfigError: There are no runs.
        CheckpointError: A file is damaged or edited, or two runs have the same task, method and seed.
    """
    path = Path(source)
    folder = path.parent if path.is_file() else path
    if TrialFiles(path).trial.is_file():
        return Runs(path, [_read_folder(path, path)], {}, {})
    files = TrialFiles(Path())
    names = (files.trial.name, files.result.name, files.failure.name)
    places = sorted({found.parent for name in names for found in (folder / RUNS).glob(f"**/{name}")})
    if places and not path.is_file():
        rows = [_read_folder(place, folder) for place in places]
    elif path.is_file() or (folder / TABLE).is_file():
        rows = _read_table(path if path.is_file() else folder / TABLE)
    else:
        remedy = f"no runs there, and no {TABLE}; give the output folder of `aroma lab run`"
        raise bad_value("folder", str(source), remedy)
    rows.sort(key=lambda row: str(row["name"]))
    runs = Runs(path, rows, read_selection(folder / "selection.json"), read_grid(folder / "grid.yaml"))
    _require_distinct(runs.reported)
    return runs


def collect_runs(runs: Runs, path: str | os.PathLike[str]) -> None:
    """Write all runs into one table, from which every table and figure but the cosines comes out the same.

    Settings, versions, metrics, ranks, curves, evaluations and inner checks are kept; events, losses and adapters are
    not.

    Args:
        runs: The runs.
        path: Parquet file to write.
    """
    kept = []
    for run in rows_of(_frame(runs.rows)):
        row = dict(run._asdict())
        if run.state == "finished":
            row["result"] = {key: value for key, value in run.result.items() if key not in _NOT_KEPT}
            # Figures need these two, tables do not, so that runs without them can be collected as well.
            has_curve = run.curve is not None or _files(run).curve.exists()
            has_history = run.evaluations is not None or _files(run).history.exists()
            row["curve"] = curve_of(run) if has_curve else None
            row["evaluations"] = evaluations_of(run) if has_history else None
            row["ended"] = ended_loops(run)
        row |= {column: _to_json(row[column]) for column in _NESTED}
        kept.append(row)
    with replacing(path) as temporary:
        frame = pd.DataFrame(kept).drop(columns="where")
        frame.to_parquet(temporary, index=False, compression="zstd", compression_level=19)


def rows_of(frame: pd.DataFrame) -> list[Run]:
    """Return the rows of a frame, whose attributes are its columns."""
    return list(frame.itertuples(index=False))


def curve_of(run: Run) -> Mapping[str, Any]:
    """Return trainable parameters and ranks by optimizer step, as `curve.json` has them.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    curve = run.curve if run.curve is not None else read_record(_files(run).curve)
    check(_files(run).curve, curve, CURVE)
    return dict(curve)


def evaluations_of(run: Run) -> Sequence[Mapping[str, Any]]:
    """Return the evaluations of a run, each with its step, split and metrics.

    Raises:
        CheckpointError: `history.json` is missing or damaged.
    """
    if run.evaluations is not None:
        return list(run.evaluations)
    history = read_record(_files(run).history)
    check(_files(run).history, history, HISTORY)
    return list(history["evaluations"])


def ended_loops(run: Run) -> Sequence[tuple[int, str]]:
    """Return outer step and module of every inner loop that ended with an outer check.

    Raises:
        CheckpointError: `events.jsonl` is damaged.
    """
    if run.ended is not None:
        return [(outer, module) for outer, module in run.ended]
    path = _files(run).events
    if not path.exists():
        return []
    try:
        events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [(event["outer_step"], event["module"]) for event in events if event["kind"] in ("merged", "frozen")]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: truncated or edited ({error}); restore the file that was written") from error


def require_reported_sets(run: Run) -> Mapping[str, Mapping[str, float]]:
    """Return a run's metrics by reported set.

    Raises:
        CheckpointError: The result has none.
    """
    check(f"{run.where}/result.json", run.result, {"reported": {...: {}}})
    return dict(run.result["reported"])


def _files(run: Run) -> TrialFiles:
    return TrialFiles(Path(run.where))


def _read_folder(place: Path, root: Path) -> dict[str, Any]:
    """Read a run folder; one with a result is a finished run, whatever failed there before."""
    files = TrialFiles(place)
    trial = read_record(files.trial)
    result = read_record(files.result) if files.result.exists() else None
    message = None
    if result is None and files.failure.exists():
        failure = read_record(files.failure)
        check(files.failure, failure, FAILURE)
        message = " ".join(f"{failure['error']}: {failure['message']}".split())
    row = _row(trial, result, message, lambda name: str(place / f"{name}.json"), OF_RUN)
    return {**row, "folder": place.relative_to(root).as_posix(), "where": str(place)}


def _read_table(path: Path) -> list[dict[str, Any]]:
    try:
        frame = pd.read_parquet(path)
        records = frame[["folder", "message", *_NESTED]].to_dict("records")
        nested = [{key: _from_json(record[key]) for key in _NESTED} for record in records]
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(f"{path}: truncated, edited, or no table of runs ({said:.120}); {OF_TABLE}") from error
    rows = []
    for record, parts in zip(records, nested, strict=True):
        where = f"{path}, {record['folder']}"
        message = record["message"] if isinstance(record["message"], str) else None
        row = _row(parts["trial"], parts["result"], message, _named(where), OF_TABLE)
        check(where, parts, {"curve?": CURVE, "evaluations?": "a list", "ended?": "a list"}, OF_TABLE)
        rows.append({**row, **parts, "folder": record["folder"], "where": where})
    return rows


def _row(trial: Any, result: Any, message: str | None, where: Callable[[str], str], remedy: str) -> dict[str, Any]:
    """Return what frames have of a run; `where` says where a record was read, for errors."""
    check(where("trial"), trial, TRIAL, remedy)
    row: dict[str, Any] = {
        "state": "finished" if result is not None else "failed" if message is not None else "unfinished",
        "message": message,
        "name": trial["name"],
        "task": trial["task"]["name"],
        "method": trial["method"],
        "seed": trial["training"]["seed"],
        "kind": trial["kind"],
        "model": trial["model"],
        # Such a run chose a setting on held-out training examples; its score is not reported.
        "selects": trial["purpose"] == "select",
        "learning_rate": trial["training"].get("learning_rate"),
        **dict.fromkeys(_OF_RESULT),
        **dict.fromkeys(("curve", "evaluations", "ended")),
        "trial": trial,
        "result": result,
    }
    if result is None:
        return row
    check(where("result"), result, RESULT, remedy)
    return row | {
        **{key: result.get(key) for key in _COPIED},
        **{f"{key}_parameters": float(result["parameters"][key]) for key in ("initial", "average", "head")},
        "training_seconds": math.fsum(result["epoch_seconds"]),
        "epoch_seconds": _epoch_seconds(trial["training"], result),
    }


_COPIED = (
    *("metric", "score", "steps", "planned_steps", "stopped_early", "average_rank", "effective_rank"),
    *("git_revision", "platform", "device", "cpu_count", "threads"),
)
_OF_RESULT = (
    *_COPIED,
    *("initial_parameters", "average_parameters", "head_parameters", "training_seconds", "epoch_seconds"),
)
_COLUMNS = (
    *("name", "folder", "where", "state", "message", "task", "method", "seed", "kind", "model", "selects"),
    *("learning_rate", *_OF_RESULT, *_NESTED),
)
"""Columns of a frame. `folder` is the run's folder within the grid's, `where` says where it was read, for errors."""


def _epoch_seconds(training: Mapping[str, Any], result: Mapping[str, Any]) -> float | None:
    """Return the mean training time of a whole epoch, in seconds; None if no step was timed.

    The last epoch of a run with a given number of steps is seldom whole, so this is the time of all steps, scaled to
    the steps of an epoch.
    """
    times, steps = result["epoch_seconds"], result["steps"]
    if not times or not steps:
        return None
    batches = math.ceil(result["examples"]["train"] / training.get("batch_size", 1))
    return float(sum(times) / steps * math.ceil(batches / training.get("gradient_accumulation_steps", 1)))


def _named(where: str) -> Callable[[str], str]:
    return lambda name: f"{where}, {name}"


def _require_distinct(reported: pd.DataFrame) -> None:
    twice = reported[reported.duplicated(["task", "method", "seed"], keep=False)]
    if len(twice):
        first, second = rows_of(twice.sort_values(["task", "method", "seed"], kind="stable"))[:2]
        raise CheckpointError(
            f"{second.where} and {first.where}: both hold {first.task}, {first.method}, seed {first.seed}; "
            "move one of them away"
        )


def _frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=list(_COLUMNS))


def _to_json(value: object) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _from_json(text: object) -> Any:
    return json.loads(text) if isinstance(text, str) else None
