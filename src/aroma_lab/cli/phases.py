"""A progress bar for each phase of long work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def shown_phase(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on standard error while the phase lasts; a `lab.phases.Phase`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task(name, total=total)
        yield lambda done: progress.advance(bar, done)
