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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch.utils.benchmark.utils.timer import timer as now

from aroma.errors import bad_value
from aroma.tuner import AromaConfig

from ..methods import Aroma, Lora
from ..progress import Progress, no_progress
from ..run.machine import keep_freed_memory, provenance
from .cases import FLOOR, Case, Contender, growing_case, select_cases
from .models import BenchSettings, make_batch, make_model

CONTROLLER_REPEATS = 5
"""Outer steps that are timed."""

_PARTS = ("forward_backward", "update")

_CHECK_INTERVAL = 2
"""Steps between two timed inner checks: fewer than in training, to save time. A check costs the same."""

Result = dict[str, Any]
"""What `measure` returns, and JSON holds: settings, provenance, cases, comparisons, cost of the controller."""


def measure(settings: BenchSettings, progress: Progress = no_progress) -> Result:
    """Run the benchmark.

    Args:
        settings: What is measured.
        progress: Shows how far the work is.

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
    sizes: list[dict[str, int]] = []
    with progress("counting bytes", len(contenders)) as advance:
        for one in contenders:
            trained = sum(p.numel() for p in one.model.parameters() if p.requires_grad)
            sizes.append({"kept_bytes": kept_bytes(one.forward, one.model), "trainable_parameters": trained})
            advance(1)
    with progress("taking turns", len(contenders) * settings.rounds) as advance:
        times = take_turns(contenders, settings.rounds, advance)
    with progress("controller", CONTROLLER_REPEATS) as advance:
        controller = controller_cost(base, batch, settings.seed, CONTROLLER_REPEATS, advance)
    for one, size in zip(contenders, sizes, strict=True):
        size["optimizer_bytes"] = optimizer_bytes(one.optimizer)
    return {
        "settings": asdict(settings),
        "provenance": _provenance(settings.device) | {"keeps_freed_memory": keeps_memory},
        "cases": case_results(cases, times, sizes),
        "comparisons": comparisons(cases, times, [size["kept_bytes"] for size in sizes]),
        "controller": controller,
    }


# Times ---------------------------------------------------------------------------------------------------------------


class Times(NamedTuple):
    """Times of one case, in seconds, one entry per round: forward and backward, and the rest of the step."""

    forward_backward: list[float]
    update: list[float]

    @property
    def step(self) -> list[float]:
        """The whole step."""
        return [first + second for first, second in zip(self.forward_backward, self.update, strict=True)]


def take_turns(
    contenders: Sequence[Any], rounds: int, on_turn: Callable[[int], None] = lambda done: None
) -> list[Times]:
    """Time all contenders once, in order, round after round: A B C A B C …

    Whatever slows the machine down for a while then slows all of them alike.
    """
    threads = torch.get_num_threads()
    timers = [
        [Timer(f"contender.{part}()", globals={"contender": one}, num_threads=threads) for part in _PARTS]
        for one in contenders
    ]
    times = [Times([], []) for _ in contenders]
    for _ in range(rounds):
        gc.collect()
        for contender, pair, result in zip(contenders, timers, times, strict=True):
            # With no minimum run time the Timer runs a statement once to warm up, and once for the time.
            for timer, part in zip(pair, result, strict=True):
                part.append(timer.blocked_autorange(min_run_time=0).median)
            contender.clear()
            on_turn(1)
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles of `values`, at least one."""
    lower, median, upper = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "lower": lower, "upper": upper}


def spread_of_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Return the spread of the ratios of two times of the same round, in which slow rounds cancel out."""
    return spread([above / below for above, below in zip(numerators, denominators, strict=True)])


def case_results(cases: Sequence[Case], times: Sequence[Times], sizes: Sequence[dict[str, Any]]) -> list[Result]:
    """Return what was found for every case, `sizes` added. The floor of compiled cases is the compiled one."""
    floors = {
        case.compiled: found.forward_backward
        for case, found in zip(cases, times, strict=True)
        if case.key.removesuffix("-compiled") == FLOOR
    }
    return [
        {
            "key": case.key,
            "name": case.name,
            "compiled": case.compiled,
            "forward_backward": spread(found.forward_backward),
            "step": spread(found.step),
            "forward_backward_ratio": spread_of_ratios(found.forward_backward, floors[case.compiled]),
            "step_ratio": spread_of_ratios(found.step, floors[case.compiled]),
            **amounts,
        }
        for case, found, amounts in zip(cases, times, sizes, strict=True)
    ]


def comparisons(cases: Sequence[Case], times: Sequence[Times], kept: Sequence[int]) -> list[Result]:
    """Return every AROMA case over LoRA r=8 with the same dropout, compiled alike, where both were measured."""
    measured = list(zip(cases, times, kept, strict=True))
    lora = {
        (case.method.dropout, case.compiled): (case.key, found, amount)
        for case, found, amount in measured
        if isinstance(case.method, Lora) and case.method.r == 8
    }
    results = []
    for case, ours, amount in measured:
        if isinstance(case.method, Aroma) and (case.method.dropout, case.compiled) in lora:
            other, theirs, their_amount = lora[case.method.dropout, case.compiled]
            results.append(
                {
                    "key": case.key,
                    "other": other,
                    "forward_backward_ratio": spread_of_ratios(ours.forward_backward, theirs.forward_backward),
                    "step_ratio": spread_of_ratios(ours.step, theirs.step),
                    "kept_ratio": amount / their_amount,
                }
            )
    return results


def controller_cost(
    base: Any, batch: dict[str, Tensor], seed: int, repeats: int, on_repeat: Callable[[int], None] = lambda done: None
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
    return found | {
        "device": found["device"] if device == "cuda" else "cpu",
        "cpu_model": _cpu_model(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cuda": torch.version.cuda,
    }


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()
