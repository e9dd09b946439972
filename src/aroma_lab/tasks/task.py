"""`aroma_task.json` beside an adapter: what its outputs mean, so that the folder alone can be evaluated."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from aroma.errors import CheckpointError, bad_value
from aroma.files import read_json, write_json

TASK_FILE = "aroma_task.json"


class Layout(NamedTuple):
    """Which columns mean what: text, second text (None: single texts), label or number."""

    text: str
    text_pair: str | None
    label: str

    def columns(self) -> list[str]:
        """Return the columns to read."""
        return [name for name in self if name is not None]


def common_layouts(text: str | None, text_pair: str | None, label: str | None) -> list[Layout]:
    """Return columns by names in common use, pairs first, but for those that are given."""
    texts: list[tuple[str, str | None]] = [
        *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence")),
        *(("text1", "text2"), ("text", "text_pair"), ("text", None), ("sentence", None), ("review", None)),
    ]
    labels = ("label", "labels", "score") if label is None else (label,)
    chosen = texts if text is None else [(text, text_pair)]
    return [Layout(one, other, column) for one, other in chosen for column in labels]


@dataclass(frozen=True)
class Task:
    """How an adapter's task was read from its data: kind, class names by index, columns, and tokens of an example."""

    kind: Literal["classification", "regression"]
    label_names: tuple[str, ...] | None
    text: str
    text_pair: str | None
    label: str
    max_length: int

    @property
    def layout(self) -> Layout:
        """Which columns mean what."""
        return Layout(self.text, self.text_pair, self.label)


def save_task(task: Task, adapter: str | os.PathLike[str]) -> None:
    """Write the task into the folder of an adapter."""
    write_json(Path(adapter) / TASK_FILE, asdict(task))


def load_task(adapter: str | os.PathLike[str]) -> Task:
    """Read the task of an adapter.

    Raises:
        CheckpointError: The folder has none, or it is damaged.
    """
    path = Path(adapter) / TASK_FILE
    if not path.exists():
        remedy = f"it has no {TASK_FILE}; give an adapter that `aroma train` or `aroma demo` saved"
        raise bad_value("adapter", str(adapter), remedy, CheckpointError)
    content = read_json(path)
    try:
        names = content.pop("label_names")
        return Task(label_names=None if names is None else tuple(names), **content)
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: edited ({error}); restore the file that was saved") from error
