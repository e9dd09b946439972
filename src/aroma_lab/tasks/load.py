"""From a task's description to its examples."""

from __future__ import annotations

import random
from typing import Any

from aroma.errors import DataError

from .columns import as_indices, as_numbers, as_texts, label_names_of
from .data import Examples, split_validation
from .glue import GlueTask, Layout, glue_task
from .origin import Origin, find_origin
from .score import resolve_metric
from .sources import Columns
from .spec import TaskData, TaskSpec

Read = tuple[Layout, Columns]
"""The columns of a split, and which of them means what."""


def load_task(spec: TaskSpec, *, reported: bool = True) -> TaskData:
    """Read, check, number and split the examples of a task.

    The held-out examples are drawn from the training data. Classes of GLUE are numbered as on the hub; those of other
    tasks in sorted order (numbers by value).

    Args:
        spec: The task.
        reported: Whether the reported splits are read; False: not one of their files is opened.

    Raises:
        ConfigError: An unknown task or metric, or values that contradict each other.
        DataError: A missing file, split or column, no rows, a text or label that is missing or unknown, too few
            examples, or reported examples that are trained on.
    """
    glue = glue_task(spec.name)
    kind = _kind(spec, glue)
    origin = find_origin(spec, glue)
    train_split, reported_splits = spec.train or "train", _reported(spec, glue, origin)
    _require_distinct(spec, origin, {"train": train_split, **reported_splits})

    raw = origin.read("train", train_split)
    names = _label_names(spec, glue, kind, raw)
    metric = resolve_metric(spec, kind, glue.metric if glue is not None else None, names)
    everything = _examples(spec, "train", raw, glue, names)
    shown = {}
    for key, split in reported_splits.items() if reported else ():
        examples = _examples(spec, key, origin.read(key, split), glue, names)
        _refuse_trained_on(spec, key, split, examples, everything)
        shown[key.removeprefix("reported.")] = examples
    train, held_out = split_validation(
        everything, spec.held_out, spec.split_seed, names, spec.field("held_out"), "give another share"
    )
    return TaskData(_draw(spec, train), held_out, shown, names, kind, metric, raw[0])


def _kind(spec: TaskSpec, glue: GlueTask | None) -> str:
    if glue is None:
        return spec.kind or "classification"
    kind = "regression" if glue.label_names is None else "classification"
    if spec.kind not in (None, kind):
        raise spec.bad(
            "kind", spec.kind, f"GLUE's {glue.folder} is a {kind}; leave it out, or name the task otherwise"
        )
    return kind


def _reported(spec: TaskSpec, glue: GlueTask | None, origin: Origin) -> dict[str, str]:
    """Return the splits that are reported, by the task's key."""
    splits = spec.reported or (glue.reported if glue is not None else None)
    if splits is None:
        there = [split for split in ("test", "validation") if origin.has(split)]
        if not there:
            raise spec.bad(
                "reported",
                None,
                "there is no split test or validation; name one, as {test: test.jsonl}: training examples are never "
                "reported",
                DataError,
            )
        splits = {there[0]: there[0]}
    return {f"reported.{label}": split for label, split in splits.items()}


def _require_distinct(spec: TaskSpec, origin: Origin, splits: dict[str, str]) -> None:
    seen: dict[str, str] = {}
    for key, split in splits.items():
        place = origin.place(key, split)
        if place in seen:
            raise spec.bad(key, split, f"{spec.field(seen[place])} is the same; give another split or file", DataError)
        seen[place] = key


def _label_names(spec: TaskSpec, glue: GlueTask | None, kind: str, train: Read) -> tuple[str, ...] | None:
    if kind == "regression":
        return None
    if glue is not None:
        return glue.label_names
    layout, columns = train
    return label_names_of(spec.field("train"), layout.label, columns[layout.label])


def _examples(spec: TaskSpec, key: str, read: Read, glue: GlueTask | None, names: tuple[str, ...] | None) -> Examples:
    layout, columns = read
    field = spec.field(key)
    texts = as_texts(field, layout.text, columns[layout.text])
    pairs = as_texts(field, layout.text_pair, columns[layout.text_pair]) if layout.text_pair is not None else None
    values = columns[layout.label]
    if names is None:
        between = glue.between if glue is not None else None
        return Examples(texts, pairs, as_numbers(field, layout.label, values, between))
    if glue is not None:
        values = _as_words(spec, key, layout.label, values, names)
    return Examples(texts, pairs, as_indices(field, layout.label, values, names))


def _as_words(spec: TaskSpec, key: str, column: str, labels: list[Any], names: tuple[str, ...]) -> list[str | None]:
    """Return GLUE's labels as words, be they words or numbers; −1, the mark of a hidden one, as missing."""
    words: dict[str, str | None] = {name: name for name in names}
    words |= {str(number): name for number, name in enumerate(names)}
    words["-1"] = None
    unknown = sorted({str(label) for label in labels if label is not None} - set(words))
    if unknown:
        numbers = ", ".join(map(str, range(len(names))))
        remedy = f"{spec.name} knows only {', '.join(names)} (or {numbers}); mend the labels, or name another column"
        raise spec.bad(f"{key} (column {column!r})", ", ".join(unknown[:10]), remedy, DataError)
    return [None if label is None else words[str(label)] for label in labels]


def _refuse_trained_on(spec: TaskSpec, key: str, split: str, examples: Examples, train: Examples) -> None:
    """Refuse a reported split that is a part of the training examples under another name."""
    if _rows(examples) <= _rows(train):
        remedy = "every example of it is a training example too; report examples that are not trained on"
        raise spec.bad(key, split, remedy, DataError)


def _rows(examples: Examples) -> set[tuple[Any, ...]]:
    return set(zip(examples.texts, examples.pairs or examples.texts, examples.labels, strict=True))


def _draw(spec: TaskSpec, train: Examples) -> Examples:
    """Return `train_examples` of the examples, in their order."""
    wanted = spec.train_examples
    if wanted is None:
        return train
    if wanted > len(train):
        remedy = f"{len(train)} are left beside the held-out ones; give at most so many, or null"
        raise spec.bad("train_examples", wanted, remedy, DataError)
    return train.take(sorted(random.Random(spec.split_seed).sample(range(len(train)), wanted)))
