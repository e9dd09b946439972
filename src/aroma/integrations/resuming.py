"""The Trainer's checkpoints, recorded when written and checked before anything of them is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerState, TrainingArguments

from ..checkpoint import last_complete_checkpoint, record_checkpoint, verify_checkpoint
from ..distributed import refuse_together, world_size
from ..errors import CheckpointError, bad_value


class CheckpointRecords:
    """Lets a callback of the Trainer record every checkpoint; see `aroma.checkpoint.record_checkpoint`.

    A single process records it twice: when only `trainer_state.json` is missing, because after that file the Trainer
    removes older checkpoints, and with that file. Several processes record it once, after all have saved what is
    theirs: keep two checkpoints or more, in case of a kill between the two.
    """

    def __init__(self) -> None:
        self._running: tuple[TrainingArguments, TrainerState] | None = None
        self._record: dict[str, Any] | None = None

    def begin(self, args: TrainingArguments, state: TrainerState) -> None:
        """Start with a training."""
        self._running, self._record = (args, state), None

    def write(self) -> None:
        """Record a checkpoint; called by `state()` of a callback, when only `trainer_state.json` is missing."""
        if self._running is not None and world_size() == 1 and self._folder.is_dir():
            self._record = record_checkpoint(self._folder, self._running[1].global_step)

    def complete(self) -> None:
        """Record the checkpoint, now that it is complete; called by all processes after a save."""
        if self._running is None:
            return
        if world_size() > 1:
            dist.barrier()
        args, state = self._running
        if args.should_save and self._folder.is_dir():
            record_checkpoint(self._folder, state.global_step, self._record or {"files": {}})
        self._record = None

    def end(self) -> None:
        """End with a training."""
        self._running = None

    @property
    def _folder(self) -> Path:
        assert self._running is not None, "it has begun"
        args, state = self._running
        return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def whole_checkpoint(resumed: Any, args: TrainingArguments) -> str:
    """Return the checkpoint to resume from, once it is found to be whole; called on all ranks.

    `True` takes the latest whole checkpoint, not the latest folder.

    Raises:
        CheckpointError: It is not, or there is none.
    """
    with refuse_together(args.device):
        folder = last_complete_checkpoint(str(args.output_dir)) if resumed is True else os.fspath(resumed)
        if folder is None:
            remedy = f"{args.output_dir} holds no whole checkpoint; train anew, without it"
            raise bad_value("resume_from_checkpoint", True, remedy, CheckpointError)
        # One process of every machine, whose disk may be its own.
        if resumed is not True and args.local_process_index == 0:
            verify_checkpoint(folder)
    return folder
