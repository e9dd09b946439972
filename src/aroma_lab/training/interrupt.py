"""Ctrl-C in a training: the optimizer step is ended and saved, so that nothing is lost."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aroma.sharding import world_size


@contextmanager
def saved_when_interrupted(trainer: Trainer) -> Iterator[None]:
    """Let a first SIGINT end the training with a checkpoint, at the end of its step; a second one ends it at once.

    Several processes are interrupted at different steps, which no checkpoint could be of: there, and outside the main
    thread, which alone gets signals, a SIGINT does what it always does.

    Raises:
        KeyboardInterrupt: On leaving, if the training was interrupted before its last step.
    """
    if world_size() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    stop = _Stop()
    before = signal.signal(signal.SIGINT, stop.note)
    trainer.add_callback(stop)
    try:
        yield
    finally:
        trainer.remove_callback(stop)
        signal.signal(signal.SIGINT, before)
    if stop.step is not None and stop.step < trainer.state.max_steps:
        raise KeyboardInterrupt


class _Stop(TrainerCallback):
    """Saves and stops at the end of the step in which it was asked to.

    Attributes:
        asked: Whether there was a SIGINT.
        step: The step after which the training was stopped.
    """

    def __init__(self) -> None:
        self.asked = False
        self.step: int | None = None

    def note(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\ninterrupted: this step is ended and saved; once more stops at once", file=sys.stderr)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if self.asked:
            self.step = state.global_step
            control.should_save = True
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        # Not before: a checkpoint that says that the training is over is not resumed.
        control.should_training_stop |= self.step == state.global_step
        return control
