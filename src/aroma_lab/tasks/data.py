"""Examples ready for a tokenizer: mapped columns, numbered labels, and a validation split that is always the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aroma.errors import DataError, bad_value

from ..specs import DataSpec
from .columns import as_indices, as_numbers, as_texts, label_names_of
from .hub import hub_splits, read_hub
from .sources import Columns, read_file


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

    def take(self, indices: Sequence[int]) -> Examples:
        """Return the examples with these indices, in their order."""
        pairs = [self.pairs[i] for i in indices] if self.pairs is not None else None
        labels: Any = [self.labels[i] for i in indices]
        return Examples([self.texts[i] for i in indices], pairs, labels)


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
    names = None
    if spec.task == "classification":
        names = label_names_of("data.train", spec.label, raw["data.train"][spec.label])
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
    train: Examples,
    fraction: float,
    seed: int,
    label_names: Sequence[str] | None,
    field: str = "data.validation_fraction",
    remedy: str = "give data.validation, or another fraction",
) -> tuple[Examples, Examples]:
    """Split examples in two: the same two for the same seed, each class in proportion.

    Args:
        train: Examples to split.
        fraction: Share of the second part, in (0, 1).
        seed: Seed of the draw.
        label_names: Names of the classes; None for a regression, which is not stratified.
        field: The recipe's key of the fraction, for errors.
        remedy: What to do instead, for errors.

    Raises:
        DataError: A class has a single example, or there are too few examples.
    """
    from sklearn.model_selection import train_test_split

    single = _classes_of_one(train, label_names or ())
    if single:
        raise bad_value(
            field,
            fraction,
            f"{', '.join(map(repr, single))} has one training example and cannot be in both parts; {remedy}, or more "
            "examples",
            DataError,
        )
    try:
        kept, held_out = train_test_split(
            range(len(train)),
            test_size=fraction,
            random_state=seed,
            stratify=train.labels if label_names is not None else None,
        )
    except ValueError as error:
        raise bad_value(
            field, fraction, f"{len(train)} training examples cannot be split so ({error}); {remedy}", DataError
        ) from error
    return train.take(sorted(kept)), train.take(sorted(held_out))


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
    texts = as_texts(field, spec.text, columns[spec.text])
    pairs = as_texts(field, spec.text_pair, columns[spec.text_pair]) if spec.text_pair is not None else None
    values = columns[spec.label]
    if label_names is None:
        return Examples(texts, pairs, as_numbers(field, spec.label, values))
    return Examples(texts, pairs, as_indices(field, spec.label, values, label_names))


def _classes_of_one(examples: Examples, label_names: Sequence[str]) -> list[str]:
    counts = Counter(examples.labels)
    return [name for index, name in enumerate(label_names) if counts[index] == 1]
