"""How long work announces itself without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Phase = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Announces a phase by its name and number of items; gives what is called with the number of items just done."""


@contextmanager
def silent_phase(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Announce nothing."""
    yield lambda done: None
