"""What both callbacks share: the Trainer calls them before a training reads anything of a checkpoint."""

from __future__ import annotations

import functools
from typing import Any

from transformers import Trainer, TrainerCallback

_WRAPPED = "aroma_callbacks"


class TrainingCallback(TrainerCallback):
    """A callback that `Trainer.train` calls first.

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
