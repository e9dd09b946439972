"""How a grid goes: bars on a terminal, and one line for each trial that ends, there and in a log file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from ..grid.status import Ended, GridStatus

if TYPE_CHECKING:
    from rich.console import Console


class GridProgress:
    """Shows how a grid goes; a `lab.grid.status.Watcher` and a context manager.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}", markup=False),
        )
        self._bars = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._whole = self._bars.add_task("trials", total=None, note="")
        self._tasks: dict[str, TaskID] = {}
        self._status: GridStatus | None = None
        self._ended = 0
        """Trials that ended since the last status."""

    def __enter__(self) -> GridProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def on_status(self, status: GridStatus) -> None:
        """Move the bars."""
        self._status, self._ended = status, 0
        self._bars.update(
            self._whole, total=status.total, completed=status.done + status.failed, note=_whole_note(status)
        )
        running = {one.trial.name: one for one in status.running}
        for name in [name for name in self._tasks if name not in running]:
            self._bars.remove_task(self._tasks.pop(name))
        for name, one in running.items():
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=None, note="")
            note = "starting" if one.planned is None else f"step {one.step} of {one.planned}"
            self._bars.update(self._tasks[name], total=one.planned, completed=one.step, note=note)

    def on_end(self, ended: Ended) -> None:
        """Print what came of a trial."""
        self._ended += 1
        result = f"score {ended.score:.4f}" if ended.score is not None else f"failed: {ended.failure}"
        self._console.print(f"{self._count()}{ended.name} · {result} · {duration(ended.seconds)}{self._left()}")

    def _count(self) -> str:
        if self._status is None:
            return ""
        return f"{self._status.done + self._status.failed + self._ended} of {self._status.total} · "

    def _left(self) -> str:
        if self._status is None or self._status.seconds_left is None:
            return ""
        return f" · about {duration(self._status.seconds_left)} left"


def duration(seconds: float) -> str:
    """Return a duration in words, as exact as an estimate deserves: `40 s`, `12 min`, `2 h 10 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _whole_note(status: GridStatus) -> str:
    failed = f", {status.failed} failed" if status.failed else ""
    left = "" if status.seconds_left is None else f" · about {duration(status.seconds_left)} left"
    return f"{status.done} of {status.total} done{failed}{left}"
