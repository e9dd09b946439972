"""What the machine can do at best, and what that makes of a low-rank update: arithmetic is cheap, passes are not.

The narrow matmuls of an update have next to nothing to multiply, but each reads or writes activations as large as
those of the backbone. Their time is bytes over bandwidth, whatever the rank, and its share of a step grows with the
speed at which the machine multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch

from ..methods import encoder_linears
from .settings import BenchSettings

_REPEATS = 15
_POOL = 6
"""Operands take turns, so that none is found in a cache because of the last repeat."""

_PASSES = 4
"""Passes over the inputs, and over the outputs, of one matrix in a step: forward reads x and reads and writes y;
backward reads gy twice (for upᵀ gy and gb), reads and writes gx, and reads x (for ga)."""


@dataclass(frozen=True)
class Roofline:
    """Speeds of the machine, and what an update must move in one step.

    Args:
        multiply_flops: Floating-point operations a second of the widest matmul of the model.
        move_bytes: Bytes a second of adding one activation to another.
        backbone_operations: Floating-point operations of forward and backward through the adapted matrices, frozen.
        update_bytes: Bytes that the narrow matmuls of all updates read and write, rank 1.
    """

    multiply_flops: float
    move_bytes: float
    backbone_operations: float
    update_bytes: float

    @property
    def update_ms(self) -> float:
        """The least time of all updates of a step, in milliseconds."""
        return 1000 * self.update_bytes / self.move_bytes

    @property
    def backbone_ms(self) -> float:
        """The least time of the adapted matrices themselves, in milliseconds."""
        return 1000 * self.backbone_operations / self.multiply_flops


def roofline(model: Any, settings: BenchSettings, stopwatch: Callable[..., list[float]]) -> Roofline:
    """Measure the machine with operands of the model's sizes.

    Args:
        model: The model that is measured.
        settings: Batch, length, dtype and device.
        stopwatch: As `timing.stopwatch_for` gives it.
    """
    tokens = settings.batch_size * settings.length
    matrices = [model.get_submodule(name).weight for name in encoder_linears(model)]
    widest = max(matrices, key=torch.numel)
    sides = sum(sum(matrix.shape) for matrix in matrices)
    return Roofline(
        multiply_flops=_multiply_flops(tokens, widest, stopwatch),
        move_bytes=_move_bytes(tokens, widest, stopwatch),
        backbone_operations=4.0 * tokens * sum(map(torch.numel, matrices)),
        update_bytes=float(_PASSES * tokens * sides * widest.element_size()),
    )


def _multiply_flops(tokens: int, matrix: torch.Tensor, stopwatch: Callable[..., list[float]]) -> float:
    n = min(matrix.shape)
    weight = matrix.detach().reshape(n, -1)
    inputs = cycle([torch.randn(tokens, n, dtype=matrix.dtype, device=matrix.device) for _ in range(_POOL)])
    seconds = _best(stopwatch, lambda: torch.mm(next(inputs), weight))
    return 2 * tokens * matrix.numel() / seconds


def _move_bytes(tokens: int, matrix: torch.Tensor, stopwatch: Callable[..., list[float]]) -> float:
    shape = (tokens, max(matrix.shape))
    # Not zeros: until they are written, those are one and the same page of memory.
    pool = [torch.randn(shape, dtype=matrix.dtype, device=matrix.device) for _ in range(_POOL)]
    targets, sources = cycle(pool[::2]), cycle(pool[1::2])
    seconds = _best(stopwatch, lambda: next(targets).add_(next(sources)))
    return 3 * pool[0].numel() * matrix.element_size() / seconds


def _best(stopwatch: Callable[..., list[float]], work: Callable[[], Any]) -> float:
    """Return the least time of `work`: what the machine can do when nobody else wants it."""
    work()
    return min(stopwatch(work)[0] for _ in range(_REPEATS))
