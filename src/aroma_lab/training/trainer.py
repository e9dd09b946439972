"""The one training loop: from a training section and a method to a Hugging Face Trainer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from aroma.controller import AromaController
from aroma.events import Event
from aroma.integrations.callback import AromaCallback
from aroma.integrations.progress import RichProgress

from ..methods import Method
from ..methods.base import HooksCallback
from ..methods.head import head_of, require_new_trains
from ..specs import TrainSpec
from .exact_resume import MethodTrainer
from .objective import Objective

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Fit:
    """A Trainer, and what drives the method in it.

    Args:
        trainer: Trains and evaluates.
        growth: Holds AROMA's controller; None for a method that has none.
        bar: Shows the progress; None for none.
    """

    trainer: Trainer
    growth: AromaCallback | None = None
    bar: RichProgress | None = None

    @property
    def controller(self) -> AromaController:
        """AROMA's controller, of a training that has begun."""
        assert self.growth is not None, "only AROMA has a controller"
        assert self.growth.controller is not None, "it has not trained"
        return self.growth.controller

    def train(self, checkpoint: str | None = None) -> None:
        """Train, from a checkpoint on if one is given; the terminal is given back whatever happens."""
        try:
            self.trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            if self.bar is not None:
                self.bar.close()


def make_trainer(
    method: Method,
    model: Any,
    objective: Objective,
    training: TrainSpec,
    folder: str | os.PathLike[str],
    train: Dataset,
    validation: Dataset | dict[str, Dataset] | None = None,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    on_event: Callable[[Event], None] | None = None,
    progress: bool = True,
    describe: Callable[[Any, Path], None] | None = None,
) -> Fit:
    """Return a Trainer of `model`: for every method the same, but for its callbacks and what it trains.

    Args:
        method: Made the model.
        model: What to train.
        objective: What becomes of the examples.
        training: The loop.
        folder: Where checkpoints go.
        train: Tokenized training examples.
        validation: Tokenized examples, or several sets of them by name; None if nothing is evaluated on the way.
        callbacks: Called after the method's own.
        on_event: Called with every event of AROMA's controller.
        progress: Whether a progress bar is shown.
        describe: Called with the model and the folder of every checkpoint, to say there what its outputs mean.

    Raises:
        ConfigError: The method cannot train the model.
    """
    own = method.callbacks(model, on_event=on_event, early_stop=training.early_stop)
    growth = next((callback for callback in own if isinstance(callback, AromaCallback)), None)
    bar = RichProgress(growth) if progress else None
    kind, arguments_class = trainer_class(training)
    trainer = kind(
        hooks=next((callback for callback in own if isinstance(callback, HooksCallback)), None),
        counts_items=objective.counts_items,
        describe=describe,
        model=model,
        args=training_arguments(training, objective, folder, arguments_class),
        data_collator=objective.collator,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=objective.processor,
        compute_metrics=objective.metrics,
        preprocess_logits_for_metrics=_logits_alone,
        callbacks=[*own, *callbacks, *([bar] if bar else [])],
        optimizers=(make_optimizer(model, training, method), None),
    )
    trainer.remove_callback(PrinterCallback)  # stands in for the tqdm bar, and would print every log line
    return Fit(trainer, growth, bar)


def make_optimizer(model: nn.Module, training: TrainSpec, method: Method | None = None) -> torch.optim.AdamW:
    """Return AdamW over two groups: the adapter or backbone, and the head with its own learning rate.

    Args:
        model: What to train.
        training: The loop.
        method: Says what of the model trains; None for all that has a gradient.
    """
    trained = [p for p in model.parameters() if p.requires_grad] if method is None else method.parameters(model)
    chosen = {id(parameter) for parameter in trained}
    named = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in chosen}
    head = head_of(model)
    require_new_trains(head, named)
    groups: list[Mapping[str, Any]] = [
        {"params": [p for name, p in named.items() if not head.holds(name)], "lr": training.learning_rate},
        {
            "params": [p for name, p in named.items() if head.holds(name)],
            "lr": training.head_learning_rate or training.learning_rate,
        },
    ]
    return torch.optim.AdamW([dict(group) for group in groups if group["params"]], weight_decay=training.weight_decay)


def trainer_class(training: TrainSpec) -> tuple[type[Any], Callable[..., TrainingArguments]]:
    """Return the Trainer that a training section asks for, and what makes its arguments."""
    if training.loop == "trainer":
        return MethodTrainer, TrainingArguments
    from ..language.sft import SftMethodTrainer, sft_arguments

    return SftMethodTrainer, sft_arguments


def training_arguments(
    training: TrainSpec,
    objective: Objective,
    folder: str | os.PathLike[str],
    kind: Callable[..., TrainingArguments] = TrainingArguments,
) -> TrainingArguments:
    """Return the Trainer's arguments for a training section; every count is in optimizer steps.

    Args:
        training: The loop.
        objective: Says what a checkpoint is chosen by.
        folder: Where checkpoints go.
        kind: Class of the arguments.
    """
    saves = {"save_strategy": "no"} if training.save_steps is None else {"save_steps": training.save_steps}
    order = {"train_sampling_strategy": "group_by_length"} if training.group_by_length else {}
    return kind(
        output_dir=str(folder),
        num_train_epochs=training.epochs,
        max_steps=-1 if training.max_steps is None else training.max_steps,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.scheduler,
        lr_scheduler_kwargs=_scheduler_options(training),
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,  # a loss that is not finite has to be seen
        eval_strategy="no" if training.eval_steps is None else "steps",
        eval_steps=training.eval_steps,
        **saves,
        **order,
        save_total_limit=training.keep_checkpoints,
        load_best_model_at_end=training.checkpoint == "best",
        metric_for_best_model=objective.choice,
        greater_is_better=objective.higher_is_better,
        seed=training.seed,
        data_seed=training.seed * _MOST_EPOCHS,
        bf16=training.bf16,
        gradient_checkpointing=training.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if training.gradient_checkpointing else None,
        use_cpu=not torch.accelerator.is_available(),  # said outright, or bf16 would be refused
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )


_MOST_EPOCHS = 10**6
"""accelerate orders an epoch by the sum of data seed and epoch: seeds side by side would share all orders but one."""


def _logits_alone(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """Drop what some models return beside their logits, as T5 its encoder states."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _scheduler_options(training: TrainSpec) -> dict[str, float]:
    return {"min_lr_rate": training.min_lr_ratio} if training.scheduler == "cosine_with_min_lr" else {}
