"""`aroma bench profile`: where the time of forward and backward goes, by kind of operation, on torch.profiler."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from ..methods import encoder_linears
from ..progress import Progress, no_progress
from .cases import Contender, make_contenders
from .measure import bench_provenance, prepare
from .models import BenchSettings, make_batch, make_model

KINDS = ("backbone matmuls", "narrow matmuls", "folding", "dropout mask", "attention", "other operations")
"""Kinds of operations. Narrow: with factors of an update. Folding: adding the update to a copy of a weight."""

BETWEEN = "between operations"
"""Time outside of all operations: Python, dispatch, the autograd engine."""

_MATMULS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv")

Shape = tuple[int, ...]


def profile(settings: BenchSettings, progress: Progress = no_progress) -> dict[str, Any]:
    """Profile forward and backward of every case, in turns.

    Args:
        settings: What is measured; `rounds` steps of each case.
        progress: Shows how far the work is.

    Returns:
        `settings`, `provenance`, and `milliseconds`: for every case a dictionary by kind, `BETWEEN` among them, whose
        values add up to the time under the profiler; medians over the rounds.

    Raises:
        ConfigError: An unknown model, case or device.
    """
    prepare(settings)
    base = make_model(settings)
    contenders = make_contenders(base, make_batch(base, settings), settings)
    weights = {tuple(base.get_submodule(name).weight.shape) for name in encoder_linears(base)}
    tokens = settings.batch_size * settings.length
    rounds: dict[str, list[dict[str, float]]] = {contender.case.key: [] for contender in contenders}
    with progress("profiling", len(contenders) * (settings.warmup_rounds + settings.rounds)) as advance:
        for number in range(settings.warmup_rounds + settings.rounds):
            for contender in contenders:
                found = _profile_once(contender, tokens, weights)
                if number >= settings.warmup_rounds:
                    rounds[contender.case.key].append(found)
                advance(1)
    milliseconds = {
        key: {kind: statistics.median(one[kind] for one in found) for kind in (*KINDS, BETWEEN)}
        for key, found in rounds.items()
    }
    return {
        "settings": asdict(settings),
        "provenance": bench_provenance(settings.device),
        "milliseconds": milliseconds,
    }


def _profile_once(contender: Contender, tokens: int, weights: set[Shape]) -> dict[str, float]:
    contender.clear()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.profiler.profile(activities=activities, record_shapes=True) as profiler,
        torch.profiler.record_function("step"),
    ):
        contender.forward_backward()
    contender.clear()
    found = dict.fromkeys((*KINDS, BETWEEN), 0.0)
    whole = 0.0
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.key == "step":
            whole = event.cpu_time_total / 1000
        elif event.key.startswith("aten::"):
            shapes = [tuple(shape) for shape in event.input_shapes if shape]
            found[kind_of(event.key, shapes, tokens, weights)] += event.self_cpu_time_total / 1000
    found[BETWEEN] = whole - sum(found.values())
    return found


def kind_of(operation: str, shapes: Sequence[Shape], tokens: int, weights: set[Shape]) -> str:
    """Return the kind of one operation, such as `aten::mm`, by the shapes of its tensors.

    `weights` are the shapes (m, n) of the adapted matrices. No number of components may equal one of their sizes.
    """
    first = shapes[0] if shapes else ()
    onto_weight = first in weights or first[::-1] in weights
    if onto_weight and operation in ("aten::addmm_", "aten::copy_", "aten::clone"):
        return "folding"
    if operation in _MATMULS:
        sizes = {size for shape in shapes for size in shape}
        components = sizes - {tokens, *(size for shape in weights for size in shape)}
        return "narrow matmuls" if tokens in sizes and components else "backbone matmuls"
    if "attention" in operation:
        return "attention"
    # Masks are flat; in a backbone of sequences nothing else is.
    sizes = {tokens * size for weight in weights for size in weight}
    if (
        operation in ("aten::bitwise_and", "aten::bitwise_and_")
        or (operation == "aten::copy_" and len(first) == 1 and first[0] in sizes)
        or (operation in ("aten::mul", "aten::mul_") and len(first) == 2 and first[0] * first[1] in sizes)
    ):
        return "dropout mask"
    return "other operations"
