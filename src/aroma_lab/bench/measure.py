"""The measurement: all cases in one process, in turns.

`torch.utils.benchmark.Timer` takes every single time: it warms up, sets the number of threads, waits for the
accelerator, and keeps Python's garbage collector out. This file has what it leaves open: the order of the cases, and
the ratios round by round.
"""

from __future__ import annotations

import gc
import os
import platform
import re
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from aroma.errors import bad_value

from ..progress import Progress, no_progress
from ..run.machine import keep_freed_memory, provenance
from .cases import FLOOR, Case, Contender, select_cases
from .models import BenchSettings, make_batch, make_model

Result = dict[str, Any]
"""What `measure` returns, and JSON holds: settings, provenance, cases, comparisons."""


def measure(settings: BenchSettings, progress: Progress = no_progress) -> Result:
    """Run the benchmark.

    Raises:
        ConfigError: An unknown model, case or device.
    """
    cases = select_cases(settings.only)  # refused before any work
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise bad_value("device", "cuda", "PyTorch finds no GPU; use cpu, or install PyTorch for CUDA")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    keeps_memory = keep_freed_memory()
    base = make_model(settings)
    batch = make_batch(base, settings)
    contenders = [Contender(case, base, batch, settings.seed) for case in cases]
    kept, trained = {}, {}
    with progress("counting bytes", len(contenders)) as advance:
        for one in contenders:
            kept[one.case.key] = kept_bytes(one.forward, one.model)
            trained[one.case.key] = sum(p.numel() for p in one.model.parameters() if p.requires_grad)
            advance(1)
    with progress("taking turns", len(contenders) * settings.rounds) as advance:
        times = take_turns(contenders, settings.rounds, advance)
    optimizer = {one.case.key: optimizer_bytes(one.optimizer) for one in contenders}
    sizes = {"kept_bytes": kept, "trainable_parameters": trained, "optimizer_bytes": optimizer}
    return {
        "settings": asdict(settings),
        "provenance": _provenance(settings.device) | {"keeps_freed_memory": keeps_memory},
        "cases": [{**case_result(case, times), **{name: sizes[name][case.key] for name in sizes}} for case in cases],
        "comparisons": comparisons(cases, times, kept),
    }


# Times ---------------------------------------------------------------------------------------------------------------


def take_turns(contenders: Sequence[Contender], rounds: int, on_turn: Callable[[int], None]) -> pd.DataFrame:
    """Time all contenders once, in order, round after round: A B C A B C …

    Whatever slows the machine down for a while then slows all of them alike.

    Returns:
        Seconds, a row for each round; columns are `forward_backward` and `step`, the whole, each by case.
    """
    threads = torch.get_num_threads()
    parts = ("forward_backward", "update")
    found = []
    for _ in range(rounds):
        gc.collect()
        times: dict[tuple[str, str], float] = {}
        for one in contenders:
            # With no minimum run time the Timer runs a statement once to warm up, and once for the time.
            first, rest = (
                Timer(f"one.{part}()", globals={"one": one}, num_threads=threads)
                .blocked_autorange(min_run_time=0)
                .median
                for part in parts
            )
            times |= {("forward_backward", one.case.key): first, ("step", one.case.key): first + rest}
            one.clear()
            on_turn(1)
        found.append(times)
    return pd.DataFrame(found)


def case_result(case: Case, times: pd.DataFrame) -> Result:
    """Return the times of a case, and their ratios to the floor of the same round, in which slow rounds cancel out."""
    floor = times["forward_backward", FLOOR]
    parts = {part: times[part, case.key] for part in ("forward_backward", "step")}
    return {
        "key": case.key,
        **{part: spread(seconds) for part, seconds in parts.items()},
        **{f"{part}_ratio": spread(seconds / floor) for part, seconds in parts.items()},
    }


def comparisons(cases: Sequence[Case], times: pd.DataFrame, kept: dict[str, int]) -> list[Result]:
    """Return every AROMA case over LoRA r=8 with the same dropout, where both were measured."""
    return [
        {
            "key": case.key,
            "other": case.rival,
            **{
                f"{part}_ratio": spread(times[part, case.key] / times[part, case.rival])
                for part in ("forward_backward", "step")
            },
            "kept_ratio": kept[case.key] / kept[case.rival],
        }
        for case in cases
        if case.rival in kept
    ]


def spread(values: pd.Series[float]) -> dict[str, float]:
    """Return the median and the quartiles of `values`, at least one."""
    lower, median, upper = values.quantile([0.25, 0.5, 0.75]).tolist()
    return {"median": median, "lower": lower, "upper": upper}


# Bytes ---------------------------------------------------------------------------------------------------------------


class _Kept:
    """What autograd holds in place of a tensor, so that it can be seen whether it still holds it."""

    def __init__(self, tensor: Tensor) -> None:
        # Detached: the output of a node would hold the node, which holds this, and neither would ever be freed.
        self.tensor = tensor.detach()


def kept_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Return the bytes that a forward pass keeps for its backward pass.

    A tensor counts with its whole storage, since a view keeps that alive, and each storage counts once. Parameters
    and buffers of `model` do not count. The number is exact, and the same on every run.
    """
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        holder = _Kept(tensor)
        kept.add(holder)
        return holder

    own = _storages((*model.parameters(), *model.buffers()))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        loss = forward()
    # What the graph has freed by now does not wait for backward.
    storages = _storages([holder.tensor for holder in kept])
    del loss
    return sum(size for place, size in storages.items() if place not in own)


def optimizer_bytes(optimizer: Any) -> int:
    """Return the bytes of the optimizer's state; 0 for None."""
    states = optimizer.state.values() if optimizer is not None else ()
    return sum(_storages(one for state in states for one in state.values() if isinstance(one, Tensor)).values())


def _storages(tensors: Iterable[Tensor]) -> dict[tuple[torch.device, int], int]:
    """Return the bytes of every storage that holds one of `tensors`, by its address."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {(storage.device, storage.data_ptr()): storage.nbytes() for storage in storages if storage.nbytes()}


def _provenance(device: str) -> dict[str, Any]:
    """Return the usual provenance and what else decides a time, JSON-able."""
    found = provenance()
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found | {
        "device": found["device"] if device == "cuda" else "cpu",
        "cpu_model": named[1].strip() if named else platform.processor() or platform.machine(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cuda": torch.version.cuda,
    }
