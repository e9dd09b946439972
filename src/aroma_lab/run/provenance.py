"""Where a result comes from: versions, source revision, machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("aroma-peft", "torch", "transformers", "peft", "accelerate")
_PACKAGE_FOLDER = Path(__file__).resolve().parents[1]


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


def git_revision() -> str | None:
    """Return the commit that AROMA's source was checked out at, with `+changes` if it was edited since.

    None where the package is installed rather than checked out, even if that is inside some repository.
    """
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    revision = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", ".")
    return f"{revision}+changes" if revision and changed else revision


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=_PACKAGE_FOLDER, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
