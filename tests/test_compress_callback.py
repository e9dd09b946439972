"""CompressCallback in the Trainer: training is as without it, and what is saved has the effect that was measured."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

import models
import trainer_runs
from aroma import CompressCallback, compress
from aroma.errors import AromaWarning, ConfigError
from compress_trainings import (
    Seen,
    adapted,
    assert_saved_as_measured,
    trainer_for,
)
from quick import slow_but
from trainer_runs import assert_same, tiny_bert

STEPS = 24
ROWS = 8
"""Of a step."""
FILE = "adapter_model.safetensors"


# Trainings, and what a plain script measures -------------------------------------------------------------------------


# Training is left alone ----------------------------------------------------------------------------------------------


def test_training_is_as_without_it_and_the_saved_adapter_has_the_effect_that_was_measured(tmp_path: Path) -> None:
    callback, seen = CompressCallback(examples=60), Seen()
    trainer = trainer_for(tmp_path / "with", callback, seen)
    trainer.train()
    plain = trainer_for(tmp_path / "without")
    plain.train()
    for step in (STEPS // 2, STEPS):
        one, other = (tmp_path / name / f"checkpoint-{step}" for name in ("with", "without"))
        assert {file.name for file in one.iterdir()} == {file.name for file in other.iterdir()}
        for name in (FILE, "adapter_config.json"):
            assert (one / name).read_bytes() == (other / name).read_bytes()
        assert_same(*(torch.load(folder / "optimizer.pt", weights_only=True) for folder in (one, other)))
        random = [torch.load(folder / "rng_state.pth", weights_only=False) for folder in (one, other)]
        assert repr(random[0]) == repr(random[1])
        assert torch.equal(random[0]["cpu"], random[1]["cpu"])
        states = [json.loads((folder / "trainer_state.json").read_text()) for folder in (one, other)]
        assert states[0] == states[1]
    assert_saved_as_measured(trainer, callback, seen, tiny_bert, tmp_path / "with" / f"checkpoint-{STEPS}")


# What the Trainer can do -------------------------------------------------------------------------------------------


class WithoutLabels(Trainer):
    """Gives the model no labels."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        output = model(**inputs)
        loss = torch.nn.functional.cross_entropy(output.logits, labels)
        return (loss, output) if return_outputs else loss


class Embedded(Trainer):
    """Gives the model embeddings, which a gradient flows through."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        words = self.model.get_input_embeddings()(inputs["input_ids"]).requires_grad_()
        output = model(inputs_embeds=words * 1.0, labels=inputs["labels"])
        return (output.loss, output) if return_outputs else output.loss


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Rows without a number of them."""

    def __iter__(self) -> Iterator[Any]:
        yield from trainer_runs.examples(400)


OPTIONS: dict[str, dict[str, Any]] = {
    "labels popped": {"kind": WithoutLabels},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "embedded": {"kind": Embedded},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "checkpointing": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant checkpointing": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
    "bf16": {"bf16": True},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "a stream": {"train": Stream()},
    "evaluation at every step": {"eval_strategy": "steps", "eval_steps": 1},
    "epochs": {"max_steps": -1, "num_train_epochs": 1},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
}


@pytest.mark.parametrize("name", slow_but(["labels popped", "accumulation", "bf16", "a stream"], OPTIONS))
def test_it_works_with_the_trainers_options(tmp_path: Path, name: str) -> None:
    callback, seen = CompressCallback(examples=48), Seen()
    trainer = trainer_for(tmp_path, callback, seen, **OPTIONS[name])
    trainer.train()
    whole = tmp_path / f"checkpoint-{STEPS}"
    assert_saved_as_measured(trainer, callback, seen, tiny_bert, whole, close=0.02 if name == "bf16" else 1e-5)
    assert callback.compression is not None
    has_labels = name not in ("labels popped", "label smoothing")
    assert (callback.compression.size.score is not None) == has_labels


def test_a_regression(tmp_path: Path) -> None:
    def base() -> Any:
        model = tiny_bert()
        model.num_labels = model.config.num_labels = 1
        torch.manual_seed(4)
        model.classifier = torch.nn.Linear(32, 1)
        return model

    rows = [{**row, "labels": row["labels"].float()} for row in trainer_runs.examples(192)]
    callback, seen = CompressCallback(examples=48), Seen()
    trainer = trainer_for(tmp_path, callback, seen, model=adapted(base()), train=rows)
    trainer.train()
    assert_saved_as_measured(trainer, callback, seen, base, tmp_path / f"checkpoint-{STEPS}")
    assert callback.compression is not None
    assert callback.compression.outputs == "values"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_language_model(tmp_path: Path, name: str) -> None:
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in trainer_runs.examples(192)]
    callback, seen = CompressCallback(examples=48, keep=0.99), Seen()
    model = adapted(models.base(name), task_type="CAUSAL_LM")
    trainer = trainer_for(tmp_path, callback, seen, model=model, train=rows)
    trainer.train()
    assert_saved_as_measured(trainer, callback, seen, lambda: models.base(name), tmp_path / f"checkpoint-{STEPS}")


def test_the_best_checkpoint_is_compressed(tmp_path: Path) -> None:
    """Here one in the middle, whose weights are not those that the training ends with."""
    callback, seen = CompressCallback(examples=48), Seen()
    best: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "load_best_model_at_end": True}
    trainer = trainer_for(tmp_path, callback, seen, metric_for_best_model="worst", greater_is_better=False, **best)
    losses = iter([3.0, 2.0, 0.1, *([5.0] * 20)])
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args, **options: evaluate(*args, **options) | {"eval_worst": next(losses)}
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-12")
    assert_saved_as_measured(trainer, callback, seen, tiny_bert, tmp_path / "checkpoint-12")


class OutOfMemory(Trainer):
    """Has room for batches of half the size only, as it finds at its third step."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if len(inputs["input_ids"]) > ROWS // 2 and self.state.global_step == 2:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, *args, **kwargs)


def test_a_training_that_begins_again_with_smaller_batches(tmp_path: Path) -> None:
    callback, model = CompressCallback(examples=10_000), adapted()
    trainer = trainer_for(tmp_path, callback, model=model, kind=OutOfMemory, auto_find_batch_size=True)
    trainer.train()
    assert callback.compression is not None
    size = trainer._train_batch_size
    assert size < ROWS
    assert callback.compression.examples == STEPS * size, "nothing of the first try"
    assert not model._forward_pre_hooks


# Resuming ----------------------------------------------------------------------------------------------------------


def test_a_resumed_training_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, resumed = CompressCallback(examples=60), CompressCallback(examples=60)
    trainer = trainer_for(tmp_path / "whole", whole)
    trainer.train()
    again = trainer_for(tmp_path / "again", resumed)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{STEPS // 2}"))
    assert whole.compression is not None
    assert resumed.compression == whole.compression
    assert_same(again.model.state_dict(), trainer.model.state_dict())


def test_without_a_step_nothing_is_compressed(tmp_path: Path) -> None:
    callback = CompressCallback(examples=60)
    trainer_for(tmp_path, TrainerCallback()).train()
    again = trainer_for(tmp_path, callback)
    with pytest.warns(AromaWarning, match=r"no step was taken.*aroma compress"):
        again.train(resume_from_checkpoint=True)
    assert callback.compression is None
    folder = tmp_path / f"checkpoint-{STEPS}"
    again.model.save_pretrained(tmp_path / "end")
    assert_same(load_file(tmp_path / "end" / FILE), load_file(folder / FILE))


def test_given_examples_serve_without_a_step(tmp_path: Path) -> None:
    trainer_for(tmp_path, TrainerCallback()).train()
    callback = CompressCallback(trainer_runs.examples(40, seed=9))
    trainer_for(tmp_path, callback).train(resume_from_checkpoint=True)
    assert callback.compression is not None
    assert callback.compression.examples == 40


def test_a_finished_training_is_not_lost(tmp_path: Path) -> None:
    """Two steps of four examples are too few to decide anything."""
    callback = CompressCallback()
    trainer = trainer_for(tmp_path, callback, max_steps=2, per_device_train_batch_size=4)
    with pytest.warns(AromaWarning, match=r"stays as it was trained: .*8 examples.*give 16 or more"):
        trainer.train()
    assert callback.compression is None
    assert {layer.r["default"] for layer in trainer.model.modules() if hasattr(layer, "lora_A")} == {6}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_second_training_goes_on_with_what_stays(tmp_path: Path, optim: str) -> None:
    """The same optimizer takes its steps, and a fused one would read moments of any shape."""
    callback = CompressCallback(examples=48, size=0.4)
    trainer = trainer_for(tmp_path, callback, save_strategy="no", optim=optim)
    trainer.train()
    first = callback.compression
    assert first is not None
    assert not trainer.optimizer.state
    trainer.train()
    assert callback.compression is not None
    assert callback.compression.curve[-1].directions == first.size.directions
    assert callback.compression.size.directions < first.size.directions


# What is measured on -------------------------------------------------------------------------------------------------


def test_given_examples_are_measured_on_as_a_script_would(tmp_path: Path) -> None:
    """With their labels; of more than `examples` a part."""
    rows = trainer_runs.examples(64, seed=9)
    callback = CompressCallback(rows, examples=64)
    trainer = trainer_for(tmp_path / "with", callback)
    trainer.train()
    other = trainer_for(tmp_path / "without")
    other.train()
    batches = [{name: torch.stack([row[name] for row in rows]) for name in rows[0]}]
    found = compress(other.model, batches)
    assert callback.compression is not None
    assert callback.compression.curve[0].loss == pytest.approx(found.curve[0].loss)
    assert callback.compression.curve[-1].score == found.curve[-1].score
    part = CompressCallback(rows, examples=20)
    trainer_for(tmp_path / "part", part, max_steps=3).train()
    assert part.compression is not None
    assert part.compression.examples == 20


class Held(TrainerCallback):
    """Notes what a callback holds after each step, and asks the model something else."""

    def __init__(self, callback: Any) -> None:
        self.callback, self.rows = callback, [0]

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.eval()(input_ids=torch.ones(3, 8, dtype=torch.long))
        self.rows.append(sum(one.rows for one in self.callback._seen))
        tensors = [value for one in self.callback._seen for value in one.inputs.values()]
        assert not any(value.requires_grad for value in tensors), "nor what was computed from them"


@pytest.mark.parametrize("kind", [Trainer, Embedded])
def test_no_more_is_held_than_the_examples_that_are_measured_on(tmp_path: Path, kind: type[Trainer]) -> None:
    callback = CompressCallback(examples=20)
    held = Held(callback)
    trainer_for(tmp_path, callback, held, kind=kind, save_strategy="no").train()
    assert {*held.rows} == {0, 8, 16, 24}
    assert callback.compression is not None
    assert callback.compression.examples == 24
    assert not callback._seen


class Uncopied(list[Any]):
    """A training set that nobody may copy."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("a copy of the model is to hold no copy of the trainer")


class Average(TrainerCallback):
    """Copies the model while it trains, as a moving average of its weights does."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.model = copy.deepcopy(model)


def test_a_copy_of_the_model_is_no_copy_of_the_trainer(tmp_path: Path) -> None:
    callback, average = CompressCallback(examples=20), Average()
    trainer_for(tmp_path, callback, average, train=Uncopied(trainer_runs.examples(64)), max_steps=3).train()
    assert callback.compression is not None
    assert callback.compression.examples == 24
    assert {layer.r["default"] for layer in average.model.modules() if hasattr(layer, "lora_A")} == {6}


# Trackers ----------------------------------------------------------------------------------------------------------


class Told(TrainerCallback):
    """Notes what a tracker is told before it closes."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.is_open = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        assert self.is_open
        self.logs.append(dict(logs))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.is_open = False


def test_trackers_are_told_before_they_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    told, callback = Told(), CompressCallback(examples=20)
    trainer = trainer_for(tmp_path, told, TensorBoardCallback(), callback)
    trainer.train()
    found = callback.compression
    assert found is not None
    expected = {f"compress/{name}": value for name, value in found.totals().items()}
    assert {"compress/share", "compress/total_rank", "compress/largest_rank", "compress/effect"} == {*expected}
    assert expected.items() <= told.logs[-1].items()
    assert expected.items() <= trainer.state.log_history[-1].items()
    assert len([*(tmp_path / "board").glob("events*")]) == 1
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    for name, value in expected.items():
        (event,) = board.Scalars(f"train/{name}")
        assert event.value == pytest.approx(value)
        assert event.step == STEPS


def test_it_says_what_stays_unless_progress_is_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for is_off in (False, True):
        callback = CompressCallback(examples=20)
        trainer_for(tmp_path, callback, max_steps=4, disable_tqdm=is_off, save_strategy="no").train()
        captured = capsys.readouterr()
        assert (str(callback.compression) in captured.out) != is_off
        assert ("effect of each size" in captured.err) != is_off


# Refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 1.5}, "keep=1.5"),
        ({"size": 0}, "size=0"),
        ({"rank": 0}, "rank=0"),
        ({"examples": 15}, "examples=15: give 16 or more"),
        ({"examples": 20.0}, "examples=20.0"),
        ({"data": trainer_runs.examples(15)}, "data='list': give a data set of 16 examples or more"),
        ({"data": iter(trainer_runs.examples(20))}, "data="),
    ],
    ids=lambda case: str(case)[:20],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CompressCallback(**options)


def no_adapter() -> Any:
    return tiny_bert()


def of_aroma() -> Any:
    return trainer_runs.adapted()


def another_kind() -> Any:
    from peft import IA3Config

    return get_peft_model(
        tiny_bert(), IA3Config(task_type="SEQ_CLS", target_modules=["query"], feedforward_modules=[])
    )


def merged() -> Any:
    model = adapted()
    model.merge_adapter()
    return model


@pytest.mark.parametrize("make", [no_adapter, of_aroma, another_kind, merged], ids=lambda make: make.__name__)
def test_a_model_that_cannot_be_compressed_is_refused_before_a_step(tmp_path: Path, make: Any) -> None:
    trainer = trainer_for(tmp_path, CompressCallback(), model=make())
    with pytest.raises(ConfigError, match=r"^model="):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("column", ["size", "labels"])
def test_examples_of_which_the_trainer_makes_no_inputs_are_refused_before_a_step(tmp_path: Path, column: str) -> None:
    trainer = trainer_for(tmp_path, CompressCallback([{column: torch.tensor(1)}] * 20))
    trainer.args.remove_unused_columns = False
    with pytest.raises(ConfigError, match="data='Trainer': it makes no inputs of the model"):
        trainer.train()
    assert trainer.state.global_step == 0
