"""Files that are whole or absent: atomic writes, manifests, checked reads. Safetensors and JSON only."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, OutputError, bad_value

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_TORCH_COULD_NOT_WRITE = ("inline_container", "iostream error")
"""What torch.save says in place of the operating system's reason."""
_ARRIVING = ".aroma-arriving"
"""Folder with the files of a save that are on their way to their places."""
_SAVING = ".aroma-saving-"
"""Begins the name of the folder that a save writes into."""


# Writing -------------------------------------------------------------------------------------------------------------


@contextmanager
def write_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a failure to write, of the operating system, safetensors or torch, into one that names the right file.

    Raises:
        OutputError: It cannot be written.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if type(error) is RuntimeError and not any(text in str(error) for text in _TORCH_COULD_NOT_WRITE):
            raise
        reason = getattr(error, "strerror", None) or ("disk full?" if type(error) is RuntimeError else error)
        named = OutputError(f"{os.fspath(path)}: cannot be written ({reason}); make room, or give another place")
        named.strerror = str(reason)
        raise named from error


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path` in one step, on failure it vanishes.

    Raises:
        OutputError: It cannot be written.
    """
    target = Path(path)
    with write_errors(target):
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
            _sync(temporary)
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


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` (any shapes) to `path` as safetensors, atomically."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"}
        )


@contextmanager
def replacing_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder; at the end of the block its files replace those in `folder`, as one act.

    One rename marks the new files as complete; then each moves to its place. A kill before that rename leaves the old
    files. A kill after it leaves the rest of the new ones in `.aroma-arriving`: the next save moves them, and readers
    refuse the folder until then (`require_adapter_folder`). Files of other names stay. One process at a time may
    write. A missing folder is made, and a symlink followed.

    Raises:
        CheckpointError: It is a file.
    """
    target = Path(os.path.realpath(folder))
    if target.exists() and not target.is_dir():
        raise bad_value("folder", str(target), "it is a file; give a folder", CheckpointError)
    target.mkdir(parents=True, exist_ok=True)
    _finish_save(target)
    for left in target.glob(f"{_SAVING}*"):  # by a killed writer
        shutil.rmtree(left, ignore_errors=True)
    new = Path(tempfile.mkdtemp(dir=target, prefix=_SAVING))
    try:
        yield new
        for file in (*new.iterdir(), new):
            _sync(file)
        new.rename(target / _ARRIVING)
        _sync(target)
        _finish_save(target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _finish_save(target: Path) -> None:
    """Move the files of a save that arrived to their places; the save may be one that was killed meanwhile."""
    arriving = target / _ARRIVING
    if arriving.is_dir() and not arriving.is_symlink():  # no save leaves a symlink
        for file in [*arriving.iterdir()]:
            os.replace(file, target / file.name)
        _sync(target)
        arriving.rmdir()


def _sync(path: Path) -> None:
    """Let a file, or the entries of a folder, reach the disk."""
    if path.is_dir() and os.name == "nt":  # it syncs no folder, and no file that is open for reading only
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems cannot do it for folders
            raise
    finally:
        os.close(handle)


# Reading -------------------------------------------------------------------------------------------------------------


def require_adapter_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder of an adapter.

    Raises:
        CheckpointError: There is no such folder, or it has files of two saves.
    """
    if not os.path.isdir(path):
        raise bad_value(
            "adapter", str(path), "no such folder; give the folder that holds adapter_config.json", CheckpointError
        )
    if (arriving := Path(path, _ARRIVING)).is_dir():
        raise CheckpointError(
            f"{arriving}: files of a save that is not finished, or was killed before its last moves; save again, or "
            f"move these files into {path} and remove the empty folder"
        )
    return Path(path)


def _regular_file(path: str | os.PathLike[str]) -> Path:
    # A FIFO or a device would never end.
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: the file is missing, or no regular file; use another checkpoint")
    return Path(path)


def own_file(folder: Path, name: str) -> Path:
    """Return the regular file `name` of an adapter's folder.

    A symlink may lead to another file of the folder, or to where the hub's cache keeps the files of its snapshots, and
    nowhere else: what a stranger's adapter points to is not read, and not copied into an export.

    Raises:
        CheckpointError: It is missing, no regular file, or a symlink to elsewhere.
    """
    file = _regular_file(folder / name)
    home, real = folder.resolve(), file.resolve()
    cache = [parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots"]
    if not any(real.is_relative_to(root) for root in (home, *cache)):
        raise CheckpointError(f"{file}: a symlink to {real}, outside of its folder; put the file itself there")
    return file


@contextmanager
def _readable(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield `path`; errors while it is read become a CheckpointError that names it."""
    from safetensors import SafetensorError

    file = _regular_file(path)
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
        return json.loads(file.read_text(encoding="utf-8"))


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of the safetensors file `path`, on the CPU.

    Raises:
        CheckpointError: The file is missing, truncated or not safetensors.
    """
    from safetensors.torch import load_file

    with _readable(path) as file:
        return load_file(file)


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Return the floating tensors of the safetensors file `path` as arrays, without PyTorch; bfloat16 as float32.

    Raises:
        CheckpointError: The file is missing, truncated or not safetensors.
    """
    import numpy as np
    from safetensors import deserialize

    read: Any = deserialize
    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    with _readable(path) as file:
        for name, tensor in read(file.read_bytes()):
            if tensor["dtype"] in kinds:
                flat = np.frombuffer(tensor["data"], kinds[tensor["dtype"]])
            elif tensor["dtype"] == "BF16":
                flat = (np.frombuffer(tensor["data"], np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                continue
            arrays[name] = flat.reshape(tensor["shape"])
    return arrays


# Manifests -----------------------------------------------------------------------------------------------------------


def write_manifest(path: str | os.PathLike[str], content: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Write JSON with a checksum of its own and the SHA-256 of the files `names` beside it; return its content.

    A save writes it last.
    """
    manifest = {**content, "files": {name: file_digest(Path(path).parent / name) for name in names}}
    write_json(path, {**manifest, "checksum": _checksum(manifest)})
    return manifest


def read_manifest(path: str | os.PathLike[str], version: int) -> dict[str, Any]:
    """Return a manifest of the format `version`; its files are not looked at (`require_files`).

    Raises:
        CheckpointError: It is missing, damaged, edited, or of another format.
    """
    manifest = read_json(path)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != version:
        remedy = f"this aroma reads format {version}; upgrade aroma-peft, or use another checkpoint"
        raise bad_value(f"{path}: format", found, remedy, CheckpointError)
    checksum = manifest.pop("checksum", None)
    if checksum != _checksum(manifest):
        remedy = "it does not fit the content, so the file was edited; use another checkpoint"
        raise bad_value(f"{path}: checksum", checksum, remedy, CheckpointError)
    return dict(manifest)


def require_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Check that the files in `folder` are those that a manifest was written with.

    Raises:
        CheckpointError: A file is missing, truncated, edited, or of another save; it is named.
    """
    for name, digest in manifest["files"].items():
        if file_digest(own_file(folder, name)) != digest:
            raise CheckpointError(f"{folder / name}: truncated, edited, or of another save; use another checkpoint")


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        CheckpointError: It is missing or no regular file.
    """
    with _regular_file(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over names, dtypes, shapes and bytes of `tensors`, whatever their order and device."""
    from safetensors.torch import save

    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    return hashlib.sha256(save(ordered)).hexdigest()
