"""Trials: their description, what a run leaves and counts, and everything that could make it lie."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import asdict, replace
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, Trainer

from aroma.errors import AromaWarning, CheckpointError, ConfigError, DataError, NonFiniteError
from aroma_lab.run.run import run_trial
from aroma_lab.run.trial import load_trial
from aroma_lab.tasks.classification import encode, load_tokenizer
from aroma_lab.tasks.data import load_task
from trial_runs import STEPS, read, save_material, trial_of


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def finished(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished trial of AROMA, evaluated on the way."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_trial(trial_of(material, "aroma", eval_steps=10), folder)
    return folder


# The description -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", [{"methd": "lora"}, {"training": {"epoch": 3}}, {"task": "mrpc"}], ids=str)
def test_an_edited_trial_file_is_refused(material: Path, tmp_path: Path, edit: dict[str, Any]) -> None:
    values = {**asdict(trial_of(material)), **edit}
    (tmp_path / "trial.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"trial\.json: edited, no trial"):
        load_trial(tmp_path / "trial.json")


# What a run leaves ---------------------------------------------------------------------------------------------------


def test_curve_history_and_result_agree(finished: Path) -> None:
    result, curve, history = (read(finished / f"{name}.json") for name in ("result", "curve", "history"))
    assert curve["planned_steps"] == STEPS
    assert set(curve["ranks"]) == set(result["ranks"])
    for name, changes in curve["ranks"].items():
        assert changes[0] == [0, 0]
        assert changes[-1][1] == result["ranks"][name]
        assert all(one[0] < two[0] and one[1] != two[1] for one, two in pairwise(changes))
    assert curve["parameters"][0] == [0, result["parameters"]["initial"]]
    assert curve["parameters"][-1][1] == result["parameters"]["final"]
    for name in ("loss", "learning_rate"):
        assert [step for step, _ in history[name]] == list(range(2, STEPS + 1, 2))
    evaluated = [(entry["step"], entry["split"]) for entry in history["evaluations"]]
    assert evaluated == [(10, "held_out"), (18, "held_out")], "what is reported is evaluated once, after training"
    last = history["evaluations"][-1]
    assert set(last) == {"step", "split", "loss", "accuracy", "macro_f1", "mcc", "f1"}
    assert last["accuracy"] == result["held_out"]["accuracy"]


def test_a_finished_trial_is_not_run_again(finished: Path, material: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    result = run_trial(trial_of(material, "aroma", eval_steps=10), finished)
    assert result == read(finished / "result.json")
    assert load_trial(finished / "trial.json") == trial_of(material, "aroma", eval_steps=10)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


def test_what_can_be_refused_is_refused_before_anything_is_written(material: Path, tmp_path: Path) -> None:
    trial = trial_of(material)
    for broken, message in (
        (replace(trial, kind="lorra"), "kind='lorra'"),
        (replace(trial, model="no/model"), "'no/model'"),
        (trial_of(material, warmup_steps=18), r"training\.warmup_steps=18"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_trial(broken, tmp_path / "run")
        assert not (tmp_path / "run").exists()


# Evaluation is whole, apart, and the same for all --------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True])
def test_every_example_is_evaluated_exactly_once(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grouped: bool
) -> None:
    seen: dict[bool, Counter[tuple[int, ...]]] = {True: Counter(), False: Counter()}
    forward = BertForSequenceClassification.forward

    @wraps(forward)
    def counted(model: Any, input_ids: Any, attention_mask: Any, **inputs: Any) -> Any:
        for tokens, mask in zip(input_ids, attention_mask, strict=True):
            seen[model.training][tuple(tokens[mask.bool()].tolist())] += 1
        return forward(model, input_ids=input_ids, attention_mask=attention_mask, **inputs)

    monkeypatch.setattr(BertForSequenceClassification, "forward", counted)
    trial = trial_of(material, max_steps=12, group_by_length=grouped)
    run_trial(trial, tmp_path / "run")
    data, tokenizer = load_task(trial.task), load_tokenizer(str(material / "model"), 16)
    train, held_out, test = (
        [tuple(row) for row in encode(part, tokenizer, 16)["input_ids"]]
        for part in (data.parts[split] for split in ("train", "held_out", "test"))
    )
    assert seen[False] == Counter(held_out + test)
    assert len(seen[False]) == 24 + 37
    # One epoch trains on every training example once, encoded by the very function that encodes the others.
    assert seen[True] == Counter(train)


@pytest.mark.slow
def test_every_method_sees_the_same_batches(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orders: dict[str, list[list[int]]] = {"lora": [], "full": [], "adalora": []}
    step = Trainer.training_step
    for method, order in orders.items():

        def noted(self: Any, model: Any, inputs: Any, *rest: Any, order: Any = order) -> Any:
            order.append(inputs["input_ids"].flatten().tolist())
            return step(self, model, inputs, *rest)

        monkeypatch.setattr(Trainer, "training_step", noted)
        run_trial(trial_of(material, method, max_steps=15, save_steps=None), tmp_path / method)
    assert len(orders["lora"]) == 15
    assert orders["lora"] == orders["full"] == orders["adalora"]


def test_a_selecting_trial_does_not_look_at_what_is_reported(material: Path, tmp_path: Path) -> None:
    chosen = trial_of(material, purpose="select", eval_steps=10)
    blind = replace(chosen, task=replace(chosen.task, reported={"test": "secret.jsonl"}))
    (material / "secret.jsonl").write_text("whoever reads this fails")
    result = run_trial(blind, tmp_path / "select")
    assert result["reported"] == {}
    assert result["examples"] == {"train": 96, "held_out": 24}
    assert result["score"] == result["held_out"]["accuracy"]
    evaluations = read(tmp_path / "select" / "history.json")["evaluations"]
    assert {entry["split"] for entry in evaluations} == {"held_out"}
    assert not (tmp_path / "select" / "adapter").exists()
    with pytest.raises(DataError, match="secret"):
        run_trial(replace(blind, purpose="report"), tmp_path / "report")


# What is counted -----------------------------------------------------------------------------------------------------


def test_a_run_whose_modules_are_all_finished_stops(material: Path, tmp_path: Path) -> None:
    options = {"max_inner_steps": 4, "inner_check_interval": 2, "rewarmup_steps": 1, "outer_tolerance": 1e6}
    trial = replace(trial_of(material, "aroma"), options=options)
    result = run_trial(trial, tmp_path / "stops")
    assert result["stopped_early"]
    assert 2 < result["steps"] <= 4
    parameters = result["parameters"]
    assert parameters["final"] == 0
    assert parameters["average"] == pytest.approx(parameters["initial"] * result["steps"] / STEPS)
    on = replace(trial, training=replace(trial.training, early_stop=False))
    result = run_trial(on, tmp_path / "goes-on")
    assert (result["steps"], result["stopped_early"], result["parameters"]["final"]) == (STEPS, False, 0)


@pytest.mark.parametrize("by", ["effect", "size"])
def test_a_compressed_run_trains_all_and_saves_less(material: Path, tmp_path: Path, by: str) -> None:
    """Of 96 examples nothing is held out: an epoch has 12 steps of 8."""
    options = {"r": 4, "by": by, "size": 0.4, "examples": 32}
    trial = replace(trial_of(material, max_steps=None, epochs=1, save_steps=None), kind="compressed", options=options)
    result = run_trial(trial, tmp_path / "run")
    whole = run_trial(replace(trial, kind="lora", options={"r": 4}), tmp_path / "whole")
    assert (result["steps"], result["examples"]) == (12, whole["examples"])
    assert read(tmp_path / "run" / "history.json")["loss"] == read(tmp_path / "whole" / "history.json")["loss"]
    assert (result["trained_rank"], whole["total_rank"]) == (4, 4 * len(result["ranks"]))
    assert 0 < result["total_rank"] <= 0.5 * whole["total_rank"]
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    found = {name: len(tensor) for name, tensor in saved.items() if "lora_A" in name}
    assert sorted(found.values()) == sorted(rank for rank in result["ranks"].values() if rank)


def test_a_compressed_run_is_resumed_to_the_bit(material: Path, tmp_path: Path) -> None:
    """From two steps before its end, where the last inputs would be too few."""
    options = {"r": 4, "size": 0.4, "examples": 32}
    trial = replace(trial_of(material, save_steps=STEPS - 2), kind="compressed", options=options)
    run_trial(trial, tmp_path / "whole", keep_checkpoints=True)
    (tmp_path / "again").mkdir()
    for name in ("trial.json", "checkpoints"):
        place = tmp_path / "whole" / name
        (shutil.copytree if place.is_dir() else shutil.copy)(place, tmp_path / "again" / name)
    shutil.rmtree(tmp_path / "again" / "checkpoints" / f"checkpoint-{STEPS}", ignore_errors=True)
    run_trial(trial, tmp_path / "again")
    saved = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "again")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(tensor, saved[1][name]) for name, tensor in saved[0].items())


def test_a_compression_that_fails_fails_the_run(material: Path, tmp_path: Path) -> None:
    trial = replace(trial_of(material, learning_rate=1e-60), kind="compressed", options={"r": 2, "examples": 16})
    with pytest.warns(AromaWarning), pytest.raises(ConfigError, match="kind='compressed': the adapter could not be"):
        run_trial(trial, tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


# The loop ------------------------------------------------------------------------------------------------------------


def test_micro_batches_are_averaged_not_summed(material: Path, tmp_path: Path) -> None:
    options = {"max_steps": 4, "warmup_steps": 0, "logging_steps": 1, "save_steps": None}
    whole = trial_of(material, "full", **options)
    parts = trial_of(material, "full", batch_size=4, gradient_accumulation_steps=2, **options)
    losses = []
    for name, trial in (("whole", whole), ("parts", parts)):
        run_trial(trial, tmp_path / name)
        losses.append([loss for _, loss in read(tmp_path / name / "history.json")["loss"]])
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.3)  # dropout apart; the sum would be twice as much
    saved = load_file(tmp_path / "whole" / "adapter" / "trained.safetensors")
    model = AutoModelForSequenceClassification.from_pretrained(material / "model", num_labels=2)
    assert model.load_state_dict(saved, strict=True)


def test_a_run_that_diverges_fails(material: Path, tmp_path: Path) -> None:
    trial = trial_of(material, "full", learning_rate=1e30, max_grad_norm=0.0, group_by_length=False)
    with pytest.raises(NonFiniteError, match="at optimizer step"):
        run_trial(trial, tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()
