"""`attach`: a growing adapter in a training loop of one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.peft
from accelerate import Accelerator
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from aroma import AromaConfig, Event, aroma_layers, attach, save_adapter, verify_adapter
from aroma.errors import CheckpointError, ConfigError
from models import METHOD, adapted, base, batch, logits, ranks, train, trainable
from trainer_runs import assert_same

STEPS = 12


def optimizer_of(model: Any, rate: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), lr=rate)


def plain_run(model: Any, steps: int = STEPS) -> tuple[list[Event], list[float]]:
    events: list[Event] = []
    optimizer = optimizer_of(model)
    # Held by the model: a controller is gone with its optimizer, and a later save has no state of the run then.
    model.growth = attach(model, optimizer, total_steps=steps, on_event=events.append)
    return events, train(model, batch("llama"), optimizer, steps)


# Growing -------------------------------------------------------------------------------------------------------------


def test_one_call_before_the_loop_makes_it_grow() -> None:
    model, events = adapted("llama", max_components=3), []
    optimizer = optimizer_of(model)
    growth = attach(model, optimizer, total_steps=40, on_event=events.append)
    for step in range(1, 41):
        model(**batch("llama")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert growth.controller.global_step == step
        if growth.finished:
            break
    assert step < 40
    assert {event.kind for event in events} == {"checked", "merged", "frozen", "finished"}
    assert events[-1].kind == "finished"
    assert set(ranks(model).values()) == {3}
    assert growth.controller.total_rank == 3 * len(aroma_layers(model)) == events[-1].rank


def test_detached_it_trains_on_without_growing() -> None:
    model, events = adapted("llama"), []
    optimizer = optimizer_of(model)
    growth = attach(model, optimizer, total_steps=STEPS, on_event=events.append)
    train(model, batch("llama"), optimizer, 6)
    growth.detach()
    seen, steps, grown = len(events), growth.controller.global_step, growth.controller.total_rank
    used = []
    optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    before = {name: layer.pair("default")[0].detach().clone() for name, layer in aroma_layers(model).items()}
    train(model, batch("llama"), optimizer, 6)
    assert len(events) == seen
    assert (growth.controller.global_step, growth.controller.total_rank) == (steps, grown)
    assert used == [0.01] * 6, "no re-warm-up any more"
    for name, layer in aroma_layers(model).items():
        assert not torch.equal(layer.pair("default")[0], before[name])


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_for_the_sake_of_the_state_is_none(kind: Callable[..., torch.optim.Optimizer]) -> None:
    """torch takes one where an optimizer without state is read, as before a checkpoint is loaded into it."""
    model = adapted("llama", rewarmup_steps=50)
    optimizer = kind(trainable(model), lr=torch.tensor(0.01) if kind is torch.optim.AdamW else 0.01)
    taken = []
    optimizer.register_step_post_hook(lambda *_: taken.append(1))
    growth = attach(model, optimizer, total_steps=STEPS)
    get_optimizer_state_dict(model, optimizer)
    assert taken == [1]
    assert growth.controller.global_step == 0
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.01)
    train(model, batch("llama"), optimizer, 5)
    assert growth.controller.global_step == 5
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.01)


def test_accelerate_grows_alike() -> None:
    plain = adapted("llama")
    events, losses = plain_run(plain)
    model, optimizer = Accelerator(cpu=True).prepare(adapted("llama"), optimizer_of(adapted("llama")))
    with pytest.raises(ConfigError, match="does not train the pair"):
        attach(model, optimizer, total_steps=STEPS)
    model = adapted("llama")
    model, optimizer = Accelerator(cpu=True).prepare(model, optimizer_of(model))
    accelerated: list[Event] = []
    attach(model, optimizer, total_steps=STEPS, on_event=accelerated.append)
    assert train(model, batch("llama"), optimizer, STEPS) == losses
    assert accelerated == events


def test_a_step_that_a_grad_scaler_skips_is_no_step() -> None:
    model = adapted("llama")
    optimizer = optimizer_of(model)
    growth = attach(model, optimizer, total_steps=STEPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for bad in (False, True, False, True, True, False):
        scaler.scale(model(**batch("llama")).loss * (torch.inf if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert optimizer.param_groups[0]["lr"] == 0.01
    assert growth.controller.global_step == 3


# Without the wrapper of PEFT -----------------------------------------------------------------------------------------


def test_an_adapter_added_by_transformers_grows_and_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The newest transformers asks for a peft that is not out yet.
    monkeypatch.setattr(transformers.integrations.peft, "check_peft_version", lambda **_: None)
    events, losses = plain_run(adapted("llama"))
    model = base("llama")
    model.add_adapter(AromaConfig(**METHOD))
    assert plain_run(model) == (events, losses)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base("llama"), str(tmp_path))
    torch.testing.assert_close(logits(loaded, batch("llama")), logits(model, batch("llama")))
    # transformers writes the weights after the state that vouches for them.
    verify_adapter(tmp_path)
    next(iter(aroma_layers(model).values())).finished("default").storage_A.mul_(2)
    model.save_pretrained(tmp_path)
    verify_adapter(tmp_path)


# Resuming ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, 4, 6])
@pytest.mark.parametrize(
    "method", [{}, {"r": 2, "lora_alpha": 3, "inner_criterion": "update_change"}], ids=["as it comes", "awkward"]
)
def test_resumed_equals_uninterrupted(tmp_path: Path, method: dict[str, Any], step: int) -> None:
    inputs = batch("llama")

    def begin(resume: Any = None) -> tuple[Any, Any, Any, Any, list[Event]]:
        model, events = adapted("llama", **method), []
        optimizer = optimizer_of(model)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        if resume is not None:
            model.load_adapter(str(resume), "default", is_trainable=True)
            optimizer.load_state_dict(torch.load(resume / "optimizer.pt", weights_only=True))
            scheduler.load_state_dict(torch.load(resume / "scheduler.pt", weights_only=True))
        folder = str(resume) if resume is not None else None
        growth = attach(model, optimizer, scheduler, total_steps=STEPS, resume_from=folder, on_event=events.append)
        return model, optimizer, scheduler, growth, events

    def advance(run: Any, steps: int) -> list[float]:
        model, optimizer, scheduler, *_ = run
        losses = []
        for _ in range(steps):
            losses += train(model, inputs, optimizer, 1)
            scheduler.step()
        return losses

    whole = begin()
    losses = advance(whole, step)
    save_adapter(whole[0], tmp_path)
    torch.save(whole[1].state_dict(), tmp_path / "optimizer.pt")
    torch.save(whole[2].state_dict(), tmp_path / "scheduler.pt")
    passed = len(whole[4])
    losses = advance(whole, STEPS - step)

    resumed = begin(tmp_path)
    assert advance(resumed, STEPS - step) == losses
    assert resumed[4] == whole[4][passed:]
    for one, other in zip(resumed[:3], whole[:3], strict=True):
        assert_same(dict(one.state_dict()), dict(other.state_dict()))
    assert_same(resumed[3].controller.state_dict(), whole[3].controller.state_dict())


def test_there_is_no_run_to_resume_in_an_adapter_saved_without_a_controller(tmp_path: Path) -> None:
    model = adapted("llama")
    save_adapter(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"resume_from=.*saved without a controller"):
        attach(model, optimizer_of(model), total_steps=STEPS, resume_from=str(tmp_path))


def test_an_adapter_loaded_under_the_controller_stops_the_next_step(tmp_path: Path) -> None:
    model = adapted("llama")
    optimizer = optimizer_of(model)
    attach(model, optimizer, total_steps=STEPS)
    train(model, batch("llama"), optimizer, 5)
    save_adapter(model, tmp_path)
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    with pytest.raises(CheckpointError, match="load_adapter replaced the components"):
        train(model, batch("llama"), optimizer, 1)
