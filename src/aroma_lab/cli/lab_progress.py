"""The progress of a study: bars on a terminal, and one line per ended trial, there and in a log file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

if TYPE_CHECKING:
    from ..study.engine import Progress


class StudyProgress:
    """Shows how a study goes; a `Watcher` and a context manager.

    Args:
        console: The console to print to; standard error by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}", markup=False),
        )
        self._bars = Bars(*columns, console=self._console, disable=not self._console.is_terminal, transient=True)
        self._whole = self._bars.add_task("trials", total=None, note="")
        self._tasks: dict[str, TaskID] = {}
        self._progress: Progress | None = None
        self._ended = 0
        """Trials that ended since the last `on_progress`."""

    def __enter__(self) -> StudyProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def on_progress(self, progress: Progress) -> None:
        """Move the bars."""
        self._progress, self._ended = progress, 0
        decided = progress.done + progress.failed
        self._bars.update(self._whole, total=progress.total, completed=decided, note=_note(progress))
        running = {one.name: one for one in progress.running}
        for name in [name for name in self._tasks if name not in running]:
            self._bars.remove_task(self._tasks.pop(name))
        for name, one in running.items():
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=None, note="")
            note = "starting" if one.planned is None else f"step {one.step} of {one.planned}"
            self._bars.update(self._tasks[name], total=one.planned, completed=one.step, note=note)

    def on_end(self, name: str, failure: str | None, score: float | None, seconds: float) -> None:
        """Print the outcome of a trial."""
        self._ended += 1
        result = f"score {score:.4f}" if score is not None else f"failed: {failure}"
        count, left = "", ""
        if self._progress is not None:
            count = f"{self._progress.done + self._progress.failed + self._ended} of {self._progress.total} · "
            left = _left(self._progress)
        self._console.print(f"{count}{name} · {result} · {duration(seconds)}{left}")


def duration(seconds: float) -> str:
    """Return a duration in words, as exact as an estimate deserves: `40 s`, `12 min`, `2 h 10 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _note(progress: Progress) -> str:
    failed = f", {progress.failed} failed" if progress.failed else ""
    return f"{progress.done} of {progress.total} done{failed}{_left(progress)}"


def _left(progress: Progress) -> str:
    return "" if progress.seconds_left is None else f" · about {duration(progress.seconds_left)} left"
