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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from tqdm.auto import tqdm

from aroma.errors import bad_value

from ..run.machine import keep_freed_memory, provenance
from .cases import COMPRESS, FLOOR, Case, Compressing, Contender, select_cases
from .models import BenchSettings, make_batch, make_model

Result = dict[str, Any]
"""What `measure` returns, and JSON holds: settings, provenance, cases."""


def measure(settings: BenchSettings, progress: bool = False) -> Result:
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
    kinds = {COMPRESS: Compressing}
    contenders = [kinds.get(case.key, Contender)(case, base, batch, settings.seed) for case in cases]
    sizes: dict[str, dict[str, int]] = {}
    with tqdm(desc="counting bytes", total=len(contenders), disable=not progress) as bar:
        for one in contenders:
            trained = sum(p.numel() for p in one.model.parameters() if p.requires_grad)
            kept = kept_bytes(one.forward, one.model)
            sizes[one.case.key] = {"kept_bytes": kept, "trainable_parameters": trained}
            bar.update()
    with tqdm(desc="taking turns", total=len(contenders) * settings.rounds, disable=not progress) as bar:
        times = take_turns(contenders, settings.rounds, bar.update)
    for one in contenders:
        sizes[one.case.key]["optimizer_bytes"] = optimizer_bytes(one.optimizer)
    return {
        "settings": asdict(settings),
        "provenance": _provenance(settings.device) | {"keeps_freed_memory": keeps_memory},
        "cases": [case_result(case, times) | sizes[case.key] for case in cases],
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
    """Return the times of a case, and their ratios to the floor and to LoRA r=8, if it was measured.

    A ratio is of one round, so that slow rounds cancel out.
    """
    result: Result = {"key": case.key}
    for part in ("forward_backward", "step"):
        seconds = times[part, case.key]
        result[part] = spread(seconds)
        result[f"{part}_ratio"] = spread(seconds / times["forward_backward", FLOOR])
        if (part, case.rival) in times:
            result[f"{part}_over_lora"] = spread(seconds / times[part, case.rival])
    return result


def spread(values: pd.Series[float]) -> dict[str, float]:
    """Return the median and the quartiles of `values`, at least one."""
    lower, median, upper = values.quantile([0.25, 0.5, 0.75]).tolist()
    return {"median": median, "lower": lower, "upper": upper}


# Bytes ---------------------------------------------------------------------------------------------------------------


def kept_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Return the bytes that a forward pass keeps for its backward pass.

    A tensor counts with its whole storage, since a view keeps that alive, and each storage counts once. Parameters
    and buffers of `model` do not count. The number is exact, and the same on every run.
    """
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return kept[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    own = _storages((*model.parameters(), *model.buffers()))
    return sum(size for place, size in _storages(kept).items() if place not in own)


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
    named = re.search(r"model name\s*:\s*(.+)", information.read_text() if information.exists() else "")
    return found | {
        "device": found["device"] if device == "cuda" else "cpu",
        "cpu_model": named[1] if named else platform.machine(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }
