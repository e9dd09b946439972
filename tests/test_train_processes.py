"""`torchrun -m aroma train`: two processes train what one does with their batches together, and one of them writes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

import trial_runs
from aroma.cli import main
from aroma.errors import ConfigError
from aroma_lab.run.run import planned_steps, require_as_many, run_trial
from aroma_lab.run.trial import save_trial
from aroma_lab.specs import TrainSpec
from ranks import launch, torchrun
from tiny_classifier import save_tiny_bert, sentences, write_json_lines
from trial_runs import save_material, trial_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    save_tiny_bert(folder / "model")
    # Without dropout, which the processes would draw otherwise than one.
    config = folder / "model" / "config.json"
    calm = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps({**json.loads(config.read_text()), **calm}))
    write_json_lines(folder / "train.jsonl", sentences(120, seed=1))
    write_json_lines(folder / "test.jsonl", sentences(37, seed=2))
    recipe = {
        "model": {"name": str(folder / "model")},
        "data": {
            "train": str(folder / "train.jsonl"),
            "reported": {"test": str(folder / "test.jsonl")},
            "max_length": 10,
            "held_out": 0.2,  # leaves 96: accelerate would fill a last batch up with others
        },
        "adapter": {"max_inner_steps": 8, "inner_check_interval": 4, "rewarmup_steps": 2, "outer_tolerance": 0.02},
        "training": {"epochs": 2, "batch_size": 4, "learning_rate": 0.01, "warmup_steps": 4, "save_steps": 10},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def decisions(folder: Path) -> list[dict[str, Any]]:
    return [{**json.loads(line), "value": None} for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def many(files: Path) -> Path:
    """The folder of a run of two processes, of which the first prints."""
    said = torchrun(2, "aroma", "train", str(files / "recipe.yaml"), f"output={files / 'many'}")
    assert said.count("adapter: ") == 1
    return files / "many"


def test_two_processes_train_what_one_trains(files: Path, many: Path) -> None:
    one = files / "one"
    assert main(["train", str(files / "recipe.yaml"), "training.batch_size=8", f"output={one}"]) == 0
    ours, theirs = read(many / "result.json"), read(one / "result.json")
    assert (ours["processes"], theirs["processes"]) == (2, 1)
    assert ours["steps"] == theirs["steps"] == planned_steps(TrainSpec(epochs=2, batch_size=4), 96, 2) == 24
    assert decisions(many) == decisions(one)
    assert {event["kind"] for event in decisions(many)} >= {"merged"}
    assert ours["ranks"] == theirs["ranks"]
    assert ours["held_out"] == pytest.approx(theirs["held_out"], abs=1e-6)
    assert ours["reported"]["test"] == pytest.approx(theirs["reported"]["test"], abs=1e-6)
    assert read(many / "curve.json") == read(one / "curve.json")
    weights, expected = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (many, one))
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        # float32, where the processes add in another order; see test_distributed.
        assert float((tensor - expected[name]).abs().max()) <= 1e-3 * float(expected[name].abs().max()), name


def test_it_resumes_as_if_it_had_not_been_interrupted(many: Path, tmp_path: Path) -> None:
    out = shutil.copytree(many, tmp_path / "cut")
    shutil.rmtree(out / "checkpoints" / "checkpoint-24")
    shutil.rmtree(out / "adapter")
    (out / "result.json").unlink()
    with pytest.raises(ConfigError, match=r"^--nproc-per-node=1: .*checkpoint-20 is of 2 on .*; start 2$"):
        require_as_many(out / "checkpoints" / "checkpoint-20")
    arguments = ["train", str(out / "recipe.yaml"), f"output={out}", "--resume"]
    assert main(arguments) == 2  # alone
    launch(2, "aroma", *arguments)
    for name in ("adapter/adapter_model.safetensors", "events.jsonl", "curve.json"):
        assert (out / name).read_bytes() == (many / name).read_bytes(), name
    ours, theirs = read(out / "result.json"), read(many / "result.json")
    assert (ours["held_out"], ours["reported"]) == (theirs["held_out"], theirs["reported"])


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_a_trial_of_another_method_trains_in_two_processes_what_it_trains_in_one(
    files: Path, tmp_path: Path, method: str
) -> None:
    trial = trial_of(save_material(tmp_path / "material"), method, max_steps=12, batch_size=4)
    trial = replace(
        trial, model=str(files / "model"), training=replace(trial.training, group_by_length=False, train_pooler=False)
    )
    save_trial(trial, tmp_path / "trial.json")
    launch(2, trial_runs.__file__, str(tmp_path / "trial.json"), str(tmp_path / "many"))
    ours = read(tmp_path / "many" / "result.json")
    theirs = run_trial(replace(trial, training=replace(trial.training, batch_size=8)), tmp_path / "one")
    assert (ours["processes"], theirs["processes"]) == (2, 1)
    assert (ours["ranks"], ours["parameters"]) == (theirs["ranks"], theirs["parameters"])
    assert ours["reported"]["test"] == pytest.approx(theirs["reported"]["test"], abs=1e-6)
    assert ours["held_out_loss"] == pytest.approx(theirs["held_out_loss"], rel=1e-3)


def test_what_is_refused_is_one_error_in_every_process_and_nothing_is_touched(files: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    said = launch(2, "aroma", "train", str(files / "recipe.yaml"), f"output={tmp_path / 'out'}", fails=True)
    assert said.count("it is not an empty folder, and nothing is overwritten") == 2
    assert "Traceback" not in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
