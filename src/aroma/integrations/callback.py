"""A growing adapter in the Hugging Face Trainer and TRL's trainers: one callback."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn
from tqdm.auto import tqdm
from transformers import DefaultFlowCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy

from ..checkpoint import record_save, whole_checkpoint
from ..controller import AromaController
from ..errors import NonFiniteError, bad_value
from ..events import Event
from ..tuner import aroma_layers
from .base import TrainingCallback
from .loop import Attachment
from .reporting import TrainingRecord


class AromaCallback(TrainingCallback, ExportableState):
    """Lets an AROMA adapter grow inside `Trainer`: checks and merges come after each optimizer step, before its save.

    .. code-block:: python

        model = get_peft_model(base, AromaConfig(task_type="SEQ_CLS"))
        Trainer(model=model, callbacks=[AromaCallback()], ...).train()

    A resumed run has the `AromaConfig` of its checkpoint, or is refused. It may have other `max_steps`, batches,
    learning rates and numbers of processes; T_in stays what it was.

    Args:
        early_stop (`bool`, *optional*, defaults to `True`): Stop the training when every module has finished. With
            `False`, other trainable parameters, such as a classification head, train to the end.
        on_event (`Callable`, *optional*): Called with every `aroma.Event`. Checkpoints do not hold it, so
            `restore_callback_states_from_checkpoint=True` loses it.
        report (`str` or path, *optional*): HTML report of result, loss, ranks and settings, written when the training
            ends and after a later evaluation. An existing file is replaced. Checkpoints do not hold it.

    Attributes:
        controller: The `AromaController` of the current or last training; None before the first.
    """

    # Of the class: the Trainer may replace the callback by a restored one, and no callback sees the checkpoint.
    _resumed: ClassVar[str] = ""

    def __init__(
        self,
        early_stop: bool = True,
        on_event: Callable[[Event], None] | None = None,
        report: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        self.early_stop = early_stop
        self.on_event = on_event
        self._report = None if report is None else TrainingRecord(report)
        self.controller: AromaController | None = None
        self._growth: Attachment | None = None

    # Beginning, and resuming -----------------------------------------------------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Refuse a model without a growing adapter, before any work."""
        trainable_adapter(model)

    def before_training(self, trainer: Any, resume_from_checkpoint: Any) -> Any:
        """Resume from a whole checkpoint only; come before the trackers, so that its totals reach them."""
        self.controller = None
        flow_first = (DefaultFlowCallback, AromaCallback)
        trainer.callback_handler.callbacks.sort(key=lambda one: [not isinstance(one, kind) for kind in flow_first])
        if not resume_from_checkpoint:
            return resume_from_checkpoint
        AromaCallback._resumed = whole_checkpoint(resume_from_checkpoint, trainer.args)
        return AromaCallback._resumed

    def on_train_begin(
        self, args: Any, state: TrainerState, control: Any, model: Any, optimizer: Any, lr_scheduler: Any, **_: Any
    ) -> None:
        """Attach a controller; on resume, give it the state of the checkpoint."""
        self._detach()  # after a training that ended with an exception, or that `auto_find_batch_size` begins again
        self.controller = AromaController(
            model,
            optimizer,
            total_steps=state.max_steps,
            adapter_name=trainable_adapter(model),
            # The model that the Trainer shows is not the one that it compiled.
            compiled=args.torch_compile,
        )
        if state.global_step > 0:
            self._restore(AromaCallback._resumed)
        if self.on_event is not None:
            self.controller.subscribe(self.on_event)
        if self._report is not None:
            self._report.begin(self.controller, state)
        self._growth = Attachment(self.controller, optimizer, lr_scheduler, lambda: self._is_over(state))

    def _restore(self, checkpoint: str) -> None:
        """Give the controller the state of a checkpoint, whose weights are loaded."""
        controller = self._running()
        # PEFT gives every adapter but "default" a folder of its own.
        name = "" if controller.adapter_name == "default" else controller.adapter_name
        controller.resume(os.path.join(checkpoint, name))

    def _detach(self) -> None:
        if self._growth is not None:
            self._growth.detach()
        self._growth = None

    def state(self) -> dict[str, Any]:
        """Return what the Trainer stores in a checkpoint's `trainer_state.json`, its last file; only rank 0 calls.

        The state of the run is beside the adapter, in `aroma_state.json`.
        """
        return {"args": {"early_stop": self.early_stop}, "attributes": {}}

    # Around every optimizer step -------------------------------------------------------------------------------------

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the training when every module has finished."""
        if self._running().finished and self.early_stop:
            # Save, evaluate and log once more, as the Trainer does at the last planned step.
            control.should_training_stop = control.should_log = True
            control.should_save = control.should_save or args.save_strategy == SaveStrategy.STEPS
            control.should_evaluate = control.should_evaluate or args.eval_strategy == "steps"
        self._guard_checkpoint(control)

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse to write an epoch's checkpoint of broken weights."""
        self._guard_checkpoint(control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record a checkpoint's files, which `verify_checkpoint` compares with what is there."""
        record_save(args, state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """Add total rank and the matrices that still train to logs and history; stop at a loss that is not finite."""
        if self.controller is None or logs is None or "loss" not in logs:
            return
        totals = {"total_rank": self.controller.total_rank, "active_modules": self.controller.active_modules}
        logs.update(totals)
        state.log_history[-1].update(totals)
        # logging_nan_inf_filter of the Trainer hides a loss that is not finite. With fp16 a gradient may overflow.
        for name in ("loss",) if args.fp16 else ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise NonFiniteError(
                    f"{name}={logs[name]} at optimizer step {state.global_step}: training stopped, and earlier "
                    "checkpoints are untouched; resume from the last one with a lower learning rate"
                )

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        """After the training, write the report again with the metrics."""
        if self._report is not None:
            self._report.write(self.controller, args, state, model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        """Say why growth ended; after `load_best_model_at_end`, go back to the best checkpoint. Then report."""
        best = state.best_model_checkpoint
        self._detach()
        if self.controller is None:
            return
        if state.is_world_process_zero and not args.disable_tqdm:
            tqdm.write(f"{self.controller.explanation()}.")
        if args.load_best_model_at_end and best is not None:
            self._restore(best)
        if self._report is not None:
            self._report.end(self.controller, args, state, model)

    def _is_over(self, state: TrainerState) -> bool:
        """Whether the run is over before a step. When such a run is resumed, the Trainer steps before it stops."""
        return state.global_step >= state.max_steps or (self.early_stop and self._running().finished)

    def _guard_checkpoint(self, control: TrainerControl) -> None:
        # A step after the end changes nothing, and for its checkpoint an older one would go.
        if self._growth is not None and self._growth.was_over:
            control.should_save = control.should_evaluate = control.should_log = False
        if control.should_save or control.should_evaluate:
            self._running().require_finite()

    def _running(self) -> AromaController:
        assert self.controller is not None, "the Trainer calls on_train_begin first"
        return self.controller


def trainable_adapter(model: nn.Module) -> str:
    """Return the name of the AROMA adapter of `model` that is active and trains; ConfigError unless there is one."""
    configs = getattr(model, "peft_config", {})
    active = {name for layer in aroma_layers(model).values() for name in layer.active_adapters if name in layer.lora_A}
    names = [str(name) for name in configs if name in active and not configs[name].inference_mode]
    if len(names) == 1:
        return names[0]
    remedy = "give the Trainer get_peft_model(model, AromaConfig(...)), with one adapter active (model.set_adapter)"
    reason = f"several AROMA adapters train, {names}" if names else "it has no trainable AROMA adapter that is active"
    raise bad_value("model", type(model).__name__, f"{reason}; {remedy}")
