"""The pretrained model as a method of comparison: nothing trains, and it is scored like all others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aroma.errors import ConfigError
from aroma_lab.language.data import questions_of
from aroma_lab.language.evaluate import evaluate_questions
from aroma_lab.language.model import LoadedModel
from aroma_lab.run.run import run_trial
from aroma_lab.run.trial import Trial
from aroma_lab.specs import TaskSpec, TrainSpec
from aroma_lab.tasks.sources import read_located
from tiny_lm import questions, save_tiny_lm, write_json_lines
from trial_runs import read, save_material

TRAINING = TrainSpec(max_steps=12, batch_size=8, warmup_steps=2, threads=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    save_tiny_lm(folder / "model")
    write_json_lines(folder / "train.jsonl", questions(60, seed=1))
    write_json_lines(folder / "test.jsonl", questions(29, seed=2))
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and data of a classification."""
    return save_material(tmp_path_factory.mktemp("words"))


def trial_of(files: Path, kind: str = "pretrained", **changes: Any) -> Trial:
    task = TaskSpec(
        name="reasoning",
        kind="commonsense",
        source=str(files),
        reported={"easy": "test.jsonl"},
        max_length=64,
        held_out=0.25,
    )
    trial = Trial(name="t", model=str(files / "model"), task=task, method=kind, kind=kind, training=TRAINING)
    return replace(trial, **changes)


def classify(words: Path, model: str, **changes: Any) -> Trial:
    task = TaskSpec(name="w", source=str(words), train="train.jsonl", reported={"test": "test.jsonl"}, max_length=16)
    return replace(trial_of(words, model=str(words / model), task=task), **changes)


def metrics_by_hand(files: Path, autocast: bool = False) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    asked = questions_of(read_located("data", str(files / "test.jsonl")))
    model = AutoModelForCausalLM.from_pretrained(files / "model")
    loaded = LoadedModel(model, tokenizer)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = evaluate_questions(loaded, asked, batch_size=8, max_length=64)
    assert found.loss is not None
    return {"accuracy": found.accuracy, "loss": found.loss}


def test_it_is_scored_and_nothing_else_is_done(files: Path, tmp_path: Path) -> None:
    result = run_trial(trial_of(files), tmp_path / "run")
    expected = metrics_by_hand(files)
    assert result["reported"]["easy"] == {name: value for name, value in expected.items() if name != "loss"}
    assert result["score"] == expected["accuracy"]
    assert 0 < expected["accuracy"] < 1
    assert result["examples"] == {"train": 45, "held_out": 15, "easy": 29}
    assert (result["steps"], result["planned_steps"], result["stopped_early"]) == (0, 12, False)
    assert result["parameters"] == {"initial": 0, "average": 0.0, "final": 0, "head": 0}
    assert (result["ranks"], result["average_rank"], result["train_seconds"]) == ({}, None, 0)
    assert read(tmp_path / "run" / "curve.json")["parameters"] == [[0, 0]]
    assert read(tmp_path / "run" / "history.json") == {"loss": [], "learning_rate": [], "evaluations": []}
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("bf16", [False, True])
def test_it_is_where_training_begins_and_scored_in_the_precision_of_those_beside_it(
    files: Path, tmp_path: Path, bf16: bool
) -> None:
    # At a rate that changes nothing, a LoRA, whose B is 0 at first, ends where the pretrained model stands. What only
    # training needs does not count for it.
    still = replace(TRAINING, bf16=bf16, learning_rate=1e-12)
    trained = run_trial(trial_of(files, "lora", training=still), tmp_path / "lora")
    idle = replace(still, warmup_steps=100, eval_steps=5, save_steps=5, checkpoint="best")
    result = run_trial(trial_of(files, training=idle), tmp_path / "pretrained")
    assert (trained["steps"], result["steps"]) == (12, 0)
    assert result["reported"] == trained["reported"]
    assert result["held_out_loss"] == pytest.approx(trained["held_out_loss"], rel=1e-6)
    expected = metrics_by_hand(files, autocast=bf16)
    assert result["reported"]["easy"] == {name: value for name, value in expected.items() if name != "loss"}


# What cannot work ----------------------------------------------------------------------------------------------------


def test_a_head_that_would_stay_random_is_refused(words: Path, tmp_path: Path) -> None:
    message = r"kind='pretrained': it trains nothing, and the checkpoint lacks classifier\.weight, classifier\.bias"
    with pytest.raises(ConfigError, match=message):
        run_trial(classify(words, "model"), tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()
