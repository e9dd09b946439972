"""Where results go: checked before any work is done. Nothing is replaced without being asked."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError, bad_value
from .files import own_file, write_errors

TASK_FILE = "aroma_task.json"
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model", "chat_template*")


def new_file(field: str, path: str | os.PathLike[str], *, force: bool | None = None) -> Path:
    """Return where the file that the option `field` named will be written; a symbolic link is followed.

    `force`: whether a file that exists may be replaced; None: never, and the error names no option.

    Raises:
        OutputError: Something is there, or nothing can be written there.
    """
    target = Path(os.path.realpath(path))
    if os.path.exists(target) and not os.path.isfile(target):
        raise bad_value(field, str(path), "it is no file; give another name", OutputError)
    if os.path.exists(target) and not force:
        remedy = "give another name" if force is None else "give another name, or --force to replace it"
        raise bad_value(field, str(path), f"it exists, and nothing is overwritten; {remedy}", OutputError)
    _try_writing(field, path, target)
    return target


def new_folder(field: str, path: str | os.PathLike[str], remedy: str = "give another folder") -> Path:
    """Return where the folder that the option `field` named will be filled: it is empty, or not there yet.

    Raises:
        OutputError: Something is there, for which the error names `remedy`, or nothing can be written there.
    """
    target = open_folder(field, path)
    if os.path.isdir(target) and any(target.iterdir()):
        reason = f"it is not an empty folder, and nothing is overwritten; {remedy}"
        raise bad_value(field, str(path), reason, OutputError)
    return target


def open_folder(field: str, path: str | os.PathLike[str]) -> Path:
    """Return where the folder that the option `field` named is or will be, empty or not.

    Raises:
        OutputError: A file is there, or nothing can be written there.
    """
    target = Path(os.path.realpath(path))
    if os.path.exists(target) and not os.path.isdir(target):
        raise bad_value(field, str(path), "it is a file, and nothing is overwritten; give a folder", OutputError)
    _try_writing(field, path, target / "any")
    return target


def _try_writing(field: str, path: str | os.PathLike[str], target: Path) -> None:
    """Raise unless a file can be made in the innermost folder above `target` that exists."""
    folder = next(parent for parent in target.parents if os.path.lexists(parent))
    try:  # only an attempt tells: root may write where permissions forbid it
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{target.relative_to(folder).parts[0]}.", suffix=".tmp"):
            pass
    except OSError as error:
        reason = f"{folder} cannot be written to ({error.strerror}); give another place"
        raise bad_value(field, str(path), reason, OutputError) from error


@contextmanager
def filled_at_once(target: Path) -> Iterator[Path]:
    """Yield a folder beside `target` that becomes `target` in one step; after an error it is deleted."""
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            staging = Path(scratch) / target.name
            staging.mkdir()
            yield staging
            os.replace(staging, target)


def copy_files(sources: list[Path], target: Path, patterns: tuple[str, ...]) -> None:
    """Copy the files that match `patterns` from the first of `sources` that has any; see `own_file`."""
    for source in sources:
        names = sorted({file.name for pattern in patterns for file in source.glob(pattern)})
        for name in names:
            shutil.copy2(own_file(source, name), target / name)
        if names:
            return
