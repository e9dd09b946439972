"""Trainings that compress at their end, and what a plain script measures of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback

import trainer_runs
from aroma import CompressCallback
from trainer_runs import arguments, tiny_bert

STEPS = 24
ROWS = 8
"""Of a step."""
FILE = "adapter_model.safetensors"


# Trainings, and what a plain script measures -------------------------------------------------------------------------


class Seen(TrainerCallback):
    """Notes what the adapted model is given in training, from outside."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._hook = model.base_model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, inputs: Any, options: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            tensors = {name: value.clone() for name, value in options.items() if isinstance(value, Tensor)}
            self.batches.append({name: value for name, value in tensors.items() if value.dim()})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hook.remove()

    def last(self, examples: int) -> list[dict[str, Any]]:
        """The last batches with as many examples."""
        count = next(n for n in range(1, 1 + len(self.batches)) if rows_of(self.batches[-n:]) >= examples)
        return self.batches[-count:]


def rows_of(batches: Sequence[dict[str, Any]]) -> int:
    return sum(len(next(iter(batch.values()))) for batch in batches)


def adapted(base: Any = None, **options: Any) -> Any:
    torch.manual_seed(3)
    settings = {"r": 6, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "SEQ_CLS", **options}
    return get_peft_model(base or tiny_bert(), LoraConfig(**settings))


def trainer_for(
    out: Path | str,
    *callbacks: Any,
    model: Any = None,
    train: Any = None,
    kind: type[Trainer] = Trainer,
    **changes: Any,
) -> Trainer:
    train = trainer_runs.examples(192) if train is None else train
    settings = arguments(out, **{"max_steps": STEPS, "save_steps": STEPS // 2, **changes})
    model = adapted() if model is None else model
    trainer = kind(model, settings, train_dataset=train, eval_dataset=trainer_runs.examples(16, seed=3))
    trainer.remove_callback(PrinterCallback)
    for one in callbacks:
        trainer.add_callback(one)
    return trainer


def reloaded(base: Any, folder: Path) -> Any:
    return PeftModel.from_pretrained(base, folder).eval()


def total_rank(folder: Path) -> int:
    saved = load_file(folder / FILE)
    return sum(len(value) for name, value in saved.items() if "lora_A" in name)


@torch.no_grad()
def logits_of(model: Any, batch: dict[str, Any]) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if "position_ids" in batch:
        inputs["use_cache"] = False  # else transformers takes packed texts for one
    found: Tensor = model(**inputs).logits.double()
    return found


def effect_of(base: Any, whole: Path, kept: Path, batches: Sequence[dict[str, Any]]) -> float:
    """Share of the effect of the adapter in `whole` that the one in `kept` has, as a plain script measures it.

    `base` makes the base model. Of classes and tokens it is by the KL divergence, of one number by the distance.
    """
    models_ = [reloaded(base(), whole), reloaded(base(), kept), reloaded(base(), whole)]
    for name, parameter in models_[2].named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    lost = total = 0.0
    for batch in batches:
        right, changed, none = (logits_of(model, batch) for model in models_)
        if right.dim() == 3:
            counts = batch["labels"][:, 1:] != -100 if "labels" in batch else batch["attention_mask"][:, 1:] == 1
            right, changed, none = (values[:, :-1][counts] for values in (right, changed, none))
        lost, total = lost + apart(right, changed), total + apart(right, none)
    return 1 - lost / total


def apart(right: Tensor, other: Tensor) -> float:
    if right.shape[-1] == 1:
        return float((right - other).square().sum() / 2)
    one, two = right.log_softmax(-1), other.log_softmax(-1)
    return float((one.exp() * (one - two)).sum())


def assert_saved_as_measured(
    trainer: Any, callback: CompressCallback, seen: Seen, base: Any, whole: Path, close: float = 1e-5
) -> None:
    """The saved adapter reloads equal, is smaller, and has the effect that was measured, on the last inputs."""
    found = callback.compression
    assert found is not None
    assert 0 < found.size.share < 1
    batches = seen.last(callback.examples)
    assert found.examples == rows_of(batches)
    kept = Path(trainer.args.output_dir) / "adapter"
    trainer.model.save_pretrained(kept)
    for batch in batches[:2]:
        torch.testing.assert_close(
            logits_of(reloaded(base(), kept), batch),
            logits_of(trainer.model.eval(), batch),
            rtol=0,
            atol=max(close, 1e-5),
        )
    assert effect_of(base, whole, kept, batches) == pytest.approx(found.size.effect, abs=close)
    assert total_rank(kept) == found.size.directions
