"""Around one optimizer step: the re-warm-up of the rates, and steps that are skipped."""

from __future__ import annotations

from typing import Any

from .. import compat


def was_skipped(optimizer: Any) -> bool:
    """Whether the step that `optimizer` is in changes nothing, because a GradScaler or DeepSpeed found an overflow.

    A fused optimizer (`AdamW(fused=True)`, the Trainer's default) takes the step, and changes nothing.
    """
    if getattr(optimizer, "overflow", False) is True:
        return True
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


class Rewarmup:
    """Scales the learning rates for one optimizer step and gives them back afterwards.

    The schedule never notices: it computes its next value from the rates it set itself. What it reports as its last
    value is the rate that was really used.
    """

    def __init__(self) -> None:
        self._scheduled: list[Any] | None = None

    def begin(self, optimizer: Any, factor: float) -> None:
        """Multiply the rate of every parameter group of `optimizer` by `factor`."""
        if self._scheduled is not None:  # the last step ended with an exception
            self.end(optimizer, None)
        self._scheduled = [group["lr"] for group in optimizer.param_groups]
        if factor != 1.0:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * factor

    def end(self, optimizer: Any, scheduler: Any | None) -> None:
        """Restore the scheduled rates, and let `scheduler` report the used ones as its last."""
        if self._scheduled is None:
            return
        used = [group["lr"] for group in optimizer.param_groups]
        for group, scheduled in zip(optimizer.param_groups, self._scheduled, strict=True):
            group["lr"] = scheduled
        self._scheduled = None
        compat.report_rates(scheduler, used)
