"""A growing adapter in a training loop: all of it happens inside `optimizer.step()`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from .. import compat
from ..controller import AromaController
from ..events import Event, ModuleSummary


class Rewarmup:
    """Scales the learning rates for one optimizer step and gives them back afterwards.

    The schedule is unaffected: it computes its next value from the rates that it set itself. As its last value it
    reports the rate that was really used.
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


class Attachment(AbstractContextManager["Attachment"]):
    """The controller of a training loop, hooked to its optimizer; made by `attach`.

    As a context manager it detaches at the end of the block, also after an exception.

    Args:
        controller: The `AromaController`.
        optimizer: The optimizer; wrapped by accelerate or not, or DeepSpeed's.
        scheduler: The scheduler, wrapped by accelerate or not.
        is_over: Whether the run has ended, so that a further step changes nothing.

    Attributes:
        controller: The `AromaController`.
        was_over: Whether the run had ended before the latest step.
    """

    def __init__(
        self,
        controller: AromaController,
        optimizer: Any,
        scheduler: Any | None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        self.controller = controller
        self.was_over = False
        self._is_over = is_over
        self._rewarmup = Rewarmup()
        self._counts = True
        # accelerate wraps both: only the real optimizer has hooks, and only the real scheduler a last rate.
        self._scheduler = getattr(scheduler, "scheduler", scheduler)
        self._hooks = controller.matrices.sharding.hook_step(optimizer, self._before_step, self._after_step)

    @property
    def finished(self) -> bool:
        """Whether every matrix is frozen, so that the loop may stop."""
        return self.controller.finished

    def summary(self) -> list[ModuleSummary]:
        """Return what became of every matrix."""
        return self.controller.summary()

    def detach(self) -> None:
        """Remove all hooks; the adapter stays as it is."""
        self._hooks.close()
        self.controller.detach()

    def __exit__(self, *_: object) -> None:
        """Detach."""
        self.detach()

    def _before_step(self, optimizer: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        self._counts = not _makes_state_only(optimizer, keywords)
        if not self._counts:
            return
        self.was_over = self._is_over()
        if self.was_over and not self.controller.matrices.sharding.has_flat_optimizer:
            optimizer.zero_grad(set_to_none=True)
        self._rewarmup.begin(optimizer, 0.0 if self.was_over else self.controller.lr_factor)

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        if not self._counts:
            return
        self._rewarmup.end(optimizer, self._scheduler)
        if not self.was_over and not _was_skipped(optimizer):
            self.controller.step()


def _makes_state_only(optimizer: Any, keywords: Mapping[str, Any]) -> bool:
    """Whether torch takes a step for the sake of the state, as `get_optimizer_state_dict` does where there is none.

    No loop gives a closure of None by name, and the ranks agree on it, as they might not on gradients that are zero.
    """
    is_at_rest = not optimizer.state and not any(float(group["lr"]) for group in optimizer.param_groups)
    return dict(keywords) == {"closure": None} and is_at_rest


def _was_skipped(optimizer: Any) -> bool:
    """Whether the step changes nothing, because DeepSpeed or a GradScaler found an overflow.

    A fused optimizer (`AdamW(fused=True)`, the Trainer's default) takes the step, and changes nothing.
    """
    if getattr(optimizer, "overflow", False) is True:
        return True
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def attach(
    model: nn.Module,
    optimizer: Any,
    scheduler: Any | None = None,
    *,
    total_steps: int | None = None,
    resume_from: str | None = None,
    on_event: Callable[[Event], None] | None = None,
    adapter_name: str = "default",
) -> Attachment:
    """Let the adapter of `model` grow in a plain loop. All of it happens inside `optimizer.step()`.

    .. code-block:: python

        growth = attach(model, optimizer, scheduler, total_steps=1000)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if growth.finished:
                break

    To resume: `model.load_adapter(folder, "default", is_trainable=True)`, restore optimizer and scheduler, then
    `attach(..., resume_from=folder)`. For several processes see docs/distributed.md.

    Args:
        model: Model with an AROMA adapter; wrapped, sharded or neither.
        optimizer: Optimizer that holds the adapter's parameters.
        scheduler: Learning-rate scheduler. Its `get_last_lr()` then returns the rate that was used, except with
            DeepSpeed, which steps it at once.
        total_steps: Planned optimizer steps; needed where `max_inner_steps` is None.
        resume_from: Folder of a saved adapter whose run goes on.
        on_event: Called with every event.
        adapter_name: Name of the adapter.

    Raises:
        ConfigError: As `AromaController`.
        CheckpointError: `resume_from` holds no state of a run, or a damaged one.
    """
    controller = AromaController(model, optimizer, total_steps=total_steps, adapter_name=adapter_name)
    if resume_from is not None:
        controller.resume(resume_from)
    if on_event is not None:
        controller.subscribe(on_event)
    return Attachment(controller, optimizer, scheduler)
