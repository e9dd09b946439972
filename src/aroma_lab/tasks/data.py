"""From the description of a task to its examples by split: read, checked, and some of training's held out."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from aroma.errors import DataError, bad_value

from ..specs import HELD_OUT, TaskSpec
from .articles import BBC_NEWS, TOPICS, load_articles, split_articles
from .metrics import resolve_metric
from .sources import FORMATS, Located, Made, Row, fitting_columns, hub_splits, of_each, read_hub, read_located
from .task import GLUE, HUB, GlueTask, Layout, Task, glue_key

if TYPE_CHECKING:
    from datasets import Dataset

_ENDINGS = ("", *FORMATS, "-00000-of-00001.parquet")
"""Endings of the name of a split's file; the last one is that of a copy of the hub."""


# Where the examples are ----------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Files of a folder, or else a data set of the hub, or the BBC News articles that come with pip."""

    folder: Path | None
    name: str = ""
    config: str | None = None

    def has(self, split: str) -> bool:
        """Return whether there is a split of this name; of the articles it may be of a topic, as `train/tech`."""
        if self.folder is not None:
            return _file_of(self.folder, split) is not None
        if self.name == BBC_NEWS:
            name, _, topic = split.partition("/")
            return name in ("train", "test") and topic in ("", *TOPICS)
        return split in hub_splits(self.name, self.config)

    def read(self, key: str, split: str) -> list[Located]:
        """Return the rows of a split, or of a file, or of several joined by `+`; `key` is the task's, for errors.

        Raises:
            DataError: They cannot be read.
        """
        field = f"data.{key}"
        if self.folder is not None:
            names = [split] if self.has(split) else split.split("+")
            return [row for name in names for row in _read_split(self.folder, field, name)]
        if self.name == BBC_NEWS:
            if not self.has(split):
                remedy = f"{BBC_NEWS} has no such split; it has train and test, and of a topic such as train/tech"
                raise bad_value(field, split, remedy, DataError)
            name, _, topic = split.partition("/")
            train, test = split_articles(load_articles())
            chosen = [one for one in (train if name == "train" else test) if topic in ("", one.topic)]
            return [(f"{field} ({one.name})", {"text": one.text, "label": one.topic}) for one in chosen]
        rows = read_hub(field, split, self.name, self.config)
        return [(f"{field} ({self.name}, row {number})", row) for number, row in enumerate(rows, start=1)]


def _file_of(folder: Path, split: str) -> Path | None:
    files = (folder / f"{split}{ending}" for ending in _ENDINGS)
    return next((file for file in files if file.is_file()), None)


def _read_split(folder: Path, field: str, split: str) -> list[Located]:
    if (file := _file_of(folder, split)) is not None:
        return read_located(field, str(file))
    there = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in FORMATS))
    remedy = f"no such file in {folder}, with or without {', '.join(FORMATS)}; it holds {there or 'no data'}"
    raise bad_value(field, split, remedy, DataError)


def glue_of(spec: TaskSpec) -> GlueTask | None:
    """Return the layout of a task of GLUE; None for other tasks, and where files are named one by one."""
    named = spec.source is None and Path(spec.train or "").suffix
    return None if named else GLUE.get(glue_key(spec.name))


def source_of(spec: TaskSpec) -> Source:
    """Return where the examples of a task are; DataError or ConfigError if nothing says it."""
    glue = glue_of(spec)
    if spec.source is None and glue is None:
        if spec.train is None:
            remedy = f"{spec.name!r} is no GLUE task (they are {', '.join(GLUE)}); give a folder of data files, a hub"
            raise bad_value("data.source", None, f"{remedy} name, or the file names as train and reported")
        return Source(Path())
    source = spec.source or HUB
    if Path(source).is_dir():
        return Source(Path(source))
    # A hub name is NAME or OWNER/NAME.
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        remedy = "no such folder; give a folder of data files, or a hub name"
        raise bad_value("data.source", source, remedy, DataError)
    return Source(None, source, spec.config or (glue_key(spec.name) if source == HUB else None))


def read_splits(spec: TaskSpec, make: Callable[[list[Located]], Made], reported: bool = True) -> dict[str, Made]:
    """Return the training set, the held-out set if the task names one, and the reported sets.

    Args:
        make: What is made of the rows of each split; one DataError names the problems of all splits.
        reported: Whether the reported splits are read; if not, none of their files is opened.
    """
    source, glue, splits = source_of(spec), glue_of(spec), spec.reported
    named = [("train", "train", spec.train or "train")]
    if spec.validation is not None:
        named.append((HELD_OUT, "validation", spec.validation))
    if reported and splits is None:
        splits = dict(glue.reported) if glue else None
        splits = splits or next(({split: split} for split in ("test", "validation") if source.has(split)), None)
        if splits is None:
            remedy = "there is no split test or validation; name one, as {test: test.jsonl}, or none, as {}"
            raise bad_value("data.reported", None, remedy, DataError)
    if reported:
        named += [(label, f"reported.{label}", split) for label, split in (splits or {}).items()]

    return dict(of_each(named, lambda one: (one[0], make(source.read(*one[1:])))))


# Splitting -----------------------------------------------------------------------------------------------------------


def held_apart(
    spec: TaskSpec, parts: dict[str, list[Any]], classes: Sequence[Any] | None = None
) -> dict[str, list[Any]]:
    """Return examples by split: `train`, held out, and reported; the same ones for the same `split_seed`.

    Args:
        parts: Examples as `read_splits` names them; without held-out ones, a share of training's is held out.
        classes: Class of each training example, for a share that has each in proportion.

    Raises:
        DataError: There are too few, or a split holds nothing but training examples.
    """
    from sklearn.model_selection import train_test_split

    everything = parts["train"]
    known = {repr(one) for one in everything}
    for split, part in parts.items():
        if split != "train" and all(repr(one) in known for one in part):
            key = "validation" if split == HELD_OUT else f"reported.{split}"
            remedy = "every example of it is a training example too; give some that are not trained on"
            raise bad_value(f"data.{key}", getattr(spec, key, (spec.reported or {}).get(split)), remedy, DataError)
    train, held_out = everything, parts.get(HELD_OUT)
    if held_out is None:
        try:
            chosen = train_test_split(
                range(len(train)), test_size=spec.held_out, random_state=spec.split_seed, stratify=classes
            )
        except ValueError as error:
            reason = f"{len(train)} training examples cannot be split that way ({error}); give another share"
            raise bad_value("data.held_out", spec.held_out, reason, DataError) from error
        train, held_out = ([everything[index] for index in sorted(some)] for some in chosen)
    drawn = {"train": _draw(spec, "train_examples", train), HELD_OUT: _draw(spec, "held_out_examples", held_out)}
    return {**drawn, **{split: part for split, part in parts.items() if split not in drawn}}


def _draw(spec: TaskSpec, key: str, examples: list[Any]) -> list[Any]:
    wanted = getattr(spec, key)
    if wanted is None:
        return examples
    if wanted > len(examples):
        raise bad_value(f"data.{key}", wanted, f"{len(examples)} are left; give at most so many, or null", DataError)
    return [examples[index] for index in sorted(random.Random(spec.split_seed).sample(range(len(examples)), wanted))]


# Classification and regression ---------------------------------------------------------------------------------------


class TaskData(NamedTuple):
    """A task, the metric that is its score, and its examples by split, with the columns of `checked_examples`."""

    task: Task
    metric: str
    parts: dict[str, Dataset]


def load_task(spec: TaskSpec, *, reported: bool = True) -> TaskData:
    """Read, check, number and split the examples of a classification or regression.

    Classes of GLUE are numbered as on the hub; those of other tasks in sorted order (numbers by value).

    Args:
        reported: Whether the reported splits are read.

    Raises:
        AromaError: They cannot be used.
    """
    from datasets import Dataset

    glue = glue_of(spec)
    kind: Any = spec.kind or ("regression" if glue is not None and glue.label_names is None else "classification")
    layout = layout_of(spec)
    rows = read_splits(spec, partial(with_columns, layout=layout), reported)
    names = None
    if kind == "classification":
        names = glue.label_names if glue else class_names(layout.label or "", (row for _, row in rows["train"]))
    metric = resolve_metric(spec, kind, glue.metric if glue else None, names)
    task = Task(kind, names, *layout, spec.max_length)
    examples = dict(of_each(rows.items(), lambda one: (one[0], checked_examples(one[1], task))))
    classes = None if names is None else [one["labels"] for one in examples["train"]]
    parts = held_apart(spec, examples, classes)
    return TaskData(task, metric, {split: Dataset.from_list(part) for split, part in parts.items()})


def layout_of(spec: TaskSpec) -> Layout:
    """Return the columns of a classification or regression."""
    glue = glue_of(spec)
    known = glue.layout if glue else Layout("text", None, "label")
    return Layout(spec.text or known.text, spec.text_pair or known.text_pair, spec.label or known.label)


def with_columns(rows: list[Located], layout: Layout) -> list[Located]:
    """Return the rows; DataError if a column is missing."""
    fitting_columns(rows, [layout])
    return rows


def checked_examples(rows: Sequence[Located], task: Task) -> list[Row]:
    """Return `text`, `pair` (if the task has pairs) and `labels` (if it has labels) of every row.

    A label becomes a class's index, or a number. It may be the name of a class or, where no name is a number, its
    index, as a Trainer is given them.

    Raises:
        DataError: A missing text or label, a label that is none of the task's, or an invalid number.
    """
    names = task.label_names or ()
    index = {str(number): number for number in range(len(names))} if not any(map(_is_whole, names)) else {}
    index |= {name: number for number, name in enumerate(names)}
    columns = {key: name for key, name in zip(("text", "pair", "labels"), task.layout, strict=True) if name}

    def example_of(located: Located) -> Row:
        where, row = located
        example = {key: row.get(name) for key, name in columns.items()}
        if missing := next((columns[key] for key, value in example.items() if value is None), None):
            remedy = f"nothing is in column {missing!r}; fill it in, or leave the row out"
            raise bad_value(where, None, remedy, DataError)
        texts = {key: str(text) for key, text in example.items() if key != "labels"}
        if task.label is None:
            return texts
        label = example["labels"]
        labels = _number(where, label) if task.label_names is None else index.get(str(label))
        if labels is None:
            remedy = f"no training example has this label; they have {', '.join(names)}. Mend the label"
            raise bad_value(where, label, remedy, DataError)
        return {**texts, "labels": labels}

    return of_each(rows, example_of)


def class_names(column: str, rows: Iterable[Row]) -> tuple[str, ...]:
    """Return the names of two or more classes, sorted (whole numbers by value); missing labels are ignored."""
    names = {str(row[column]) for row in rows if row.get(column) is not None}
    if len(names) < 2:
        remedy = "all training examples have the same label; give examples of two classes or more"
        raise bad_value(f"data.train (column {column!r})", ", ".join(names), remedy, DataError)
    return tuple(sorted(names, key=int if all(map(_is_whole, names)) else str))


def _is_whole(name: str) -> bool:
    return re.fullmatch(r"-?\d+", name) is not None


def _number(where: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise bad_value(where, value, "a regression needs finite numbers; mend it", DataError)
    return number
