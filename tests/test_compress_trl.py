"""CompressCallback in TRL's trainers: it measures on what they made of their rows, and on sampled answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

import trl_runs
from aroma import CompressCallback
from aroma.errors import ConfigError
from compress_trainings import Seen, assert_saved_as_measured, rows_of
from quick import slow_but
from trl_runs import KINDS, ONLINE, base, examples, tokenizer, trainer_for

STEPS = 12

pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")


def lora(kind: str) -> LoraConfig:
    return LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM",
    )


# Instructions and texts --------------------------------------------------------------------------------------------


def texts(count: int = 48) -> Dataset:
    return Dataset.from_dict({"text": [f"{one['prompt']} {one['chosen']}" for one in examples("dpo", count)]})


def sft(out: Path, *callbacks: Any, train: Dataset, **changes: Any) -> SFTTrainer:
    settings = {**trl_runs.SETTINGS, "output_dir": str(out), "max_steps": STEPS, "save_steps": STEPS, "max_length": 16}
    trainer = SFTTrainer(
        base("sft"),
        SFTConfig(**{**settings, **changes}),
        train_dataset=train,
        processing_class=tokenizer(),
        peft_config=lora("sft"),
        callbacks=[*callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


SFT: dict[str, dict[str, Any]] = {
    "texts": {},
    "answers only": {"completion_only_loss": True},
    "packed": {"packing": True, "max_steps": 24},
    "without padding": {"padding_free": True, "max_length": None, "max_steps": 24},
    "another loss": {"loss_type": "dft"},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "checkpointing": {"activation_checkpointing": True},
}


@pytest.mark.parametrize("name", slow_but(["answers only", "packed"], SFT))
def test_supervised_training(tmp_path: Path, name: str) -> None:
    train = texts(96)
    if name == "answers only":
        train = examples("dpo").rename_column("chosen", "completion").remove_columns("rejected")
    callback, seen = CompressCallback(examples=20, keep=0.99), Seen()
    trainer = sft(tmp_path, callback, seen, train=train, **SFT[name])
    trainer.train()
    assert callback.compression is not None
    has_labels = name != "label smoothing"  # for which TRL takes them away
    assert (callback.compression.size.score is not None) == has_labels
    if name == "answers only":
        assert all(bool((batch["labels"] == -100).any()) for batch in seen.batches)
    if name in ("packed", "without padding"):
        assert callback.compression.examples == 16, "as few rows as decide anything, since each holds several texts"
        seen.last = lambda examples: seen.batches[-16:]  # type: ignore[method-assign]
    whole = tmp_path / f"checkpoint-{trainer.state.global_step}"
    assert_saved_as_measured(trainer, callback, seen, lambda: base("sft"), whole)


# Preferences, rewards and reinforcement ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", slow_but(["dpo", "grpo"], KINDS))
def test_all_that_was_trained_on_and_no_reference_is_measured_on(tmp_path: Path, kind: str) -> None:
    """The reference of DPO is the same model, asked without its adapter, or with another."""
    callback, seen = CompressCallback(examples=10_000, keep=0.99), Seen()
    trainer = trainer_for(kind, tmp_path, callback, seen, config=lora(kind), max_steps=STEPS, save_steps=STEPS)
    seen.last = lambda examples: seen.batches  # type: ignore[method-assign]
    trainer.train()
    assert callback.compression is not None
    in_pairs = kind in ("dpo", "reward")
    assert callback.compression.examples == STEPS * 4 * (2 if in_pairs else 1) == rows_of(seen.batches)
    if kind in ONLINE:
        prompts = {tuple(tokenizer()(one["prompt"])["input_ids"]) for one in examples(kind, 96)}
        answered = [row for batch in seen.batches for row in batch["input_ids"].tolist()]
        assert all(any(tuple(row[start : start + 4]) in prompts for start in range(len(row) - 4)) for row in answered)
    assert_saved_as_measured(trainer, callback, seen, lambda: base(kind), tmp_path / f"checkpoint-{STEPS}")
    assert "compress/effect" in trainer.state.log_history[-1]


def test_an_adapter_that_trains_on_has_its_start_as_reference(tmp_path: Path) -> None:
    """TRL keeps it as a second adapter, which stays as it is."""
    torch.manual_seed(0)
    start = get_peft_model(base("dpo"), lora("dpo"))
    for name, parameter in start.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    callback = CompressCallback(examples=20, size=0.3)
    trainer = trainer_for("dpo", tmp_path, callback, model=start, config=None, max_steps=4, save_strategy="no")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items() if ".ref." in name}
    assert before
    trainer.train()
    assert callback.compression is not None
    after = trainer.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


# Given examples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", slow_but(["sft"], ["sft", "dpo", "reward"]))
def test_raw_rows_are_prepared_as_the_training_set_is(tmp_path: Path, kind: str) -> None:
    data: Any = texts(24) if kind == "sft" else examples(kind, 24, seed=5)
    callback = CompressCallback(data)
    if kind == "sft":
        trainer: Any = sft(tmp_path, callback, train=texts(), save_strategy="no")
    else:
        trainer = trainer_for(kind, tmp_path, callback, config=lora(kind), max_steps=4, save_strategy="no")
    trainer.train()
    assert callback.compression is not None
    assert callback.compression.examples == (24 if kind == "sft" else 48)


@pytest.mark.parametrize("kind", ONLINE)
def test_prompts_without_answers_are_refused_before_a_step(tmp_path: Path, kind: str) -> None:
    callback = CompressCallback(examples(kind, 24))
    trainer = trainer_for(kind, tmp_path, callback, config=lora(kind))
    with pytest.raises(ConfigError, match=rf"data='{type(trainer).__name__}': it makes no inputs of the model"):
        trainer.train()
    assert trainer.state.global_step == 0
