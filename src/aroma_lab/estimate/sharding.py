"""Where the bytes of a training go on each device: on one, on replicas (DDP), or sharded (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Literal

from .checks import inner_check_bytes, outer_step_bytes
from .inventory import Held, Inventory, finished_bytes
from .optimizers import state_bytes
from .settings import ScaleSettings
from .step import StepUse

Strategy = Literal["one", "ddp", "fsdp2"]


@dataclass(frozen=True)
class DeviceBytes:
    """Bytes on the device that holds most.

    Args:
        weights: Frozen base weights, in their dtype or packed.
        constants: Scales and code tables of quantised weights.
        buffers: The base model's buffers.
        pairs: Components in training.
        finished: Finished components, padding included.
        head: Trained parameters beside the pairs.
        gradients: Of pairs and head.
        optimizer: Its state.
        buckets: Copies of the gradients that DDP reduces.
        gathered: Parameters that FSDP2 has gathered at one time.
        kept: What forward keeps for backward.
        step_extra: What a step needs beyond `kept` at its peak.
        between_extra: What checks, growth or the optimizer need between two steps beyond all that a step needs.
    """

    weights: int
    constants: int
    buffers: int
    pairs: int
    finished: int
    head: int
    gradients: int
    optimizer: int
    buckets: int
    gathered: int
    kept: int
    step_extra: int
    between_extra: int

    @property
    def total(self) -> int:
        """The peak."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Needs:
    """What a training needs, from which the bytes of any number of devices follow.

    Args:
        settings: What is estimated.
        inventory: Its tensors.
        step: Its step on one device.
        finished: Bytes of the finished components.
        check: Bytes of an inner check.
        outer: Bytes of an outer step.
    """

    settings: ScaleSettings
    inventory: Inventory
    step: StepUse
    finished: int
    check: int
    outer: int

    @classmethod
    def of(cls, settings: ScaleSettings, inventory: Inventory, step: StepUse) -> Needs:
        """Return the needs, given the tensors and the step."""
        return cls(
            settings,
            inventory,
            step,
            finished_bytes(inventory, settings),
            inner_check_bytes(inventory, settings),
            outer_step_bytes(inventory, settings),
        )

    def on(self, strategy: Strategy, devices: int = 1) -> DeviceBytes:
        """Return the bytes on one of so many devices; one device has nobody to share with."""
        shard = _sharding(strategy, devices)
        inventory = self.inventory
        trained = [shard(one) for one in inventory.trained]
        gradients = _bytes(trained)
        between = max(self.check, self.outer, gradients)  # an optimizer's intermediates are as large as what it trains
        step_extra = self.step.peak - self.step.kept
        gathered = self._gathered() if strategy == "fsdp2" and devices > 1 else 0
        return DeviceBytes(
            weights=_bytes(map(shard, inventory.weights)),
            constants=inventory.constants,
            buffers=inventory.buffers,
            pairs=_bytes(map(shard, inventory.pairs)),
            finished=self.finished,
            head=_bytes(map(shard, inventory.head)),
            gradients=gradients,
            optimizer=state_bytes(self.settings.optimizer, trained),
            buckets=gradients if strategy == "ddp" and devices > 1 else 0,
            gathered=gathered,
            kept=self.step.kept,
            step_extra=step_extra,
            between_extra=max(0, between - self.step.peak),
        )

    def _gathered(self) -> int:
        """What lies outside the blocks is gathered for the whole step, and of the blocks one and the next."""
        return self.inventory.root + 2 * self.inventory.block


def _sharding(strategy: Strategy, devices: int) -> Callable[[Held], Held]:
    if strategy != "fsdp2" or devices == 1:
        return lambda one: one
    return lambda one: one.shard(devices)


def _bytes(held: Iterable[Held]) -> int:
    return sum(one.bytes for one in held)
