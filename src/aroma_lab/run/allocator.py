"""How the C library treats freed memory: a tenth of a training step on a CPU, and most of its noise."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_NEVER = -1


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, in pieces of up to 32 MiB, rather than give it back to the system.

    An activation of a few MiB is otherwise returned when it is freed, and mapped again page by page a moment later:
    tens of thousands of page faults a step, more or fewer as chance has it. Resident memory stays at its peak.

    Returns:
        Whether the C library could be told; only glibc can.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
