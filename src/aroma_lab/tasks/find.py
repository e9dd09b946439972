"""Which local file is which split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from aroma.errors import DataError

from .sources import FORMATS
from .spec import TaskSpec

_SHARD = "-00000-of-00001.parquet"
"""How the hub's files of one split end."""


def has_split(folder: Path, split: str) -> bool:
    """Whether a folder has a file of a split, by any of the split's names."""
    return any((folder / name).is_file() for name in _names(split))


def find_file(spec: TaskSpec, key: str, folder: Path, split: str, originals: Mapping[str, str]) -> Path:
    """Return the file of a split.

    Args:
        spec: The task, for errors.
        key: The task's key that names the split, for errors.
        folder: The task's folder.
        split: Name of a file in the folder, or of a split: `train`, `validation` (or `dev`), `test`, ….
        originals: File names by split, taken where there is no file named like the split.

    Raises:
        DataError: No such file, naming what was looked for; or several, in different formats.
    """
    if (folder / split).is_file():
        return folder / split
    names = [split] if Path(split).suffix.lower() in FORMATS else _names(split)
    found = [name for name in names if (folder / name).is_file()]
    if len(found) > 1:
        raise spec.bad(key, split, f"{folder} has {', '.join(found)}; name the file that is meant", DataError)
    if not found and split in originals:
        names = [*names, originals[split]]
        found = [originals[split]] if (folder / originals[split]).is_file() else []
    if not found:
        raise _missing(spec, key, folder, split, names)
    return folder / found[0]


def _names(split: str) -> list[str]:
    """Return the file names that a split can have: GLUE's originals say dev for validation."""
    stems = [split, split.replace("validation", "dev")] if "validation" in split else [split]
    return [f"{stem}{ending}" for stem in stems for ending in (*FORMATS, _SHARD)]


def _missing(spec: TaskSpec, key: str, folder: Path, split: str, names: list[str]) -> Exception:
    there = sorted(path.name for path in folder.iterdir() if path.suffix in FORMATS)
    example = "train: FILE" if key == "train" else "reported: {LABEL: FILE}"
    return spec.bad(
        key,
        split,
        f"no such file in {folder}; looked for {', '.join(names)}; the folder holds {', '.join(there) or 'no data'}. "
        f"Name a file with public labels, as {example}",
        DataError,
    )
