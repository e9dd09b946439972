"""Files that are whole or absent: atomic writes, checked reads. Safetensors and JSON only."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, OutputError, bad_value
from .folders import settle

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST_JSON = 256 * 2**20
"""Bytes; the largest state of a run that was ever written has a few MiB."""


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the operating system answers where there is no room for a file: disk, quota, limit of the process."""


_TORCH_COULD_NOT_WRITE = ("inline_container", "iostream error")
"""What torch.save says in place of the operating system's reason."""


@contextmanager
def told_of(path: str | os.PathLike[str], size: int | None = None) -> Iterator[None]:
    """Turn a failure to write into one that says what could not be written, why, and how much room it needs.

    Args:
        path: What the person asked for; where it is written meanwhile means nothing to them.
        size: Bytes that it takes; None if unknown.

    Raises:
        OutputError: In place of an error of the operating system, of safetensors or of PyTorch.
    """
    try:
        yield
    except Exception as error:
        failure = write_failure(error)
        if failure is None:
            raise
        code, reason = failure
        remedy = "give another place"
        if code in NO_ROOM:
            needs = "" if size is None else f"it needs about {_in_bytes(size)}, and "
            remedy = f"{needs}{_in_bytes(free_bytes(path))} are free; make room, or give another place"
        told = OutputError(f"{os.fspath(path)}: cannot be written ({reason}); {remedy}")
        told.errno, told.strerror = code, reason
        raise told from error


def write_failure(error: Exception) -> tuple[int, str] | None:
    """Return number and text of the operating system's error behind a failure to write; None if there is none."""
    if isinstance(error, OSError):
        return None if error.errno is None else (error.errno, error.strerror or os.strerror(error.errno))
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors, whose errors have no number
        return int(found[1]), os.strerror(int(found[1]))
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _TORCH_COULD_NOT_WRITE):
        return errno.ENOSPC, "the file could not be written to its end"
    return None


def free_bytes(path: str | os.PathLike[str]) -> int:
    """Return how many bytes are free on the file system where `path` is or would be."""
    return shutil.disk_usage(next(folder for folder in Path(path).absolute().parents if folder.is_dir())).free


def _in_bytes(size: int) -> str:
    from rich.filesize import decimal

    return decimal(size)


@contextmanager
def replacing(path: str | os.PathLike[str], size: int | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path` in one step, on failure it vanishes.

    Args:
        path: The file.
        size: Bytes that it will have, for the error of a full disk; None if unknown.

    Raises:
        OutputError: It cannot be written.
    """
    with told_of(path, size), _replacing(Path(path)) as temporary:
        yield temporary


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; give the mode that open() would have given.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


_LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")
"""A name that `replacing` gives to a file until it is whole."""


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed saves in `folder` and below; nobody may be writing there."""
    for leftover in [*folder.rglob(".*.tmp")]:
        if _LEFTOVER.fullmatch(leftover.name) and not leftover.is_dir():
            leftover.unlink()


def require_adapter_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder of an adapter.

    Raises:
        CheckpointError: There is no such folder.
    """
    folder = Path(path)
    try:
        found = folder.is_dir()
    except OSError:  # a folder above it that may not be entered
        found = False
    if not found:
        raise bad_value(
            "adapter", str(path), "no such folder; give the folder that holds adapter_config.json", CheckpointError
        )
    settle(folder)
    return folder


def require_regular_file(path: str | os.PathLike[str]) -> Path:
    """Return `path` if it is a regular file, or a symlink to one: a FIFO or a device would never end.

    Raises:
        CheckpointError: It is missing, cannot be looked at, or is something else.
    """
    file = Path(path)
    try:
        mode = file.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path}: the file is missing; give a folder that AROMA saved") from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a FIFO, a device or a socket"
        raise CheckpointError(f"{path}: {what} in place of a file; use another checkpoint")
    return file


def own_file(folder: Path, name: str) -> Path:
    """Return the regular file `name` of an adapter's folder.

    A symlink may lead to another file of the folder, or to where the hub's cache keeps the files of its snapshots, and
    nowhere else: what a stranger's adapter points to is not read, and not copied into an export.

    Raises:
        CheckpointError: It is missing, no regular file, or a symlink to elsewhere.
    """
    file = require_regular_file(folder / name)
    real = file.resolve()
    home = folder.resolve()
    cache = [parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots"]
    if not any(real.is_relative_to(root) for root in (home, *cache)):
        raise CheckpointError(f"{file}: a symlink to {real}, outside of its folder; put the file itself there")
    return file


def _unreadable(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return CheckpointError(f"{path}: cannot be read ({reason}); use another checkpoint")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with replacing(path, len(content)) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return the JSON value in `path`.

    Raises:
        CheckpointError: The file is missing, truncated, no regular file, or not JSON.
    """
    file = require_regular_file(path)
    try:
        if file.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"larger than {_LARGEST_JSON // 2**20} MiB")
        text = file.read_text(encoding="utf-8")
        return json.loads(text)
    except OSError as error:
        raise _unreadable(path, error) from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: edited (nested too deeply); use another checkpoint") from error
    except ValueError as error:  # not JSON, not UTF-8, or a number of thousands of digits
        raise CheckpointError(f"{path}: truncated or edited ({error}); use another checkpoint") from error


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor]) -> None:
    """Write `tensors` (any shapes) to `path` as safetensors, atomically."""
    from safetensors.torch import save_file

    with replacing(path, sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"}
        )


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of the safetensors file `path`, on the CPU.

    Raises:
        CheckpointError: The file is missing, truncated or not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = require_regular_file(path)
    try:
        return load_file(file)
    except OSError as error:
        raise _unreadable(path, error) from error
    except (SafetensorError, KeyError, ValueError, RuntimeError, OverflowError) as error:
        # Beside its own error: a dtype that torch lacks, and shapes that hold no bytes but overflow.
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: truncated or edited ({reason}); use another checkpoint") from error


def file_digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        CheckpointError: It is missing or no regular file.
    """
    with require_regular_file(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """Return a SHA-256 over names, dtypes, shapes and bytes of `tensors`, whatever their order and device."""
    from safetensors.torch import save

    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    return hashlib.sha256(save(ordered)).hexdigest()
