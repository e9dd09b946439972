"""Files of a folder that are replaced as one act: a kill leaves all the old ones or all the new ones.

The new files are written into a hidden folder within, and reach the disk. One rename marks them as complete; then each
moves to its place. A kill before that rename leaves the old files. A kill after it leaves the rest of the new ones in
`.aroma-arriving`, and whoever opens or saves the folder next moves them (`settle`). One process at a time may write.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CheckpointError, bad_value

_ARRIVING = ".aroma-arriving"
"""Folder with the files of a save that are on their way to their places."""
_LIST = ".gone.json"
"""In that folder: the names of the old files that have no successor."""
_SAVING = ".aroma-saving-"
"""Begins the name of the folder that a save writes into."""


@contextmanager
def replacing_files(folder: str | os.PathLike[str], names: Collection[str]) -> Iterator[Path]:
    """Yield an empty folder; at the end of the block its files replace those in `folder`, as one act.

    An exception in the block leaves `folder` as it was. What killed writers have left is removed.

    Args:
        folder: Created if missing. A symlink is followed.
        names: Names of the files that belong together: what is not written anew is removed. All others stay.

    Raises:
        CheckpointError: `folder` is a file.
    """
    target = Path(os.path.realpath(folder))
    if target.exists() and not target.is_dir():
        raise bad_value("folder", str(target), "it is a file; give a folder", CheckpointError)
    target.mkdir(parents=True, exist_ok=True)
    settle(target)
    for left in target.glob(f"{_SAVING}*"):
        shutil.rmtree(left, ignore_errors=True)
    new = Path(tempfile.mkdtemp(dir=target, prefix=_SAVING))
    try:
        yield new
        gone = sorted({*names} - {*os.listdir(new)})
        (new / _LIST).write_text(json.dumps(gone), encoding="utf-8")
        for file in new.iterdir():
            sync(file)
        sync(new)
        new.rename(target / _ARRIVING)
        sync(target)
        settle(target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def settle(folder: str | os.PathLike[str]) -> None:
    """Finish a save into `folder` that was killed while its files moved to their places.

    At whatever moment this is killed in turn, the next call goes on.

    Raises:
        CheckpointError: It cannot be finished: the folder cannot be written to, or no save has left it so.
    """
    target = Path(folder)
    arriving = target / _ARRIVING
    if not os.path.lexists(arriving):
        return
    try:
        if arriving.is_symlink():
            raise ValueError("a symlink, which no save has left")
        if (arriving / _LIST).exists():
            for name in json.loads((arriving / _LIST).read_text(encoding="utf-8")):
                (target / Path(name).name).unlink(missing_ok=True)
            for file in sorted(arriving.iterdir()):
                if file.name != _LIST:
                    os.replace(file, target / file.name)
            sync(target)
            (arriving / _LIST).unlink()
        arriving.rmdir()
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{target}: a save was killed, and {_ARRIVING} holds the rest, which cannot be moved to its place "
            f"({error}); make the folder writable and open it again, or remove {_ARRIVING} and save again"
        ) from error


def sync(path: Path) -> None:
    """Let a file, or the entries of a folder, reach the disk."""
    if path.is_symlink():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems cannot do it for folders
            raise
    finally:
        os.close(handle)
