"""From a recipe's training section to a Hugging Face Trainer."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

from ..events import Event
from ..integrations.callback import AromaCallback
from ..integrations.progress import RichProgress
from .metrics import CHOICE_METRIC, trainer_metrics
from .model import is_adapter
from .specs import TrainSpec

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Growth:
    """A Trainer and the callback that grows its model.

    Args:
        trainer: Trains and evaluates.
        callback: Holds the controller.
        bar: Shows the progress; None for none.
    """

    trainer: Trainer
    callback: AromaCallback
    bar: RichProgress | None = None

    def train(self, checkpoint: str | None = None) -> None:
        """Train, from a checkpoint on if one is given; the terminal is given back whatever happens."""
        try:
            self.trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            if self.bar is not None:
                self.bar.close()


def make_trainer(
    model: Any,
    tokenizer: Any,
    task: str,
    training: TrainSpec,
    folder: str | os.PathLike[str],
    train: Dataset,
    validation: Dataset | None = None,
    on_event: Callable[[Event], None] | None = None,
    progress: bool = True,
) -> Growth:
    """Return a Trainer that grows `model`.

    Args:
        model: A PeftModel with an AROMA adapter.
        tokenizer: Pads the batches.
        task: `"classification"` or `"regression"`; decides the metrics.
        training: The loop.
        folder: Where checkpoints go.
        train: Tokenized training examples.
        validation: Tokenized validation examples; None if nothing is evaluated on the way.
        on_event: Called with every event of the controller.
        progress: Whether a progress bar is shown.

    Raises:
        ConfigError: The model does not grow.
    """
    callback = AromaCallback(early_stop=training.early_stop, on_event=on_event)
    bar = RichProgress(callback) if progress else None
    trainer = Trainer(
        model=model,
        args=training_arguments(training, task, folder),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        compute_metrics=trainer_metrics(task),
        preprocess_logits_for_metrics=_logits_alone,
        callbacks=[callback, *([bar] if bar else [])],
        optimizers=(make_optimizer(model, training), None),
    )
    trainer.remove_callback(PrinterCallback)  # stands in for the tqdm bar, and would print every log line
    return Growth(trainer, callback, bar)


def make_optimizer(model: Any, training: TrainSpec) -> torch.optim.AdamW:
    """Return AdamW over two groups: the adapter, and the head with its own learning rate."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapter = [parameter for name, parameter in trainable.items() if is_adapter(name)]
    head = [parameter for name, parameter in trainable.items() if not is_adapter(name)]
    groups = [
        {"params": adapter, "lr": training.learning_rate},
        {"params": head, "lr": training.head_learning_rate or training.learning_rate},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=training.weight_decay)


def training_arguments(training: TrainSpec, task: str, folder: str | os.PathLike[str]) -> TrainingArguments:
    """Return the Trainer's arguments for a recipe's training section; every count is in optimizer steps."""
    saves = {"save_strategy": "no"} if training.save_steps is None else {"save_steps": training.save_steps}
    return TrainingArguments(
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
        save_total_limit=training.keep_checkpoints,
        load_best_model_at_end=training.checkpoint == "best",
        metric_for_best_model=CHOICE_METRIC[task],
        greater_is_better=True,
        seed=training.seed,
        bf16=training.bf16,
        use_cpu=not torch.accelerator.is_available(),  # said outright, or bf16 would be refused
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _logits_alone(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """Drop what some models return beside their logits, as T5 its encoder states."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _scheduler_options(training: TrainSpec) -> dict[str, float]:
    return {"min_lr_rate": training.min_lr_ratio} if training.scheduler == "cosine_with_min_lr" else {}
