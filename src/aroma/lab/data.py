"""Examples ready for a tokenizer: mapped columns, numbered labels, and a validation split that is always the same."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import AromaError, DataError, bad_value
from .sources import Columns, hub_splits, read_file, read_hub
from .specs import DataSpec


@dataclass(frozen=True)
class Examples:
    """Examples of one split, in the order of their source.

    Args:
        texts: One text an example.
        pairs: Its second text, or None where the task has single texts.
        labels: Class indices, or numbers for a regression.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: list[int] | list[float]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Splits:
    """All examples of a task.

    Args:
        train: What is trained on.
        validation: What a checkpoint may be chosen by.
        test: What is only reported; None if there is none.
        label_names: Names of the classes by index; None for a regression.
    """

    train: Examples
    validation: Examples
    test: Examples | None
    label_names: tuple[str, ...] | None


def load_splits(spec: DataSpec) -> Splits:
    """Read, check and number all examples of a recipe.

    Labels are compared as texts, and numbered in sorted order (numbers by value).

    Raises:
        DataError: A missing file or column, no rows, an empty text or label, one class only, labels that training
            lacks, a number that is none, or too few examples for a validation split.
    """
    raw = _read_all(spec)
    names = _label_names(raw["data.train"][spec.label]) if spec.task == "classification" else None
    if names is not None:
        _require_classes(names, spec)
    examples = {field: _examples(field, columns, spec, names) for field, columns in raw.items()}
    train, validation = examples["data.train"], examples.get("data.validation")
    if validation is None:
        train, validation = split_validation(train, spec.validation_fraction, spec.split_seed, names)
    return Splits(train, validation, examples.get("data.test"), names)


def load_examples(field: str, path: str, spec: DataSpec, label_names: Sequence[str] | None) -> Examples:
    """Read one file of examples whose classes are known: to evaluate a trained adapter.

    Args:
        field: What the file is called in errors.
        path: As in `data.test`.
        spec: Names of the columns, and the task.
        label_names: Names of the classes by index; None for a regression.

    Raises:
        DataError: As in `load_splits`.
    """
    return _examples(field, read_file(field, path, _wanted(spec)), spec, label_names)


def split_validation(
    train: Examples, fraction: float, seed: int, label_names: Sequence[str] | None
) -> tuple[Examples, Examples]:
    """Split examples in two: the same two for the same seed, each class in proportion.

    Args:
        train: Examples to split.
        fraction: Share of the second part, in (0, 1).
        seed: Seed of the draw.
        label_names: Names of the classes; None for a regression, which is not stratified.

    Raises:
        DataError: A class has a single example, or there are too few examples.
    """
    from sklearn.model_selection import train_test_split

    if label_names is not None:
        _require_two_each(train, label_names)
    try:
        kept, held_out = train_test_split(
            range(len(train)),
            test_size=fraction,
            random_state=seed,
            stratify=train.labels if label_names is not None else None,
        )
    except ValueError as error:
        raise bad_value(
            "data.validation_fraction",
            fraction,
            f"{len(train)} training examples cannot be split so ({error}); give data.validation, or another fraction",
            DataError,
        ) from error
    return _take(train, sorted(kept)), _take(train, sorted(held_out))


def _read_all(spec: DataSpec) -> dict[str, Columns]:
    """Read every given split, by the recipe's key."""
    sources = {"data.train": spec.train, "data.validation": spec.validation, "data.test": spec.test}
    wanted = _wanted(spec)
    if spec.name is None:
        return {field: read_file(field, path, wanted) for field, path in sources.items() if path is not None}
    sources["data.train"] = spec.train or "train"
    if spec.validation is None and "validation" in hub_splits(spec.name, spec.config):
        sources["data.validation"] = "validation"
    return {
        field: read_hub(field, split, spec.name, spec.config, wanted)
        for field, split in sources.items()
        if split is not None
    }


def _wanted(spec: DataSpec) -> list[str]:
    return [name for name in (spec.text, spec.text_pair, spec.label) if name is not None]


def _examples(field: str, columns: Columns, spec: DataSpec, label_names: Sequence[str] | None) -> Examples:
    texts = _texts(field, spec.text, columns)
    pairs = _texts(field, spec.text_pair, columns) if spec.text_pair is not None else None
    if label_names is None:
        return Examples(texts, pairs, _numbers(field, spec.label, columns))
    return Examples(texts, pairs, _indices(field, spec.label, columns, label_names))


def _texts(field: str, column: str, columns: Columns) -> list[str]:
    empty = [row for row, value in enumerate(columns[column], start=1) if value is None]
    if empty:
        raise _at_rows(field, column, None, empty, "a text is missing; fill it in or leave the row out")
    return [str(value) for value in columns[column]]


def _numbers(field: str, column: str, columns: Columns) -> list[float]:
    numbers = []
    for row, value in enumerate(columns[column], start=1):
        number = _as_number(value)
        if number is None:
            remedy = "a regression needs finite numbers; mend it, or set data.task: classification"
            raise _at_rows(field, column, value, [row], remedy)
        numbers.append(number)
    return numbers


def _as_number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _indices(field: str, column: str, columns: Columns, label_names: Sequence[str]) -> list[int]:
    labels = columns[column]
    missing = [row for row, label in enumerate(labels, start=1) if label is None]
    if missing:
        raise _at_rows(field, column, None, missing, "a label is missing; fill it in or leave the row out")
    index = {name: number for number, name in enumerate(label_names)}
    unseen = sorted({str(label) for label in labels} - set(index), key=_sort_key(label_names))
    if unseen:
        raise bad_value(
            f"{field} (column {column!r})",
            ", ".join(unseen),
            f"labels that the training examples lack; they have {', '.join(label_names)}. Mend the labels, or add "
            "training examples of them",
            DataError,
        )
    return [index[str(label)] for label in labels]


def _label_names(labels: list[Any]) -> tuple[str, ...]:
    names = {str(label) for label in labels if label is not None}
    return tuple(sorted(names, key=_sort_key(names)))


def _sort_key(names: Sequence[str] | set[str]) -> Callable[[str], Any]:
    """Sort by value where all names are whole numbers, else as texts."""
    return int if all(re.fullmatch(r"-?\d+", name) for name in names) else str


def _require_classes(names: tuple[str, ...], spec: DataSpec) -> None:
    if len(names) < 2:
        raise bad_value(
            f"data.label (column {spec.label!r})",
            ", ".join(names),
            "all training examples bear one label, and there is nothing to tell apart; give examples of two classes "
            "or more",
            DataError,
        )


def _require_two_each(train: Examples, label_names: Sequence[str]) -> None:
    counts = Counter(train.labels)
    single = [label_names[index] for index in range(len(label_names)) if counts[index] == 1]
    if single:
        raise bad_value(
            "data.validation",
            None,
            f"{', '.join(map(repr, single))} has one training example and cannot be in a training and a validation "
            "split; give data.validation, or more examples",
            DataError,
        )


def _take(examples: Examples, indices: list[int]) -> Examples:
    pairs = [examples.pairs[i] for i in indices] if examples.pairs is not None else None
    labels: Any = [examples.labels[i] for i in indices]
    return Examples([examples.texts[i] for i in indices], pairs, labels)


def _at_rows(field: str, column: str, value: Any, rows: list[int], remedy: str) -> AromaError:
    shown = ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")
    where = f"row {shown}" if len(rows) == 1 else f"{len(rows)} rows ({shown})"
    return bad_value(f"{field} (column {column!r}, {where})", value, remedy, DataError)
