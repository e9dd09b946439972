"""From a task's description to its examples, read from local files or from the hub."""

from __future__ import annotations

import difflib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aroma.errors import AromaError, DataError

from .data import Layout, class_names, make_examples, split_examples
from .glue import GLUE, HUB, GlueTask, glue_key, glue_task
from .metrics import resolve_metric
from .sources import FORMATS, Columns, hub_splits, read_file, read_hub
from .spec import TaskSpec

if TYPE_CHECKING:
    from datasets import Dataset

_SHARD = "-00000-of-00001.parquet"
"""Ending of the hub's files of one split."""


@dataclass(frozen=True)
class TaskData:
    """The examples of a task.

    Args:
        train: Training examples.
        held_out: Examples of the training data that are not trained on; models are selected by them.
        reported: Reported examples by label; empty if they were not asked for.
        label_names: Names of the classes by index; None for a regression.
        kind: `"classification"` or `"regression"`.
        metric: Name of the metric that is the score.
        layout: Which columns of the training examples mean what.
    """

    train: Dataset
    held_out: Dataset
    reported: dict[str, Dataset]
    label_names: tuple[str, ...] | None
    kind: str
    metric: str
    layout: Layout = field(compare=False)


def load_task(spec: TaskSpec, *, reported: bool = True) -> TaskData:
    """Read, check, number and split the examples of a task.

    The held-out examples are drawn from the training data. Classes of GLUE are numbered as on the hub; those of other
    tasks in sorted order (numbers by value).

    Args:
        spec: The task.
        reported: Whether the reported splits are read; if not, none of their files is opened.

    Raises:
        ConfigError: An unknown task or metric, or values that contradict each other.
        DataError: A missing file, split or column, no rows, a text or label that is missing or unknown, too few
            examples, or reported examples that are trained on.
    """
    glue = glue_task(spec.name)
    kind = _kind(spec, glue)
    source = _find_source(spec, glue)
    train_split, reported_splits = spec.train or "train", _reported(spec, glue, source)
    _require_distinct(spec, source, {"train": train_split, **reported_splits})

    layout, columns = source.read("train", train_split)
    names = None
    if kind == "classification":
        field = spec.field("train")
        names = glue.label_names if glue else class_names(field, layout.label, columns[layout.label])
    metric = resolve_metric(spec, kind, glue.metric if glue else None, names)
    everything = _examples(spec, "train", layout, columns, glue, names)
    shown = {}
    for key, split in reported_splits.items() if reported else ():
        examples = _examples(spec, key, *source.read(key, split), glue, names)
        _refuse_trained_on(spec, key, split, examples, everything)
        shown[key.removeprefix("reported.")] = examples
    train, held_out = split_examples(
        everything, spec.held_out, spec.split_seed, spec.field("held_out"), "give another share"
    )
    return TaskData(_draw(spec, train), held_out, shown, names, kind, metric, layout)


def _kind(spec: TaskSpec, glue: GlueTask | None) -> str:
    if glue is None:
        return spec.kind or "classification"
    kind = "regression" if glue.label_names is None else "classification"
    if spec.kind not in (None, kind):
        raise spec.bad(
            "kind", spec.kind, f"GLUE's {glue.folder} is a {kind}; leave it out, or give the task another name"
        )
    return kind


def _reported(spec: TaskSpec, glue: GlueTask | None, source: _Files | _Hub) -> dict[str, str]:
    """Return the reported splits by the task's key."""
    splits = spec.reported or (glue.reported if glue else None)
    if splits is None:
        existing = [split for split in ("test", "validation") if source.has(split)]
        if not existing:
            raise spec.bad(
                "reported",
                None,
                "there is no split test or validation; name one, as {test: test.jsonl}: training examples are never "
                "reported",
                DataError,
            )
        splits = {existing[0]: existing[0]}
    return {f"reported.{label}": split for label, split in splits.items()}


def _require_distinct(spec: TaskSpec, source: _Files | _Hub, splits: dict[str, str]) -> None:
    seen: dict[str, str] = {}
    for key, split in splits.items():
        identity = source.identity(key, split)
        if identity in seen:
            other = spec.field(seen[identity])
            raise spec.bad(key, split, f"{other} is the same; give another split or file", DataError)
        seen[identity] = key


def _examples(
    spec: TaskSpec, key: str, layout: Layout, columns: Columns, glue: GlueTask | None, names: tuple[str, ...] | None
) -> Dataset:
    if glue and names is not None:
        columns = {**columns, layout.label: _as_words(spec, key, layout.label, columns[layout.label], names)}
    return make_examples(spec.field(key), layout, columns, names, glue.between if glue else None)


def _as_words(spec: TaskSpec, key: str, column: str, labels: list[Any], names: tuple[str, ...]) -> list[str | None]:
    """Return GLUE's labels, which may be words or numbers, as words; −1 marks a hidden label, which is missing."""
    words: dict[str, str | None] = {name: name for name in names}
    words |= {str(number): name for number, name in enumerate(names)}
    words["-1"] = None
    unknown = sorted({str(label) for label in labels if label is not None} - set(words))
    if unknown:
        numbers = ", ".join(map(str, range(len(names))))
        remedy = f"{spec.name} knows only {', '.join(names)} (or {numbers}); mend the labels, or name another column"
        raise spec.bad(f"{key} (column {column!r})", ", ".join(unknown[:10]), remedy, DataError)
    return [None if label is None else words[str(label)] for label in labels]


def _refuse_trained_on(spec: TaskSpec, key: str, split: str, examples: Dataset, train: Dataset) -> None:
    """Refuse a reported split that is a part of the training examples under another name."""
    if _rows(examples) <= _rows(train):
        remedy = "every example of it is a training example too; report examples that are not trained on"
        raise spec.bad(key, split, remedy, DataError)


def _rows(examples: Dataset) -> set[tuple[Any, ...]]:
    return set(zip(*(examples[name] for name in examples.column_names), strict=True))


def _draw(spec: TaskSpec, train: Dataset) -> Dataset:
    """Return `train_examples` of the examples, in their order."""
    wanted = spec.train_examples
    if wanted is None:
        return train
    if wanted > len(train):
        remedy = f"{len(train)} are left beside the held-out ones; give at most so many, or null"
        raise spec.bad("train_examples", wanted, remedy, DataError)
    return train.select(sorted(random.Random(spec.split_seed).sample(range(len(train)), wanted)))


# Where the examples are: files or the hub; `key` is the task's key that names a split, for errors --------------------


def _find_source(spec: TaskSpec, glue: GlueTask | None) -> _Files | _Hub:
    layouts = _layouts(spec, glue)
    if spec.source is None and spec.train is not None and Path(spec.train).suffix.lower() in FORMATS:
        return _Files(spec, glue, layouts, Path())
    if spec.source is None:
        if glue is None:
            raise _unknown(spec)
        return _Hub(spec, layouts[0], HUB, spec.config or glue_key(spec.name))
    folder = Path(spec.source)
    if folder.is_dir():
        return _Files(spec, glue, layouts, _own_folder(folder, spec, glue))
    # A hub name is NAME or OWNER/NAME.
    if folder.is_file() or spec.source.startswith((".", "/", "~")) or spec.source.count("/") > 1:
        raise spec.bad("source", spec.source, "no such folder; give a folder of data files, or a hub name", DataError)
    config = spec.config or (glue_key(spec.name) if glue and spec.source == HUB else None)
    return _Hub(spec, layouts[0], spec.source, config)


def _layouts(spec: TaskSpec, glue: GlueTask | None) -> list[Layout]:
    """Return the possible names of the columns; names that the task gives hold in each."""
    given = {key: getattr(spec, key) for key in ("text", "text_pair", "label") if getattr(spec, key) is not None}
    known = glue.layouts if glue else (Layout("text", None, "label"),)
    layouts = list(dict.fromkeys(replace(layout, **given) for layout in known))
    for layout in layouts:
        if layout.label in (layout.text, layout.text_pair):
            raise spec.bad("label", layout.label, "the label and a text cannot be the same column")
    return layouts


def _own_folder(folder: Path, spec: TaskSpec, glue: GlueTask | None) -> Path:
    """Return the task's folder in a folder of all tasks, or `folder` itself."""
    if glue is None or _has_split(folder, "train"):
        return folder
    inner = [folder / name for name in (glue.folder, glue_key(spec.name)) if (folder / name).is_dir()]
    return inner[0] if inner else folder


def _unknown(spec: TaskSpec) -> AromaError:
    nearest = difflib.get_close_matches(glue_key(spec.name), list(GLUE), n=1, cutoff=0.0)[0]
    return spec.bad(
        "source",
        None,
        f"{spec.name!r} is no GLUE task (they are {', '.join(GLUE)}; the nearest is {nearest!r}); give a folder of "
        "data files or a hub name, or the file names as train and reported",
    )


@dataclass(frozen=True)
class _Hub:
    spec: TaskSpec
    layout: Layout
    name: str
    config: str | None

    def has(self, split: str) -> bool:
        return split in hub_splits(self.name, self.config, self.spec.field("source"))

    def identity(self, key: str, split: str) -> str:
        """Return what tells the split from others, without reading it."""
        return split

    def read(self, key: str, split: str) -> tuple[Layout, Columns]:
        choices = [self.layout.columns()]
        field = self.spec.field
        return self.layout, read_hub(field(key), split, self.name, self.config, choices, field("source"))[1]


@dataclass(frozen=True)
class _Files:
    spec: TaskSpec
    glue: GlueTask | None
    layouts: list[Layout]
    folder: Path

    def has(self, split: str) -> bool:
        return _has_split(self.folder, split)

    def identity(self, key: str, split: str) -> str:
        return str(self._find(key, split).resolve())

    def read(self, key: str, split: str) -> tuple[Layout, Columns]:
        file = self._find(key, split)
        # Damaged reported examples are an error, never left out.
        skip = key == "train" and self.glue is not None and self.glue.damaged_lines
        choices = [layout.columns() for layout in self.layouts]
        choice, columns = read_file(self.spec.field(key), str(file), choices, skip_damaged=skip)
        return self.layouts[choice], columns

    def _find(self, key: str, split: str) -> Path:
        """Return the file of a split, which may also be a file name.

        Raises:
            DataError: No such file, with what was looked for; or several, in different formats.
        """
        if (self.folder / split).is_file():
            return self.folder / split
        originals: Mapping[str, str] = self.glue.originals if self.glue else {}
        names = [split] if Path(split).suffix.lower() in FORMATS else _file_names(split)
        found = [name for name in names if (self.folder / name).is_file()]
        if len(found) > 1:
            remedy = f"{self.folder} has {', '.join(found)}; name the file that is meant"
            raise self.spec.bad(key, split, remedy, DataError)
        if not found and split in originals:
            names = [*names, originals[split]]
            found = [name for name in names if (self.folder / name).is_file()]
        if not found:
            raise self._missing(key, split, names)
        return self.folder / found[0]

    def _missing(self, key: str, split: str, names: list[str]) -> AromaError:
        existing = sorted(path.name for path in self.folder.iterdir() if path.suffix in FORMATS)
        example = "train: FILE" if key == "train" else "reported: {LABEL: FILE}"
        return self.spec.bad(
            key,
            split,
            f"no such file in {self.folder}; looked for {', '.join(names)}; the folder holds "
            f"{', '.join(existing) or 'no data'}. Name a file with public labels, as {example}",
            DataError,
        )


def _has_split(folder: Path, split: str) -> bool:
    return any((folder / name).is_file() for name in _file_names(split))


def _file_names(split: str) -> list[str]:
    """Return the file names that a split can have: GLUE's originals say dev for validation."""
    stems = [split, split.replace("validation", "dev")] if "validation" in split else [split]
    return [f"{stem}{ending}" for stem in stems for ending in (*FORMATS, _SHARD)]
