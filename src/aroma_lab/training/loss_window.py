"""The loss that the Trainer has summed up since it last logged, across a resume."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState


class LossWindow(TrainerCallback, ExportableState):
    """Keeps it in the checkpoints: a resumed Trainer would log the mean over fewer steps than the uninterrupted one.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """On resume, go on with the sum of the checkpoint."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step > 0 and saved is not None:
            window = saved["attributes"]
            self._trainer._tr_loss = torch.tensor(window["loss"], device=args.device)
            self._trainer._globalstep_last_logged = window["logged"]

    def state(self) -> dict[str, Any]:
        """Return what the Trainer stores in a checkpoint; it asks before the training begins, too."""
        loss = float(getattr(self._trainer, "_tr_loss", 0.0))
        logged = getattr(self._trainer, "_globalstep_last_logged", 0)
        return {"args": {}, "attributes": {"loss": loss, "logged": logged}}
