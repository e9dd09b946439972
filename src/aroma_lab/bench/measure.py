"""The whole benchmark: all cases in one process, in turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..methods import encoder_linears
from ..progress import Progress, no_progress
from ..run.memory import keep_freed_memory
from .cases import Case, select_cases
from .contestant import Contestant
from .growth_cost import growth_cost
from .machine import bench_provenance, require_device
from .memory import kept_bytes, optimizer_bytes, peak_gpu_bytes, trainable_parameters
from .peak import peak_resident_bytes
from .result import BenchResult, Footprint, case_results, comparisons
from .roofline import roofline
from .settings import BenchSettings
from .shapes import copy_model, make_batch, make_model
from .timing import interleave, stopwatch_for

GROWTH_REPEATS = 5
"""Outer steps that are timed."""

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


def measure(settings: BenchSettings, phase: Progress = no_progress) -> BenchResult:
    """Run the benchmark.

    Args:
        settings: What is measured.
        phase: Announces what is being done.

    Raises:
        ConfigError: An unknown model, case or device, or a process that failed.
    """
    cases = select_cases(settings.only, settings.compiled)
    require_device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    keeps_memory = settings.keep_memory and keep_freed_memory()
    base = make_model(settings)
    batch = make_batch(base, settings)
    stopwatch = stopwatch_for(settings.device)
    machine = roofline(base, settings, stopwatch)
    contestants, kept = _prepare(cases, base, batch, settings, phase)
    with phase("taking turns", len(cases) * (settings.rounds + settings.warmup_rounds)) as advance:
        times = interleave(contestants, settings.rounds, settings.warmup_rounds, stopwatch, advance)
    with phase("controller", GROWTH_REPEATS) as advance:
        model = copy_model(base, own_backbone=False)
        growth = growth_cost(model, batch, settings.seed, GROWTH_REPEATS, stopwatch, advance)
    peaks = _peaks(contestants, settings, phase)
    footprints = [
        Footprint(amount, optimizer_bytes(contestant.optimizer), trainable_parameters(contestant.model), peak)
        for contestant, amount, peak in zip(contestants, kept, peaks, strict=True)
    ]
    results = case_results(cases, times, footprints)
    return BenchResult(
        settings=settings,
        model=_describe(base),
        provenance=bench_provenance(settings.device) | {"keeps_freed_memory": keeps_memory},
        cases=results,
        comparisons=comparisons(cases, results),
        growth=growth,
        roofline=machine,
    )


def _prepare(
    cases: Sequence[Case], base: Any, batch: dict[str, Tensor], settings: BenchSettings, phase: Progress
) -> tuple[list[Contestant], list[int]]:
    """Return a contestant of every case, and the bytes that it keeps for backward."""
    contestants, kept = [], []
    with phase("preparing", len(cases)) as advance:
        for case in cases:
            model = copy_model(base, case.method.writes_backbone)
            contestants.append(Contestant(case, model, batch, settings.seed))
            kept.append(kept_bytes(contestants[-1].forward, contestants[-1].model))
            advance(1)
    return contestants, kept


def _peaks(contestants: Sequence[Contestant], settings: BenchSettings, phase: Progress) -> list[int | None]:
    if not settings.peak:
        return [None] * len(contestants)
    peaks = []
    with phase("peak memory", len(contestants)) as advance:
        for contestant in contestants:
            peaks.append(_peak(contestant, settings))
            advance(1)
    return peaks


def _peak(contestant: Contestant, settings: BenchSettings) -> int | None:
    if settings.device == "cuda":
        return peak_gpu_bytes(contestant.step, contestant.model, contestant.optimizer)
    if contestant.case.compiled:
        return None  # a process that compiles peaks in the compiler
    return peak_resident_bytes(settings, contestant.case.key)


def _describe(model: Any) -> dict[str, Any]:
    """Return kind and sizes of the measured model, JSON-able."""
    sizes = {name: value for name in _SIZES if (value := getattr(model.config, name, None)) is not None}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    backbone = sum(parameter.numel() for parameter in model.base_model.parameters())
    return {
        "type": model.config.model_type,
        **sizes,
        "adapted_modules": len(encoder_linears(model)),
        "parameters": parameters,
        "head_parameters": parameters - backbone,
        "attention": "sdpa",
        "dropout": 0.0,
    }
