"""The whole estimate of one model, for several numbers of components."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from aroma.errors import bad_value

from .architecture import build
from .devices import NETWORK_GB, NODE, RESERVED_BYTES, RESERVED_SHARE, Device
from .fit import Fit, fit
from .inventory import take_inventory
from .pace import UTILISATION
from .settings import ScaleSettings, require_whole
from .shapes import load_config, require_length
from .sharding import DeviceBytes, Needs, Strategy
from .step import step_use
from .traffic import Traffic


@dataclass(frozen=True)
class Estimate:
    """One model with one number of components.

    Args:
        needs: What it needs.
        devices: Number of devices that `on` and `traffic` are for.
        on: Bytes on each device, by strategy: `"one"`, and for more devices `"ddp"` and `"fsdp2"`.
        traffic: By the strategies of more devices.
        fits: Verdicts on the kinds of devices that were asked for.
    """

    needs: Needs
    devices: int
    on: dict[Strategy, DeviceBytes]
    traffic: dict[Strategy, Traffic]
    fits: tuple[Fit, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        needs, inventory = self.needs, self.needs.inventory
        return {
            "settings": asdict(needs.settings),
            "parameters": {
                "base": inventory.parameters,
                "modules": len(inventory.modules),
                "pairs": needs.settings.r * sum(m + n for m, n in inventory.modules),
                "finished": needs.settings.rank * sum(m + n for m, n in inventory.modules),
            },
            "step": {"tokens": needs.settings.tokens, **asdict(needs.step)},
            "inner_check_bytes": needs.check,
            "outer_step_bytes": needs.outer,
            "bytes": {name: {**asdict(one), "total": one.total} for name, one in self.on.items()},
            "traffic": {name: asdict(one) for name, one in self.traffic.items()},
            "fits": [one.as_dict() for one in self.fits],
        }


def estimate(settings: Sequence[ScaleSettings], devices: int = 1, kinds: Sequence[Device] = ()) -> list[Estimate]:
    """Return the estimates of one model that differ in their components alone.

    Args:
        settings: One for every number of components.
        devices: Number of devices for the table of bytes.
        kinds: Kinds of devices to pass a verdict on.

    Raises:
        ConfigError: A model or a number that cannot work.
    """
    require_whole("devices", devices, 1)
    if not settings:
        raise bad_value("components", [], "give one number at least")
    first = settings[0]
    config = load_config(first.model)
    require_length(config, first.sequence_length)
    inventory = take_inventory(build(first, config), first.dtype)
    return [_estimate(Needs.of(one, inventory, step_use(one, config)), devices, kinds) for one in settings]


def record(estimates: Sequence[Estimate]) -> dict[str, Any]:
    """Return estimates with their assumptions as JSON has them."""
    return {
        "devices": estimates[0].devices,
        "assumptions": {
            "reserved_share": RESERVED_SHARE,
            "reserved_bytes": RESERVED_BYTES,
            "utilisation": UTILISATION,
            "devices_of_a_machine": NODE,
            "network_gigabytes_a_second": NETWORK_GB,
        },
        "estimates": [one.as_dict() for one in estimates],
    }


def _estimate(needs: Needs, devices: int, kinds: Sequence[Device]) -> Estimate:
    strategies: tuple[Strategy, ...] = ("ddp", "fsdp2") if devices > 1 else ()
    return Estimate(
        needs,
        devices,
        {"one": needs.on("one"), **{name: needs.on(name, devices) for name in strategies}},
        {name: Traffic.of(needs, name, devices) for name in strategies} or {"one": Traffic.of(needs, "one", 1)},
        tuple(fit(needs, kind) for kind in kinds),
    )
