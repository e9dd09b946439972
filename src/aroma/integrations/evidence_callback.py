"""Checkups in the Hugging Face Trainer and TRL's trainers: one callback beside PEFT's own LoRA."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from tqdm.auto import tqdm
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from .. import compat
from ..distributed import world_size
from ..errors import AromaWarning, bad_value
from ..evidence.checkup import Checkup, Loss
from ..evidence.checkups import Checkups, require_standard_errors
from ..evidence.schedule import FEWEST, WANTED, moments
from .base import TrainingCallback
from .held_out import rows_of


class EvidenceCallback(TrainingCallback):
    """Keeps the directions of a LoRA adapter that lower the loss of held-out examples, inside `Trainer`.

    .. code-block:: python

        train, held_out = hold_out(dataset)
        model = get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
        Trainer(model, args, train_dataset=train, callbacks=[EvidenceCallback(held_out)]).train()
        model.save_pretrained("adapter")

    A checkup comes after an optimizer step, before that step's save. When the training ends, the adapter is made
    compact: every matrix has the rank that it kept. Under FSDP2 and ZeRO it keeps its shape, with directions of zero;
    `aroma.compact` does the rest when it is loaded into one process.

    Args:
        held_out: Examples that the trainer does not train on, prepared as its training set is; see `aroma.hold_out`.
            TRL's trainers prepare them themselves.
        at: When the checkups come, as shares of the run.
        standard_errors: How many standard errors of held-out loss a smaller adapter may cost; 0 keeps the least loss.
        loss: Loss of a model and a batch; by default that of the training, `trainer.compute_loss`.
        on_event: Called with every `Checkup`. Checkpoints do not hold it.

    Attributes:
        history: The checkups of the current or last training.

    Raises:
        ConfigError: Without a LoRA adapter, with too few examples, or with a trainer that samples its examples.
    """

    def __init__(
        self,
        held_out: Any,
        *,
        at: Sequence[float] = (0.4, 0.6),
        standard_errors: float = 0.0,
        loss: Loss | None = None,
        on_event: Callable[[Checkup], None] | None = None,
    ) -> None:
        super().__init__()
        moments(at, 2**53)
        require_standard_errors(standard_errors)
        self.held_out, self.at, self.standard_errors = held_out, at, standard_errors
        self.loss, self.on_event = loss, on_event
        self.trainer: Any = None
        self._checkups: Checkups | None = None

    @property
    def history(self) -> list[Checkup]:
        """The checkups of the current or last training."""
        return [] if self._checkups is None else self._checkups.history

    def explanation(self) -> str:
        """Return one sentence on what the last checkup kept."""
        return "no checkup yet" if self._checkups is None else self._checkups.explanation()

    def before_training(self, trainer: Any, resume_from_checkpoint: Any) -> Any:
        """Remember the trainer, whose loss decides."""
        self.trainer = trainer
        return resume_from_checkpoint

    def on_init_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse a trainer that has no held-out loss, or that would make the callback anew, before any work."""
        _refuse(args)

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any, optimizer: Any, **kwargs: Any
    ) -> None:
        """Make batches of the held-out examples; on resume, go on where the checkpoint was."""
        _refuse(args)
        batches, cost = held_out_batches(self.trainer, self.held_out)
        self._checkups = Checkups(
            model,
            optimizer,
            state.max_steps,
            batches,
            at=self.at,
            standard_errors=self.standard_errors,
            loss=self.loss or functools.partial(_trainer_loss, self.trainer),
            on_event=self.on_event,
            cost=cost,
        )
        if state.global_step > 0:
            self._checkups.load_state_dict(self.saved(state)["checkups"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Run a checkup where one is due, and log it."""
        assert self._checkups is not None, "the Trainer calls on_train_begin first"
        found = self._checkups.advance(state.global_step)
        if found is None:
            return
        if state.is_world_process_zero and not args.disable_tqdm:
            tqdm.write(f"step {found.step}: {found}")
        with compat.without_metrics(self.trainer.log):  # they belong to the Trainer's next log
            self.trainer.log({f"evidence/{name}": value for name, value in found.totals().items()})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any, **kwargs: Any
    ) -> None:
        """Make the adapter compact; it is the best checkpoint's where that was loaded."""
        assert self._checkups is not None, "the Trainer calls on_train_begin first"
        self._checkups.finish()

    def attributes(self) -> dict[str, Any]:
        """Return the state of the checkups."""
        return {"checkups": None if self._checkups is None else self._checkups.state_dict()}


def _refuse(args: Any) -> None:
    if args.restore_callback_states_from_checkpoint:
        remedy = "it would make EvidenceCallback anew, without held-out examples; leave it out, resuming works"
        raise bad_value("restore_callback_states_from_checkpoint", True, remedy)
    if isinstance(getattr(args, "num_generations", None), int):
        raise bad_value(
            "callbacks",
            "EvidenceCallback",
            "this trainer samples its examples, so none has a held-out loss; run `aroma compress` on logged answers "
            "when it has finished, or use AromaConfig and AromaCallback, which need no loss",
        )


def held_out_batches(trainer: Trainer, held_out: Any) -> tuple[list[Any], float]:
    """Return batches of held-out examples as the trainer evaluates, this process's part of each.

    They have the training's size, or a smaller one where there would be fewer than 16 of them.

    Returns:
        The batches, and what a training step on one costs, in optimizer steps.

    Raises:
        ConfigError: Too few examples, or no examples at all.
    """
    args: Any = trainer.args
    examples = _prepared(trainer, held_out)
    if not hasattr(examples, "__len__") or len(examples) < FEWEST * world_size():
        count = len(examples) if hasattr(examples, "__len__") else type(examples).__name__
        remedy = (
            f"at least {FEWEST * world_size()} examples with a length are needed; train, held_out = hold_out(data)"
        )
        raise bad_value("held_out", count, remedy)
    if held_out is trainer.eval_dataset:
        warnings.warn(
            "held_out is the eval_dataset, too: what decides cannot also report, so its scores will be too good; "
            "hold out other examples",
            AromaWarning,
            stacklevel=2,
        )
    size = min(args.per_device_train_batch_size, max(1, len(examples) // (WANTED * world_size())))
    whole = len(examples) // (size * world_size()) * size * world_size()
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(args.data_seed or args.seed))
    before, args.per_device_eval_batch_size = args.per_device_eval_batch_size, size
    try:
        with torch.random.fork_rng([]):  # a loader draws a seed for its workers
            loader = trainer.get_test_dataloader(rows_of(examples, order[:whole].tolist()))
            batches = [send_to_device(batch, "cpu") for batch in loader]  # all at once would fill an accelerator
    finally:
        args.per_device_eval_batch_size = before
    return batches, size / (args.per_device_train_batch_size * args.gradient_accumulation_steps)


def _prepared(trainer: Any, held_out: Any) -> Any:
    """Return held-out examples as a trainer of TRL prepares its data sets; of others, as they are."""
    prepare = getattr(trainer, "_prepare_dataset", None)
    if prepare is None or not hasattr(held_out, "column_names"):
        return held_out
    trained = getattr(trainer.train_dataset, "column_names", None) or []
    if {*trained} <= {*held_out.column_names}:
        return held_out
    known = {
        "processing_class": trainer.processing_class,
        "args": trainer.args,
        "packing": getattr(trainer.args, "packing", False),
        "formatting_func": getattr(trainer, "_formatting_func", None),
        "dataset_name": "held-out",
    }
    return prepare(held_out, **{name: known[name] for name in inspect.signature(prepare).parameters if name in known})


def _trainer_loss(trainer: Trainer, model: Any, batch: Any) -> Any:
    with trainer.compute_loss_context_manager(), compat.without_metrics(trainer.compute_loss):
        return trainer.compute_loss(model, batch)
