"""Files of a folder that are replaced as one act: at any moment the folder holds all the old ones or all the new ones.

The new files are written into a hidden folder beside it and reach the disk. Then

- a folder that does not exist yet gets its name in one rename;
- an existing one is exchanged for the new one in one system call (Linux's `renameat2`), with its other files linked
  into the new one;
- where that cannot be done, the new files move into the folder together, under one hidden name, and from there to
  their places one by one. A kill in the midst leaves the rest, and whoever opens or saves the folder next moves it
  (`settle`).

That last way is taken on systems without the call (NFS, macOS), and for a folder that holds other folders, is a mount
point, cannot be replaced by this user, or is the working directory.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CheckpointError, bad_value

try:
    import fcntl
except ImportError:  # a system without POSIX locks
    fcntl = None  # type: ignore[assignment]

_ARRIVING = ".aroma-arriving"
"""Folder with the files of a save that are on their way to their places."""
_LIST = ".files.json"
"""In that folder: the names of all files of the save, moved or not."""
_SUFFIX = ".saving"
"""Ends the names of the hidden folders that saves write into."""
_AT_WORKING_DIRECTORY, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = {getattr(errno, name) for name in ("EACCES", "EBUSY", "EINVAL", "ENOSYS", "ENOTSUP", "EPERM", "EXDEV")}
_NO_FOLDER_SYNC = {getattr(errno, name) for name in ("EACCES", "EBADF", "EINVAL", "ENOTSUP")}


@contextmanager
def replacing_files(folder: str | os.PathLike[str], names: Collection[str]) -> Iterator[Path]:
    """Yield an empty folder; at the end of the block its files replace those in `folder`, as one act.

    An exception in the block leaves `folder` as it was. Of two that write into one folder, one wins whole. What killed
    writers have left is removed.

    Args:
        folder: Created if missing. A symlink is followed.
        names: Names of the files that belong together: what is not written anew is removed. All others stay.

    Raises:
        CheckpointError: `folder` is a file, or a folder has one of the `names` in it.
    """
    target = Path(os.path.realpath(folder))
    _require_place(target, names)
    target.parent.mkdir(parents=True, exist_ok=True)
    inside = target.is_dir() and (os.path.ismount(target) or not os.access(target.parent, os.W_OK | os.X_OK))
    place = target if inside else target.parent
    _remove_leftovers(place, target.name)
    with _workshop(place, target.name) as workshop:
        new = workshop / "new"
        new.mkdir()
        yield new
        for file in new.iterdir():
            sync(file)
        _put(new, target, names)


def settle(folder: str | os.PathLike[str]) -> None:
    """Finish a save into `folder` that was killed while its files moved to their places.

    Raises:
        CheckpointError: It cannot be finished, as the folder cannot be written to.
    """
    target = Path(folder)
    if not (target / _ARRIVING).is_dir():
        return
    try:
        with _locked(target):
            _arrive(target)
    except OSError as error:
        raise CheckpointError(
            f"{target}: a save was killed in its midst, and {_ARRIVING} in it holds the rest, which cannot be moved "
            f"to its place ({error}); make the folder writable and open it again, or save again"
        ) from error


# Putting new files into place ----------------------------------------------------------------------------------------


def _put(new: Path, target: Path, names: Collection[str]) -> None:
    while not os.path.lexists(target):
        sync(new)
        try:
            new.rename(target)
        except OSError as error:  # another writer was quicker
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            sync(target.parent)
            return
    settle(target)
    if not _exchange_for(new, target, names):
        _move_in(new, target, names)


def _exchange_for(new: Path, target: Path, names: Collection[str]) -> bool:
    """Exchange `target` for `new`, which gets its other files; False, with `new` as it was, where that cannot be."""
    if not _may_be_exchanged(target):
        return False
    written = {file.name for file in new.iterdir()}
    linked: list[str] = []
    for name in os.listdir(target):
        if name not in names and name not in written:
            try:
                os.link(target / name, new / name, follow_symlinks=False)
            except FileNotFoundError:  # its owner removed it meanwhile
                continue
            except OSError:  # no links here
                break
            linked.append(name)
    else:
        shutil.copymode(target, new)
        sync(new)
        if _exchange(new, target):
            sync(target.parent)
            old = new
            for name in set(os.listdir(old)) - set(names) - written:
                # What others have put there since the links were made.
                now = target / name
                if not os.path.lexists(now) or not os.path.samestat((old / name).lstat(), now.lstat()):
                    os.replace(old / name, now)
            return True
    for name in linked:
        (new / name).unlink()
    return False


def _may_be_exchanged(target: Path) -> bool:
    if os.path.ismount(target) or not os.access(target.parent, os.W_OK | os.X_OK):
        return False
    # It would go on to be the folder that is removed.
    if Path(os.path.realpath(os.curdir)).is_relative_to(target):
        return False
    with os.scandir(target) as entries:
        return not any(entry.is_dir(follow_symlinks=False) for entry in entries)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders exchange their names in one system call; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here = _AT_WORKING_DIRECTORY
    if rename(here, os.fsencode(one), here, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def _move_in(new: Path, target: Path, names: Collection[str]) -> None:
    """Move the files of `new` into `target` one by one, such that a kill can be recovered from."""
    written = sorted(file.name for file in new.iterdir())
    listing = new / _LIST
    listing.write_text(json.dumps({"files": written, "belonging": sorted(names)}), encoding="utf-8")
    sync(listing)
    sync(new)
    with _locked(target):
        _arrive(target)
        new.rename(target / _ARRIVING)
        sync(target)
        _arrive(target)


def _arrive(target: Path) -> None:
    """Move what has arrived in `target` to its place. At whatever moment it is killed, the next call goes on."""
    arriving = target / _ARRIVING
    if not arriving.is_dir():
        return
    listing = arriving / _LIST
    if arriving.is_symlink() or not all(stat.S_ISREG(entry.lstat().st_mode) for entry in arriving.iterdir()):
        raise CheckpointError(f"{arriving}: no save has left it so; remove it")
    if listing.exists():
        files, belonging = _read_list(listing)
        for name in sorted(belonging - files):
            (target / name).unlink(missing_ok=True)
        for name in sorted(files):
            if (arriving / name).exists():
                os.replace(arriving / name, target / name)
        sync(target)
        listing.unlink()
    arriving.rmdir()


def _read_list(listing: Path) -> tuple[set[str], set[str]]:
    try:
        content = json.loads(listing.read_text(encoding="utf-8"))
        files, belonging = set(content["files"]), set(content["belonging"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{listing}: truncated or edited ({error}); remove {listing.parent}") from error
    if strange := [name for name in files | belonging if not isinstance(name, str) or name != os.path.basename(name)]:
        raise bad_value(f"{listing}: files", strange[0], f"it names no file; remove {listing.parent}", CheckpointError)
    return files, belonging


def _require_place(target: Path, names: Collection[str]) -> None:
    if target.exists() and not target.is_dir():
        raise bad_value("folder", str(target), "it is a file; give a folder", CheckpointError)
    for name in names:
        if (target / name).is_dir() and not (target / name).is_symlink():
            raise bad_value("folder", str(target), f"{name} in it is a folder; give another one", CheckpointError)


# Hidden folders, and what killed saves leave -------------------------------------------------------------------------


@contextmanager
def _workshop(place: Path, name: str) -> Iterator[Path]:
    """Yield a new folder that is removed at the end; it is locked, so that no other save takes it for a leftover."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=place, prefix=f".{name}.", suffix=_SUFFIX))
        lock = _lock(folder, waits=True)
        if folder.exists():  # else another save removed it before it was locked
            break
        _unlock(lock)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
        _unlock(lock)


def _remove_leftovers(place: Path, name: str) -> None:
    """Remove the hidden folders of killed saves; those of saves under way are locked."""
    for folder in place.glob(f".{_escaped(name)}.*{_SUFFIX}"):
        if folder.is_symlink() or not folder.is_dir():
            continue
        lock = _lock(folder, waits=False)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)  # two saves may find it at once
            _unlock(lock)


def _escaped(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = _lock(folder, waits=True)
    try:
        yield
    finally:
        _unlock(lock)


def _lock(folder: Path, waits: bool) -> int | None:
    """Lock a folder, and return what `_unlock` takes; None if it is locked, is gone, or cannot be locked here.

    The end of a process, whatever it was, ends its locks.
    """
    if fcntl is None:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except OSError:  # locked by another, or a file system without locks
        os.close(handle)
        return None
    return handle


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def sync(path: Path) -> None:
    """Let a file, or the entries of a folder, reach the disk."""
    if path.is_symlink():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some file systems cannot do it for folders
        if not path.is_dir() or error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)
