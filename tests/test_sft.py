"""TRL's SFTTrainer: `peft_config=AromaConfig(...)` and the callback are all it takes."""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from aroma import AromaCallback, AromaConfig, aroma_layers, verify_adapter
from models import METHOD, base, logits
from trainer_runs import assert_same, growth, live, steps_of
from trl_runs import SETTINGS, WORDS, tokenizer

SENTENCES = [
    f"the {size} {who} {does} a {colour} {whom}"
    for size, who, does, colour, whom in product(*[WORDS[start : start + 2] for start in (10, 5, 8, 12, 6)])
]


def trainer_for(out: Path, *callbacks: Any, name: str = "llama", method: Any = None, **changes: Any) -> SFTTrainer:
    trainer = SFTTrainer(
        model=base(name),
        args=SFTConfig(output_dir=str(out), **{**SETTINGS, "max_steps": 16, "max_length": 16, **changes}),
        train_dataset=Dataset.from_dict({"text": SENTENCES}),
        processing_class=tokenizer(),
        peft_config=AromaConfig(task_type="CAUSAL_LM", **{**METHOD, **(method or {})}),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


INPUTS = {"input_ids": torch.arange(3, 13).reshape(2, 5)}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_grows_and_plain_peft_loads_it(tmp_path: Path, name: str) -> None:
    trainer = trainer_for(tmp_path, AromaCallback(), name=name)
    trainer.train()
    controller = growth(trainer).controller
    assert controller.global_step == 16
    ranks = {summary.name: summary.rank for summary in controller.summary()}
    assert set(ranks) == set(aroma_layers(trainer.model))
    assert max(ranks.values()) > 1
    log = steps_of(trainer.state.log_history)
    assert log[-1]["total_rank"] == controller.total_rank
    assert log[-1]["active_modules"] == controller.active_modules
    assert log[-1]["loss"] < log[0]["loss"] - 0.5

    trainer.save_model(str(tmp_path / "final"))
    for folder in ("final", "checkpoint-6", "checkpoint-16"):
        verify_adapter(tmp_path / folder)
    loaded = PeftModel.from_pretrained(base(name), str(tmp_path / "final"))
    torch.testing.assert_close(logits(loaded, INPUTS), logits(trainer.model, INPUTS))
    assert not torch.allclose(logits(loaded, INPUTS), logits(base(name), INPUTS), atol=0.1)


def test_it_resumes_bit_for_bit(tmp_path: Path) -> None:
    method = {"lora_alpha": 3, "lora_dropout": 0.1, "inner_criterion": "update_change"}
    whole = trainer_for(tmp_path / "whole", AromaCallback(), method=method)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "again" / "checkpoint-6")
    again = trainer_for(tmp_path / "again", AromaCallback(), method=method)
    again.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-6"))
    one, other = live(again), live(whole)
    for entry in one["log"] + other["log"]:
        del entry["num_tokens"]  # TRL counts them anew after a resume
    assert_same(one, other)


def test_it_stops_early_and_resuming_a_finished_run_changes_and_says_nothing(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    # There is no head: nothing at all is left to train in the step that the Trainer takes before it stops.
    runs = []
    for resume in (False, True):
        trainer = trainer_for(tmp_path, AromaCallback(), method={"max_components": 2}, max_steps=40)
        trainer.train(resume_from_checkpoint=resume)
        assert growth(trainer).controller.finished
        assert trainer.state.global_step < 12
        trainer.save_model(str(tmp_path / f"saved-{resume}"))
        runs.append(trainer)
    assert not [warning for warning in recwarn if "controller" in str(warning.message)]
    last = runs[0].state.global_step
    verify_adapter(tmp_path / f"checkpoint-{last}")
    assert not (tmp_path / f"checkpoint-{last + 1}").exists()
    assert_same(dict(runs[1].model.state_dict()), dict(runs[0].model.state_dict()))
    assert_same(*[growth(trainer).controller.state_dict() for trainer in runs])


@pytest.mark.parametrize("callbacks", [[], [AromaCallback()]])
def test_without_the_callback_the_first_save_says_so(
    tmp_path: Path, callbacks: list[Any], recwarn: pytest.WarningsRecorder
) -> None:
    trainer_for(tmp_path, *callbacks, save_steps=2, max_steps=2).train()
    said = ["trained without its controller" in str(warning.message) for warning in recwarn]
    assert any(said) == (not callbacks)
