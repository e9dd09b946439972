"""`progress.json`: how far a running trial is, for whoever waits for it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aroma.files import write_json

_INTERVAL = 2.0
"""Least seconds between two writes."""


class ProgressFile(TrainerCallback):
    """Writes step, planned steps, and when this attempt began and at which step, every few seconds.

    Args:
        path: The file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._started = time.time()
        self._first_step = 0
        self._written = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write where the attempt begins."""
        self._started, self._first_step = time.time(), state.global_step
        self._write(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write, unless it was done a moment ago."""
        if time.monotonic() - self._written >= _INTERVAL or state.global_step >= state.max_steps:
            self._write(state)

    def _write(self, state: TrainerState) -> None:
        self._written = time.monotonic()
        record = {
            "step": state.global_step,
            "planned": state.max_steps,
            "started": self._started,
            "first_step": self._first_step,
        }
        write_json(self._path, record)
