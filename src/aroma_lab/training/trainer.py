"""transformers' Trainer for every method, resumed to the bit."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import ProgressCallback, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from aroma.errors import CheckpointError
from aroma.files import read_tensors, write_errors, write_tensors

from ..methods.base import TRAINED_FILE, Hooks, trained_tensors
from ..methods.head import head_of
from ..specs import TrainSpec
from .job import Job

HOOKS_FILE = "hooks.safetensors"
"""File of a checkpoint with the state of the method's hooks."""
_MOST_EPOCHS = 10**6
"""accelerate orders an epoch by the sum of data seed and epoch: seeds side by side would share all orders but one."""


# The loop ------------------------------------------------------------------------------------------------------------


class Bar(ProgressCallback):
    """The Trainer's bar, with the loss beside it in place of a line for every log."""

    def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
        """Show the loss."""
        if self.training_bar is not None and logs is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4f}")


def make_optimizer(model: nn.Module, training: TrainSpec) -> torch.optim.AdamW:
    """Return AdamW over adapter or backbone, and over the head."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = head_of(model)
    adapter = [parameter for name, parameter in named.items() if not head.holds(name)]
    new = [parameter for name, parameter in named.items() if head.holds(name)]
    rates = (training.learning_rate, training.head_learning_rate or training.learning_rate)
    groups = [{"params": group, "lr": rate} for group, rate in zip((adapter, new), rates, strict=True) if group]
    return torch.optim.AdamW(groups, weight_decay=training.weight_decay)


def training_arguments(training: TrainSpec, job: Job, folder: str | os.PathLike[str]) -> TrainingArguments:
    """Return the Trainer's arguments for a training section; all counts are of optimizer steps."""
    further = {"train_sampling_strategy": "group_by_length"} if training.group_by_length else {}
    ends_above_zero = training.scheduler == "cosine_with_min_lr"
    return (job.arguments_class or TrainingArguments)(
        output_dir=str(folder),
        num_train_epochs=training.epochs,
        max_steps=-1 if training.max_steps is None else training.max_steps,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.scheduler,
        lr_scheduler_kwargs={"min_lr_rate": training.min_lr_ratio} if ends_above_zero else None,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,  # a loss that is not finite has to be seen
        eval_strategy="no" if training.eval_steps is None else "steps",
        eval_steps=training.eval_steps,
        save_strategy="no" if training.save_steps is None else "steps",
        save_steps=training.save_steps or 0,
        save_total_limit=training.keep_checkpoints,
        load_best_model_at_end=training.checkpoint == "best",
        metric_for_best_model=f"{job.evaluated[0]}_{job.chosen_by or job.metric}",
        greater_is_better=job.chosen_by != "loss",
        remove_unused_columns=False,  # collators may take more than the model
        seed=training.seed,
        data_seed=training.seed * _MOST_EPOCHS,
        bf16=training.bf16,
        gradient_checkpointing=training.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if training.gradient_checkpointing else None,
        use_cpu=not torch.accelerator.is_available(),  # said outright, or bf16 would be refused
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        **further,
    )


# Exact resume --------------------------------------------------------------------------------------------------------


class MethodTrainer(Trainer):
    """Trains any method, and resumes it to the bit.

    Its checkpoints hold the trained parameters whole, and the state of the method's hooks. PEFT's own files would not
    do: of AdaLoRA they lack the triplets that are masked for now.

    Args:
        job: Measures the held-out examples, and describes the adapter of every checkpoint.
        hooks: Calls the method's hooks; None for a model whose own files are exact, as AROMA's are.
        **options: Of the Trainer.
    """

    def __init__(self, *, job: Job, hooks: Hooks | None, **options: Any) -> None:
        super().__init__(**options)
        self._job, self._hooks = job, hooks
        if not job.counts_items:
            # The Trainer takes any model with **kwargs for one that does. Those with a classification head take the
            # mean over their micro-batch, and would be summed up.
            self.model_accepts_loss_kwargs = False

    @property
    def has_hooks(self) -> bool:
        """Whether its checkpoints are of its own files, and not AROMA's."""
        return self._hooks is not None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            return EpochLengthSampler(sampler, self.args.seed)
        return sampler

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure all held-out examples, as at the end; every process does."""
        split = self._job.evaluated[0]
        metrics, loss = self._job.measure(self.model, self._job.rows[split], self.args.per_device_eval_batch_size)
        named = {f"eval_{split}_{name}": value for name, value in {**metrics, "loss": loss}.items()}
        self.log(dict(named))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def _save_checkpoint(self, *options: Any) -> None:
        with write_errors(self.args.output_dir):
            super()._save_checkpoint(*options)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        self._job.describe(folder)
        if self._hooks is None:
            super()._save(output_dir, state_dict)
            return
        write_tensors(folder / TRAINED_FILE, trained_tensors(self.model))
        write_tensors(folder / HOOKS_FILE, self._hooks.state_dict())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._hooks is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._restore(Path(resume_from_checkpoint), self._hooks)

    def _load_best_model(self) -> None:
        if self._hooks is None:
            super()._load_best_model()
        else:
            self._restore(Path(self.state.best_model_checkpoint), self._hooks)

    @torch.no_grad()
    def _restore(self, checkpoint: Path, hooks: Hooks) -> None:
        file = checkpoint / TRAINED_FILE
        saved, parameters = read_tensors(file), trained_tensors(self.model)
        shapes = [{name: tuple(one.shape) for name, one in some.items()} for some in (saved, parameters)]
        if differing := sorted(name for name, _ in shapes[0].items() ^ shapes[1].items()):
            raise CheckpointError(f"{file}: {differing[0]} has another shape in the model; it is of another run")
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
        hooks.load_state_dict(read_tensors(checkpoint / HOOKS_FILE))


class EpochLengthSampler(LengthGroupedSampler):
    """transformers' groups of similar lengths, in an order that depends on seed and epoch alone.

    Drawn from the global random numbers, as transformers does it, a resumed run could not find an epoch's order again,
    and every method, which draws its own dropout, would see other batches.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        super().__init__(sampler.batch_size, lengths=sampler.lengths, generator=torch.Generator())
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        # Hashed: with a sum, the second epoch of one seed would be the first of the next.
        digest = hashlib.sha256(f"{self._seed} {self._epoch}".encode()).digest()
        self.generator.manual_seed(int.from_bytes(digest[:7], "big"))
        order: Iterator[int] = super().__iter__()
        return order
