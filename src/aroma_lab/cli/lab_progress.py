"""The progress of a study: bars on a terminal, and one line per ended trial, there and in a log file."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

if TYPE_CHECKING:
    from ..study.engine import Progress


class StudyProgress:
    """Shows how a study goes; called with its progress, and a context manager.

    Args:
        console: The console to print to; standard error by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(),
        )
        is_log = not console.is_terminal
        # A trial may take hours: the estimate is from all that ended.
        self._bars = Bars(*columns, console=console, disable=is_log, transient=True, speed_estimate_period=1e9)
        self._whole = self._bars.add_task("trials", total=None, note="")
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> StudyProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, progress: Progress) -> None:
        """Move the bars, and print what has ended."""
        decided = progress.done + progress.failed
        for one in progress.ended:
            result = f"failed: {one.failure}" if one.score is None else f"score {one.score:.4f}"
            took = timedelta(seconds=round(one.seconds))
            self._bars.console.print(f"{decided} of {progress.total} · {one.name} · {result} · {took}")
        note = f"{progress.done} done, {progress.failed} failed, of {progress.total}"
        self._bars.update(self._whole, total=progress.total, completed=decided, note=note)
        running = {trial.name: trial for trial in progress.running}
        for name in self._tasks.keys() - running.keys():
            self._bars.remove_task(self._tasks.pop(name))
        for name, trial in running.items():
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=None, note="")
            note = "starting" if trial.planned is None else f"step {trial.step} of {trial.planned}"
            self._bars.update(self._tasks[name], total=trial.planned, completed=trial.step, note=note)
