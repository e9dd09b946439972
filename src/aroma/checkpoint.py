"""Adapters and checkpoints on disk: written atomically, checked, and found again."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from .card import CARD_FILE
from .distributed import of_first_rank, rank, refuse_together, world_size
from .errors import AromaWarning, CheckpointError, bad_value
from .files import read_manifest, replacing_files, require_files, write_errors, write_manifest
from .saved import read_adapter
from .sharding import sharding_of_model
from .state import read_state
from .tuner import live_adapter

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

RECORD_FILE = "aroma_checkpoint.json"
RECORD_FORMAT = 2
_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,18})")
_LEFT = re.compile(r"\..+\.tmp")
"""Names of files that killed writes have left."""


# Adapters ------------------------------------------------------------------------------------------------------------


def save_adapter(model: Any, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write an adapter of `model` into `folder` atomically: a kill leaves the old adapter or the new one.

    All files are written elsewhere, checked, synced to the disk, and then moved to their places. After a kill among
    the moves the next save finishes them, and readers of AROMA refuse the folder until then (docs/serving.md).

    Under DistributedDataParallel, ZeRO-1 and ZeRO-2 rank 0 calls this. Under FSDP2 and ZeRO-3 all ranks do: they
    gather the trained parameters, and wait until rank 0 has written them.

    Args:
        model: A PeftModel with an AROMA adapter.
        folder: Where to write; created if missing. Other files stay, and so does what PEFT did not write in README.md.
        adapter_name: Adapter to write.

    Raises:
        ConfigError: The model has no AROMA adapter of that name.
        CheckpointError: The written files do not fit together, or `folder` is a file.
    """
    live_adapter(model, adapter_name)
    sharding, target = sharding_of_model(model), Path(folder)
    with ExitStack() as stack:
        if not sharding.must_gather(model.parameters()):
            _write_adapter(model, target, stack.enter_context(replacing_files(target)), adapter_name)
            return
        stack.callback(dist.barrier)  # last: until rank 0 has written, or failed
        is_first = dist.get_rank() == 0
        # Before any rank gathers: it would wait for a first one that has no place to write to.
        with refuse_together(), write_errors(target):
            if is_first:
                new = stack.enter_context(replacing_files(target))
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
    return read_adapter(folder).state or read_state(folder)


# Checkpoints of a Trainer --------------------------------------------------------------------------------------------


def record_checkpoint(folder: str | os.PathLike[str], step: int) -> None:
    """Write `aroma_checkpoint.json`: the step, and the SHA-256 of every file, so that it is whole or not used."""
    root, apart = Path(folder), {RECORD_FILE, CARD_FILE}
    files = (Path(parent) / name for parent, _, names in os.walk(root) for name in names if not _LEFT.fullmatch(name))
    names = sorted({file.relative_to(root).as_posix() for file in files} - apart)
    write_manifest(root / RECORD_FILE, {"format": RECORD_FORMAT, "step": step}, names)


def verify_checkpoint(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Check that every file of a Trainer's checkpoint is as it was saved, and return its `aroma_checkpoint`.

    Weights, heads, optimizer, schedule, random states of all processes, the shards of FSDP2 and DeepSpeed, and
    `trainer_state.json`. A README.md is not looked at, and nothing is loaded.

    Raises:
        CheckpointError: Naming a file that is missing, truncated, edited, of another step, or not a regular file.
    """
    path = Path(folder)
    if not path.is_dir():
        remedy = "no such folder; give a checkpoint-N of the Trainer"
        raise bad_value("checkpoint", str(folder), remedy, CheckpointError)
    if not os.path.lexists(path / RECORD_FILE):
        raise CheckpointError(
            f"{path}: it has no {RECORD_FILE}: its save was killed, or no AromaCallback took part, so its inner and "
            "outer loops are unknown; resume from another checkpoint, or load the adapter and start a new run"
        )
    record = read_manifest(path / RECORD_FILE, RECORD_FORMAT)
    require_files(path, record)
    if not any("optim" in name for name in record["files"]):
        raise CheckpointError(
            f"{path}: it was saved without the optimizer (save_only_model?), so no run can go on from it exactly; use "
            "another checkpoint, or load its adapter and start a new run"
        )
    return record


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the latest whole `checkpoint-N` folder in a Trainer's `output_dir`; None if there is none.

    A training that is killed during a save leaves an incomplete one, which `get_last_checkpoint` would return. Here
    every file is compared with the digest that `AromaCallback` took (`verify_checkpoint`).

    Warns:
        AromaWarning: A folder was passed over, and why.
    """
    found = [
        (int(match[1]), entry) for entry in Path(output_dir).glob("*") if (match := _CHECKPOINT.fullmatch(entry.name))
    ]
    for _, entry in sorted(found, reverse=True):
        try:
            verify_checkpoint(entry)
            return str(entry)
        except CheckpointError as error:
            if rank() == 0:
                warnings.warn(
                    f"a checkpoint was passed over, so the run goes on from an earlier one, or begins anew: {error}",
                    AromaWarning,
                    stacklevel=2,
                )
    return None


# In a Trainer --------------------------------------------------------------------------------------------------------


def record_save(args: TrainingArguments, state: TrainerState) -> None:
    """Record the checkpoint that the Trainer has saved; called by all processes.

    The Trainer has removed older checkpoints by then: keep two or more, in case of a kill in between.
    """
    if world_size() > 1:  # all have saved their parts
        dist.barrier()
    folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
    if args.should_save and folder.is_dir():
        record_checkpoint(folder, state.global_step)


def whole_checkpoint(resumed: Any, args: TrainingArguments) -> str:
    """Return the checkpoint to resume from, once it is found to be whole; called on all ranks.

    `True` takes the latest whole checkpoint, not the latest folder.

    Raises:
        CheckpointError: It is not, or there is none.
    """
    found = resumed
    with refuse_together():
        if resumed is True and rank() == 0:
            found = last_complete_checkpoint(str(args.output_dir))
            if found is None:
                remedy = f"{args.output_dir} holds no whole checkpoint; train anew, without it"
                raise bad_value("resume_from_checkpoint", True, remedy, CheckpointError)
    found = of_first_rank(found) if resumed is True else os.fspath(resumed)
    with refuse_together():
        # One process of every machine, whose disk may be its own.
        if args.local_process_index == 0 and (resumed is not True or rank() > 0):
            verify_checkpoint(found)
    return str(found)
