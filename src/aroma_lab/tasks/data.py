"""Labelled examples, checked value by value, as `datasets.Dataset`.

A data set of examples has the columns `text`, `pair` (if the task has pairs of texts) and `labels`: class indices
(`ClassLabel`, which names the classes), or float64 numbers for a regression.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aroma.errors import AromaError, DataError, bad_value

from ..specs import DataSpec
from .sources import Columns, hub_splits, read_file, read_hub

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Layout:
    """Which columns mean what.

    Args:
        text: Column of the text.
        text_pair: Column of the second text; None: single texts.
        label: Column of the label or number.
    """

    text: str
    text_pair: str | None
    label: str

    def columns(self) -> list[str]:
        """Return the columns to read."""
        return [name for name in (self.text, self.text_pair, self.label) if name is not None]


# Whole data sets -----------------------------------------------------------------------------------------------------


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
    raw = _read_splits(spec, layout)
    names = None
    if spec.task == "classification":
        names = class_names("data.train", spec.label, raw["train"][spec.label])
    splits = {split: make_examples(f"data.{split}", layout, columns, names) for split, columns in raw.items()}
    if "validation" not in splits:
        splits["train"], splits["validation"] = split_examples(
            splits["train"], spec.validation_fraction, spec.split_seed
        )
    return {split: splits[split] for split in ("train", "validation", "test") if split in splits}


def _read_splits(spec: DataSpec, layout: Layout) -> dict[str, Columns]:
    sources = {"train": spec.train, "validation": spec.validation, "test": spec.test}
    choices = [layout.columns()]
    if spec.name is None:
        return {
            split: read_file(f"data.{split}", path, choices)[1] for split, path in sources.items() if path is not None
        }
    sources["train"] = spec.train or "train"
    if spec.validation is None and "validation" in hub_splits(spec.name, spec.config):
        sources["validation"] = "validation"
    return {
        split: read_hub(f"data.{split}", source, spec.name, spec.config, choices)[1]
        for split, source in sources.items()
        if source is not None
    }


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
        columns: The columns.
        label_names: Names of the classes by index; None for a regression.
        between: The smallest and the largest possible number of a regression; None: any.

    Raises:
        DataError: A missing text or label, a label that is none of `label_names`, or an invalid number.
    """
    from datasets import ClassLabel, Dataset, Features, Value

    texts = {"text": layout.text} | ({} if layout.text_pair is None else {"pair": layout.text_pair})
    values: dict[str, Any] = {name: _texts(field, column, columns[column]) for name, column in texts.items()}
    features = {name: Value("string") for name in texts}
    labels = columns[layout.label]
    if label_names is None:
        values["labels"], features["labels"] = _numbers(field, layout.label, labels, between), Value("float64")
    else:
        values["labels"] = _class_indices(field, layout.label, labels, label_names)
        features["labels"] = ClassLabel(names=list(label_names))
    return Dataset.from_dict(values, features=Features(features))


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
        raise bad_value(
            field,
            fraction,
            f"{', '.join(map(repr, single))} has one training example and cannot be in both parts; {remedy}, or more "
            "examples",
            DataError,
        )
    rows = examples.select_columns("labels").add_column("row", list(range(len(examples))))
    try:
        parts = rows.train_test_split(
            test_size=fraction,
            stratify_by_column=None if names is None else "labels",
            # With the generator of `seed=` other examples would be held out than by scikit-learn, as in earlier runs.
            generator=RandomState(seed),
        )
    except ValueError as error:
        raise bad_value(
            field, fraction, f"{len(examples)} training examples cannot be split so ({error}); {remedy}", DataError
        ) from error
    return examples.select(sorted(parts["train"]["row"])), examples.select(sorted(parts["test"]["row"]))


# Values --------------------------------------------------------------------------------------------------------------


def class_names(field: str, column: str, labels: Sequence[Any]) -> tuple[str, ...]:
    """Return the names of all classes, sorted (whole numbers by value).

    Args:
        field: The recipe's key of the training examples, for errors.
        column: Column of the labels, for errors.
        labels: The labels; missing ones are ignored.

    Raises:
        DataError: There is a single class.
    """
    names = {str(label) for label in labels if label is not None}
    if len(names) < 2:
        raise bad_value(
            f"{field} (column {column!r})",
            ", ".join(names),
            "all training examples have the same label, so there is nothing to tell apart; give examples of two "
            "classes or more",
            DataError,
        )
    return tuple(sorted(names, key=_sort_key(names)))


def _texts(field: str, column: str, values: Sequence[Any]) -> list[str]:
    empty = [row for row, value in enumerate(values, start=1) if value is None]
    if empty:
        raise _at_rows(field, column, None, empty, "a text is missing; fill it in or leave the row out")
    return [str(value) for value in values]


def _numbers(field: str, column: str, values: Sequence[Any], between: tuple[float, float] | None) -> list[float]:
    numbers = []
    for row, value in enumerate(values, start=1):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            remedy = "a regression needs finite numbers; mend it, or make the task a classification"
            raise _at_rows(field, column, value, [row], remedy)
        if between is not None and not between[0] <= number <= between[1]:
            remedy = f"the numbers lie in [{between[0]}, {between[1]}]; another one stands for a hidden label"
            raise _at_rows(field, column, value, [row], remedy)
        numbers.append(number)
    return numbers


def _class_indices(field: str, column: str, values: Sequence[Any], label_names: Sequence[str]) -> list[int]:
    missing = [row for row, label in enumerate(values, start=1) if label is None]
    if missing:
        remedy = "a label is missing; fill it in or leave the row out (a test set with hidden labels cannot be used)"
        raise _at_rows(field, column, None, missing, remedy)
    index = {name: number for number, name in enumerate(label_names)}
    unseen = sorted({str(label) for label in values} - set(index), key=_sort_key(label_names))
    if unseen:
        raise bad_value(
            f"{field} (column {column!r})",
            ", ".join(unseen),
            f"labels that the training examples lack; they have {', '.join(label_names)}. Mend the labels, or add "
            "training examples of them",
            DataError,
        )
    return [index[str(label)] for label in values]


def _sort_key(names: Collection[str]) -> Callable[[str], Any]:
    """Sort by value if all names are whole numbers, else as texts."""
    return int if all(re.fullmatch(r"-?\d+", name) for name in names) else str


def _at_rows(field: str, column: str, value: Any, rows: list[int], remedy: str) -> AromaError:
    shown = ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")
    where = f"row {shown}" if len(rows) == 1 else f"{len(rows)} rows ({shown})"
    return bad_value(f"{field} (column {column!r}, {where})", value, remedy, DataError)
