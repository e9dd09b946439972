"""Accelerators, by what their makers publish."""

from __future__ import annotations

import math
from dataclasses import dataclass

from aroma.errors import bad_value

GIB = 2**30

RESERVED_SHARE, RESERVED_BYTES = 0.05, GIB
"""What of a device's memory is left free: for fragments, and for the driver's context and its libraries."""

NODE = 8
"""Devices that one machine holds; more are linked by a network."""

NETWORK_GB = 25.0
"""Gigabytes a second and device, one way, between machines: 200 Gbit/s, an assumption."""


@dataclass(frozen=True)
class Device:
    """One kind of accelerator.

    Args:
        name: Its name.
        memory_gib: Memory.
        half_tflops: Dense bfloat16 or float16 matmuls with float32 sums, 10¹² operations a second.
        float_tflops: The same in float32, outside of tensor cores.
        link_gb: To the others of its machine, gigabytes a second, one way.
    """

    name: str
    memory_gib: float
    half_tflops: float
    float_tflops: float
    link_gb: float

    @property
    def usable_bytes(self) -> int:
        """Bytes that a training may take."""
        return max(0, math.floor(self.memory_gib * GIB * (1 - RESERVED_SHARE)) - RESERVED_BYTES)

    def tflops(self, weight_dtype: str) -> float:
        """Return the published speed of matmuls in a dtype."""
        return self.float_tflops if weight_dtype == "float32" else self.half_tflops

    def bandwidth(self, devices: int) -> float:
        """Return bytes a second, one way, between so many devices."""
        return 1e9 * (self.link_gb if devices <= NODE else min(self.link_gb, NETWORK_GB))


DEVICES = {
    device.name: device
    for device in (
        Device("T4", 15, 65, 8.1, 16),
        Device("L4", 22.5, 121, 30.3, 32),
        Device("A10G", 22.5, 70, 35, 32),
        Device("RTX-4090", 24, 165, 82.6, 32),
        Device("A100-40GB", 40, 312, 19.5, 300),
        Device("L40S", 45, 362, 91.6, 32),
        Device("A100-80GB", 80, 312, 19.5, 300),
        Device("H100", 80, 989, 67, 450),
        Device("H200", 140, 989, 67, 450),
        Device("B200", 179, 2250, 75, 900),
    )
}
"""By name, the smallest first."""


def find_device(name: str) -> Device:
    """Return a device by its name, whatever the case.

    Raises:
        ConfigError: There is none of that name.
    """
    for known, device in DEVICES.items():
        if known.lower() == name.lower():
            return device
    raise bad_value("device", name, f"choose among {', '.join(DEVICES)}, or give --device-memory")


def device_of_memory(memory_gib: float) -> Device:
    """Return a device of which only the memory is known; it has no speed.

    Raises:
        ConfigError: It leaves nothing to train with.
    """
    device = Device(f"{memory_gib:g} GiB", memory_gib, math.nan, math.nan, math.nan)
    if not math.isfinite(memory_gib) or device.usable_bytes <= 0:
        raise bad_value(
            "device_memory", memory_gib, "give GiB; 1 GiB and a twentieth are left free, so give more than 1.06"
        )
    return device
