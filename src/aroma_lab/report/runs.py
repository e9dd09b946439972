"""Runs as pandas frames, from the folders that `aroma lab run` leaves or the table that `aroma lab collect` makes.

A frame has one row for each run. Its plain columns are what tables group by and compute with; the columns `trial` and
`result` hold the whole records. Files that a hand may have edited are checked as they are read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from aroma.errors import CheckpointError, bad_value
from aroma.files import write_bytes

from ..run.files import RUNS, TrialFiles

TABLE = "runs.parquet"
"""Name of the table of runs, in the output folder of a grid."""

Run = Any
"""A row of a frame, as `itertuples` gives it; its attributes are `_COLUMNS`."""

_OF_RUN = "restore the file, or remove the run's folder and run it again"
_OF_GRID = "restore the file, or remove it and run the grid again, which writes it anew"
_OF_TABLE = "restore the file, or make it again from the run folders with `aroma lab collect`"

_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "a mapping": Mapping,
    "a list": list,
    "a text": str,
    "a number": (int, float),
    "a whole number": int,
    "anything": object,
}
_SCHEMAS: Mapping[str, Any] = {
    "trial": {
        **dict.fromkeys(("name", "model", "method", "kind", "purpose"), "a text"),
        "task": {"name": "a text"},
        "training": {"seed": "a whole number"},
        "options": "a mapping",
    },
    "result": {
        "metric": "a text",
        "score": "a number",
        "examples": {"train": "a whole number", ...: "a whole number"},
        "parameters": dict.fromkeys(("initial", "average", "head"), "a number"),
        "versions": "a mapping",
        **dict.fromkeys(("steps", "planned_steps"), "a whole number"),
        "pooler?": {"trains": "anything", "reason": "a text"},
        "epoch_seconds": ["a number"],
        "asked_examples?": "a whole number",
        **dict.fromkeys(("stopped_early", "git_revision", "platform", "device", "cpu_count", "threads"), "anything"),
    },
    "failure": dict.fromkeys(("error", "message"), "anything"),
    "curve": dict.fromkeys(("parameters", "total_rank", "ranks"), "anything"),
    "history": {"evaluations": "a list"},
    "event": {
        **{"kind": "a text", "step": "a whole number", "outer_step": "a whole number", "rank": "a whole number"},
        "module?": "a text",
    },
    "grid": {"methods?": {...: "anything"}, "tasks?": {...: "anything"}, "seeds?": ["a whole number"]},
    "selection": {...: {...: {"chosen?": "a mapping", "tried?": [("a mapping", "anything")]}}},
}
"""What a file must have, by its name, and of which type where tables compute with it or group by it; see `check`."""

_NESTED = {
    "trial": _SCHEMAS["trial"],
    "result?": _SCHEMAS["result"],
    "curve?": _SCHEMAS["curve"],
    "evaluations?": "a list",
    "ended?": [("a whole number", "a text")],
}
"""Columns of the table of runs that are JSON, and what they must have."""
_PARTS = tuple(key.removesuffix("?") for key in _NESTED)
_OF_MATRICES = ("effective_ranks", "relative_updates")
"""Measures by matrix in a result, of which the table of runs keeps four digits."""
_ONLY_OF_REPORTED = ("curve", "evaluations", "ended", "inner_checks", "states", "explanation", *_OF_MATRICES)
"""What the table of runs keeps of reported runs alone."""
_NOT_KEPT = ("singular_values", "overlaps")
"""Long parts of a result that no table and no figure reads, and the table of runs leaves out."""
_COPIED = (
    *("metric", "score", "steps", "planned_steps", "stopped_early", "average_rank", "effective_rank", "trained_rank"),
    *("git_revision", "platform", "device", "cpu_count", "threads"),
)
_PARAMETERS = ("initial", "average", "head")
_COLUMNS = (
    *("name", "folder", "where", "state", "message", "task", "method", "seed", "kind", "model", "selects"),
    *_COPIED,
    *(f"{key}_parameters" for key in _PARAMETERS),
    *("training_seconds", "epoch_seconds", *_PARTS),
)
"""Columns of a frame. `folder` is the run's folder within the grid's, `where` says where it was read, for errors;
`ended` has outer step and module of every inner loop that ended with an outer check."""


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
        """What the best run of a selection has most or least of: `"score"` or `"loss"`; see `grid.Selection`."""
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
        frame = self.reported
        if method is not None:
            frame = frame[frame.method == method]
        if task is not None:
            frame = frame[frame.task == task]
        return frame.sort_values("seed", kind="stable")

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
    folder = path.parent if path.is_file() else path
    if TrialFiles(path).trial.is_file():
        return Runs(path, [_read_folder(path, path)], {}, {})
    found = {
        file.parent for name in ("trial", "result", "failure") for file in (folder / RUNS).glob(f"**/{name}.json")
    }
    if found and not path.is_file():
        rows = [_read_folder(place, folder) for place in found]
    elif path.is_file() or (folder / TABLE).is_file():
        rows = _read_table(path if path.is_file() else folder / TABLE)
    else:
        remedy = f"no runs there, and no {TABLE}; give the output folder of `aroma lab run` or `aroma train`"
        raise bad_value("folder", str(source), remedy)
    rows.sort(key=lambda row: str(row["name"]))
    selection, grid = (
        _read(file, _OF_GRID) if file.exists() else {} for file in (folder / "selection.json", folder / "grid.yaml")
    )
    runs = Runs(path, rows, selection, grid)
    keys = ["task", "method", "seed"]
    twice = runs.reported[runs.reported.duplicated(keys, keep=False)].sort_values(keys, kind="stable")
    if len(twice):
        first, second = rows_of(twice)[:2]
        same = f"both hold {first.task}, {first.method}, seed {first.seed}"
        raise CheckpointError(f"{second.where} and {first.where}: {same}; move one of them away")
    return runs


def has_fixed_rank(trial: Mapping[str, Any]) -> bool:
    """Whether a trial is one of plain LoRA: from a start that data gives it is another method."""
    return bool(trial["kind"] == "lora" and trial["options"].get("init", "kaiming") == "kaiming")


def join_runs(parts: Sequence[Runs]) -> Runs:
    """Join parts of one grid that were run apart; of runs of one name that of the later part is taken."""
    rows: dict[str, Mapping[str, Any]] = {}
    selection: dict[str, dict[str, Any]] = {}
    for part in parts:
        rows |= {str(row["name"]): row for row in part.rows}
        for task, chosen in part.selection.items():
            selection[task] = selection.get(task, {}) | chosen
    joined = [rows[name] for name in sorted(rows)]
    return Runs(parts[-1].source, joined, selection, parts[-1].grid)


def collect_runs(runs: Runs, path: str | os.PathLike[str]) -> None:
    """Write all runs into one Parquet file, from which every table and figure but the cosines comes out the same.

    Settings, versions, metrics, ranks, curves, evaluations and inner checks are kept; events, losses and adapters are
    not. Of runs that chose a setting no table or figure shows more than that and what they were made with. Measures of
    single matrices, which are most of what a run says, have four digits.
    """
    frame = _frame(runs.rows).drop(columns="where")
    for part in _PARTS:
        values = zip(frame[part], frame.selects, strict=True)
        frame[part] = [_as_json(part, one, selects) for one, selects in values]
    # Statistics would repeat the least and the greatest text of every column, a dictionary what is compressed anyway,
    # and the schema says the types once more.
    table = frame.to_parquet(
        index=False,
        compression="zstd",
        compression_level=19,
        write_statistics=False,
        use_dictionary=False,
        store_schema=False,
    )
    write_bytes(path, table)


def _as_json(part: str, value: Any, selects: bool) -> str | None:
    if value is None or (selects and part in _ONLY_OF_REPORTED):
        return None
    if part == "result":
        kept = {key: one for key, one in value.items() if not (selects and key in _ONLY_OF_REPORTED)}
        value = kept | {key: _four_digits(kept[key]) for key in _OF_MATRICES if key in kept}
    return json.dumps(value, ensure_ascii=False)


def _four_digits(measures: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{measure:.4g}") for name, measure in measures.items()}


def rows_of(frame: pd.DataFrame) -> list[Run]:
    """Return the rows of a frame, whose attributes are its columns."""
    return list(frame.itertuples(index=False))


def option_of(trial: Mapping[str, Any], name: str) -> Any:
    """Return an option of AROMA of a trial, its default if it was not given."""
    from aroma.tuner.config import AromaConfig  # here alone, since it loads PyTorch

    return trial["options"].get(name, getattr(AromaConfig, name))


def check(where: object, value: Any, schema: Any, remedy: str = _OF_RUN) -> None:
    """Raise unless `value`, read at `where`, is what `schema` says.

    A schema is the name of a type; or a list with the schema of each item; or a tuple with those of the items of a
    list of that length; or a mapping with the schema of each key. Keys that end in `?` may be missing or null, and
    `...` stands for all keys, which must be texts.

    Raises:
        CheckpointError: It is not.
    """

    def edited(what: str) -> CheckpointError:
        return CheckpointError(f"{where}: edited, or of another version: {what}; {remedy}")

    kind = "a mapping" if isinstance(schema, dict) else "a list" if isinstance(schema, list | tuple) else schema
    types: Any = _TYPES[kind]
    # A truth value is a whole number to Python.
    if not isinstance(value, types) or (isinstance(value, bool) and kind != "anything"):
        raise edited(f"{value!r:.60} is not {kind}")
    if isinstance(schema, tuple) and len(schema) != len(value):
        raise edited(f"{value!r:.60} has not {len(schema)} items")
    if isinstance(schema, list | tuple):
        for item, of_item in zip(value, schema * len(value) if isinstance(schema, list) else schema, strict=True):
            check(where, item, of_item, remedy)
    if isinstance(schema, dict):
        missing = [key for key in schema if key is not ... and not key.endswith("?") and key not in value]
        if missing:
            raise edited(f"{', '.join(missing)} missing")
        if ... in schema and not all(isinstance(name, str) for name in value):
            raise edited(f"{list(value)!r:.60} are not all texts")
        for name, item in value.items():
            of_key = schema.get(name, schema.get(f"{name}?" if item is not None else None, schema.get(...)))
            if of_key is not None:
                check(f"{where}, {name}", item, of_key, remedy)


def _read(path: Path, remedy: str = _OF_RUN) -> Any:
    """Return the content of a JSON or YAML file, which has the schema of its name."""
    try:
        content = path.read_text(encoding="utf-8")
        value = yaml.safe_load(content) if path.suffix == ".yaml" else json.loads(content)
    except (OSError, ValueError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(f"{path}: missing, truncated or edited ({said}); {remedy}") from error
    check(path, value, _SCHEMAS[path.stem], remedy)
    return value


def _read_folder(folder: Path, root: Path) -> dict[str, Any]:
    """Read a run folder; one with a result is a finished run, whatever failed there before."""
    files = TrialFiles(folder)
    parts, message = {"trial": _read(files.trial)}, None
    if files.result.exists():
        result = _read(files.result)
        parts["result"] = {key: value for key, value in result.items() if key not in _NOT_KEPT}
        # Figures need these two, tables do not.
        parts["curve"] = _read(files.curve) if files.curve.exists() else None
        parts["evaluations"] = _read(files.history)["evaluations"] if files.history.exists() else None
        parts["ended"] = _read_ended(files.events)
    elif files.failure.exists():
        failure = _read(files.failure)
        message = " ".join(f"{failure['error']}: {failure['message']}".split())
    return _row(parts, message, folder.relative_to(root).as_posix(), str(folder))


def read_events(path: Path, is_finished: bool = True) -> list[dict[str, Any]]:
    """Return the events of a run, as `events.jsonl` has them.

    Args:
        is_finished: Whether the run has ended; one that was killed may have left half a line.

    Raises:
        CheckpointError: The file is truncated or edited.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        events = [json.loads(line) for line in lines if is_finished or line.endswith("\n")]
    except ValueError as error:
        raise CheckpointError(f"{path}: truncated or edited ({error}); {_OF_RUN}") from error
    for number, event in enumerate(events, 1):
        check(f"{path}, line {number}", event, _SCHEMAS["event"])
    return [{"module": None, **event} for event in events]


def _read_ended(path: Path) -> list[tuple[int, str]]:
    events = read_events(path) if path.exists() else []
    return [(event["outer_step"], event["module"]) for event in events if event["kind"] in ("merged", "frozen")]


def _read_table(path: Path) -> list[dict[str, Any]]:
    rows = []
    try:
        for record in pd.read_parquet(path)[["folder", "message", *_PARTS]].to_dict("records"):
            parts = {key: json.loads(record[key]) if isinstance(record[key], str) else None for key in _PARTS}
            message = record["message"] if isinstance(record["message"], str) else None
            check(where := f"{path}, {record['folder']}", parts, _NESTED, _OF_TABLE)
            rows.append(_row(parts, message, record["folder"], where))
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(f"{path}: truncated, edited, or no table of runs ({said:.120}); {_OF_TABLE}") from error
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
        "seed": trial["training"]["seed"],
        # Such a run chose a setting on held-out training examples; its score is not reported.
        "selects": trial["purpose"] == "select",
    }
    if result is not None:
        row |= {key: result.get(key) for key in _COPIED}
        row |= {f"{key}_parameters": float(result["parameters"][key]) for key in _PARAMETERS}
        row["training_seconds"] = math.fsum(result["epoch_seconds"])
        row["epoch_seconds"] = _epoch_seconds(trial["training"], result)
    return row


def _epoch_seconds(training: Mapping[str, Any], result: Mapping[str, Any]) -> float | None:
    """Return the mean training time of a whole epoch, in seconds; None if no step was timed.

    The last epoch of a run with a given number of steps is seldom whole, so this is the time of all steps, scaled to
    the steps of an epoch.
    """
    times, steps = result["epoch_seconds"], result["steps"]
    if not times or not steps:
        return None
    trained = result["examples"]["train"] - result.get("asked_examples", 0)
    batches = math.ceil(trained / training.get("batch_size", 1))
    return float(sum(times) / steps * math.ceil(batches / training.get("gradient_accumulation_steps", 1)))


def _frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=list(_COLUMNS))
