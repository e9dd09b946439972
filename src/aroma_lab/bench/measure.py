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
import statistics
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch.utils.benchmark.utils.timer import timer as now

from aroma.errors import bad_value
from aroma.tuner import AromaConfig

from ..progress import Progress, no_progress
from ..run.machine import keep_freed_memory, provenance
from .cases import Case, Contender, growing_case, select_cases
from .models import BenchSettings, make_batch, make_model

CONTROLLER_REPEATS = 5
"""Outer steps that are timed."""

_CHECK_INTERVAL = 2
"""Steps between two timed inner checks: fewer than in training, to save time. A check costs the same."""

Result = dict[str, Any]
"""What `measure` returns, and JSON holds: settings, provenance, cases, comparisons, cost of the controller."""


def measure(settings: BenchSettings, progress: Progress = no_progress) -> Result:
    """Run the benchmark.

    Raises:
        ConfigError: An unknown model, case or device.
    """
    cases = select_cases(settings.only, settings.compiled)  # refused before any work
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
    with progress("controller", CONTROLLER_REPEATS) as advance:
        controller = controller_cost(base, batch, settings.seed, CONTROLLER_REPEATS, advance)
    optimizer = {one.case.key: optimizer_bytes(one.optimizer) for one in contenders}
    sizes = {"kept_bytes": kept, "trainable_parameters": trained, "optimizer_bytes": optimizer}
    return {
        "settings": asdict(settings),
        "provenance": _provenance(settings.device) | {"keeps_freed_memory": keeps_memory},
        "cases": [{**case_result(case, times), **{name: sizes[name][case.key] for name in sizes}} for case in cases],
        "comparisons": comparisons(cases, times, kept),
        "controller": controller,
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
    """Return the times of a case, and their ratios to its floor of the same round, in which slow rounds cancel out."""
    floor = times["forward_backward", case.floor]
    parts = {part: times[part, case.key] for part in ("forward_backward", "step")}
    return {
        "key": case.key,
        "compiled": case.compiled,
        **{part: spread(seconds) for part, seconds in parts.items()},
        **{f"{part}_ratio": spread(seconds / floor) for part, seconds in parts.items()},
    }


def comparisons(cases: Sequence[Case], times: pd.DataFrame, kept: dict[str, int]) -> list[Result]:
    """Return every AROMA case over LoRA r=8 with the same dropout, compiled alike, where both were measured."""
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


def controller_cost(
    base: Any, batch: dict[str, Tensor], seed: int, repeats: int, on_repeat: Callable[[int], None]
) -> dict[str, float]:
    """Train an AROMA model with all modules growing, and time its controller in `repeats` inner loops of two steps.

    Returns:
        Medians in milliseconds: `step_ms`, an ordinary step without its controller; `uncheck_ms` and `check_ms`, the
        controller in a step without and with an inner check; `outer_ms`, an outer step in which every module keeps
        its component (check, merge, reset, norms of the weights). And `check_interval`, steps between two checks in
        training; `amortised_ms`, the controller per step on average; `amortised_fraction` and `outer_fraction`, the
        same and an outer step over an ordinary step.
    """
    contender = Contender(growing_case(_CHECK_INTERVAL), base, batch, seed)
    contender.hooks.detach()  # to time the controller apart from the optimizer
    contender.forward_backward()  # the first pass claims memory
    controller = contender.hooks.controller
    times: dict[str, list[float]] = {name: [] for name in ("step_ms", "uncheck_ms", "check_ms", "outer_ms")}
    for _ in range(repeats):
        for name in ("uncheck_ms", "check_ms"):  # a check every second step
            times["step_ms"].append(_ms(contender.forward_backward) + _ms(contender.optimizer_step))
            times[name].append(_ms(controller.step))
        times["outer_ms"].append(_ms(controller.outer_step))
        on_repeat(1)
    found = {name: statistics.median(one) for name, one in times.items()}
    interval = AromaConfig.inner_check_interval
    amortised = found["uncheck_ms"] + (found["check_ms"] - found["uncheck_ms"]) / interval
    return {
        **found,
        "check_interval": interval,
        "amortised_ms": amortised,
        "amortised_fraction": amortised / found["step_ms"],
        "outer_fraction": found["outer_ms"] / found["step_ms"],
    }


def _ms(work: Callable[[], Any]) -> float:
    start = now()
    work()
    return 1000 * (now() - start)


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
