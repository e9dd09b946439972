"""Whole adapters and checkpoints on disk: written as one act, checked, and found again."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from .card import CARD_FILE
from .distributed import rank, refuse_together, world_size
from .errors import CheckpointError, bad_value
from .files import file_digest, read_json, require_adapter_folder, require_regular_file, told_of, write_json
from .folders import replacing_files
from .saved import read_adapter, require_vouched
from .sharding import sharding_of_model
from .tuner.live import live_adapter
from .tuner.state import STATE_FILE, STATE_TENSORS_FILE, WEIGHT_FILES, checksum_of, read_state, require_checksum

ADAPTER_FILES = ("adapter_config.json", *WEIGHT_FILES, STATE_FILE, STATE_TENSORS_FILE)
"""Files that belong to one moment of an adapter."""
RECORD_FILE = "aroma_checkpoint.json"
RECORD_FORMAT = 1
TRAINER_STATE_FILE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,18})")
_LOADED = re.compile(r".*\.(bin|pt|pth|safetensors|distcp)|.*\.index\.json")
"""Names of files that a Trainer loads if they are there."""
_EXACT = {
    "the optimizer": r"optimizer\.(pt|bin)|optimizer_\d+/.*|global_step\d+/.*optim_states\.pt",
    "the random state": r"rng_state(_\d+)?\.pth",
}
"""What an exact resume needs, by the names of its files."""


# Adapters ------------------------------------------------------------------------------------------------------------


def save_adapter(model: Any, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write an adapter of `model` into `folder` as one act: whenever it is killed, the old or the new one is there.

    `model.save_pretrained` overwrites one file after the other. This function writes all of them elsewhere, checks
    them, waits until they are on the disk, and moves them to their places. A reader of AROMA, or the next save,
    finishes a move that was killed (docs/files.md).

    Under DistributedDataParallel, ZeRO-1 and ZeRO-2 rank 0 calls this. Under FSDP2 and ZeRO-3 all ranks do: they
    gather the trained parameters, and wait until rank 0 has written them.

    Args:
        model: A PeftModel with an AROMA adapter.
        folder: Where to write; created if missing. Files of other names in it are left alone; of its README.md,
            what PEFT does not write.
        adapter_name: Adapter to write.

    Raises:
        ConfigError: The model has no AROMA adapter of that name.
        CheckpointError: The written files do not fit together, or `folder` is a file.
    """
    live_adapter(model, adapter_name)
    sharding, target = sharding_of_model(model), Path(folder)
    with ExitStack() as stack:
        if not sharding.must_gather(model.parameters()):
            _write_adapter(model, target, stack.enter_context(replacing_files(target, ADAPTER_FILES)), adapter_name)
            return
        stack.callback(dist.barrier)  # last: until rank 0 has written, or failed
        is_first = dist.get_rank() == 0
        # Before any rank gathers: it would wait for a first one that has no place to write to.
        with refuse_together(sharding.device(next(model.parameters()))), told_of(target):
            if is_first:
                new = stack.enter_context(replacing_files(target, ADAPTER_FILES))
            else:
                new = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if is_first:
            _write_adapter(model, target, new, adapter_name)
        else:
            model.save_pretrained(new, selected_adapters=[adapter_name], is_main_process=False)


def _write_adapter(model: Any, target: Path, new: Path, adapter_name: str) -> None:
    """Write an adapter into `new`, with the card of `target`, which PEFT brings up to date."""
    if (target / CARD_FILE).is_file():
        shutil.copyfile(target / CARD_FILE, new / CARD_FILE)
    model.save_pretrained(new, selected_adapters=[adapter_name])
    if adapter_name != "default":  # PEFT gives every adapter but "default" a folder of its own
        for file in (new / adapter_name).iterdir():
            os.replace(file, new / file.name)
        shutil.rmtree(new / adapter_name)
    verify_adapter(new)


def verify_adapter(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Check that the adapter in `folder` is complete, and return its `aroma_state`.

    Raises:
        CheckpointError: Naming a file that is missing, truncated, edited, or of another save than the others.
    """
    path = require_adapter_folder(folder)
    state = read_state(path)
    if os.path.lexists(path / SAFETENSORS_WEIGHTS_NAME) or not os.path.lexists(path / WEIGHTS_NAME):
        read_adapter(path)
    else:
        require_vouched(path, state)
    return state


# Checkpoints of a Trainer --------------------------------------------------------------------------------------------


def record_checkpoint(
    folder: str | os.PathLike[str], step: int, earlier: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write `aroma_checkpoint.json`, the SHA-256 of every file in a checkpoint, so that it is whole or not used.

    Args:
        folder: The checkpoint, all of whose files are there but, without an `earlier` record, `trainer_state.json`.
        step: Optimizer steps.
        earlier: The record without that file, whose digests are taken over.

    Returns:
        The record.
    """
    root = Path(folder)
    known = earlier["files"] if earlier is not None else {}
    apart = {RECORD_FILE, CARD_FILE, *([] if earlier is not None else [TRAINER_STATE_FILE])}
    names = [name for name in _files_below(root) if name not in {*apart, *known}]
    with ThreadPoolExecutor(8) as threads:  # hashing leaves the interpreter to others
        facts = [*threads.map(lambda name: _facts(root / name), names)]
    record = {
        "format": RECORD_FORMAT,
        "step": step,
        "processes": world_size(),
        "files": {**known, **dict(zip(names, facts, strict=True))},
    }
    write_json(root / RECORD_FILE, {**record, "checksum": checksum_of(record)})
    return record


def _facts(file: Path) -> dict[str, Any]:
    return {"bytes": require_regular_file(file).stat().st_size, "sha256": file_digest(file)}


def _files_below(folder: Path) -> list[str]:
    """Return the names of all files in `folder` and the folders below it, but for those that killed writes left."""
    found = (Path(parent) / name for parent, _, names in os.walk(folder) for name in names)
    is_left = re.compile(r"\..+\.tmp")
    return sorted(file.relative_to(folder).as_posix() for file in found if not is_left.fullmatch(file.name))


def verify_checkpoint(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Check that every file of a Trainer's checkpoint is as it was saved, and return its `aroma_checkpoint`.

    Weights, heads, optimizer, schedule, random states of all processes, the shards of FSDP2 and DeepSpeed, and
    `trainer_state.json`. A README.md is not looked at, and nothing is loaded.

    Raises:
        CheckpointError: Naming a file that is missing, truncated, edited, of another step, or no file at all.
    """
    path = Path(folder)
    if not path.is_dir():
        raise bad_value(
            "checkpoint", str(folder), "no such folder; give a checkpoint-N of the Trainer", CheckpointError
        )
    record = _read_record(path)
    named = _CHECKPOINT.fullmatch(path.resolve().name)
    if named is not None and int(named[1]) != record["step"]:
        raise CheckpointError(f"{path}: it holds step {record['step']}, as the folder was renamed; use another one")
    for name, facts in record["files"].items():
        if _facts(path / name) != facts:
            raise CheckpointError(f"{path / name}: truncated, edited, or of another save; use another checkpoint")
    # A run that was killed right after that file was written had no time to record it.
    if TRAINER_STATE_FILE not in record["files"] and _step_of(path / TRAINER_STATE_FILE) != record["step"]:
        raise CheckpointError(f"{path / TRAINER_STATE_FILE}: edited, or of another save; use another checkpoint")
    for name in _files_below(path):
        if name not in record["files"] and _LOADED.fullmatch(name):
            raise CheckpointError(f"{path / name}: this file is not of the save; remove it, or use another checkpoint")
    for what, pattern in _EXACT.items():
        if not any(re.fullmatch(pattern, name) for name in record["files"]):
            raise CheckpointError(
                f"{path}: it was saved without {what} (save_only_model?), so no run can go on from it exactly; use "
                "another checkpoint, or load its adapter and start a new run"
            )
    return record


def _read_record(folder: Path) -> dict[str, Any]:
    file = folder / RECORD_FILE
    if not os.path.lexists(file):
        raise CheckpointError(
            f"{folder}: it has no {RECORD_FILE}: its save was killed, or no AromaCallback took part, so its inner and "
            "outer loops are unknown; resume from another checkpoint, or load the adapter and start a new run"
        )
    record = read_json(file)
    if not isinstance(record, dict) or record.get("format") != RECORD_FORMAT:
        remedy = f"this aroma reads format {RECORD_FORMAT}; upgrade aroma-peft, or use another checkpoint"
        raise bad_value(f"{file}: format", str(record)[:40], remedy, CheckpointError)
    require_checksum(record, str(file))
    if "step" not in record:
        raise CheckpointError(f"{file}: it is another file's content; use another checkpoint")
    return record


def _step_of(file: Path) -> object:
    content = read_json(file)
    return content.get("global_step") if isinstance(content, dict) else None


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the latest whole `checkpoint-N` folder in a Trainer's `output_dir`; None if there is none.

    A training that is killed during a save leaves a folder from which no run can resume, but which
    `get_last_checkpoint` would return. Every file is compared with the digest that `AromaCallback` took
    (`verify_checkpoint`), and whatever is wrong with a folder, an earlier one is returned.

    Warns:
        UserWarning: Which folders were passed over, and why.
    """
    root = Path(output_dir)
    if not root.is_dir():
        return None
    found = [(int(match[1]), entry) for entry in root.iterdir() if (match := _CHECKPOINT.fullmatch(entry.name))]
    passed_over, whole = [], None
    for _, entry in sorted(found, reverse=True):
        try:
            verify_checkpoint(entry)
        except CheckpointError as error:
            passed_over.append(str(error))
        else:
            whole = str(entry)
            break
    if passed_over and rank() == 0:
        remedy = f"the run goes on from {whole}" if whole else "no other is whole, so the run begins anew"
        warnings.warn("\n".join([f"checkpoints were passed over, and {remedy}:", *passed_over]), stacklevel=2)
    return whole
