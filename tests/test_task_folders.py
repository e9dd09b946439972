"""Tasks one after another: each has its own components, starts off the earlier ones, and leaves them as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback

from aroma import AromaCallback, AromaConfig, Tasks, aroma_layers, verify_adapter
from aroma.errors import CheckpointError, ConfigError, OutputError
from aroma.tuner.live import live_adapter
from trainer_runs import METHOD, assert_same, tiny_bert, trainer_for

LABELS = {"first": 3, "second": 4, "third": 3}
BATCH = torch.arange(1, 33).reshape(4, 8)


def bert(task: str) -> Any:
    """The same encoder, with a head for the labels of a task."""
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.num_labels = model.config.num_labels = LABELS[task]
    torch.manual_seed(len(task))
    model.classifier = torch.nn.Linear(32, LABELS[task])
    return model


def config(seed: int) -> AromaConfig:
    return AromaConfig(task_type="SEQ_CLS", **{**METHOD, "outer_tolerance": 1e-6, "component_seed": seed})


def learn(model: Any, out: Path, *callbacks: TrainerCallback, resume: str | None = None, **training: Any) -> None:
    growth = AromaCallback(early_stop=False)
    trainer = trainer_for(model, out, growth, *callbacks, **{"max_steps": 60, "save_strategy": "no", **training})
    trainer.train(resume_from_checkpoint=resume)


def answers(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(BATCH).logits
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder of three tasks, and what each model answered when it had been trained."""
    folder, told = tmp_path_factory.mktemp("tasks") / "tasks", {}
    for task in LABELS:
        tasks = Tasks(folder)
        model = tasks.grow(bert(task), config(0))
        before = {name: files(folder / name) for name in tasks.names}
        learn(model, folder.parent / f"run-{task}")
        tasks.save(model, task)
        assert {name: files(folder / name) for name in before} == before
        told[task] = answers(model)
    return folder, told


def test_no_task_is_forgotten(learnt: tuple[Path, dict[str, Any]]) -> None:
    folder, told = learnt
    tasks = Tasks(folder)
    assert tasks.names == [*LABELS]
    assert tasks.over("third") == ["first", "second"]
    for task in LABELS:
        model = tasks.load(bert(task), task)
        assert isinstance(model, PeftModel)
        assert not aroma_layers(model)
        torch.testing.assert_close(answers(model), told[task], rtol=0, atol=1e-5)
        assert verify_adapter(folder / task)
        assert float((answers(bert(task)) - told[task]).abs().max()) > 1e-2, "it has learnt something"


def test_components_are_of_their_task_alone(learnt: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, told = learnt
    tasks = Tasks(folder)
    own, beneath = tasks.load(bert("second"), tasks=["second"]), tasks.load(bert("second"), "second", ["first"])
    assert float((answers(own) - told["second"]).abs().max()) > 1e-3, "without the first it answers otherwise"
    weights = [{name: p for name, p in model.named_parameters() if ".lora_" in name} for model in (own, beneath)]
    whole = dict(tasks.load(bert("second"), "second").named_parameters())
    for name in weights[0].keys() & weights[1].keys():
        dim = 0 if "lora_A" in name else 1
        assert torch.equal(torch.cat([weights[1][name], weights[0][name]], dim), whole[name])
    tasks.export(tmp_path / "both", "second")
    torch.testing.assert_close(
        answers(PeftModel.from_pretrained(bert("second"), tmp_path / "both")), told["second"], rtol=0, atol=1e-5
    )
    with pytest.raises(OutputError):
        tasks.export(tmp_path / "both", "second")


class Starts(TrainerCallback):
    """Notes, after every step, how far new components are from being orthogonal to what lies beneath them."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int]] = set()
        self.overlaps: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for layer in aroma_layers(model, "default").values():
            b, a = (one.detach() for one in layer.pair("default"))
            beneath = layer.rows_beneath("default")
            for slot in range(len(a)):
                if not b[:, slot].any() and a[slot].any() and beneath.any():
                    overlap = beneath @ a[slot] / (beneath.norm(dim=1) * a[slot].norm())
                    self.overlaps.append(float(overlap.abs().max()))


def test_components_start_orthogonal_to_those_of_earlier_tasks(
    learnt: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = learnt
    starts = Starts()
    learn(Tasks(folder).grow(bert("first"), config(7)), tmp_path, starts, max_steps=36)
    assert len(starts.overlaps) > 10
    assert max(starts.overlaps) < 1e-5


def test_what_lies_beneath_is_part_of_every_answer_and_never_trains(
    learnt: tuple[Path, dict[str, Any]],
) -> None:
    folder, told = learnt
    shutil.rmtree(folder.parent / "two", ignore_errors=True)
    shutil.copytree(folder, folder.parent / "two")
    tasks = Tasks(folder.parent / "two")
    tasks.remove("third")
    model = tasks.grow(bert("second"), config(1))
    model.base_model.classifier.modules_to_save["default"].load_state_dict(
        tasks.load(bert("second"), "second").base_model.classifier.modules_to_save["default"].state_dict()
    )
    torch.testing.assert_close(answers(model), told["second"], rtol=0, atol=1e-5)
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert training
    assert all(".default." in name for name in training)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged.eval()(BATCH).logits, told["second"], rtol=0, atol=1e-4)


def test_a_training_over_earlier_tasks_resumes_to_the_bit(learnt: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = learnt
    saving = {"save_strategy": "steps", "save_steps": 20}
    whole, again = (Tasks(folder).grow(bert("first"), config(7)) for _ in range(2))
    learn(whole, tmp_path, **saving)
    learn(again, tmp_path / "again", resume=str(tmp_path / "checkpoint-40"))
    assert_same(answers(again), answers(whole))
    for name, layer in aroma_layers(whole, "default").items():
        assert_same(layer.components("default"), aroma_layers(again, "default")[name].components("default"), name)


def test_one_is_removed_and_the_others_stay(learnt: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    shutil.copytree(learnt[0], tmp_path / "tasks")
    tasks = Tasks(tmp_path / "tasks")
    before = {name: files(tasks.folder / name) for name in ("first", "third")}
    tasks.remove("second")
    assert {name: files(tasks.folder / name) for name in before} == before
    assert Tasks(tasks.folder).names == ["first", "third"]
    assert Tasks(tasks.folder).over("third") == ["first"]
    torch.testing.assert_close(answers(tasks.load(bert("first"), "first")), learnt[1]["first"], rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match=r"task='second': .* has first, third; give one of these"):
        tasks.load(bert("second"), "second")


def test_an_adapter_that_was_trained_elsewhere_is_added(learnt: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, told = learnt
    tasks = Tasks(tmp_path / "tasks")
    for task in LABELS:
        tasks.add(task, folder / task, tasks.names)
    torch.testing.assert_close(answers(tasks.load(bert("third"))), told["third"], rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match=r"trained over first, and .*train it again"):
        tasks.add("fourth", folder / "second", ["first"])


def test_two_that_use_a_folder_see_what_the_other_saved(tmp_path: Path) -> None:
    one, other = Tasks(tmp_path / "tasks"), Tasks(tmp_path / "tasks")
    model = one.grow(tiny_bert(), config(0))
    one.save(model, "first")
    with pytest.raises(ConfigError, match=r"task='second': the model grew over other tasks than first"):
        other.save(model, "second")
    other.save(other.grow(tiny_bert(), config(1)), "second")
    assert Tasks(tmp_path / "tasks").names == other.names == ["first", "second"]
    one.remove("second")
    assert Tasks(tmp_path / "tasks").names == one.names == ["first"]


def test_what_cannot_be(tmp_path: Path) -> None:
    tasks = Tasks(tmp_path / "tasks")
    model = tasks.grow(tiny_bert(), config(0))
    with pytest.raises(ConfigError, match=r"has no tasks yet"):
        tasks.load(tiny_bert())
    for name in ("default", "a/b", "../x", "", ".x"):
        with pytest.raises(ConfigError, match="task="):
            tasks.save(model, name)
    tasks.save(model, "one")
    with pytest.raises(ConfigError, match=r"task='one': .* has it already"):
        tasks.save(model, "one")
    with pytest.raises(ConfigError, match=r"task='two': the model grew over other tasks than one, which"):
        tasks.save(model, "two")
    shutil.copytree(tmp_path / "tasks" / "one", tmp_path / "tasks" / "killed")
    with pytest.raises(ConfigError, match=r"task='killed': .*aroma_tasks\.json does not name it; delete it"):
        tasks.require_new("killed")
    with pytest.raises(ConfigError, match=r"task 'one': the base model has no bert\.encoder"):
        tasks.grow(torch.nn.Sequential(torch.nn.Linear(4, 4)), AromaConfig(target_modules=["0"]))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match=r"it has no aroma_tasks\.json"):
        Tasks(tmp_path / "other")
    index = tmp_path / "tasks" / "aroma_tasks.json"
    for damage in ({"format": 2}, {"format": 1, "tasks": 3}, {"format": 1, "tasks": [{"name": "..", "over": []}]}):
        index.write_text(json.dumps(damage))
        with pytest.raises(CheckpointError, match=r"aroma_tasks\.json: (format|tasks)="):
            Tasks(tmp_path / "tasks")


def test_the_dense_reference_of_the_projection() -> None:
    """Rows off a span, as a least-squares fit says; spans of dependent rows too."""
    generator = torch.Generator().manual_seed(0)
    tasks_rows = torch.randn(5, 32, generator=generator, dtype=torch.float64)
    rows = torch.cat([tasks_rows, tasks_rows[:2] * 3])
    model = Tasks("nowhere").grow(tiny_bert(), config(0))
    layer = next(iter(aroma_layers(model).values()))
    layer.rows_beneath = lambda name: rows  # type: ignore[method-assign]
    layer.beneath["default"] = ("default",)
    a = torch.randn(3, 32, generator=generator, dtype=torch.float64)
    expected = a - (torch.linalg.lstsq(tasks_rows.T, a.T).solution.T @ tasks_rows)
    expected *= a.norm(dim=1, keepdim=True) / expected.norm(dim=1, keepdim=True)
    assert not layer.off_beneath("default", rows[:2] + rows[3:5]).any(), "in the span nothing is left"
    torch.testing.assert_close(layer.off_beneath("default", a), expected, rtol=0, atol=1e-10)


class Glance(torch.nn.Module):
    """A row of an embedding, a convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.look, self.say = torch.nn.Embedding(9, 16), torch.nn.Conv2d(1, 4, 3), torch.nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.say(self.look(self.words(tokens).reshape(-1, 1, 4, 4)).reshape(len(tokens), -1))
        return found


def test_convolutions_and_embeddings_lie_beneath_too(tmp_path: Path) -> None:
    tokens, told = torch.arange(4), {}
    generator = torch.Generator().manual_seed(3)
    for task in ("one", "two"):
        tasks = Tasks(tmp_path / "tasks")
        model = tasks.grow(Glance(), AromaConfig(target_modules=["words", "look", "say"], r=2))
        live_adapter(model).ever_controlled = True
        for layer in aroma_layers(model, "default").values():
            b, _ = layer.pair("default")
            b.data = torch.randn(b.shape, generator=generator)
        told[task] = model.eval()(tokens).detach()
        tasks.save(model, task)
    for task, expected in told.items():
        torch.testing.assert_close(tasks.load(Glance(), task)(tokens), expected, rtol=0, atol=1e-4)
    assert float((told["one"] - told["two"]).abs().max()) > 0.1
