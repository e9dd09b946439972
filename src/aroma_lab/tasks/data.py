"""From the description of a task or of a recipe's data to checked examples, as `datasets.Dataset`.

A data set of examples has the columns `text`, `pair` (if the task has pairs of texts) and `labels`: class indices
(`ClassLabel`, which names the classes), or float64 numbers for a regression.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from aroma.errors import DataError, bad_value

from ..specs import DataSpec
from .articles import BBC_NEWS, TOPICS, Article, load_articles, split_articles
from .glue import GLUE, HUB, GlueTask, glue_key
from .metrics import METRICS, resolve_metric
from .sources import FORMATS, Columns, hub_splits, read_file, read_hub
from .spec import HELD_OUT, Layout, TaskSpec
from .task import Task

if TYPE_CHECKING:
    from datasets import Dataset

_ENDINGS = ("", *FORMATS, "-00000-of-00001.parquet")
"""Endings of the name of a split's file; the last one is that of a copy of the hub."""


class TaskData(NamedTuple):
    """A task, the metric that is its score, and its examples by split: `train`, those held out, those reported."""

    task: Task
    metric: str
    parts: dict[str, Dataset]


# The data of a recipe ------------------------------------------------------------------------------------------------


def load_splits(spec: DataSpec) -> TaskData:
    """Read, check and number all examples of a recipe; DataError if they cannot be used.

    Labels are compared as texts, and numbered in sorted order (numbers by value). The splits are `train`, `validation`
    (given, or drawn from the training examples) and, if the recipe names it, `test`.
    """
    layout = Layout(spec.text, spec.text_pair, spec.label)
    raw: dict[str, Columns] = {}
    for split, source in recipe_sources(spec).items():
        if spec.name is None:
            _, raw[split] = read_file(f"data.{split}", source, [layout.columns()])
        else:
            _, raw[split] = read_hub(f"data.{split}", source, spec.name, spec.config, [layout.columns()])
    names = None
    if spec.task == "classification":
        names = class_names("data.train", spec.label, raw["train"][spec.label])
    splits = {split: make_examples(f"data.{split}", layout, columns, names) for split, columns in raw.items()}
    if "validation" not in splits:
        drawn = split_examples(splits["train"], spec.validation_fraction, spec.split_seed, "data.validation_fraction")
        splits |= dict(zip(("train", "validation"), drawn, strict=True))
    task = Task.of(spec.task, names, layout, spec.max_length)
    order = [split for split in ("train", "validation", "test") if split in splits]
    return TaskData(task, METRICS[spec.task][0], {split: splits[split] for split in order})


def recipe_sources(spec: DataSpec) -> dict[str, str]:
    """Return the file, or the split on the hub, of every split of a recipe; DataError if training's is used twice."""
    sources = {"train": spec.train, "validation": spec.validation, "test": spec.test}
    if spec.name is not None:
        sources["train"] = spec.train or "train"
        if spec.validation is None and "validation" in hub_splits(spec.name, spec.config):
            sources["validation"] = "validation"
    for split in ("validation", "test"):
        if sources[split] is not None and sources[split] == sources["train"]:
            remedy = "these are the training examples; give others, or leave it out"
            raise bad_value(f"data.{split}", sources[split], remedy, DataError)
    return {split: source for split, source in sources.items() if source is not None}


# The data of an experiment's task ------------------------------------------------------------------------------------


def load_task(spec: TaskSpec, *, reported: bool = True) -> TaskData:
    """Read, check, number and split the examples of a task; AromaError if they cannot be used.

    The held-out examples are drawn from the training data. Classes of GLUE are numbered as on the hub; those of other
    tasks in sorted order (numbers by value).

    Args:
        reported: Whether the reported splits are read; if not, none of their files is opened.
    """
    glue = GLUE.get(glue_key(spec.name))
    kind = spec.kind or ("regression" if glue is not None and glue.label_names is None else "classification")
    layout, source = _layout(spec, glue), find_source(spec, glue)
    columns = source.read("train", source.train, layout)
    names = None
    if kind == "classification":
        names = glue.label_names if glue else class_names(spec.field("train"), layout.label, columns[layout.label])
    metric = resolve_metric(spec, kind, glue.metric if glue else None, names)

    def checked(key: str, columns: Columns) -> Dataset:
        if glue is not None:
            columns = {**columns, layout.label: _words(columns[layout.label], names or ())}
        return make_examples(spec.field(key), layout, columns, names)

    everything = checked("train", columns)
    train, held_out = split_examples(everything, spec.held_out, spec.split_seed, spec.field("held_out"))
    if (wanted := spec.train_examples) is not None:
        if wanted > len(train):
            remedy = f"{len(train)} are left beside the held-out ones; give at most so many, or null"
            raise spec.bad("train_examples", wanted, remedy, DataError)
        train = train.select(sorted(random.Random(spec.split_seed).sample(range(len(train)), wanted)))
    parts = {"train": train, HELD_OUT: held_out}
    for label, split in reported_splits(spec, source).items() if reported else ():
        key = f"reported.{label}"
        parts[label] = checked(key, source.read(key, split, layout))
        if _rows(parts[label]) <= _rows(everything):
            remedy = "every example of it is a training example too; report examples that are not trained on"
            raise spec.bad(key, split, remedy, DataError)
    return TaskData(Task.of(kind, names, layout, spec.max_length), metric, parts)


def _layout(spec: TaskSpec, glue: GlueTask | None) -> Layout:
    known = glue.layout if glue else Layout("text", None, "label")
    layout = Layout(spec.text or known.text, spec.text_pair or known.text_pair, spec.label or known.label)
    if layout.label in (layout.text, layout.text_pair):
        raise spec.bad("label", layout.label, "the label and a text cannot be the same column")
    return layout


def _rows(examples: Dataset) -> set[tuple[Any, ...]]:
    return set(zip(*(examples[name] for name in examples.column_names), strict=True))


def _words(labels: list[Any], names: Sequence[str]) -> list[Any]:
    """Return GLUE's labels, which may be words or their numbers, as words; −1 marks a hidden label."""
    words = {str(number): name for number, name in enumerate(names)}
    return [None if label in (None, -1, "-1") else words.get(str(label), label) for label in labels]


# Where the examples of a task are; `key` is the task's key that names a split, for errors ----------------------------


@dataclass(frozen=True)
class Source:
    """Files of a folder, or (`folder` is None) a data set of the hub."""

    spec: TaskSpec
    folder: Path | None
    name: str = ""
    config: str | None = None
    reported: dict[str, str] | None = None
    """The splits that are reported unless the task says so, by label."""

    @property
    def train(self) -> str:
        """The split that is trained on."""
        return self.spec.train or "train"

    def has(self, split: str) -> bool:
        """Return whether there is a split of this name."""
        if self.folder is None:
            return split in hub_splits(self.name, self.config, self.spec.field("source"))
        return any((self.folder / f"{split}{ending}").is_file() for ending in _ENDINGS)

    def locate(self, key: str, split: str) -> str:
        """Return the file of a split, which may also be a file name; on the hub the split itself."""
        if self.folder is None:
            return split
        for ending in _ENDINGS:
            if (file := self.folder / f"{split}{ending}").is_file():
                return str(file.resolve())
        there = ", ".join(sorted(path.name for path in self.folder.iterdir() if path.suffix in FORMATS))
        remedy = f"{self.folder} has no such file, with or without {', '.join(FORMATS)}; it holds {there or 'no data'}"
        raise self.spec.bad(key, split, remedy, DataError)

    def read(self, key: str, split: str, layout: Layout) -> Columns:
        """Return the columns of a split."""
        where, choices = self.spec.field(key), [layout.columns()]
        if self.folder is None:
            return read_hub(where, split, self.name, self.config, choices)[1]
        return read_file(where, self.locate(key, split), choices)[1]


class Articles(Source):
    """The BBC News articles that come with pip; a split may be of a topic, as `train/tech`."""

    def has(self, split: str) -> bool:
        """Return whether there is a split of this name."""
        name, _, topic = split.partition("/")
        return name in ("train", "test") and topic in ("", *TOPICS)

    def articles(self, key: str, split: str) -> list[Article]:
        """Return the articles of a split; DataError if there is none of this name."""
        if not self.has(split):
            remedy = f"{BBC_NEWS} has no such split; it has train and test, and of a topic such as train/{TOPICS[-1]}"
            raise self.spec.bad(key, split, remedy, DataError)
        name, _, topic = split.partition("/")
        train, test = split_articles(load_articles())
        return [one for one in (train if name == "train" else test) if topic in ("", one.topic)]

    def read(self, key: str, split: str, layout: Layout) -> Columns:
        """Return text and topic of the articles of a split."""
        articles = self.articles(key, split)
        return {"text": [one.text for one in articles], "label": [one.topic for one in articles]}


def find_source(spec: TaskSpec, glue: GlueTask | None) -> Source:
    """Return where the examples of a task are; `glue` is what is known of it if it is GLUE's."""
    reported = dict(glue.reported) if glue else None
    if spec.source is None and spec.train is not None and Path(spec.train).suffix.lower() in FORMATS:
        return Source(spec, Path(), reported=reported)
    if spec.source is None and glue is None:
        remedy = f"{spec.name!r} is no GLUE task (they are {', '.join(GLUE)}); give a folder of data files, a hub name"
        raise spec.bad("source", None, f"{remedy}, or the file names as train and reported")
    source = spec.source or HUB
    if Path(source).is_dir():
        return Source(spec, Path(source), reported=reported)
    if source == BBC_NEWS:
        return Articles(spec, None)
    # A hub name is NAME or OWNER/NAME.
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise spec.bad("source", source, "no such folder; give a folder of data files, or a hub name", DataError)
    config = spec.config or (glue_key(spec.name) if source == HUB else None)
    return Source(spec, None, source, config, reported)


def reported_splits(spec: TaskSpec, source: Source) -> dict[str, str]:
    """Return the splits that are reported, by label: the task's, GLUE's, or the test or validation split."""
    splits = spec.reported or source.reported
    if splits is None:
        splits = next(({split: split} for split in ("test", "validation") if source.has(split)), None)
    if splits is None:
        remedy = "there is no split test or validation; name one, as {test: test.jsonl}"
        raise spec.bad("reported", None, remedy, DataError)
    return splits


# Checked examples ----------------------------------------------------------------------------------------------------


def make_examples(field: str, layout: Layout, columns: Columns, label_names: Sequence[str] | None) -> Dataset:
    """Return checked examples; see `checked_values`."""
    from datasets import ClassLabel, Dataset, Features, Value

    values = checked_values(field, layout, columns, label_names)
    features = {name: Value("string") for name in values if name != "labels"}
    features["labels"] = Value("float64") if label_names is None else ClassLabel(names=list(label_names))
    return Dataset.from_dict(values, features=Features(features))


def checked_values(
    field: str, layout: Layout, columns: Columns, label_names: Sequence[str] | None
) -> dict[str, list[Any]]:
    """Return the columns of examples as lists.

    Args:
        field: The recipe's key of the split, for errors.
        layout: Which columns mean what.
        label_names: Names of the classes by index; None for a regression.

    Raises:
        DataError: A missing text or label, a label that is none of `label_names`, or an invalid number.
    """
    for column in layout.columns():
        if missing := [row for row, value in enumerate(columns[column], start=1) if value is None]:
            where = f"{field} (column {column!r}, row {', '.join(map(str, missing[:5]))})"
            remedy = "a text is missing; fill it in or leave the row out"
            if column == layout.label:
                remedy = "a label is missing (a test set with hidden labels cannot be used); fill it in"
            raise bad_value(where, None, remedy, DataError)
    texts = {"text": layout.text} | ({} if layout.text_pair is None else {"pair": layout.text_pair})
    values: dict[str, list[Any]] = {name: [str(text) for text in columns[column]] for name, column in texts.items()}
    where, labels = f"{field} (column {layout.label!r})", columns[layout.label]
    values["labels"] = _numbers(where, labels) if label_names is None else _class_indices(where, labels, label_names)
    return values


def named_labels(labels: Sequence[Any], names: Sequence[str] | None) -> list[Any]:
    """Return labels as names, where all of them are indices of names, as a Trainer is given them."""
    texts = {str(label) for label in labels}
    indices = {str(index): name for index, name in enumerate(names or ())}
    if names is None or texts <= {*names} or not texts <= {*indices}:
        return [*labels]
    return [indices[str(label)] for label in labels]


def class_names(field: str, column: str, labels: Sequence[Any]) -> tuple[str, ...]:
    """Return the names of two or more classes, sorted (whole numbers by value); missing labels are ignored."""
    names = {str(label) for label in labels if label is not None}
    if len(names) < 2:
        remedy = "all training examples have the same label; give examples of two classes or more"
        raise bad_value(f"{field} (column {column!r})", ", ".join(names), remedy, DataError)
    are_numbers = all(re.fullmatch(r"-?\d+", name) for name in names)
    return tuple(sorted(names, key=int if are_numbers else str))


def _numbers(where: str, values: Sequence[Any]) -> list[float]:
    numbers = []
    for value in values:
        try:
            numbers.append(float(value))
        except (TypeError, ValueError):
            numbers.append(math.nan)
        if not math.isfinite(numbers[-1]):
            raise bad_value(where, value, f"row {len(numbers)}: a regression needs finite numbers; mend it", DataError)
    return numbers


def _class_indices(where: str, values: Sequence[Any], label_names: Sequence[str]) -> list[int]:
    index = {name: number for number, name in enumerate(label_names)}
    if unseen := sorted({str(label) for label in values} - set(index)):
        remedy = f"labels that the training examples lack; they have {', '.join(label_names)}. Mend the labels"
        raise bad_value(where, ", ".join(unseen), remedy, DataError)
    return [index[str(label)] for label in values]


def split_examples(examples: Dataset, fraction: float, seed: int, field: str) -> tuple[Dataset, Dataset]:
    """Split examples in two, each class in proportion; the same seed gives the same split.

    Args:
        fraction: Share of the second part, in (0, 1).
        field: The key of the fraction, for errors.

    Raises:
        DataError: There are too few examples, or only one of a class.
    """
    from sklearn.model_selection import train_test_split

    classes = list(examples["labels"]) if hasattr(examples.features["labels"], "names") else None
    try:
        parts = train_test_split(range(len(examples)), test_size=fraction, random_state=seed, stratify=classes)
    except ValueError as error:
        reason = f"{len(examples)} training examples cannot be split so ({error}); give another share"
        raise bad_value(field, fraction, reason, DataError) from error
    kept, held_out = (examples.select(sorted(part)) for part in parts)
    return kept, held_out
