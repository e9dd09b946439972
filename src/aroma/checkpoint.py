"""Whole adapters on disk: written atomically, checked, and found again."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from .errors import CheckpointError, ConfigError
from .files import require_adapter_folder
from .saved import read_adapter, require_vouched
from .sharding import sharding_of_model
from .tuner.state import STATE_FILE, STATE_TENSORS_FILE, read_state

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def save_adapter(model: Any, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write an adapter of `model` into `folder`; a kill leaves either the old files or the new ones.

    `model.save_pretrained` overwrites tensors in place. This function writes all files elsewhere, checks them, and
    then moves them, `aroma_state.json` last because it holds the digests of the others.

    Under DistributedDataParallel, ZeRO-1 and ZeRO-2 rank 0 calls this. Under FSDP2 and ZeRO-3 all ranks do: they
    gather the trained parameters, and wait until rank 0 has written them.

    Args:
        model: A PeftModel with an AROMA adapter.
        folder: Where to write; created if missing. Files of other names in it, and a README.md, are left alone.
        adapter_name: Adapter to write.

    Raises:
        CheckpointError: The written files do not fit together.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    if not sharding_of_model(model).must_gather(model.parameters()):
        _write_adapter(model, target, adapter_name)
        return
    try:
        _write_adapter(model, target, adapter_name, writes=dist.get_rank() == 0)
    finally:  # so that no rank waits for one that failed
        dist.barrier()


def _write_adapter(model: Any, target: Path, adapter_name: str, writes: bool = True) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as staging:
        model.save_pretrained(staging, selected_adapters=[adapter_name], is_main_process=writes)
        if not writes:
            return
        # PEFT gives every adapter but "default" a folder of its own.
        source = Path(staging) if adapter_name == "default" else Path(staging) / adapter_name
        verify_adapter(source)
        files = [file for file in source.iterdir() if file.name != "README.md" or not (target / file.name).exists()]
        for file in sorted(files, key=lambda file: file.name == STATE_FILE):
            os.replace(file, target / file.name)
        if not any(file.name == STATE_TENSORS_FILE for file in files):
            (target / STATE_TENSORS_FILE).unlink(missing_ok=True)


def verify_adapter(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Check that the adapter in `folder` is complete, and return its `aroma_state`.

    Raises:
        CheckpointError: Naming a file that is missing, truncated, edited, or of another save than the others.
    """
    path = require_adapter_folder(folder)
    state = read_state(path)
    if os.path.lexists(path / SAFETENSORS_WEIGHTS_NAME):
        try:
            read_adapter(path)
        except ConfigError as error:  # another kind of adapter, which AROMA does not save
            raise CheckpointError(f"{path}: {error}") from error
    elif not os.path.lexists(path / WEIGHTS_NAME):
        raise CheckpointError(f"{path / SAFETENSORS_WEIGHTS_NAME}: the file is missing; use another checkpoint")
    else:
        require_vouched(path, state)
    return state


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the latest complete `checkpoint-N` folder in a Trainer's `output_dir`; None if there is none.

    A training that is killed during a save leaves a folder from which no run can resume, but which
    `get_last_checkpoint` would return. The Trainer writes `trainer_state.json` last, so a folder is complete if that
    file is.
    """
    root = Path(output_dir)
    if not root.is_dir():
        return None
    found = [(int(match[1]), entry) for entry in root.iterdir() if (match := _CHECKPOINT.fullmatch(entry.name))]
    for _, entry in sorted(found, reverse=True):
        if entry.is_dir() and _is_complete(entry):
            return str(entry)
    return None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        verify_adapter(checkpoint)
    except (CheckpointError, FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return False
    return True
