"""The Trainer's checkpoints, recorded when written and checked before anything of them is read."""

from __future__ import annotations

import functools
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import DefaultFlowCallback, Trainer, TrainerState, TrainingArguments

from ..checkpoint import complete_record, last_complete_checkpoint, record_checkpoint, verify_checkpoint
from ..errors import CheckpointError, bad_value
from ..sharding import refuse_together, world_size

_PREPARES = "aroma_prepares"


class CheckpointRecords:
    """Lets a callback of the Trainer record every checkpoint; see `aroma.checkpoint.record_checkpoint`.

    The process that writes `trainer_state.json` waits until all processes have saved what is theirs, and takes the
    digests of everything. It does so before it writes that file, because afterwards the Trainer removes older
    checkpoints. There the Trainer calls it alone, so the others meet it from their next event, `on_save`: in a group
    of their own, whose order nobody else disturbs.
    """

    def __init__(self) -> None:
        self._state: TrainerState | None = None
        self._group: Any = None
        self._written: tuple[Path, dict[str, Any]] | None = None
        self._has_met = False

    def begin(self, args: TrainingArguments, state: TrainerState) -> None:
        """Start with a training; all processes call it."""
        self._state, self._written, self._has_met = state, None, False
        if world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=args.ddp_timeout))

    def write(self, adapter: str | None) -> None:
        """Record a checkpoint; called by `state()` of a callback, when only `trainer_state.json` is missing.

        Args:
            adapter: Where the adapter was saved last.
        """
        if self._state is None or adapter is None:
            return
        name = f"checkpoint-{self._state.global_step}"
        # PEFT gives every adapter but "default" a folder of its own.
        folder = next((path for path in (Path(adapter), Path(adapter).parent) if path.name == name), None)
        if folder is not None:
            self._meet()
            self._written = folder, record_checkpoint(folder, self._state)

    def complete(self) -> None:
        """Complete the record, now that the checkpoint is; called by all processes after a save."""
        if not self._has_met:
            self._meet()
        self._has_met = False
        if self._written is not None:
            complete_record(*self._written)
            self._written = None

    def end(self) -> None:
        """End with a training; all processes call it."""
        self._state = None
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _meet(self) -> None:
        self._has_met = True
        if self._group is not None:
            dist.barrier(self._group)


def prepare_trainings(kind: type[Any]) -> None:
    """Let every Trainer that has a callback of `kind` check the checkpoint it resumes from, before it reads any of it.

    The Trainer tells no callback, so its `train` is wrapped. `resume_from_checkpoint=True` takes the latest whole
    checkpoint, not the latest folder. The callback is called before the trackers, so that they get what it logs.
    """
    train = Trainer.train
    if hasattr(train, _PREPARES):
        return

    @functools.wraps(train)
    def prepared(self: Any, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        known = self.callback_handler.callbacks
        if any(isinstance(one, kind) for one in known):
            known.sort(key=lambda one: (not isinstance(one, DefaultFlowCallback), not isinstance(one, kind)))
            if resume_from_checkpoint:
                resume_from_checkpoint = _checked(resume_from_checkpoint, self.args)
        return train(self, resume_from_checkpoint, *args, **options)

    setattr(prepared, _PREPARES, True)
    Trainer.train = prepared


def _checked(resumed: bool | str | os.PathLike[str], args: TrainingArguments) -> str:
    """Return the checkpoint to resume from, once it is found to be whole; called on all ranks.

    Raises:
        CheckpointError: It is not, or there is none.
    """
    with refuse_together(args.device):
        if resumed is not True:
            folder: str | None = os.fspath(resumed)  # type: ignore[arg-type]
            # One process of every machine, whose disk may be its own.
            if args.local_process_index == 0:
                verify_checkpoint(str(folder))
        else:
            folder = last_complete_checkpoint(str(args.output_dir))
            if folder is None:
                raise bad_value(
                    "resume_from_checkpoint",
                    True,
                    f"{args.output_dir} holds no whole checkpoint; train anew, without it",
                    CheckpointError,
                )
    return str(folder)
