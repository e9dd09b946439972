"""From the description of a task or of a recipe's data to checked examples, as `datasets.Dataset`.

A data set of examples has the columns `text`, `pair` (if the task has pairs of texts) and `labels`: class indices
(`ClassLabel`, which names the classes), or float64 numbers for a regression.
"""

from __future__ import annotations

import difflib
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aroma.errors import AromaError, DataError, bad_value

from ..specs import DataSpec
from .articles import BBC_NEWS, TOPICS, Article, columns_of, load_articles, split_articles
from .glue import GLUE, HUB, GlueTask, glue_key, glue_task
from .metrics import resolve_metric
from .sources import FORMATS, Columns, hub_splits, read_file, read_hub
from .spec import Layout, TaskSpec

if TYPE_CHECKING:
    from datasets import Dataset


# The data of a recipe ------------------------------------------------------------------------------------------------


def load_splits(spec: DataSpec) -> dict[str, Dataset]:
    """Read, check and number all examples of a recipe.

    Labels are compared as texts, and numbered in sorted order (numbers by value).

    Returns:
        `train`, `validation` (given, or drawn from the training examples) and, if the recipe names it, `test`.

    Raises:
        DataError: A missing file or column, no rows, an empty text or label, a single class, labels that training
            lacks, an invalid number, or too few examples for a validation split.
    """
    layout = Layout(spec.text, spec.text_pair, spec.label)
    raw: dict[str, Columns] = {}
    for split, source in recipe_sources(spec).items():
        where, choices = f"data.{split}", [layout.columns()]
        if spec.name is None:
            _, raw[split] = read_file(where, source, choices)
        else:
            _, raw[split] = read_hub(where, source, spec.name, spec.config, choices)
    names = None
    if spec.task == "classification":
        names = class_names("data.train", spec.label, raw["train"][spec.label])
    splits = {split: make_examples(f"data.{split}", layout, columns, names) for split, columns in raw.items()}
    if "validation" not in splits:
        train, validation = split_examples(splits["train"], spec.validation_fraction, spec.split_seed)
        splits = {
            "train": train,
            "validation": validation,
            **{name: splits[name] for name in splits if name == "test"},
        }
    return splits


def recipe_sources(spec: DataSpec) -> dict[str, str]:
    """Return the file, or the split on the hub, of every split of a recipe that has one.

    Raises:
        DataError: Examples that are trained on are to validate, or to be reported.
    """
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
        reported: Whether the reported splits are read; if not, none of their files is opened.

    Raises:
        ConfigError: An unknown task or metric, or values that contradict each other.
        DataError: A missing file, split or column, no rows, a text or label that is missing or unknown, too few
            examples, or reported examples that are trained on.
    """
    glue = glue_task(spec.name)
    kind = spec.kind or "classification"
    if glue is not None:
        kind = "regression" if glue.label_names is None else "classification"
        if spec.kind not in (None, kind):
            raise spec.bad("kind", spec.kind, f"GLUE's {glue.folder} is a {kind}; leave it out")
    source = find_source(spec, glue)
    shown = {f"reported.{label}": split for label, split in reported_splits(spec, source).items()}
    seen: dict[str, str] = {}
    for key, split in {"train": source.train, **shown}.items():
        other = seen.setdefault(source.locate(key, split), key)
        if other != key:
            raise spec.bad(key, split, f"{spec.field(other)} is the same; give another split or file", DataError)

    layout, columns = source.read("train", source.train)
    names = None
    if kind == "classification":
        labels = columns[layout.label]
        names = glue.label_names if glue else class_names(spec.field("train"), layout.label, labels)
    metric = resolve_metric(spec, kind, glue.metric if glue else None, names)

    def checked(key: str, layout: Layout, columns: Columns) -> Dataset:
        if glue and names is not None:
            columns = {**columns, layout.label: _glue_words(spec, key, layout.label, columns[layout.label], names)}
        return make_examples(spec.field(key), layout, columns, names, glue.between if glue else None)

    everything = checked("train", layout, columns)
    parts = {}
    for key, split in shown.items() if reported else ():
        parts[key.removeprefix("reported.")] = part = checked(key, *source.read(key, split))
        if _rows(part) <= _rows(everything):
            remedy = "every example of it is a training example too; report examples that are not trained on"
            raise spec.bad(key, split, remedy, DataError)
    train, held_out = split_examples(
        everything, spec.held_out, spec.split_seed, spec.field("held_out"), "give another share"
    )
    if (wanted := spec.train_examples) is not None:
        if wanted > len(train):
            remedy = f"{len(train)} are left beside the held-out ones; give at most so many, or null"
            raise spec.bad("train_examples", wanted, remedy, DataError)
        train = train.select(sorted(random.Random(spec.split_seed).sample(range(len(train)), wanted)))
    return TaskData(train, held_out, parts, names, kind, metric, layout)


def _rows(examples: Dataset) -> set[tuple[Any, ...]]:
    return set(zip(*(examples[name] for name in examples.column_names), strict=True))


def _glue_words(spec: TaskSpec, key: str, column: str, labels: list[Any], names: tuple[str, ...]) -> list[str | None]:
    """Return GLUE's labels, which may be words or numbers, as words; −1 marks a hidden label, which is missing."""
    words: dict[str, str | None] = {name: name for name in names}
    words |= {str(number): name for number, name in enumerate(names)} | {"-1": None}
    unknown = sorted({str(label) for label in labels if label is not None} - set(words))
    if unknown:
        remedy = (
            f"{spec.name} knows only {', '.join(names)}, or their numbers; mend the labels, or name another column"
        )
        raise spec.bad(f"{key} (column {column!r})", ", ".join(unknown[:10]), remedy, DataError)
    return [None if label is None else words[str(label)] for label in labels]


# Where the examples of a task are; `key` is the task's key that names a split, for errors ----------------------------


@dataclass(frozen=True)
class Source:
    """Files of a folder, or (`folder` is None) a data set of the hub."""

    spec: TaskSpec
    glue: GlueTask | None
    folder: Path | None
    name: str = ""
    config: str | None = None

    @property
    def train(self) -> str:
        """The split that is trained on."""
        return self.spec.train or "train"

    @cached_property
    def layouts(self) -> list[Layout]:
        """The possible names of the columns; names that the task gives hold in each."""
        given = {key: name for key in ("text", "text_pair", "label") if (name := getattr(self.spec, key)) is not None}
        known = self.glue.layouts if self.glue else (Layout("text", None, "label"),)
        layouts = list(dict.fromkeys(replace(layout, **given) for layout in known))
        for layout in layouts:
            if layout.label in (layout.text, layout.text_pair):
                raise self.spec.bad("label", layout.label, "the label and a text cannot be the same column")
        return layouts

    def has(self, split: str) -> bool:
        """Return whether there is a split of this name."""
        if self.folder is None:
            return split in hub_splits(self.name, self.config, self.spec.field("source"))
        return _has_split(self.folder, split)

    def locate(self, key: str, split: str) -> str:
        """Return the file of a split, which may also be a file name; on the hub the split.

        Raises:
            DataError: No such file, with what was looked for; or several, in different formats.
        """
        folder = self.folder
        if folder is None:
            return split
        names = [split] if Path(split).suffix.lower() in FORMATS else [split, *_file_names(split)]
        found = [name for name in names if (folder / name).is_file()]
        if not found and self.glue and split in self.glue.originals:
            names.append(self.glue.originals[split])
            found = [name for name in names[-1:] if (folder / name).is_file()]
        if len(found) > 1:
            remedy = f"{folder} has {', '.join(found)}; name the file that is meant"
            raise self.spec.bad(key, split, remedy, DataError)
        if not found:
            existing = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in FORMATS))
            remedy = f"no such file in {folder}; looked for {', '.join(names)}; it holds {existing or 'no data'}"
            raise self.spec.bad(key, split, remedy, DataError)
        return str((folder / found[0]).resolve())

    def read(self, key: str, split: str) -> tuple[Layout, Columns]:
        """Return the columns of a split, and what they mean."""
        choices, where = [layout.columns() for layout in self.layouts], self.spec.field(key)
        if self.folder is None:
            choice, columns = read_hub(where, split, self.name, self.config, choices, self.spec.field("source"))
        else:
            # Damaged reported examples are an error, never left out.
            skip = key == "train" and self.glue is not None and self.glue.damaged_lines
            choice, columns = read_file(where, self.locate(key, split), choices, skip_damaged=skip)
        return self.layouts[choice], columns


class Articles(Source):
    """The BBC News articles that come with pip; a split may be of a topic, as `train/tech`."""

    def has(self, split: str) -> bool:
        """Return whether there is a split of this name."""
        name, _, topic = split.partition("/")
        return name in ("train", "test") and topic in ("", *TOPICS)

    def locate(self, key: str, split: str) -> str:
        """Return the split.

        Raises:
            DataError: There is none of this name.
        """
        if not self.has(split):
            remedy = f"{BBC_NEWS} has no such split; it has train and test, and of a topic such as train/{TOPICS[-1]}"
            raise self.spec.bad(key, split, remedy, DataError)
        return split

    def articles(self, key: str, split: str) -> list[Article]:
        """Return the articles of a split.

        Raises:
            DataError: There is no such split.
        """
        name, _, topic = self.locate(key, split).partition("/")
        train, test = split_articles(load_articles())
        return [one for one in (train if name == "train" else test) if topic in ("", one.topic)]

    def read(self, key: str, split: str) -> tuple[Layout, Columns]:
        """Return text and topic of the articles of a split."""
        return Layout("text", None, "label"), columns_of(self.articles(key, split))


def find_source(spec: TaskSpec, glue: GlueTask | None) -> Source:
    """Return where the examples of a task are; `glue` is what is known of it if it is GLUE's.

    Raises:
        ConfigError: Nothing says where.
        DataError: There is no such folder.
    """
    key = glue_key(spec.name)
    if spec.source is None:
        if spec.train is not None and Path(spec.train).suffix.lower() in FORMATS:
            return Source(spec, glue, Path())
        if glue is None:
            nearest = difflib.get_close_matches(key, list(GLUE), n=1, cutoff=0.0)[0]
            remedy = (
                f"{spec.name!r} is no GLUE task (they are {', '.join(GLUE)}; the nearest is {nearest!r}); give a "
                "folder of data files or a hub name, or the file names as train and reported"
            )
            raise spec.bad("source", None, remedy)
        return Source(spec, glue, None, HUB, spec.config or key)
    folder = Path(spec.source)
    if spec.source == BBC_NEWS and not folder.is_dir():
        return Articles(spec, glue, None)
    if folder.is_dir():
        inner = [folder / name for name in (glue.folder, key) if (folder / name).is_dir()] if glue else []
        return Source(spec, glue, inner[0] if inner and not _has_split(folder, "train") else folder)
    # A hub name is NAME or OWNER/NAME.
    if folder.is_file() or spec.source.startswith((".", "/", "~")) or spec.source.count("/") > 1:
        raise spec.bad("source", spec.source, "no such folder; give a folder of data files, or a hub name", DataError)
    return Source(spec, glue, None, spec.source, spec.config or (key if glue and spec.source == HUB else None))


def reported_splits(spec: TaskSpec, source: Source) -> dict[str, str]:
    """Return the splits that are reported, by label: the task's, GLUE's, or the test or validation split.

    Raises:
        DataError: There are none.
    """
    splits = spec.reported or (dict(source.glue.reported) if source.glue else None)
    if splits is None:
        splits = next(({split: split} for split in ("test", "validation") if source.has(split)), None)
    if splits is None:
        remedy = "there is no split test or validation; name one, as {test: test.jsonl}"
        raise spec.bad("reported", None, remedy, DataError)
    return splits


def _has_split(folder: Path, split: str) -> bool:
    return any((folder / name).is_file() for name in _file_names(split))


def _file_names(split: str) -> list[str]:
    """Return the file names that a split can have, the hub's Parquet among them; GLUE says dev for validation."""
    stems = dict.fromkeys((split, split.replace("validation", "dev")))
    return [f"{stem}{ending}" for stem in stems for ending in (*FORMATS, "-00000-of-00001.parquet")]


# Checked examples ----------------------------------------------------------------------------------------------------


def make_examples(
    field: str,
    layout: Layout,
    columns: Columns,
    label_names: Sequence[str] | None,
    between: tuple[float, float] | None = None,
) -> Dataset:
    """Return checked examples.

    Args:
        field: The recipe's key of the split, for errors.
        layout: Which columns mean what.
        label_names: Names of the classes by index; None for a regression.
        between: The smallest and the largest possible number of a regression; None: any.

    Raises:
        DataError: A missing text or label, a label that is none of `label_names`, or an invalid number.
    """
    from datasets import ClassLabel, Dataset, Features, Value

    values = checked_values(field, layout, columns, label_names, between)
    features = {name: Value("string") for name in values if name != "labels"}
    features["labels"] = Value("float64") if label_names is None else ClassLabel(names=list(label_names))
    return Dataset.from_dict(values, features=Features(features))


def checked_values(
    field: str,
    layout: Layout,
    columns: Columns,
    label_names: Sequence[str] | None,
    between: tuple[float, float] | None = None,
) -> dict[str, list[Any]]:
    """Return the columns of `make_examples` as lists; see there."""
    texts = {"text": layout.text} | ({} if layout.text_pair is None else {"pair": layout.text_pair})
    values: dict[str, list[Any]] = {}
    for name, column in texts.items():
        _require_none_missing(field, column, columns[column], "a text is missing")
        values[name] = [str(text) for text in columns[column]]
    labels = columns[layout.label]
    if label_names is None:
        values["labels"] = _numbers(field, layout.label, labels, between)
    else:
        values["labels"] = _class_indices(field, layout.label, labels, label_names)
    return values


def named_labels(labels: Sequence[Any], names: Sequence[str] | None) -> list[Any]:
    """Return labels as names, where all of them are indices of names, as a Trainer is given them."""
    texts = {str(label) for label in labels}
    indices = {str(index): name for index, name in enumerate(names or ())}
    if names is None or texts <= {*names} or not texts <= {*indices}:
        return [*labels]
    return [indices[str(label)] for label in labels]


def class_names(field: str, column: str, labels: Sequence[Any]) -> tuple[str, ...]:
    """Return the names of all classes, sorted (whole numbers by value); missing labels are ignored.

    Raises:
        DataError: There is a single class.
    """
    names = {str(label) for label in labels if label is not None}
    if len(names) < 2:
        remedy = "all training examples have the same label; give examples of two classes or more"
        raise bad_value(f"{field} (column {column!r})", ", ".join(names), remedy, DataError)
    return tuple(sorted(names, key=_sort_key(names)))


def _numbers(field: str, column: str, values: Sequence[Any], between: tuple[float, float] | None) -> list[float]:
    low, high = between or (-math.inf, math.inf)
    numbers = []
    for row, value in enumerate(values, start=1):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not (math.isfinite(number) and low <= number <= high):
            span = "" if between is None else f" in [{low}, {high}] (another one stands for a hidden label)"
            raise _at_rows(field, column, value, [row], f"a regression needs finite numbers{span}; mend it")
        numbers.append(number)
    return numbers


def _class_indices(field: str, column: str, values: Sequence[Any], label_names: Sequence[str]) -> list[int]:
    _require_none_missing(field, column, values, "a label is missing (a test set with hidden labels cannot be used)")
    index = {name: number for number, name in enumerate(label_names)}
    unseen = {str(label) for label in values} - set(index)
    if unseen:
        listed = ", ".join(sorted(unseen, key=_sort_key([*label_names, *unseen])))
        remedy = f"labels that the training examples lack; they have {', '.join(label_names)}. Mend the labels"
        if _are_numbers(label_names) and not _are_numbers(unseen):
            remedy += ", or train a model that has their names: from_pretrained(..., id2label=..., label2id=...)"
        raise bad_value(f"{field} (column {column!r})", listed, remedy, DataError)
    return [index[str(label)] for label in values]


def _sort_key(names: Collection[str]) -> Callable[[str], Any]:
    """Sort by value if all names are whole numbers, else as texts."""
    return int if _are_numbers(names) else str


def _are_numbers(names: Collection[str]) -> bool:
    return all(re.fullmatch(r"-?\d+", name) for name in names)


def _require_none_missing(field: str, column: str, values: Sequence[Any], what: str) -> None:
    missing = [row for row, value in enumerate(values, start=1) if value is None]
    if missing:
        raise _at_rows(field, column, None, missing, f"{what}; fill it in or leave the row out")


def _at_rows(field: str, column: str, value: Any, rows: list[int], remedy: str) -> AromaError:
    shown = ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")
    return bad_value(f"{field} (column {column!r}, row {shown})", value, remedy, DataError)


# Splits --------------------------------------------------------------------------------------------------------------


def names_of(examples: Dataset) -> tuple[str, ...] | None:
    """Return the names of the classes of examples by index; None for a regression."""
    names = getattr(examples.features["labels"], "names", None)
    return None if names is None else tuple(names)


def split_examples(
    examples: Dataset,
    fraction: float,
    seed: int,
    field: str = "data.validation_fraction",
    remedy: str = "give data.validation, or another fraction",
) -> tuple[Dataset, Dataset]:
    """Split examples in two, each class in proportion; the same seed gives the same split.

    Args:
        examples: The examples; the parts keep their order.
        fraction: Share of the second part, in (0, 1).
        seed: Seed of the draw.
        field: The recipe's key of the fraction, for errors.
        remedy: What to do instead, for errors.

    Raises:
        DataError: A class has a single example, or there are too few examples.
    """
    from numpy.random import RandomState

    names = names_of(examples)
    counts = Counter(examples["labels"])
    single = [name for index, name in enumerate(names or ()) if counts[index] == 1]
    if single:
        reason = f"{', '.join(map(repr, single))} has one training example and cannot be in both parts; {remedy}"
        raise bad_value(field, fraction, reason, DataError)
    rows = examples.select_columns("labels").add_column("row", list(range(len(examples))))
    try:
        parts = rows.train_test_split(
            test_size=fraction,
            stratify_by_column=None if names is None else "labels",
            # With the generator of `seed=` other examples would be held out than by scikit-learn, as in earlier runs.
            generator=RandomState(seed),
        )
    except ValueError as error:
        reason = f"{len(examples)} training examples cannot be split so ({error}); {remedy}"
        raise bad_value(field, fraction, reason, DataError) from error
    return examples.select(sorted(parts["train"]["row"])), examples.select(sorted(parts["test"]["row"]))
