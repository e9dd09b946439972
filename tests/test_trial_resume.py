"""A killed trial ends as the uninterrupted one, whatever the method."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aroma.errors import CheckpointError
from aroma.files import read_json
from aroma_lab.run.run import resumable_checkpoint, run_trial
from aroma_lab.run.trial import TrialFiles
from ranks import processes
from trainer_runs import resealed
from trial_runs import LAST, METHODS, SAVE_STEPS, die_at, read, save_material, trial_of

COSTS = {"wall_seconds", "peak_gpu_memory_mib", "train_seconds"}
"""Of a result, what is different in every run."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_material(tmp_path_factory.mktemp("material"))


def attempt(trial: Any, folder: Path, kill_at: int, exitcode: int = -9) -> None:
    """Run a trial in a process of its own, which SIGKILLs itself after step `kill_at`; −1: before the evaluation."""
    process = processes().Process(target=die_at, args=(trial, folder, kill_at))
    process.start()
    process.join()
    assert process.exitcode == exitcode


def assert_same_end(one: Path, other: Path) -> None:
    """Compare all that two finished trials left, to the bit."""
    ours, theirs = (read(folder / "result.json") for folder in (one, other))
    assert {key: value for key, value in ours.items() if key not in COSTS} == {
        key: value for key, value in theirs.items() if key not in COSTS
    }
    for name in ("curve.json", "history.json", "events.jsonl", "trial.json"):
        assert (one / name).read_text() == (other / name).read_text(), name
    names = sorted(path.name for path in (one / "adapter").iterdir())
    assert names == sorted(path.name for path in (other / "adapter").iterdir())
    tensors = [name for name in names if name.endswith(".safetensors")]
    assert tensors
    for name in tensors:
        saved, expected = load_file(one / "adapter" / name), load_file(other / "adapter" / name)
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[key], expected[key]) for key in saved), name


@pytest.mark.parametrize("method", METHODS)
def test_killed_equals_uninterrupted(material: Path, tmp_path: Path, method: str) -> None:
    # Adapters, head and dropout move; evaluations on the way draw random numbers, too.
    trial = trial_of(material, method, eval_steps=8, bf16=method in ("lora", "aroma"))
    run_trial(trial, tmp_path / "whole")
    attempt(trial, tmp_path / "killed", LAST + 2)
    assert not (tmp_path / "killed" / "result.json").exists()
    assert resumable_checkpoint(TrialFiles(tmp_path / "killed")) is not None
    run_trial(trial, tmp_path / "killed")
    assert_same_end(tmp_path / "killed", tmp_path / "whole")
    left = {path.name for path in (tmp_path / "killed").iterdir()}
    assert left == {"adapter", "curve.json", "events.jsonl", "history.json", "result.json", "trial.json"}


@pytest.fixture(scope="module")
def whole(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted trial."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_trial(trial_of(material), folder)
    return folder


@pytest.fixture(scope="module")
def killed(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same trial, killed after its last checkpoint."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    attempt(trial_of(material), folder, LAST + 2)
    return folder


def test_a_resumed_trial_does_not_begin_anew(whole: Path, material: Path, tmp_path: Path) -> None:
    attempt(trial_of(material), tmp_path / "run", LAST + 1)
    attempt(trial_of(material), tmp_path / "run", LAST - 1, exitcode=0)  # anew, it would die there
    assert_same_end(tmp_path / "run", whole)


def test_a_checkpoint_that_was_cut_off_is_passed_over(
    killed: Path, whole: Path, material: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    last = run / "checkpoints" / f"checkpoint-{LAST}"
    state = (last / "trainer_state.json").read_text()
    (last / "trainer_state.json").write_text(state[: len(state) // 2])
    assert resumable_checkpoint(TrialFiles(run)) == run / "checkpoints" / f"checkpoint-{LAST - SAVE_STEPS}"
    (run / "checkpoints" / f"checkpoint-{LAST - SAVE_STEPS}" / "hooks.safetensors").unlink()
    assert resumable_checkpoint(TrialFiles(run)) is None
    run_trial(trial_of(material), run)
    assert_same_end(run, whole)


@pytest.mark.parametrize(
    ("method", "stops"), [pytest.param("adalora", False, marks=pytest.mark.slow), ("aroma", True)]
)
def test_killed_after_training_equals_uninterrupted(material: Path, tmp_path: Path, method: str, stops: bool) -> None:
    # From the checkpoint of the last step the Trainer would take one step more.
    trial = trial_of(material, method)
    if stops:
        trial = replace(trial, options={**trial.options, "outer_tolerance": 1e3})
    attempt(trial, tmp_path / "killed", -1)
    whole = run_trial(trial, tmp_path / "whole")
    assert whole["stopped_early"] == stops
    assert (tmp_path / "killed" / "checkpoints" / f"checkpoint-{whole['steps']}").exists()
    run_trial(trial, tmp_path / "killed")
    assert_same_end(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("method", ["adalora", "aroma"])
def test_the_best_checkpoint_is_the_one_reported(material: Path, tmp_path: Path, method: str) -> None:
    trial = trial_of(material, method, checkpoint="best", eval_steps=5, keep_checkpoints=2)
    result = run_trial(trial, tmp_path / "whole")
    evaluations = read(tmp_path / "whole" / "history.json")["evaluations"]
    best = max(evaluations, key=lambda entry: entry["accuracy"])  # the first of equals, as the Trainer has it
    assert result["held_out"]["accuracy"] == best["accuracy"]
    attempt(trial, tmp_path / "killed", LAST + 2)
    run_trial(trial, tmp_path / "killed")
    assert_same_end(tmp_path / "killed", tmp_path / "whole")


def test_a_checkpoint_of_another_model_is_refused(killed: Path, material: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    file = run / "checkpoints" / f"checkpoint-{LAST}" / "trained.safetensors"
    tensors = load_file(file)
    name, tensor = next(iter(tensors.items()))
    save_file({**tensors, name: tensor[:1].clone()}, file)
    resealed(file.parent)
    with pytest.raises(CheckpointError, match="has another shape in the model; it is of another run"):
        run_trial(trial_of(material), run)


def test_earlier_attempts_count(killed: Path, material: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    file = run / "checkpoints" / f"checkpoint-{LAST}" / "trainer_state.json"
    state = read_json(file)
    attributes = state["stateful_callbacks"]["Recorder"]["attributes"]
    assert attributes["train_seconds"] > 0
    attributes["cost"] = {"wall_seconds": 1000.0, "peak_gpu_memory_mib": 3e6}
    attributes["train_seconds"] = 300.0
    file.write_text(json.dumps(state))
    resealed(file.parent)
    result = run_trial(trial_of(material), run)
    assert 1000 < result["wall_seconds"] < 1900
    assert result["peak_gpu_memory_mib"] == 3e6
    assert 300 < result["train_seconds"] < 400
