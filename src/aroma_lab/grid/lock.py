"""One runner a grid: a lock that lives as long as the runner or any of its workers, and dies with them."""

from __future__ import annotations

import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aroma.errors import bad_value

LOCK_FILE = ".lock"
_PATIENCE = 30.0
"""Seconds that the workers of a killed runner have to end; they notice at once, so this is plenty."""


@contextmanager
def exclusive(output: Path) -> Iterator[int]:
    """Hold the lock of a grid's output folder, which is made if missing.

    The kernel gives the lock back when the last process that has the yielded descriptor is gone, however it went. A
    worker that inherits the descriptor so keeps a new runner out until it has ended, too.

    Yields:
        The descriptor, for workers to inherit.

    Raises:
        ConfigError: Another runner holds it.
    """
    output.mkdir(parents=True, exist_ok=True)
    # Not opened with "w": what a holder wrote into it is still to be read.
    descriptor = os.open(output / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take(descriptor, output)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {platform.node()}".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _take(descriptor: int, output: Path) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not _try(descriptor):
        holder = os.pread(descriptor, 256, 0).decode(errors="replace")
        if time.monotonic() > deadline or not _is_gone(holder):
            raise bad_value(
                "output",
                str(output),
                f"this grid is being run already (process and host: {holder or 'unknown'}); wait for it, or give "
                "another output",
            )
        time.sleep(0.1)


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_gone(holder: str) -> bool:
    """Whether the runner that wrote its process id and host was killed here, so that only workers of it are left."""
    process, _, host = holder.partition(" ")
    if not process.isdigit() or host != platform.node():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
