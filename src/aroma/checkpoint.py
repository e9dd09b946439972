"""Whole adapters and checkpoints on disk: written as one act, checked, and found again."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import stat
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from .card import CARD_FILE
from .errors import CheckpointError, ConfigError, bad_value
from .files import file_digest, remove_leftovers, require_adapter_folder, told_of, write_json
from .folders import replacing_files
from .saved import read_adapter, require_vouched
from .sharding import rank, refuse_together, sharding_of_model, world_size
from .tuner.live import live_adapter
from .tuner.state import STATE_FILE, STATE_TENSORS_FILE, WEIGHT_FILES, checksum_of, read_state, require_checksum

if TYPE_CHECKING:
    from transformers import TrainerState

ADAPTER_FILES = ("adapter_config.json", *WEIGHT_FILES, STATE_FILE, STATE_TENSORS_FILE)
"""Files that belong to one moment of an adapter."""
RECORD_FILE = "aroma_checkpoint.json"
RECORD_FORMAT = 1
TRAINER_STATE_FILE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,18})")
_LOADED = re.compile(r".*\.(bin|pt|pth|safetensors|distcp)|.*\.index\.json")
"""Names of files that a Trainer may load if they are there."""


# Adapters ------------------------------------------------------------------------------------------------------------


def save_adapter(model: Any, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write an adapter of `model` into `folder` as one act: whenever it is killed, the old or the new one is there.

    `model.save_pretrained` overwrites one file after the other. This function writes all of them elsewhere, checks
    them, waits until they are on the disk, and exchanges the folder for the new one (docs/files.md says what happens
    where the system has no such call). Of two processes that write into one folder, one wins whole.

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
    with ExitStack() as stack:
        # PEFT gives every adapter but "default" a folder of its own.
        staging = new if adapter_name == "default" else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if (target / CARD_FILE).is_file():
            shutil.copyfile(target / CARD_FILE, staging / CARD_FILE)
        model.save_pretrained(staging, selected_adapters=[adapter_name])
        if adapter_name != "default":
            for file in (staging / adapter_name).iterdir():
                shutil.copyfile(file, new / file.name)
    verify_adapter(new)


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


# Checkpoints of a Trainer --------------------------------------------------------------------------------------------


def record_checkpoint(folder: str | os.PathLike[str], state: TrainerState) -> dict[str, Any]:
    """Write `aroma_checkpoint.json`: size and SHA-256 of every file in a checkpoint, so that it is whole or not used.

    To be called when all files are there but `trainer_state.json`, the Trainer's last; the record says what that file
    will hold, apart from the state of callbacks. As soon as it is written the Trainer may remove older checkpoints, so
    the new one counts from then on. `complete_record` adds its digest.

    Args:
        folder: The checkpoint.
        state: What `trainer_state.json` will hold.

    Returns:
        The record.
    """
    root = Path(folder)
    apart = (RECORD_FILE, TRAINER_STATE_FILE, CARD_FILE)
    remove_leftovers(root)
    names = [name for name in _files_below(root) if name not in apart and (root / name).is_file()]
    with ThreadPoolExecutor(8) as threads:  # hashing leaves the interpreter to others
        facts = [*threads.map(lambda name: _facts(root / name), names)]
    record = {
        "format": RECORD_FORMAT,
        "step": state.global_step,
        "processes": world_size(),
        "trainer_state": _settled(_as_written(state)),
        "files": dict(zip(names, facts, strict=True)),
    }
    _write_record(root, record)
    return record


def complete_record(folder: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """Add the digest of `trainer_state.json` to what `record_checkpoint` has written.

    A checkpoint that the Trainer has removed again, as `save_total_limit` may demand, stays away.
    """
    root = Path(folder)
    if not root.is_dir():
        return
    record["files"][TRAINER_STATE_FILE] = _facts(root / TRAINER_STATE_FILE)
    _write_record(root, record)


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    write_json(folder / RECORD_FILE, {**record, "checksum": checksum_of(record)})


def _facts(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": file_digest(file)}


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
        _require_file(path, name, facts)
    if TRAINER_STATE_FILE not in record["files"]:
        _require_trainer_state(path, record)
    for name in _files_below(path):
        # Of a folder, too, the Trainer loads what is in it.
        if name not in record["files"] and (_LOADED.fullmatch(name) or (path / name).is_dir()):
            raise CheckpointError(f"{path / name}: this file is not of the save; remove it, or use another checkpoint")
    for what, pattern in _EXACT.items():
        if not any(re.fullmatch(pattern, name) for name in record["files"]):
            raise CheckpointError(
                f"{path}: it was saved without {what} (save_only_model?), so no run can go on from it exactly; use "
                "another checkpoint, or load its adapter and start a new run"
            )
    return record


_EXACT = {
    "the optimizer": r"optimizer\.(pt|bin)|optimizer_\d+/.*|global_step\d+/.*optim_states\.pt",
    "the random state": r"rng_state(_\d+)?\.pth",
}


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the latest whole `checkpoint-N` folder in a Trainer's `output_dir`; None if there is none.

    A training that is killed during a save leaves a folder from which no run can resume, but which
    `get_last_checkpoint` would return. Every file of the moment is compared with the digest that `AromaCallback` took
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


def _files_below(folder: Path) -> list[str]:
    """Return the names of all in `folder` and the folders below it, but for folders; symlinks are not followed."""
    found = []
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        found += [(Path(parent) / name).relative_to(folder).as_posix() for name in [*names, *links]]
    return sorted(found)


def _read_record(folder: Path) -> dict[str, Any]:
    file = folder / RECORD_FILE
    if not os.path.lexists(file):
        raise CheckpointError(
            f"{folder}: it has no {RECORD_FILE}: its save was killed, or no AromaCallback took part, so its inner and "
            "outer loops are unknown; resume from another checkpoint, or load the adapter and start a new run"
        )
    record = _load(file)
    if record.get("format") != RECORD_FORMAT:
        remedy = f"this aroma reads format {RECORD_FORMAT}; upgrade aroma-peft, or use another checkpoint"
        raise bad_value(f"{file}: format", record.get("format"), remedy, CheckpointError)
    require_checksum(record, str(file))
    facts = record.get("files")
    fits = isinstance(facts, dict) and all(isinstance(fact, dict) and fact.keys() == _FACTS for fact in facts.values())
    if not fits or not isinstance(record.get("step"), int):
        raise CheckpointError(f"{file}: no run writes that; use another checkpoint")
    return record


_FACTS = {"bytes", "sha256"}


def _load(file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`; the Trainer's has NaN and infinity where the run logged them."""
    _require_regular(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        json.dumps(content)  # what is nested as deeply as can be read cannot be written
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: truncated or edited ({str(error)[:200]}); use another checkpoint") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: edited (it holds no object); use another checkpoint")
    return content


def _require_regular(file: Path) -> os.stat_result:
    """Raise unless `file` is a regular one, or a symlink to one, before it is opened: nothing else ends for sure."""
    try:
        status = file.stat()
    except (OSError, ValueError) as error:  # a name with a zero byte
        raise CheckpointError(f"{file}: missing or unreadable ({_reason(error)}); {_REMEDY}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{file}: it is no file; {_REMEDY}")
    return status


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)[:200]


_REMEDY = "a save was killed, or it was changed since; use another checkpoint"


def _require_file(folder: Path, name: str, facts: dict[str, Any]) -> None:
    """Raise unless the file `name` below `folder` has the recorded size and digest."""
    file = folder / name
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise bad_value(f"{folder / RECORD_FILE}: files", name, "it lies elsewhere; use another one", CheckpointError)
    size = _require_regular(file).st_size
    if size != facts["bytes"]:
        raise CheckpointError(f"{file}: truncated or edited ({size} bytes instead of {facts['bytes']}); {_REMEDY}")
    try:
        digest = file_digest(file)
    except OSError as error:
        raise CheckpointError(f"{file}: unreadable ({_reason(error)}); {_REMEDY}") from error
    if digest != facts["sha256"]:
        raise bad_value(f"{file}: sha256", digest, f"edited, or of another save: {_REMEDY}", CheckpointError)


def _require_trainer_state(folder: Path, record: dict[str, Any]) -> None:
    """Check a `trainer_state.json` whose digest is unknown, as the run was killed right after it was written."""
    file = folder / TRAINER_STATE_FILE
    if _settled(_load(file)) != record.get("trainer_state"):
        raise CheckpointError(f"{file}: edited, or of another save than {RECORD_FILE}; use another checkpoint")


def _as_written(state: TrainerState) -> dict[str, Any]:
    """Return what `trainer_state.json` holds of a state, callbacks left out."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    written: dict[str, Any] = json.loads(json.dumps({**fields, "stateful_callbacks": None}))
    return written


def _settled(state: dict[str, Any]) -> str:
    """Return a digest of a `trainer_state.json`, callbacks left out."""
    return checksum_of({**state, "stateful_callbacks": None})
