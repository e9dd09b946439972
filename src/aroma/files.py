"""Files that are whole or absent: atomic writes, checked reads. Safetensors and JSON only."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
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

_TORCH_COULD_NOT_WRITE = ("inline_container", "iostream error")
"""What torch.save says in place of the operating system's reason."""


# Writing -------------------------------------------------------------------------------------------------------------


@contextmanager
def told_of(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a failure to write into one that names the file that was asked for, not a temporary one.

    Raises:
        OutputError: In place of an error of the operating system, of safetensors or of PyTorch.
    """
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        if number is None:
            raise
        remedy = "make room, or give another place"
        told = OutputError(f"{os.fspath(path)}: cannot be written ({os.strerror(number)}); {remedy}")
        told.errno, told.strerror = number, os.strerror(number)
        raise told from error


def _error_number(error: Exception) -> int | None:
    """Return the operating system's number of a failure to write; None if the error is another one."""
    if isinstance(error, OSError):
        return error.errno
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors' errors hold it in their text
        return int(found[1])
    is_torchs = isinstance(error, RuntimeError) and any(text in str(error) for text in _TORCH_COULD_NOT_WRITE)
    return errno.ENOSPC if is_torchs else None


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path` in one step, on failure it vanishes.

    Raises:
        OutputError: It cannot be written.
    """
    target = Path(path)
    with told_of(target):
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


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor]) -> None:
    """Write `tensors` (any shapes) to `path` as safetensors, atomically."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"}
        )


# Reading -------------------------------------------------------------------------------------------------------------


def require_adapter_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder of an adapter, after the end of a save into it that was killed.

    Raises:
        CheckpointError: There is no such folder.
    """
    folder = Path(path)
    if not os.path.isdir(folder):
        raise bad_value(
            "adapter", str(path), "no such folder; give the folder that holds adapter_config.json", CheckpointError
        )
    settle(folder)
    return folder


def require_regular_file(path: str | os.PathLike[str]) -> Path:
    """Return `path` if it is a regular file, or a symlink to one: a FIFO or a device would never end.

    Raises:
        CheckpointError: It is missing, or something else.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        is_missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        reason = "the file is missing" if is_missing else f"cannot be read ({error})"
        raise CheckpointError(f"{path}: {reason}; use another checkpoint") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: it is no regular file; use another checkpoint")
    return Path(path)


def own_file(folder: Path, name: str) -> Path:
    """Return the regular file `name` of an adapter's folder.

    A symlink may lead to another file of the folder, or to where the hub's cache keeps the files of its snapshots, and
    nowhere else: what a stranger's adapter points to is not read, and not copied into an export.

    Raises:
        CheckpointError: It is missing, no regular file, or a symlink to elsewhere.
    """
    file = require_regular_file(folder / name)
    home, real = folder.resolve(), file.resolve()
    cache = [parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots"]
    if not any(real.is_relative_to(root) for root in (home, *cache)):
        raise CheckpointError(f"{file}: a symlink to {real}, outside of its folder; put the file itself there")
    return file


@contextmanager
def _readable(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield `path`; what goes wrong while it is read is a CheckpointError that names it."""
    from safetensors import SafetensorError

    file = require_regular_file(path)
    try:
        yield file
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError, OverflowError) as error:
        # RuntimeError: JSON nested too deeply, and shapes that overflow; KeyError: a dtype that torch lacks.
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: truncated or edited ({reason}); use another checkpoint") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return the JSON value in `path`.

    Raises:
        CheckpointError: The file is missing, truncated, no regular file, or not JSON.
    """
    with _readable(path) as file:
        if file.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"larger than {_LARGEST_JSON // 2**20} MiB")
        return json.loads(file.read_text(encoding="utf-8"))


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of the safetensors file `path`, on the CPU.

    Raises:
        CheckpointError: The file is missing, truncated or not safetensors.
    """
    from safetensors.torch import load_file

    with _readable(path) as file:
        return load_file(file)


# Digests -------------------------------------------------------------------------------------------------------------


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
