"""Kinds of devices, on how many of each a training fits, and the whole estimate."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from aroma.errors import bad_value

from .memory import Needs, inner_check_bytes, outer_step_bytes, step_bytes
from .model import EstimateSettings, length_of, load_config, require_whole
from .tensors import finished_bytes, inventory_of

GIB = 2**30

RESERVED_SHARE, RESERVED_BYTES = 0.05, GIB
"""What is left free of a device's memory: for fragments, the driver's context and its libraries."""

MOST = 1024

DEVICES = {
    "T4": 15,
    "L4": 22.5,
    "A10G": 22.5,
    "RTX-4090": 24,
    "A100-40GB": 40,
    "L40S": 45,
    "A100-80GB": 80,
    "H100": 80,
    "H200": 140,
    "B200": 179,
}
"""GiB of kinds of devices, as their makers publish them; the smallest first."""


def usable_bytes(memory_gib: float) -> int:
    """Return the bytes that a training may take of a device."""
    return max(0, math.floor(memory_gib * GIB * (1 - RESERVED_SHARE)) - RESERVED_BYTES)


def kinds_of(names: Sequence[str] = (), memory_gib: float | None = None) -> dict[str, float]:
    """Return GiB by kind of device: those of `names`, in upper or lower case, and one of `memory_gib`; all if none.

    Raises:
        ConfigError: An unknown name, or a memory that leaves nothing to train with.
    """
    known = {name.lower(): name for name in DEVICES}
    for name in names:
        if name.lower() not in known:
            raise bad_value("device", name, f"choose among {', '.join(DEVICES)}, or give --device-memory")
    kinds: dict[str, float] = {known[name.lower()]: DEVICES[known[name.lower()]] for name in names}
    if memory_gib is not None:
        if not math.isfinite(memory_gib) or usable_bytes(memory_gib) <= 0:
            remedy = "give GiB; 1 GiB and a twentieth are left free, so give more than 1.06"
            raise bad_value("device_memory", memory_gib, remedy)
        kinds[f"{memory_gib:g} GiB"] = memory_gib
    return kinds or {**DEVICES}


def fit(needs: Needs, usable: int) -> dict[str, Any]:
    """Return on how many devices a training fits.

    Args:
        needs: What the training needs.
        usable: Bytes of a device that it may take.

    Returns:
        `usable_bytes`; `on_one`, whether one device is enough, and DDP takes any number; `fsdp2` and `zero3`, the
        smallest numbers of devices that are enough, None if 1024 are not, or if the strategy cannot train it;
        `fsdp2_bytes`, bytes on each of them.
    """
    on_one = needs.on("one")["total"] <= usable
    found: dict[str, Any] = {"usable_bytes": usable, "on_one": on_one}
    for strategy in ("fsdp2", "zero3"):
        if strategy not in needs.strategies:
            found[strategy] = 1 if on_one else None
            continue
        # From two devices on, more devices never hold more each.
        enough = partial(lambda name, devices: needs.on(name, devices)["total"] <= usable, strategy)
        fewest = 1 if on_one else bisect_left(range(MOST + 1), True, lo=2, key=enough)
        found[strategy] = fewest if fewest <= MOST else None
    return {**found, "fsdp2_bytes": needs.on("fsdp2", found["fsdp2"] or MOST)["total"]}


def needs_of(settings: Sequence[EstimateSettings]) -> list[Needs]:
    """Return what trainings of one model need that differ in their components alone; lengths are filled in."""
    config = load_config(settings[0].model)
    length = length_of(settings[0], config)
    inventory = inventory_of(settings[0], config)
    found = []
    for one in settings:
        checks = (inner_check_bytes, outer_step_bytes) if one.adapter == "aroma" else ()
        between = max((check(inventory, one) for check in checks), default=0)
        one = replace(one, sequence_length=length)
        found.append(Needs(one, inventory, step_bytes(one, config), finished_bytes(inventory, one), between))
    return found


def estimate(
    settings: Sequence[EstimateSettings], devices: int = 1, kinds: Mapping[str, float] = DEVICES
) -> dict[str, Any]:
    """Return the estimates of one model, JSON-able.

    Args:
        settings: One for every number of components; otherwise alike.
        devices: Number of devices for the bytes of each strategy.
        kinds: GiB of kinds of devices, by name.

    Returns:
        `devices`, `assumptions`, and a list `estimates`, each with `settings`, `parameters`, `bytes` by strategy (see
        `Needs.on`), and `fits` (see `fit`).

    Raises:
        ConfigError: A model or a number that cannot work.
    """
    require_whole("devices", devices, 1)
    return {
        "devices": devices,
        "assumptions": {"reserved_share": RESERVED_SHARE, "reserved_bytes": RESERVED_BYTES},
        "estimates": [_estimate(needs, devices, kinds) for needs in needs_of(settings)],
    }


def _estimate(needs: Needs, devices: int, kinds: Mapping[str, float]) -> dict[str, Any]:
    settings, inventory = needs.settings, needs.inventory
    sides = sum(m + n for m, n in inventory.modules)
    return {
        "settings": asdict(settings),
        "parameters": {
            "base": inventory.parameters,
            "modules": len(inventory.modules),
            "in_training": settings.r * sides,
            "finished": settings.rank * sides,
        },
        "bytes": {
            "one": needs.on("one"),
            **{strategy: needs.on(strategy, devices) for strategy in needs.strategies[1:] if devices > 1},
        },
        "fits": [{"device": name, **fit(needs, usable_bytes(memory))} for name, memory in kinds.items()],
    }
