"""Estimates as tables and sentences."""

from __future__ import annotations

from dataclasses import fields

from rich.table import Table

from .devices import GIB, NETWORK_GB, NODE, RESERVED_BYTES, RESERVED_SHARE
from .estimate import Estimate
from .fit import MOST, Fit
from .pace import UTILISATION
from .sharding import DeviceBytes

_ROWS = {
    "weights": "base weights",
    "constants": "scales of quantised weights",
    "buffers": "buffers of the base model",
    "pairs": "components in training",
    "finished": "finished components",
    "head": "trained head",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "buckets": "DDP's buckets",
    "gathered": "gathered by FSDP2",
    "kept": "kept for backward",
    "step_extra": "peak of a step, beyond that",
    "between_extra": "checks and growth, beyond a step",
}
_STRATEGIES = {"one": "one device", "ddp": "DDP, each of {}", "fsdp2": "FSDP2, each of {}"}


def size(count: float) -> str:
    """Return bytes as a person reads them."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count:.0f} B"


def bytes_table(estimate: Estimate) -> Table:
    """Return the table of where the bytes go."""
    settings, inventory = estimate.needs.settings, estimate.needs.inventory
    title = (
        f"{settings.model}: {inventory.parameters / 1e9:.3f} billion parameters, {len(inventory.modules)} growing "
        f"modules with {settings.components} finished components each"
    )
    table = Table(title=title, show_footer=True)
    table.add_column("bytes of", footer="peak")
    for name, one in estimate.on.items():
        table.add_column(_STRATEGIES[name].format(estimate.devices), footer=size(one.total), justify="right")
    for field in fields(DeviceBytes):
        found = [getattr(one, field.name) for one in estimate.on.values()]
        if any(found):
            table.add_row(_ROWS[field.name], *(size(count) if count else "–" for count in found))
    return table


def verdict_table(estimate: Estimate) -> Table:
    """Return the table of verdicts, a row for every kind of device."""
    table = Table(title="Does it fit?")
    for name in ("device", "usable", "on one", "fewest with FSDP2", "on each", "rough s/step"):
        table.add_column(name, justify="left" if name == "device" else "right")
    for one in estimate.fits:
        table.add_row(*_verdict(one))
    return table


def notes(estimate: Estimate) -> list[str]:
    """Return what else there is to say: traffic, operations, assumptions."""
    needs, settings = estimate.needs, estimate.needs.settings
    traffic = next(iter(estimate.traffic.values()))
    lines = [
        f"A step of {settings.batch_size} × {settings.sequence_length} tokens a device takes "
        f"{needs.step.flops / 1e12:,.2f} · 10¹² operations"
        f"{', the second forward of checkpointing included' if settings.gradient_checkpointing else ''}.",
        f"Gradients reduced in a step over several devices: {size(traffic.reduced)}, whatever the rank has grown to; "
        f"LoRA r = 8: {size(traffic.lora_reduced)}; LoRA of this rank: {size(traffic.final_lora_reduced)}.",
    ]
    for name, one in estimate.traffic.items():
        if estimate.devices > 1:
            lines.append(
                f"{name.upper()}, {estimate.devices} devices: each sends {size(one.step)} a step, "
                f"{size(one.check)} a check and {size(one.outer_step)} an outer step."
            )
    lines.append(
        "DDP replicates: it takes as many devices as you like where one is enough, and none otherwise. "
        f"Left free on each: {RESERVED_SHARE:.0%} and {size(RESERVED_BYTES)}."
    )
    lines.append(
        f"Seconds and traffic are counted, not measured: {UTILISATION:.0%} of the published speed, {NETWORK_GB:g} "
        f"GB/s a device beyond {NODE} devices. docs/scale.md says how, and what the bytes were checked against."
    )
    return lines


def _verdict(one: Fit) -> tuple[str, ...]:
    return (
        one.device,
        size(one.usable_bytes),
        "yes" if one.on_one else "no",
        "–" if one.fsdp2 is None else str(one.fsdp2),
        size(one.fsdp2_bytes) if one.fsdp2 is not None else f"{size(one.fsdp2_bytes)} even on {MOST}",
        "–" if one.seconds is None else f"{one.seconds:.2g}",
    )
