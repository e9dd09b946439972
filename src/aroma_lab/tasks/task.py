"""`aroma_task.json` beside an adapter: what its outputs mean, so that the folder alone can be evaluated."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from aroma.errors import CheckpointError, bad_value
from aroma.files import read_json, write_json

from .spec import Layout

TASK_FILE = "aroma_task.json"


@dataclass(frozen=True)
class Task:
    """How an adapter's task was read from its data: kind, class names by index, columns, and tokens of an example."""

    kind: Literal["classification", "regression"]
    label_names: tuple[str, ...] | None
    text: str
    text_pair: str | None
    label: str
    max_length: int

    @classmethod
    def of(cls, kind: Any, label_names: tuple[str, ...] | None, layout: Layout, max_length: int) -> Task:
        """Return the task of examples whose columns are known."""
        return cls(kind, label_names, layout.text, layout.text_pair, layout.label, max_length)

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
