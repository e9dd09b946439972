"""The machine and the source of a run: versions, revision, and how this process keeps its memory."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("aroma-peft", "torch", "transformers", "peft", "accelerate")


def provenance() -> dict[str, Any]:
    """Return versions of the packages that decide a result, the source revision, and the machine, JSON-able."""
    import torch

    return {
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES},
        "git_revision": git_revision(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


@cache
def git_revision() -> str | None:
    """Return the commit that AROMA's source was checked out at, with `+changes` if it was edited since.

    None where the package is installed rather than checked out, even if that is inside some repository.
    """
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    revision = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", ".", "../aroma")
    return f"{revision}+changes" if revision and changed else revision


def _git(*arguments: str) -> str | None:
    try:
        folder = Path(__file__).resolve().parents[1]
        return subprocess.check_output(
            ["git", *arguments], cwd=folder, stderr=subprocess.DEVNULL, text=True, timeout=10
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, in pieces of up to 32 MiB; False where the C library is not glibc.

    An activation of a few MiB is otherwise returned when it is freed, and mapped again page by page a moment later:
    tens of thousands of page faults a step, more or fewer as chance has it. Resident memory stays at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    trim_threshold, mmap_threshold = -1, -3  # mallopt(3)
    return bool(mallopt and mallopt(mmap_threshold, 32 * 2**20) and mallopt(trim_threshold, -1))
