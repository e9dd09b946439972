"""A growing adapter in a plain training loop: one call before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from ..controller import AromaController
from ..events import Event, Summary
from ..reset import makes_state_only
from .rewarmup import Rewarmup, was_skipped


class Attachment(AbstractContextManager["Attachment"]):
    """The controller of a plain training loop, hooked to its optimizer; made by `attach`.

    As a context manager it detaches at the end of the block, also after an exception.

    Attributes:
        controller: The `AromaController`.
    """

    def __init__(self, controller: AromaController, optimizer: Any, scheduler: Any | None) -> None:
        self.controller = controller
        self._rewarmup = Rewarmup()
        self._counts = True
        # accelerate wraps both: only the real optimizer has hooks, and only the real scheduler a last rate.
        self._scheduler = getattr(scheduler, "scheduler", scheduler)
        self._hooks = controller.matrices.sharding.hook_step(optimizer, self._before_step, self._after_step)

    @property
    def finished(self) -> bool:
        """Whether every matrix is frozen, so that the loop may stop."""
        return self.controller.finished

    def summary(self) -> Summary:
        """Return what became of every matrix; prints as a short table. See `AromaController.summary`."""
        return self.controller.summary()

    def detach(self) -> None:
        """Remove all hooks; the adapter stays as it is."""
        self._hooks.close()
        self.controller.detach()

    def __exit__(self, *_: object) -> None:
        """Detach."""
        self.detach()

    def _before_step(self, optimizer: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        self._counts = not makes_state_only(optimizer, keywords)
        if self._counts:
            self._rewarmup.begin(optimizer, self.controller.lr_factor)

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        if not self._counts:
            return
        self._rewarmup.end(optimizer, self._scheduler)
        if not was_skipped(optimizer):
            self.controller.step()


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
