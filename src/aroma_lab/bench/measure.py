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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.benchmark.utils.timer import timer as now

from aroma.errors import bad_value
from aroma.tuner import AromaConfig

from ..methods import Aroma, Lora, encoder_linears
from ..progress import Progress, no_progress
from ..run.machine import keep_freed_memory, provenance
from .cases import FLOOR, Case, Contender, growing_case, make_contenders, select_cases
from .memory import kept_bytes, optimizer_bytes, peak_of
from .models import BenchSettings, make_batch, make_model

CONTROLLER_REPEATS = 5
"""Outer steps that are timed."""

_CHECK_INTERVAL = 2
"""Steps between two timed inner checks: fewer than in training, to save time. A check costs the same."""

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")

Result = dict[str, Any]
"""What `measure` returns, and JSON holds: settings, model, provenance, cases, comparisons, controller."""


def measure(settings: BenchSettings, progress: Progress = no_progress) -> Result:
    """Run the benchmark.

    Args:
        settings: What is measured.
        progress: Shows how far the work is.

    Raises:
        ConfigError: An unknown model, case or device, or a process that failed.
    """
    select_cases(settings.only, settings.compiled)  # refused before any work
    keeps_memory = prepare(settings)
    base = make_model(settings)
    batch = make_batch(base, settings)
    contenders = make_contenders(base, batch, settings)
    with progress("counting bytes", len(contenders)) as advance:
        kept = []
        for contender in contenders:
            kept.append(kept_bytes(contender.forward, contender.model))
            advance(1)
    with progress("taking turns", len(contenders) * (settings.rounds + settings.warmup_rounds)) as advance:
        times = take_turns(contenders, settings.rounds, settings.warmup_rounds, advance)
    with progress("controller", CONTROLLER_REPEATS) as advance:
        controller = controller_cost(base, batch, settings.seed, CONTROLLER_REPEATS, advance)
    peaks: list[int | None] = [None] * len(contenders)
    if settings.peak:
        with progress("peak memory", len(contenders)) as advance:
            for index, contender in enumerate(contenders):
                peaks[index] = peak_of(contender, settings)
                advance(1)
    sizes = [
        {
            "kept_bytes": amount,
            "optimizer_bytes": optimizer_bytes(contender.optimizer),
            "trainable_parameters": sum(p.numel() for p in contender.model.parameters() if p.requires_grad),
            "peak_bytes": peak,
        }
        for contender, amount, peak in zip(contenders, kept, peaks, strict=True)
    ]
    cases = [contender.case for contender in contenders]
    return {
        "settings": asdict(settings),
        "model": _describe(base),
        "provenance": bench_provenance(settings.device) | {"keeps_freed_memory": keeps_memory},
        "cases": case_results(cases, times, sizes),
        "comparisons": comparisons(cases, times, kept),
        "controller": controller,
    }


def prepare(settings: BenchSettings) -> bool:
    """Check the device and set the number of threads; return whether the process now keeps the memory it frees.

    Raises:
        ConfigError: PyTorch finds no GPU.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise bad_value("device", "cuda", "PyTorch finds no GPU; use cpu, or install PyTorch for CUDA")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return settings.keep_memory and keep_freed_memory()


# Times ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Times of one case, in seconds, one entry per round.

    Args:
        forward_backward: Forward and backward.
        update: The rest of the step: the optimizer, and what the method does around it.
    """

    forward_backward: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)

    @property
    def step(self) -> list[float]:
        """The whole step."""
        return [first + second for first, second in zip(self.forward_backward, self.update, strict=True)]


def take_turns(
    contenders: Sequence[Any], rounds: int, warmup_rounds: int, on_turn: Callable[[int], None] = lambda done: None
) -> list[Times]:
    """Time all contenders once, in order, round after round: A B C A B C …

    Whatever slows the machine down for a while then slows all of them alike.

    Args:
        contenders: Objects with the methods `forward_backward`, `update` and `clear`.
        rounds: Timed rounds.
        warmup_rounds: Rounds before those.
        on_turn: Called with 1 after each turn.

    Returns:
        Times of every contender, in order.
    """
    threads = torch.get_num_threads()
    parts = ("forward_backward", "update")
    timers = [
        [Timer(f"contender.{part}()", globals={"contender": one}, num_threads=threads) for part in parts]
        for one in contenders
    ]
    times = [Times() for _ in contenders]
    for number in range(warmup_rounds + rounds):
        gc.collect()
        for contender, pair, result in zip(contenders, timers, times, strict=True):
            # With no minimum run time the Timer runs a statement once to warm up, and once for the time.
            seconds = [timer.blocked_autorange(min_run_time=0).median for timer in pair]
            contender.clear()
            if number >= warmup_rounds:
                result.forward_backward.append(seconds[0])
                result.update.append(seconds[1])
            on_turn(1)
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles of `values`, at least one."""
    if len(values) == 1:
        return dict.fromkeys(("median", "lower", "upper"), values[0])
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "lower": lower, "upper": upper}


def spread_of_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Return the spread of the ratios of two times of the same round, in which slow rounds cancel out."""
    return spread([above / below for above, below in zip(numerators, denominators, strict=True)])


def case_results(cases: Sequence[Case], times: Sequence[Times], sizes: Sequence[dict[str, Any]]) -> list[Result]:
    """Return what was found for every case. The floor of compiled cases is the compiled one.

    Args:
        cases: The cases.
        times: Their times.
        sizes: Bytes and parameters, which are added to each entry.
    """
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
    """Return every AROMA case over LoRA r=8 with the same dropout, compiled alike, where both were measured.

    Args:
        cases: The cases.
        times: Their times.
        kept: Bytes that each keeps for backward.
    """
    found = dict(zip((case.key for case in cases), zip(times, kept, strict=True), strict=True))
    lora = {
        (case.method.dropout, case.compiled): case.key
        for case in cases
        if isinstance(case.method, Lora) and case.method.r == 8
    }
    results = []
    for case in cases:
        if isinstance(case.method, Aroma) and (case.method.dropout, case.compiled) in lora:
            other = lora[case.method.dropout, case.compiled]
            (ours, our_bytes), (theirs, their_bytes) = found[case.key], found[other]
            results.append(
                {
                    "key": case.key,
                    "other": other,
                    "forward_backward_ratio": spread_of_ratios(ours.forward_backward, theirs.forward_backward),
                    "step_ratio": spread_of_ratios(ours.step, theirs.step),
                    "kept_ratio": our_bytes / their_bytes,
                }
            )
    return results


def controller_cost(
    base: Any,
    batch: dict[str, Tensor],
    seed: int,
    repeats: int,
    on_repeat: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """Train an AROMA model with all modules growing, and time its controller.

    Args:
        base: A classifier, which is copied.
        batch: Its input with labels.
        seed: Seed of the adapter's weights.
        repeats: Inner loops, each of two steps.
        on_repeat: Called with 1 after each of them.

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
    steps: list[float] = []
    controlled: list[float] = []
    outer: list[float] = []
    for _ in range(repeats):
        for _ in range(_CHECK_INTERVAL):
            steps.append(_seconds(contender.forward_backward) + _seconds(contender.optimizer_step))
            controlled.append(_seconds(contender.hooks.controller.step))
        outer.append(_seconds(contender.hooks.controller.outer_step))
        on_repeat(1)
    step_ms, outer_ms = _median_ms(steps), _median_ms(outer)
    uncheck_ms, check_ms = (_median_ms(controlled[first::_CHECK_INTERVAL]) for first in (0, _CHECK_INTERVAL - 1))
    interval = AromaConfig.inner_check_interval
    amortised_ms = uncheck_ms + (check_ms - uncheck_ms) / interval
    return {
        "step_ms": step_ms,
        "uncheck_ms": uncheck_ms,
        "check_ms": check_ms,
        "check_interval": interval,
        "amortised_ms": amortised_ms,
        "amortised_fraction": amortised_ms / step_ms,
        "outer_ms": outer_ms,
        "outer_fraction": outer_ms / step_ms,
    }


def _seconds(work: Callable[[], Any]) -> float:
    start = now()
    work()
    return now() - start


def _median_ms(seconds: Sequence[float]) -> float:
    return 1000 * statistics.median(seconds)


# What was measured, and where ----------------------------------------------------------------------------------------


def bench_provenance(device: str) -> dict[str, Any]:
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
    if information.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _describe(model: Any) -> dict[str, Any]:
    """Return the kind and the sizes of the measured model, JSON-able."""
    sizes = {name: value for name in _SIZES if (value := getattr(model.config, name, None)) is not None}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    backbone = sum(parameter.numel() for parameter in model.base_model.parameters())
    return {
        "type": model.config.model_type,
        **sizes,
        "adapted_modules": len(encoder_linears(model)),
        "parameters": parameters,
        "head_parameters": parameters - backbone,
    }
