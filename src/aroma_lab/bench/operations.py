"""Where the time of a step goes, by kind of operation, as PyTorch's profiler sees it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..methods import encoder_linears
from ..progress import Progress, no_progress
from ..run.memory import keep_freed_memory
from .cases import select_cases
from .contestant import Contestant
from .machine import bench_provenance, require_device
from .settings import BenchSettings
from .shapes import copy_model, make_batch, make_model

KINDS = ("backbone matmuls", "narrow matmuls", "folding", "dropout mask", "attention", "other operations")
"""What operations are sorted into. Narrow: with factors of an update. Folding: the update into a copy of a weight."""

BETWEEN = "between operations"
"""Time in none of them: Python, dispatch, the autograd engine."""

_MATMULS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv")
_BITS = ("aten::bitwise_and", "aten::bitwise_and_")


@dataclass(frozen=True)
class OperationTimes:
    """Milliseconds of one case's forward and backward by kind of operation, medians over steps.

    Args:
        key: Key of the case.
        milliseconds: By kind, `BETWEEN` among them; their sum is the step's duration under the profiler.
    """

    key: str
    milliseconds: dict[str, float]


def operation_times(settings: BenchSettings, phase: Progress = no_progress) -> list[OperationTimes]:
    """Profile forward and backward of every case, in turns.

    Args:
        settings: What is measured; `rounds` steps of each case.
        phase: Announces what is being done.

    Raises:
        ConfigError: An unknown model, case or device.
    """
    cases = select_cases(settings.only, compiled=False)
    require_device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.keep_memory:
        keep_freed_memory()
    base = make_model(settings)
    batch = make_batch(base, settings)
    shapes = {tuple(base.get_submodule(name).weight.shape) for name in encoder_linears(base)}
    contestants = [
        Contestant(case, copy_model(base, case.method.writes_backbone), batch, settings.seed) for case in cases
    ]
    steps: dict[str, list[dict[str, float]]] = {case.key: [] for case in cases}
    with phase("profiling", len(cases) * (settings.warmup_rounds + settings.rounds)) as advance:
        for turn in range(settings.warmup_rounds + settings.rounds):
            for contestant in contestants:
                found = _profile(contestant, settings.batch_size * settings.length, shapes)
                if turn >= settings.warmup_rounds:
                    steps[contestant.case.key].append(found)
                advance(1)
    return [OperationTimes(key, _medians(found)) for key, found in steps.items()]


def operations_record(settings: BenchSettings, found: Sequence[OperationTimes]) -> dict[str, Any]:
    """Return what was found, with settings and provenance, JSON-able."""
    return {
        "settings": asdict(settings),
        "provenance": bench_provenance(settings.device),
        "milliseconds": {times.key: times.milliseconds for times in found},
    }


def kind_of(operation: str, shapes: Sequence[Sequence[int]], tokens: int, weights: set[tuple[int, ...]]) -> str:
    """Return the kind of one operation.

    Args:
        operation: Its name, as `aten::mm`.
        shapes: Shapes of its tensors.
        tokens: Tokens of a batch.
        weights: Shapes (m, n) of the adapted matrices; no number of components may be one of their sizes.
    """
    first = tuple(shapes[0]) if shapes else ()
    of_weight = [shape for shape in map(tuple, shapes) if shape in weights or shape[::-1] in weights]
    if operation in _MATMULS:
        onto_weight = operation == "aten::addmm_" and first in of_weight
        return "folding" if onto_weight else _kind_of_matmul(shapes, tokens, weights)
    if "attention" in operation:
        return "attention"
    if operation in ("aten::copy_", "aten::clone") and first in of_weight:
        return "folding"
    if operation in _BITS or _is_of_a_mask(operation, first, tokens, weights):
        return "dropout mask"
    return "other operations"


def _is_of_a_mask(operation: str, shape: tuple[int, ...], tokens: int, weights: set[tuple[int, ...]]) -> bool:
    """Whether a mask is made numbers, or multiplied with: flat, as nothing of a backbone of sequences is."""
    sizes = {tokens * size for weight in weights for size in weight}
    if operation == "aten::copy_":
        return len(shape) == 1 and shape[0] in sizes
    return operation in ("aten::mul", "aten::mul_") and len(shape) == 2 and shape[0] * shape[1] in sizes


def _kind_of_matmul(shapes: Sequence[Sequence[int]], tokens: int, weights: set[tuple[int, ...]]) -> str:
    sizes = {size for shape in shapes for size in shape}
    components = sizes - {tokens, *(size for shape in weights for size in shape)}
    return "narrow matmuls" if tokens in sizes and components else "backbone matmuls"


def _profile(contestant: Contestant, tokens: int, weights: set[tuple[int, ...]]) -> dict[str, float]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.profiler.profile(activities=activities, record_shapes=True) as profiler,
        torch.profiler.record_function("step"),
    ):
        contestant.forward_backward()
    contestant.clear()
    found = dict.fromkeys((*KINDS, BETWEEN), 0.0)
    whole = 0.0
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.key == "step":
            whole = event.cpu_time_total / 1000
        elif event.key.startswith("aten::"):
            shapes = [shape for shape in event.input_shapes if shape]
            found[kind_of(event.key, shapes, tokens, weights)] += event.self_cpu_time_total / 1000
    found[BETWEEN] = whole - sum(found.values())
    return found


def _medians(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    return {kind: statistics.median(step[kind] for step in steps) for kind in steps[0]}
