"""Runs as pandas frames, from the folders that `aroma lab run` leaves or the table that `aroma lab collect` makes.

A frame has one row for each run. Its plain columns are what tables group by and compute with; the columns `trial` and
`result` hold the whole records.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from aroma.errors import CheckpointError, bad_value
from aroma.files import write_bytes

from ..run.trial import RUNS, TrialFiles

TABLE = "runs.parquet"
"""Name of the table of runs, in the output folder of a grid."""

Run = Any
"""A row of a frame, as `itertuples` gives it."""

_PARTS = ("trial", "result", "curve", "evaluations")
"""Columns that the table of runs has as JSON."""
_OF_MATRICES = ("effective_ranks", "relative_updates")
"""Measures by matrix in a result, of which the table of runs keeps four digits."""
_NOT_KEPT = ("singular_values", "overlaps")
"""Long parts of a result that no table and no figure reads, and the table of runs leaves out."""
MACHINE = ("git_revision", "platform", "device", "cpu_count", "threads")
"""Keys of a result that describe the code and the machine of its run."""
_RANKS = ("average_rank", "effective_rank", "trained_rank")
_PARAMETERS = ("initial", "average", "head")
_COLUMNS = (
    *("name", "folder", "where", "state", "message", "task", "method", "seed", "kind", "model", "selects"),
    *("metric", "score", "steps", "planned_steps", "stopped_early", *_RANKS, *MACHINE),
    *(f"{key}_parameters" for key in _PARAMETERS),
    *_PARTS,
)
"""Columns of a frame. `folder` is the run's folder within the grid's, `where` says where it was read, for errors."""


@dataclass(frozen=True)
class Runs:
    """All runs of a grid, finished or not, by name; and its `selection.json` and `grid.yaml`, empty if missing."""

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

    @property
    def chose_by(self) -> str:
        """What the best run of a selection has most or least of: `"score"` or `"loss"`."""
        return str((self.grid.get("select") or {}).get("by", "score"))

    def in_state(self, state: str) -> pd.DataFrame:
        """Return the runs of both purposes that are `finished`, `failed` or `unfinished`, by name."""
        return _frame(row for row in self.rows if row["state"] == state)

    @cached_property
    def methods(self) -> list[str]:
        """Labels of the methods, in the grid's order, then those that only runs name."""
        return list(dict.fromkeys([*(self.grid.get("methods") or ()), *(row["method"] for row in self.rows)]))

    @cached_property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the same order."""
        return list(dict.fromkeys([*(self.grid.get("tasks") or ()), *(row["task"] for row in self.rows)]))

    @cached_property
    def seeds(self) -> list[int]:
        """Seeds that every cell of a table should have: the grid's, and those of all reported runs."""
        return sorted({*(self.grid.get("seeds") or ()), *(row["seed"] for row in self.rows if not row["selects"])})

    def of(self, method: str | None = None, task: str | None = None) -> pd.DataFrame:
        """Return the reported runs of a method and a task, by seed; None: of any."""
        frame = self.reported.sort_values("seed", kind="stable")
        return frame[((frame.method == method) | (method is None)) & ((frame.task == task) | (task is None))]

    def finished_methods(self, kind: str | None = None) -> list[str]:
        """Return the labels of the methods, of a kind if given, that have a reported run, in order."""
        present = set(self.reported.method[(self.reported.kind == kind) | (kind is None)])
        return [method for method in self.methods if method in present]


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
    if TrialFiles(path).trial.is_file():
        return Runs(path, [_read_folder(path, path)], {}, {})
    folder = path.parent if path.is_file() else path
    table = path if path.is_file() else folder / TABLE
    if path.is_dir() and (found := {file.parent for file in (folder / RUNS).glob("**/trial.json")}):
        rows = [_read_folder(place, folder) for place in found]
    elif table.is_file():
        rows = _read_table(table)
    else:
        remedy = f"no runs there, and no {TABLE}; give the output folder of `aroma lab run` or `aroma train`"
        raise bad_value("folder", str(source), remedy)
    rows.sort(key=lambda row: str(row["name"]))
    of_grid = [folder / name for name in ("selection.json", "grid.yaml")]
    runs = Runs(path, rows, *(_read(file) if file.exists() else {} for file in of_grid))
    twice = runs.reported[runs.reported.duplicated(["task", "method", "seed"], keep=False)]
    if len(twice):
        one = rows_of(twice)[0]
        same = f"both hold {one.task}, {one.method}, seed {one.seed}; move one of them away"
        raise CheckpointError(f"{' and '.join(twice['where'][:2])}: {same}")
    return runs


def has_fixed_rank(trial: Mapping[str, Any]) -> bool:
    """Whether a trial is one of plain LoRA; older runs with a start computed from data are another method."""
    return bool(trial["kind"] == "lora" and trial["options"].get("init", "kaiming") == "kaiming")


def collect_runs(runs: Runs, path: str | os.PathLike[str]) -> None:
    """Write all runs into one Parquet file, from which every table and figure comes out the same.

    Settings, versions, metrics, ranks, curves and evaluations are kept; events, losses and adapters are not. Measures
    of single matrices, which are most of what a run says, have four digits.
    """
    frame = _frame(runs.rows).drop(columns="where")
    for part in _PARTS:
        frame[part] = [
            None if value is None else json.dumps(_short(value), ensure_ascii=False) for value in frame[part]
        ]
    write_bytes(path, frame.to_parquet(index=False, compression="zstd", compression_level=19))


def _short(part: Any) -> Any:
    measured = {key: part[key] for key in _OF_MATRICES if key in part} if isinstance(part, dict) else {}
    digits = {key: {name: float(f"{one:.4g}") for name, one in values.items()} for key, values in measured.items()}
    return {**part, **digits} if digits else part


def rows_of(frame: pd.DataFrame) -> list[Run]:
    """Return the rows of a frame, whose attributes are its columns."""
    return list(frame.itertuples(index=False))


@contextmanager
def _whole(where: object, remedy: str = "restore it, or run the trial or the grid again") -> Iterator[None]:
    """Name the file that cannot be understood."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{where}: missing, truncated or edited ({said:.120}); {remedy}") from error


def _read(path: Path) -> Any:
    """Return the content of a JSON or YAML file."""
    with _whole(path):
        content = path.read_text(encoding="utf-8")
        return yaml.safe_load(content) if path.suffix == ".yaml" else json.loads(content)


def _read_folder(folder: Path, root: Path) -> dict[str, Any]:
    """Read a run folder; one with a result is a finished run, whatever failed there before."""
    files = TrialFiles(folder)
    parts, message = {"trial": _read(files.trial)}, None
    with _whole(folder):
        if files.result.exists():
            parts["result"] = {key: value for key, value in _read(files.result).items() if key not in _NOT_KEPT}
            parts["curve"] = _read(files.curve) if files.curve.exists() else None
            parts["evaluations"] = _read(files.history)["evaluations"] if files.history.exists() else None
        elif files.failure.exists():
            failure = _read(files.failure)
            message = " ".join(f"{failure['error']}: {failure['message']}".split())
        return _row(parts, message, folder.relative_to(root).as_posix(), str(folder))


def _read_table(path: Path) -> list[dict[str, Any]]:
    rows = []
    with _whole(path, "restore it, or make it again from the run folders with `aroma lab collect`"):
        for record in pd.read_parquet(path)[["folder", "message", *_PARTS]].to_dict("records"):
            parts = {key: json.loads(record[key]) if isinstance(record[key], str) else None for key in _PARTS}
            message = record["message"] if isinstance(record["message"], str) else None
            rows.append(_row(parts, message, record["folder"], f"{path}, {record['folder']}"))
    return rows


def _row(parts: Mapping[str, Any], message: str | None, folder: str, where: str) -> dict[str, Any]:
    trial, result = parts["trial"], parts.get("result")
    row = {
        **dict.fromkeys(_COLUMNS),
        **parts,
        "folder": folder,
        "where": where,
        "state": "finished" if result is not None else "failed" if message is not None else "unfinished",
        "message": message,
        **{key: trial[key] for key in ("name", "method", "kind", "model")},
        "task": trial["task"]["name"],
        "seed": int(trial["training"]["seed"]),
        # Such a run chose a setting on held-out training examples; its score is not reported.
        "selects": trial["purpose"] == "select",
    }
    if result is not None:
        row |= {key: result[key] for key in ("metric", "stopped_early", *MACHINE)}
        row |= {key: result.get(key) for key in _RANKS}
        row |= {"score": float(result["score"])} | {key: int(result[key]) for key in ("steps", "planned_steps")}
        row |= {f"{key}_parameters": float(result["parameters"][key]) for key in _PARAMETERS}
    return row


def _frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=list(_COLUMNS))
