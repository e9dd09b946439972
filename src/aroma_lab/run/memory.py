"""Memory of this process: its peak, and what the C library does with what is freed."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_NEVER = -1


def peak_bytes() -> int:
    """Return the peak of this process's resident memory, in bytes."""
    # Not getrusage where it can be avoided: on Linux its peak is inherited from the process that started this one.
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    import resource  # not there on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_bytes() -> int:
    """Return the peak of what PyTorch has allocated on the current GPU, in bytes; 0 without one."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


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
