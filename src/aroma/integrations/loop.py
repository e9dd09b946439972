"""A growing adapter in a plain training loop: one call before it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from ..controller import AromaController
from ..errors import AromaWarning, CheckpointError, bad_value
from ..events import Event, Summary
from ..reset import makes_state_only
from ..sharding import rank
from ..tuner.state import is_whole, read_controller_state
from .held_out import HeldOutBatches, Loss, refuse_unread
from .rewarmup import Rewarmup, loss_scale, was_skipped


class Attachment(AbstractContextManager["Attachment"]):
    """The controller of a plain training loop, hooked to its optimizer; made by `attach`.

    As a context manager it detaches at the end of the block, also after an exception.

    Attributes:
        controller: The `AromaController`.
    """

    def __init__(
        self, controller: AromaController, optimizer: Any, scheduler: Any | None, scaler: Any | None = None
    ) -> None:
        self.controller = controller
        self._rewarmup = Rewarmup()
        self._counts = True
        self._scaler = getattr(optimizer, "scaler", None) if scaler is None else scaler
        self._loss_scale = 1.0
        # accelerate wraps both: only the real optimizer has hooks, and only the real scheduler a last rate.
        self._scheduler = getattr(scheduler, "scheduler", scheduler)
        self._hook = controller.matrices.sharding.hook_step(optimizer, self._before_step, self._after_step)

    @property
    def finished(self) -> bool:
        """Whether every matrix is frozen, so that the loop may stop."""
        return self.controller.finished

    def summary(self) -> Summary:
        """Return what became of every matrix; prints as a short table. See `AromaController.summary`."""
        return self.controller.summary()

    def detach(self) -> None:
        """Remove all hooks; the adapter stays as it is."""
        self._hook.remove()
        self.controller.detach()

    def __exit__(self, *_: object) -> None:
        """Detach."""
        self.detach()

    def _before_step(self, optimizer: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        self._counts = not makes_state_only(optimizer, keywords)
        if self._counts:
            if not any(map(callable, [*arguments, *keywords.values()])):  # a closure makes its backwards in the step
                self.controller.require_answers()
            self._loss_scale = loss_scale(optimizer, self._scaler)
            self._rewarmup.begin(optimizer, self.controller.lr_factor)

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        if not self._counts:
            return
        self._rewarmup.end(optimizer, self._scheduler)
        if was_skipped(optimizer):
            self.controller.skip_step()
        else:
            self.controller.step(loss_scale=self._loss_scale)


def attach(
    model: nn.Module,
    optimizer: Any,
    scheduler: Any | None = None,
    *,
    total_steps: int | None = None,
    resume_from: str | None = None,
    on_event: Callable[[Event], None] | None = None,
    adapter_name: str = "default",
    steps_per_pass: int | None = None,
    growth_batches: Iterable[Any] | None = None,
    growth_loss: Loss | None = None,
    scaler: Any | None = None,
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

    With `growth="evidence"`, held-out batches decide what stays after the trial, births after the first pass, and what
    goes in the last squeeze:

    .. code-block:: python

        train, growth = hold_out(dataset)
        batches, held_out = DataLoader(train, 16, shuffle=True), DataLoader(growth, 16, drop_last=True)
        attach(model, optimizer, total_steps=3 * len(batches), steps_per_pass=len(batches), growth_batches=held_out)

    To resume: `model.load_adapter(folder, "default", is_trainable=True)`, restore optimizer and scheduler, then
    `attach(..., resume_from=folder)`.

    Under `torchrun`, wrap the model first, `attach(DistributedDataParallel(model), optimizer, ...)`, on every rank;
    save on rank 0. With FSDP2: `fully_shard` the blocks and the model, make the optimizer, then `attach(model,
    optimizer, ...)`; save with `aroma.save_adapter(model, folder)` on every rank (docs/distributed.md).

    Args:
        model: Model with an AROMA adapter; wrapped, sharded or neither.
        optimizer: Optimizer that holds the adapter's parameters.
        scheduler: Learning-rate scheduler. Its `get_last_lr()` then returns the rate that was used, except with
            DeepSpeed, which steps it at once.
        total_steps: Planned optimizer steps; needed with `growth="evidence"`, and where `max_inner_steps` is None.
        resume_from: Folder of a saved adapter whose run goes on.
        on_event: Called with every event.
        adapter_name: Name of the adapter.
        steps_per_pass: With growth="evidence", optimizer steps of one pass over the training set; `total_steps` if no
            example comes twice.
        growth_batches: With growth="evidence", batches of examples that are not trained on, as a list or a DataLoader.
            They decide what stays after the trial, from the second pass on what is born, and what goes where growth
            ends. They begin anew when they end; of an iterator the first 256 are kept for that.
        growth_loss: Loss of a model and such a batch, where the model itself returns none.
        scaler: With growth="evidence", the `torch.amp.GradScaler` that scales the loss, if one does; an optimizer that
            accelerate prepared brings it along, and one of DeepSpeed scales by itself.

    Raises:
        ConfigError: As `AromaController`.
        CheckpointError: `resume_from` holds no state of a run, or a damaged one.

    Warns:
        AromaWarning: growth="evidence" without `steps_per_pass`, or as `AromaController.decide_by`.
    """
    controller = AromaController(model, optimizer, total_steps=total_steps, adapter_name=adapter_name)
    of_evidence = {"steps_per_pass": steps_per_pass, "growth_batches": growth_batches, "growth_loss": growth_loss}
    refuse_unread("growth_batches", of_evidence, has_slots=controller.config.has_slots)
    if steps_per_pass is not None and not is_whole(steps_per_pass, 1, 2**62):
        raise bad_value("steps_per_pass", steps_per_pass, "a pass over the training set takes a whole number of steps")
    held_out = None
    if growth_batches is not None:
        with controller.together():
            alpha, questions = controller.config.significance, controller.rule.questions
            held_out = HeldOutBatches(growth_batches, growth_loss, rank(), alpha, questions)
        held_out.require_loss(controller.matrices.model, controller.matrices.device)
    if controller.config.has_slots and steps_per_pass is None:
        warnings.warn(
            "steps_per_pass is not given, so every batch counts as one that was not trained on before. Give the "
            "optimizer steps of one pass over the training set; if no example comes twice, total_steps",
            AromaWarning,
            stacklevel=2,
        )
    controller.decide_by(held_out, None if steps_per_pass is None else int(steps_per_pass))
    if resume_from is None:
        controller.warn_of_undecided()
    else:
        with controller.together():
            exported = read_controller_state(resume_from)
            if exported is None:
                raise CheckpointError(
                    f"resume_from={resume_from!r}: saved without a controller, so there is no run to resume"
                )
        controller.load_state_dict(exported)
    if on_event is not None:
        controller.subscribe(on_event)
    return Attachment(controller, optimizer, scheduler, scaler)
