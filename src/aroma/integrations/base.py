"""What both callbacks share: the Trainer calls them before a training reads anything of a checkpoint."""

from __future__ import annotations

import functools
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerState, trainer_callback

from ..errors import CheckpointError

_WRAPPED = "aroma_callbacks"


class TrainingCallback(TrainerCallback, trainer_callback.ExportableState):
    """A callback that `Trainer.train` calls first, and whose state is part of every checkpoint.

    The first one replaces `Trainer.train` in this process by a wrapper, because the Trainer shows callbacks neither
    itself nor the checkpoint that it resumes from.
    """

    def __init__(self) -> None:
        train = Trainer.train
        if hasattr(train, _WRAPPED):
            return

        @functools.wraps(train)
        def wrapped(self: Any, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
            for callback in [*self.callback_handler.callbacks]:
                if isinstance(callback, TrainingCallback):
                    resume_from_checkpoint = callback.before_training(self, resume_from_checkpoint)
            return train(self, resume_from_checkpoint, *args, **options)

        setattr(wrapped, _WRAPPED, True)
        Trainer.train = wrapped

    def before_training(self, trainer: Any, resume_from_checkpoint: Any) -> Any:
        """Return what to resume from, before any of it is read; called on all ranks."""
        return resume_from_checkpoint

    def attributes(self) -> dict[str, Any]:
        """Return what a checkpoint holds of this training."""
        raise NotImplementedError

    def saved(self, state: TrainerState) -> dict[str, Any]:
        """Return the `attributes()` of the checkpoint that the Trainer resumes.

        Raises:
            CheckpointError: It was trained without this callback.
        """
        name = type(self).__name__
        found: dict[str, Any] = (state.stateful_callbacks.get(name) or {}).get("attributes") or {}
        if not any(found.values()):
            remedy = "resume one that was trained with this callback, or load the adapter and start a new run"
            raise CheckpointError(f"trainer_state.json: the checkpoint has no state of {name}; {remedy}")
        return found

    def state(self) -> dict[str, Any]:
        """Return what the Trainer stores in a checkpoint's `trainer_state.json`, its last file; only rank 0 calls."""
        return {"args": {}, "attributes": self.attributes()}
