"""Estimates as tables and sentences."""

from __future__ import annotations

from typing import Any

import pandas as pd

from .devices import GIB, MOST, RESERVED_BYTES, RESERVED_SHARE
from .memory import PARTS

_STRATEGIES = {"one": "one device", "ddp": "DDP", "fsdp2": "FSDP2"} | {f"zero{n}": f"ZeRO-{n}" for n in (1, 2, 3)}


def size(count: float) -> str:
    """Return bytes as a person reads them."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count:.0f} B" if count else "–"


def bytes_table(found: dict[str, Any], devices: int) -> str:
    """Return the table of where the bytes go, as text, of one of the estimates of `devices.estimate`."""
    settings, parameters = found["settings"], found["parameters"]
    is_aroma = settings["adapter"] == "aroma"
    adapter = f"AROMA with {settings['components']} finished components" if is_aroma else "LoRA"
    title = (
        f"{settings['model']}, {parameters['base'] / 1e9:.3f} billion parameters in {settings['dtype']}; {adapter}, "
        f"r = {settings['r']}, on {parameters['modules']} modules; {settings['batch_size']} × "
        f"{settings['sequence_length']} tokens"
    )
    if devices > 1:
        title += f"\nbytes on one device, and on each of {devices}"
    frame = pd.DataFrame(found["bytes"]).rename(index={**PARTS, "total": "peak"}, columns=_STRATEGIES)
    return f"{title}\n{frame[frame.any(axis='columns')].map(size).to_string()}"


def fit_table(found: dict[str, Any]) -> str:
    """Return the table of how many devices of each kind are enough, as text; see `bytes_table`."""
    frame = pd.DataFrame(
        {
            "device": one["device"],
            "usable": size(one["usable_bytes"]),
            "on one": "yes" if one["on_one"] else "no",
            "fewest with FSDP2": one["fsdp2"] or "–",
            "on each": size(one["fsdp2_bytes"]) + ("" if one["fsdp2"] else f" even on {MOST}"),
            "fewest with ZeRO-3": one["zero3"] or "–",
        }
        for one in found["fits"]
    )
    return f"Does it fit?\n{frame.to_string(index=False)}"


def notes() -> list[str]:
    """Return the assumptions in sentences."""
    return [
        f"DDP holds everything on each device: it fits where one device is enough. Left free on each: "
        f"{RESERVED_SHARE:.0%} and {size(RESERVED_BYTES)}.",
        "Bytes are counted, not measured. docs/scale.md says how, and what they were checked against.",
    ]
