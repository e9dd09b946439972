"""EvidenceCallback in the Trainer and TRL's trainers: it does what a loop does, resumes exactly, and refuses early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PrinterCallback, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

import trl_runs
from aroma import EvidenceCallback, hold_out
from aroma.errors import AromaWarning, CheckpointError, ConfigError
from aroma.evidence.checkups import Checkups
from trainer_runs import arguments, tiny_bert

STEPS = 40
"""As `arguments` has it."""
AT = (0.25, 0.5)


def examples(count: int, seed: int = 2) -> list[dict[str, torch.Tensor]]:
    """Random token sequences, labelled by their first token."""
    tokens = torch.randint(1, 40, (count, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row[0] // 14} for row in tokens]


def adapted(base: Any = None, **options: Any) -> Any:
    torch.manual_seed(3)
    settings = {"r": 6, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "SEQ_CLS", **options}
    return get_peft_model(base or tiny_bert(), LoraConfig(**settings))


def data() -> tuple[Any, Any]:
    return hold_out(examples(96), 1 / 3)


def trainer_for(out: Path | str, callback: Any, *more: Any, model: Any = None, **changes: Any) -> Trainer:
    train, _ = data()
    model = adapted() if model is None else model
    trainer = Trainer(model, arguments(out, **changes), train_dataset=train, eval_dataset=examples(16, seed=3))
    trainer.remove_callback(PrinterCallback)
    for one in (callback, *more):
        trainer.add_callback(one)
    trainer.model_accepts_loss_kwargs = False
    return trainer


def with_evidence(**options: Any) -> EvidenceCallback:
    return EvidenceCallback(data()[1], at=AT, **options)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: value.clone() for name, value in model.state_dict().items() if "lora_" in name or "modules_to" in name
    }


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_training_ends_with_a_compact_plain_adapter(tmp_path: Path) -> None:
    told: list[Any] = []
    callback = with_evidence(on_event=told.append)
    trainer = trainer_for(tmp_path, callback)
    trainer.train()
    assert [one.step for one in callback.history] == [10, 20]
    assert told == callback.history
    ranks = {name: rank for name, (rank,) in callback.history[-1].ranks.items() if rank}
    assert 0 < sum(ranks.values()) < callback.history[0].sizes[-1]
    trainer.model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny_bert(), tmp_path / "adapter").eval()
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    found = {name: saved["rank_pattern"].get(f"^{name.replace('.', chr(92) + '.')}", saved["r"]) for name in ranks}
    assert {*saved["target_modules"]} == {*ranks}
    assert found == ranks
    batch = {"input_ids": torch.stack([one["input_ids"] for one in examples(8, seed=9)])}
    torch.testing.assert_close(again(**batch).logits, trainer.model.eval()(**batch).logits)
    logged = [entry for entry in trainer.state.log_history if "evidence/total_rank" in entry]
    assert [entry["evidence/total_rank"] for entry in logged] == [one.kept for one in callback.history]


class Loop(TrainerCallback):
    """Does with `Checkups` what EvidenceCallback does, from outside."""

    def __init__(self, batches: list[Any], cost: float) -> None:
        self.batches, self.cost = batches, cost

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        made = (kwargs["model"], kwargs["optimizer"], STEPS, self.batches)
        self.checkups = Checkups(*made, at=AT, cost=self.cost)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.checkups.step()


def test_a_loop_and_the_trainer_find_equal_ranks(tmp_path: Path) -> None:
    callback = with_evidence()
    one = trainer_for(tmp_path / "one", callback)
    one.train()
    batches = callback._checkups._held_out.batches
    loop = Loop([dict(batch) for batch in batches], 0.25)
    other = trainer_for(tmp_path / "other", loop)
    other.train()
    assert [found.as_dict() for found in loop.checkups.history] == [found.as_dict() for found in callback.history]
    assert_equal(weights(other.model), weights(one.model))


@pytest.mark.parametrize("step", [8, 10, 12, 24])
def test_it_resumes_exactly(tmp_path: Path, step: int) -> None:
    whole = with_evidence()
    trainer = trainer_for(tmp_path / "whole", whole, save_steps=2)
    trainer.train()
    resumed = with_evidence()
    again = trainer_for(tmp_path / "again", resumed, save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert [found.as_dict() for found in resumed.history] == [found.as_dict() for found in whole.history]
    assert_equal(weights(again.model), weights(trainer.model))


def test_the_best_checkpoint_brings_its_ranks(tmp_path: Path) -> None:
    """Ranks lie in the weights, so those of the best checkpoint, here one before the second checkup, are the end's."""
    callback = with_evidence()
    best = {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "load_best_model_at_end": True}
    trainer = trainer_for(tmp_path, callback, metric_for_best_model="worst", **best)
    trainer.compute_metrics = None
    losses = iter([3.0, 2.0, 1.0, 0.1, *([5.0] * 20)])
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args, **options: evaluate(*args, **options) | {"eval_worst": next(losses)}
    trainer.args.greater_is_better = False
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-16")
    found = {name: rank for name, (rank,) in callback.history[0].ranks.items() if rank}
    kept = {
        name[17:]: layer.r["default"] for name, layer in trainer.model.named_modules() if getattr(layer, "r", None)
    }
    assert kept == found


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
        {"eval_strategy": "steps", "eval_steps": 1},
        {"optim": "adafactor"},
        {"label_smoothing_factor": 0.1},
        {"max_steps": -1, "num_train_epochs": 5},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=lambda changes: "-".join(map(str, changes)),
)
def test_it_works_with_the_trainers_options(tmp_path: Path, changes: dict[str, Any]) -> None:
    callback = with_evidence()
    trainer = trainer_for(tmp_path, callback, **changes)
    trainer.train()
    assert len(callback.history) == 2
    assert 0 < callback.history[-1].kept <= callback.history[0].sizes[-1]
    assert all(entry["loss"] < 10 for entry in trainer.state.log_history if "loss" in entry)


def test_another_loss_decides() -> None:
    def none_is_better(model: Any, batch: Any) -> torch.Tensor:
        return model(**batch).logits.square().mean() * 1e-6 + sum(
            parameter.square().sum() for name, parameter in model.named_parameters() if "lora_B" in name
        )

    callback = with_evidence(loss=none_is_better)
    trainer_for("unused", callback, save_strategy="no").train()
    assert callback.history[0].kept == 0


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "reward"])
def test_trl_prepares_the_held_out_examples(tmp_path: Path, kind: str) -> None:
    """Raw rows are given; the trainer's own loss decides."""
    config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM")
    if kind == "sft":
        rows = Dataset.from_dict({"text": [f"{word} sees a {word} bird" for word in trl_runs.WORDS[5:]] * 8})
        train, held_out = hold_out(rows, 0.25)
        callback = EvidenceCallback(held_out, at=(0.5,))
        args = SFTConfig(**{**trl_runs.SETTINGS, "output_dir": str(tmp_path), "max_steps": 8, "max_length": 16})
        trainer = SFTTrainer(
            trl_runs.base("sft"),
            args,
            train_dataset=train,
            processing_class=trl_runs.tokenizer(),
            peft_config=config,
            callbacks=[callback],
        )
    else:
        callback = EvidenceCallback(trl_runs.examples(kind, 16, seed=5), at=(0.5,))
        trainer = trl_runs.trainer_for(kind, tmp_path, callback, config=config, max_steps=8)
    trainer.train()
    (found,) = callback.history
    assert found.step == 4
    assert found.kept <= found.sizes[-1]


@pytest.mark.parametrize("kind", trl_runs.ONLINE)
def test_trainers_that_sample_are_refused_before_any_work(tmp_path: Path, kind: str) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match=r"aroma compress.* or use AromaConfig"):
        trl_runs.trainer_for(kind, tmp_path, EvidenceCallback([1] * 20), config=config)


def test_what_cannot_decide_is_refused(tmp_path: Path) -> None:
    for held_out in (examples(7), iter(examples(40))):
        with pytest.raises(ConfigError, match=r"held_out=.*at least 8 examples"):
            trainer_for(tmp_path, EvidenceCallback(held_out)).train()
    with pytest.raises(ConfigError, match="needs one active LoRA adapter"):
        trainer_for(tmp_path, with_evidence(), model=tiny_bert()).train()
    with pytest.raises(ConfigError, match="at="):
        EvidenceCallback(examples(40), at=(2,))
    with pytest.raises(ConfigError, match="restore_callback_states_from_checkpoint=True"):
        trainer_for(tmp_path, with_evidence(), restore_callback_states_from_checkpoint=True).train()


def test_the_eval_dataset_cannot_decide_and_report(tmp_path: Path) -> None:
    callback = with_evidence()
    trainer = trainer_for(tmp_path, callback, max_steps=4)
    trainer.eval_dataset = callback.held_out
    with pytest.warns(AromaWarning, match="cannot also report"):
        trainer.train()


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    trainer_for(tmp_path, TrainerCallback(), max_steps=4).train()
    with pytest.raises(CheckpointError, match="no state of EvidenceCallback"):
        trainer_for(tmp_path, with_evidence()).train(resume_from_checkpoint=True)
