"""A rough time of a step: published speeds, an assumed share of them. Not measured."""

from __future__ import annotations

import math

from .devices import Device
from .sharding import Strategy
from .step import StepUse
from .traffic import Traffic

UTILISATION = 0.4
"""Share of the published speed that a step's matmuls reach: an assumption, common for large models."""


def step_seconds(
    step: StepUse, traffic: Traffic, device: Device, weight_dtype: str, strategy: Strategy, devices: int
) -> float | None:
    """Return the seconds of forward, backward and traffic; None for a device of unknown speed.

    Replicas reduce after backward; FSDP2 gathers while it computes, so that the slower of both counts.
    """
    if not math.isfinite(device.half_tflops):
        return None
    compute = step.flops / (device.tflops(weight_dtype) * 1e12 * UTILISATION)
    exchange = traffic.step / device.bandwidth(devices)
    return max(compute, exchange) if strategy == "fsdp2" else compute + exchange
