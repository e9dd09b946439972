"""The machine that is measured."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from aroma.errors import bad_value

from ..run.provenance import provenance


def require_device(device: str) -> None:
    """Raise for `"cuda"` without a GPU.

    Raises:
        ConfigError: PyTorch finds none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise bad_value("device", device, "PyTorch finds no GPU; use cpu, or install PyTorch for CUDA")


def bench_provenance(device: str) -> dict[str, Any]:
    """Return the usual provenance, and what else decides a time, JSON-able."""
    found = provenance()
    return found | {
        "device": found["device"] if device == "cuda" else "cpu",
        "cpu_model": _cpu_model(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cuda": torch.version.cuda,
    }


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()
