"""A progress bar for long trainings: step, loss, and where growth stands; at the end, why it ended there."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .callback import AromaCallback

_WIDE = 120
"""Columns of a terminal that hold the whole line with a long bar."""


class RichProgress(TrainerCallback):
    """Shows one line while the Trainer works, rank 0 alone; give the Trainer `disable_tqdm=True` with it.

    Args:
        growth: The AromaCallback whose controller is shown; None for a training without growth.
        title: First word of the line.
        console: Where to; standard error by default, so that output can be piped.
    """

    def __init__(
        self, growth: AromaCallback | None = None, title: str = "train", console: Console | None = None
    ) -> None:
        self._growth = growth
        self._loss: float | None = None
        self._title = title
        console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24 if console.width >= _WIDE else 8),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", table_column=Column(ratio=1, no_wrap=True)),
            TimeRemainingColumn(compact=True),
            console=console,
            expand=True,  # so that the status alone is cut where the line is too long
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar, at the step where the training begins."""
        self._task = self._progress.add_task(
            self._title, total=state.max_steps, completed=state.global_step, status=self._status()
        )
        if state.is_world_process_zero:
            self._progress.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Remember the last loss."""
        self._loss = (logs or {}).get("loss", self._loss)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance by one optimizer step."""
        self._progress.update(self._task, completed=state.global_step, status=self._status())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the finished line, and below it why the matrices grow no more."""
        self._progress.update(self._task, status=self._status())
        self.close()
        controller = self._growth.controller if self._growth is not None else None
        if controller is not None and state.is_world_process_zero:
            self._progress.console.print(controller.explanation(), markup=False, highlight=False)

    def close(self) -> None:
        """Give the terminal back; for a training that ended with an exception."""
        self._progress.stop()

    def _status(self) -> str:
        parts = [] if self._loss is None else [f"loss {self._loss:.4f}"]
        controller = self._growth.controller if self._growth is not None else None
        if controller is not None:
            parts += controller.rule.status
        return " · ".join(parts)
