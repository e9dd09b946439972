"""Whether a training fits, and on how many devices of a kind."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .devices import Device
from .pace import step_seconds
from .sharding import Needs, Strategy
from .traffic import Traffic

MOST = 1024
"""Most devices that are tried."""


@dataclass(frozen=True)
class Fit:
    """The verdict on one kind of device.

    Args:
        device: Its name.
        usable_bytes: What of its memory a training may take.
        on_one: Whether one device is enough; then DDP takes any number.
        fsdp2: Smallest number of devices that is enough with FSDP2; None if none up to 1024 is.
        fsdp2_bytes: Bytes on each of them; with 1024 where none is enough.
        seconds: Rough seconds of a step on that number; None where it does not fit, or no speed is known.
    """

    device: str
    usable_bytes: int
    on_one: bool
    fsdp2: int | None
    fsdp2_bytes: int
    seconds: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)


def fit(needs: Needs, device: Device) -> Fit:
    """Return the verdict on a kind of device."""
    usable = device.usable_bytes
    on_one = needs.on("one").total <= usable
    count = 1 if on_one else _smallest(needs, usable)
    shown = count or MOST
    strategy: Strategy = "one" if shown == 1 else "fsdp2"
    seconds = None
    if count is not None:
        traffic = Traffic.of(needs, strategy, count)
        seconds = step_seconds(needs.step, traffic, device, needs.settings.weight_dtype, strategy, count)
    return Fit(device.name, usable, on_one, count, needs.on(strategy, shown).total, seconds)


def _smallest(needs: Needs, usable: int) -> int | None:
    """Return the smallest number from 2 on; more devices never hold more each."""
    if needs.on("fsdp2", MOST).total > usable:
        return None
    low, high = 1, MOST
    while high - low > 1:
        middle = (low + high) // 2
        if needs.on("fsdp2", middle).total <= usable:
            high = middle
        else:
            low = middle
    return high
