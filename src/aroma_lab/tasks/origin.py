"""Where a task's examples are: local files, or splits of a hub data set."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from aroma.errors import DataError

from .find import find_file, has_split
from .glue import GLUE, HUB, GlueTask, Layout, glue_key
from .hub import hub_splits, read_hub
from .sources import FORMATS, Columns, read_fitting
from .spec import TaskSpec


class Origin(Protocol):
    """Reads the splits of one task."""

    def has(self, split: str) -> bool:
        """Whether there is a split of this name."""

    def place(self, key: str, split: str) -> str:
        """Return what tells the split from others, without reading it; `key` is the task's key, for errors."""

    def read(self, key: str, split: str) -> tuple[Layout, Columns]:
        """Return the columns of a split, and which of them means what."""


def find_origin(spec: TaskSpec, glue: GlueTask | None) -> Origin:
    """Return where a task's examples are.

    Args:
        spec: The task.
        glue: What is known of it, or None.

    Raises:
        ConfigError: A name that is no GLUE task's, and no source.
        DataError: A source that is a missing folder.
    """
    layouts = _layouts(spec, glue)
    if spec.source is None and _is_file_name(spec.train):
        return _Files(spec, glue, layouts, Path())
    if spec.source is None:
        if glue is None:
            raise _unknown(spec)
        return _Hub(spec, layouts[0], HUB, spec.config or glue_key(spec.name))
    folder = Path(spec.source)
    if folder.is_dir():
        return _Files(spec, glue, layouts, _own_folder(folder, spec, glue))
    if folder.is_file() or _is_path(spec.source):
        raise spec.bad("source", spec.source, "no such folder; give a folder of data files, or a hub name", DataError)
    config = spec.config or (glue_key(spec.name) if glue is not None and spec.source == HUB else None)
    return _Hub(spec, layouts[0], spec.source, config)


@dataclass(frozen=True)
class _Files:
    spec: TaskSpec
    glue: GlueTask | None
    layouts: list[Layout]
    folder: Path

    def has(self, split: str) -> bool:
        return has_split(self.folder, split)

    def place(self, key: str, split: str) -> str:
        return str(self._find(key, split).resolve())

    def read(self, key: str, split: str) -> tuple[Layout, Columns]:
        file = self._find(key, split)
        # Reported examples are never left out: a damaged one is an error.
        skip = key == "train" and self.glue is not None and self.glue.damaged_lines
        choices = [layout.columns() for layout in self.layouts]
        choice, columns = read_fitting(self.spec.field(key), str(file), choices, skip_damaged=skip)
        return self.layouts[choice], columns

    def _find(self, key: str, split: str) -> Path:
        return find_file(self.spec, key, self.folder, split, self.glue.originals if self.glue is not None else {})


@dataclass(frozen=True)
class _Hub:
    spec: TaskSpec
    layout: Layout
    name: str
    config: str | None

    def has(self, split: str) -> bool:
        return split in hub_splits(self.name, self.config, self.spec.field("source"))

    def place(self, key: str, split: str) -> str:
        return split

    def read(self, key: str, split: str) -> tuple[Layout, Columns]:
        columns = read_hub(
            self.spec.field(key), split, self.name, self.config, self.layout.columns(), self.spec.field("source")
        )
        return self.layout, columns


def _layouts(spec: TaskSpec, glue: GlueTask | None) -> list[Layout]:
    """Return what the columns may be called; names that the task gives count in each."""
    given = {key: getattr(spec, key) for key in ("text", "text_pair", "label") if getattr(spec, key) is not None}
    known: Iterable[Layout] = glue.layouts if glue is not None else [Layout("text", None, "label")]
    layouts = list(dict.fromkeys(replace(layout, **given) for layout in known))
    for layout in layouts:
        if layout.label in (layout.text, layout.text_pair):
            raise spec.bad("label", layout.label, "the label and a text cannot be the same column")
    return layouts


def _own_folder(folder: Path, spec: TaskSpec, glue: GlueTask | None) -> Path:
    """Return the task's folder in a folder of all tasks, or `folder` itself."""
    if glue is None or has_split(folder, "train"):
        return folder
    inner = [folder / name for name in (glue.folder, glue_key(spec.name)) if (folder / name).is_dir()]
    return inner[0] if inner else folder


def _is_file_name(split: str | None) -> bool:
    return split is not None and Path(split).suffix.lower() in FORMATS


def _is_path(source: str) -> bool:
    """Whether a source cannot be a hub name, which is NAME or OWNER/NAME."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1


def _unknown(spec: TaskSpec) -> Exception:
    nearest = difflib.get_close_matches(glue_key(spec.name), list(GLUE), n=1, cutoff=0.0)[0]
    return spec.bad(
        "source",
        None,
        f"{spec.name!r} is no GLUE task (they are {', '.join(GLUE)}; the nearest is {nearest!r}); give a folder of "
        "data files or a hub name, or the file names as train and reported",
    )
