"""AromaCallback in the Hugging Face Trainer: growing, stopping, the best checkpoint, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from aroma import AromaCallback, Event, aroma_layers, verify_adapter
from aroma.errors import ConfigError, NonFiniteError
from aroma.tuner import live_adapter
from quick import slow_but
from trainer_runs import Run, adapted, assert_same, growth, read_events, steps_of, tiny_bert, train, trainer_for

INPUT = torch.arange(1, 33).reshape(4, 8)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=INPUT).logits


def checkpoints(out: Path) -> list[int]:
    return sorted(int(folder.name.rsplit("-", 1)[1]) for folder in out.glob("checkpoint-*"))


# Growing -------------------------------------------------------------------------------------------------------------


def test_the_adapter_grows_and_the_log_tells(tmp_path: Path) -> None:
    trainer = train(tmp_path, Run(steps=28))
    events = read_events(tmp_path / "events.jsonl")
    modules = {event["module"] for event in events}
    frozen = {event["module"] for event in events if event["kind"] == "frozen"}
    assert frozen
    assert len(frozen) < len(modules)
    ranks = {name: layer.finished("default").rank for name, layer in aroma_layers(trainer.model).items()}
    assert max(ranks.values()) > 1
    for entry in steps_of(trainer.state.log_history):
        past = [event for event in events if event["step"] <= entry["step"]]
        merged = sum(event["kind"] == "merged" for event in past)
        # What trains counts from its first step on; at the end of an inner loop the next pair is still 0.
        assert merged <= entry["total_rank"] <= merged + entry["active_modules"]
        assert entry["active_modules"] == len(modules) - sum(event["kind"] == "frozen" for event in past)


def test_gradient_accumulation_does_not_move_the_outer_steps(tmp_path: Path) -> None:
    runs = []
    for batch, accumulation in ((8, 1), (2, 4)):
        # Double precision and no dropout: the two differ in the order of sums alone.
        base = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
        events: list[Event] = []
        trainer = trainer_for(
            adapted(base),
            tmp_path,
            AromaCallback(on_event=events.append),
            max_steps=30,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            save_strategy="no",
        )
        trainer.train()
        losses = [entry["loss"] for entry in steps_of(trainer.state.log_history)]
        runs.append((losses, [(e.kind, e.step, e.outer_step, e.module, e.rank, e.converged) for e in events]))
    (losses, events_at_once), (accumulated_losses, accumulated_events) = runs
    assert accumulated_losses == pytest.approx(losses, rel=1e-6)
    assert accumulated_events == events_at_once
    assert {"checked", "merged", "frozen"} == {event[0] for event in events_at_once}


def test_a_step_that_fp16_skipped_is_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = {3, 4, 9, 10, 21}
    calls = 0
    really_step = AcceleratedOptimizer.step

    def step(self: AcceleratedOptimizer, closure: Any = None) -> None:
        nonlocal calls
        calls += 1
        self._is_overflow = calls in skipped
        if not self._is_overflow:
            really_step(self, closure)

    run = Run(steps=24, training={"save_strategy": "no", "lr_scheduler_type": "constant"})
    monkeypatch.setattr(AcceleratedOptimizer, "step", step)
    trainer = train(tmp_path, run)
    controller = growth(trainer).controller
    assert trainer.state.global_step == 24
    assert controller.global_step == 24 - len(skipped)
    events = read_events(tmp_path / "events.jsonl")
    assert {event["step"] % 2 for event in events if event["kind"] == "checked"} == {0}
    for optimizer_state in trainer.optimizer.state.values():
        assert optimizer_state["step"] <= controller.global_step
    used = [entry["learning_rate"] for entry in steps_of(trainer.state.log_history)]
    assert used.count(0.0) > 1
    assert used[8] == used[9] == used[10] == 0.01, "the re-warm-up of outer step 2 is over by then"


class OutOfMemory(Trainer):
    """Has room for batches of 4, as it finds out in a step of the second inner loop."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 10 and self._train_batch_size > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return super().training_step(*args, **kwargs)


def test_a_training_that_begins_again_with_smaller_batches_goes_on_growing(tmp_path: Path) -> None:
    """`auto_find_batch_size` keeps model and optimizer, and begins at step 0 with them."""
    trainer = trainer_for(
        adapted(), tmp_path, AromaCallback(), kind=OutOfMemory, max_steps=12, auto_find_batch_size=True
    )
    trainer.train()
    controller = growth(trainer).controller
    assert trainer._train_batch_size < 8
    assert controller.global_step == 12
    assert controller.earlier_outer_steps > 0
    verify_adapter(tmp_path / "checkpoint-12")


# Stopping ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("components", [0, 2])
def test_early_stop_saves_evaluates_and_logs_once_more(tmp_path: Path, components: int) -> None:
    limit = {"outer_tolerance": 100.0} if components == 0 else {"max_components": 2, "outer_tolerance": 1e-9}
    trainer = trainer_for(
        adapted(**limit),
        tmp_path,
        AromaCallback(),
        eval_strategy="steps",
        eval_steps=1000,
        save_steps=1000,
        logging_steps=1000,
    )
    trainer.train()
    controller = growth(trainer).controller
    end = trainer.state.global_step
    assert controller.finished
    assert controller.global_step == end < 40
    assert controller.total_rank == components * len(aroma_layers(trainer.model))
    assert checkpoints(tmp_path) == [end]
    verify_adapter(tmp_path / f"checkpoint-{end}")
    loaded = PeftModel.from_pretrained(tiny_bert(), str(tmp_path / f"checkpoint-{end}"))
    torch.testing.assert_close(logits(loaded), logits(trainer.model))
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [end]
    assert [entry["step"] for entry in steps_of(trainer.state.log_history)] == [end]


def test_without_early_stop_the_head_trains_on(tmp_path: Path) -> None:
    trainer = train(tmp_path, Run(steps=16, method={"outer_tolerance": 100.0}, early_stop=False))
    assert trainer.state.global_step == 16
    assert checkpoints(tmp_path) == [4, 8, 12, 16]
    (finished,) = [e["step"] for e in read_events(tmp_path / "events.jsonl") if e["kind"] == "finished"]
    assert finished <= 8
    then, now = (load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (8, 16))
    for name in ("base_model.model.classifier.weight", "base_model.model.classifier.bias"):
        assert not torch.equal(then.pop(name), now.pop(name))
    assert_same(then, now)


# The best checkpoint -------------------------------------------------------------------------------------------------


class Remember(TrainerCallback):
    """Copies, at one step, everything that load_best_model_at_end has to bring back."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            controller = growth_of(model)
            self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            self.controller = controller.state_dict()
            self.summary = controller.summary()
            self.logits = logits(model)
            model.train()


def growth_of(model: Any) -> Any:
    return live_adapter(model).controller


def trainer_that_keeps_the_best(
    out: Path, scores: list[float], every: int, *callbacks: TrainerCallback, limit: int | None = None, **method: Any
) -> Trainer:
    """A Trainer that is evaluated and saved every few steps, with these scores, and ends with the best checkpoint."""
    each = iter(scores)
    return trainer_for(
        adapted(**method),
        out,
        AromaCallback(),
        *callbacks,
        more={"compute_metrics": lambda _: {"score": next(each)}},
        save_steps=every,
        eval_steps=every,
        eval_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="score",
        save_total_limit=limit,
    )


@pytest.mark.parametrize("criterion", slow_but(["norm_change"], ["norm_change", "update_change"]))
def test_the_best_checkpoint_comes_back_whole(tmp_path: Path, criterion: str) -> None:
    best = Remember(step=18)
    scores = [0.1, 0.2, 0.9, 0.3, 0.2, 0.1, 0.8]
    trainer = trainer_that_keeps_the_best(tmp_path, scores, 6, best, limit=2, inner_criterion=criterion, lora_alpha=3)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-18")
    controller = growth(trainer).controller
    assert_same(controller.state_dict(), best.controller)
    assert controller.summary() == best.summary
    assert_same(dict(trainer.model.state_dict()), best.weights)
    assert_same(logits(trainer.model), best.logits)
    # The test would prove nothing if nothing had happened after the best, or no flag were set at it.
    assert trainer.state.log_history[-2]["step"] == 40
    states = {summary.state for summary in best.summary}
    assert "frozen" in states
    if criterion == "norm_change":
        assert states == {"training", "converged", "frozen"}

    trainer.save_model(str(tmp_path / "final"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "final" / name).read_bytes() == (tmp_path / "checkpoint-18" / name).read_bytes()
    assert verify_adapter(tmp_path / "final")["modules"] == verify_adapter(tmp_path / "checkpoint-18")["modules"]


def test_a_module_that_finished_after_the_best_trains_again(tmp_path: Path) -> None:
    trainer = trainer_that_keeps_the_best(tmp_path, [0.9, 0.1], 2, outer_tolerance=100.0)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    controller = growth(trainer).controller
    assert controller.global_step == 2
    assert not controller.finished
    assert all(parameter.requires_grad for layer in controller.modules for parameter in layer.layer.pair("default"))


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [tiny_bert, lambda: get_peft_model(tiny_bert(), LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))],
    ids=["no adapter", "plain LoRA"],
)
def test_a_model_without_a_growing_adapter_is_refused_at_construction(tmp_path: Path, model: Any) -> None:
    with pytest.raises(ConfigError, match=r"^model='.*no trainable AROMA adapter.*get_peft_model"):
        trainer_for(model(), tmp_path, AromaCallback())


# NaN and infinity ----------------------------------------------------------------------------------------------------


def bad_loss_at(step: int, value: float) -> type[Trainer]:
    class BadLoss(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            result = super().compute_loss(*args, **kwargs)
            if self.model.training and self.state.global_step == step - 1:
                return result * value if isinstance(result, torch.Tensor) else (result[0] * value, result[1])
            return result

    return BadLoss


def assert_only_good_checkpoints(out: Path, expected: list[int]) -> None:
    assert checkpoints(out) == expected
    for step in expected:
        verify_adapter(out / f"checkpoint-{step}")
        loaded = PeftModel.from_pretrained(tiny_bert(), str(out / f"checkpoint-{step}"))
        assert torch.isfinite(logits(loaded)).all()


@pytest.mark.parametrize("value", slow_but([math.nan], [math.nan, math.inf]))
@pytest.mark.parametrize(
    ("save_steps", "found_at", "left"),
    [(4, 6, [4]), (5, 5, []), (3, 6, [3])],
    ids=["at a check", "at a save before the check", "at a save with a check"],
)
def test_a_bad_loss_stops_the_training(
    tmp_path: Path, value: float, save_steps: int, found_at: int, left: list[int]
) -> None:
    trainer = trainer_for(
        adapted(inner_tolerance=1e-9),
        tmp_path,
        AromaCallback(),
        kind=bad_loss_at(5, value),
        save_steps=save_steps,
        logging_steps=100,  # nothing is logged before
    )
    with pytest.raises(NonFiniteError, match=rf"bert\.\S+: .*not finite.*optimizer step {found_at} .*last one"):
        trainer.train()
    assert_only_good_checkpoints(tmp_path, left)
