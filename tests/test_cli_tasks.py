"""`aroma train --continue`: tasks one after another on the command line, and what reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from aroma import Tasks, verify_adapter
from aroma.cli import main
from tiny_classifier import save_tiny_bert, sentences, write_json_lines


def recipe(folder: Path, task: str, seed: int) -> list[str]:
    write_json_lines(folder / f"{task}.jsonl", sentences(120, seed=seed))
    write_json_lines(folder / f"{task}-test.jsonl", sentences(37, seed=seed + 1))
    values = {
        "model": {"name": str(folder / "model")},
        "data": {
            "train": str(folder / f"{task}.jsonl"),
            "test": str(folder / f"{task}-test.jsonl"),
            "max_length": 10,
        },
        "adapter": {"max_inner_steps": 10, "inner_check_interval": 5, "rewarmup_steps": 2},
        "training": {"max_steps": 40, "batch_size": 8, "learning_rate": 0.01, "warmup_steps": 4, "save_steps": 20},
        "output": str(folder / f"run-{task}"),
    }
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(values))
    return ["train", str(folder / f"{task}.yaml"), "--continue", str(folder / "tasks"), "--task", task, "--no-report"]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learnt")
    save_tiny_bert(folder / "model")
    for seed, task in enumerate(("first", "second")):
        assert main(recipe(folder, task, 10 * seed)) == 0
    return folder


def accuracy_of(folder: Path, adapter: str, task: str, capsys: Any) -> float:
    out = folder / "accuracy.json"
    out.unlink(missing_ok=True)
    assert main(["eval", str(folder / adapter), "--data", str(folder / f"{task}-test.jsonl"), "--json", str(out)]) == 0
    capsys.readouterr()
    found: float = json.loads(out.read_text())["metrics"]["accuracy"]
    return found


def test_a_task_answers_together_with_those_beneath_it(learnt: Path, tmp_path: Path, capsys: Any) -> None:
    tasks = Tasks(learnt / "tasks")
    assert tasks.names == ["first", "second"]
    assert tasks.over("second") == ["first"]
    for task in tasks.names:
        result = json.loads((learnt / f"run-{task}" / "result.json").read_text())
        told = result["reported"]["test"]["accuracy"]
        assert told > 0.8
        assert accuracy_of(learnt, f"tasks/{task}", task, capsys) == pytest.approx(told, abs=1e-9)
        assert verify_adapter(learnt / "tasks" / task)


def test_a_task_whose_run_was_killed_before_it_was_added_is_added(learnt: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(learnt, folder)
    for file in ("second.yaml", "run-second/trial.json", "run-second/recipe.yaml"):
        path = folder / file
        path.write_text(path.read_text().replace(str(learnt), str(folder)))
    command = ["train", str(folder / "second.yaml"), "--continue", str(folder / "tasks"), "--no-report", "--resume"]
    tasks = Tasks(folder / "tasks")
    before = (folder / "tasks" / "second" / "adapter_model.safetensors").read_bytes()
    tasks.remove("second")
    assert main([*command, "--task", "second"]) == 0
    assert Tasks(folder / "tasks").over("second") == ["first"]
    assert (folder / "tasks" / "second" / "adapter_model.safetensors").read_bytes() == before
    assert main([*command, "--task", "2024"]) == 2, "another name is another run, and a number is a name"


def test_tasks_are_exported_as_one_plain_adapter(learnt: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["export", str(learnt / "tasks" / "second"), str(tmp_path / "whole"), "--plain"]) == 0
    assert "adapter of first, second: " in capsys.readouterr().out
    both = [str(learnt / "tasks"), str(tmp_path / "both"), "--plain", "--tasks", "first", "second"]
    assert main(["export", *both]) == 0
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("whole", "both")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert main(["export", str(learnt / "tasks" / "second"), str(tmp_path / "served"), "--uniform"]) == 0
    expected = json.loads((learnt / "run-second" / "result.json").read_text())["reported"]["test"]["accuracy"]
    (tmp_path / "second-test.jsonl").write_bytes((learnt / "second-test.jsonl").read_bytes())
    for name in ("whole", "served"):
        assert verify_adapter(tmp_path / name)
        assert accuracy_of(tmp_path, name, "second", capsys) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "second.yaml", "--continue", "tasks", "--task", "second"], "task='second': tasks has it already"),
        (
            ["train", "second.yaml", "--task", "third"],
            "task='third': a folder of tasks and the name of this one belong",
        ),
        (["train", "second.yaml", "--continue", "run-first", "--task", "third"], "it has no aroma_tasks.json"),
        (["export", "run-first/adapter", "out", "--plain"], "it is no folder of tasks"),
        (["export", "tasks/first", "out", "--plain", "--tasks", "first"], "is one task"),
        (["export", "tasks", "out", "--plain", "--tasks", "absent"], "tasks has first, second; give one of these"),
        (["export", "tasks/first", "out", "--uniform", "--tasks", "first"], "it has a meaning only with --plain"),
    ],
)
def test_what_cannot_be_is_one_line(
    learnt: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(learnt)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (learnt / "out").exists()
