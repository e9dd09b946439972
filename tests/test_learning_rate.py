"""The learning rate that is really used is the schedule's times the re-warm-up's, and is the one that is logged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import lr_scheduler as torch_schedules
from transformers import TrainerCallback, get_scheduler

from aroma import AromaCallback, Event, attach
from aroma.matrices import GrowingMatrices
from trainer_runs import METHOD, adapted, assert_same, examples, steps_of, trainer_for

STEPS = 40
CLIMB = 3
LENGTHS = [4, 8, 2, 6, 8, 4, 8]
"""Of the inner loops: some shorter than the climb of the re-warm-up."""
RATES = (0.01, 0.004)
"""Of the components and of the head: two parameter groups."""

SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"warmup_steps": 5},
    "warmup_stable_decay": {
        "warmup_steps": 6,
        "lr_scheduler_kwargs": {"num_stable_steps": 14, "num_decay_steps": 20, "min_lr_ratio": 0.1},
    },
    "cosine_with_restarts": {"warmup_steps": 2, "lr_scheduler_kwargs": {"num_cycles": 3}},
}


@pytest.fixture
def uneven(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let the modules converge at checks of their own, so that the inner loops have LENGTHS; return the config."""
    really = GrowingMatrices.inner_values
    loop, check = -1, 0

    def scripted(matrices: GrowingMatrices, active: Any) -> Any:
        nonlocal loop, check
        loop, check = (loop + 1, 1) if active[0].checked_norm is None else (loop, check + 1)
        last = LENGTHS[loop] // METHOD["inner_check_interval"]
        norms, values = really(matrices, active)
        return norms, [0.0 if check >= 1 + index % last else 1.0 for index in range(len(values))]

    monkeypatch.setattr(GrowingMatrices, "inner_values", scripted)
    return {"rewarmup_steps": CLIMB, "outer_tolerance": None}


def assert_uneven(events: list[Event]) -> None:
    lengths = {event.outer_step: event.inner_step for event in events if event.kind == "merged"}
    assert list(lengths.values()) == LENGTHS[: len(lengths)]
    assert len(lengths) > 3
    labels = {event.step for event in events if event.converged and event.outer_step == 2}
    assert len(labels) > 1


class Recorder(TrainerCallback):
    """Notes the rates of every group at the moment of every optimizer step."""

    def __init__(self) -> None:
        self.used: list[list[float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
        optimizer.optimizer.register_step_pre_hook(self.note)

    def note(self, optimizer: Any, *_: Any) -> None:
        self.used.append([float(group["lr"]) for group in optimizer.param_groups])


def factors(events: list[Event], steps: int = STEPS, climb: int = CLIMB) -> list[float]:
    """The re-warm-up of Figure 2 from the outer steps that really happened, by the plain formula."""
    ends = sorted({event.step for event in events if event.kind in ("merged", "frozen")})
    finished = [event.step for event in events if event.kind == "finished"]
    result = []
    for done in range(steps):
        begun = [end for end in ends if end <= done]
        if not begun or (finished and done >= finished[0]):
            result.append(1.0)
        else:
            result.append(min(1.0, (done - begun[-1]) / climb))
    return result


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    head = {name for name, _ in model.named_parameters() if "classifier" in name}
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [parameter for name, parameter in named if name not in head], "lr": RATES[0]},
            {"params": [parameter for name, parameter in named if name in head], "lr": RATES[1]},
        ]
    )


def dummy_optimizer() -> torch.optim.Optimizer:
    """An optimizer of the same groups that no growth disturbs."""
    return torch.optim.AdamW([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in RATES])


def rates(optimizer: Any) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


# In the Trainer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "components"), [("linear", None), ("warmup_stable_decay", None), ("cosine_with_restarts", 4)]
)
def test_used_and_logged_in_the_trainer(tmp_path: Path, uneven: Any, name: str, components: int | None) -> None:
    options = SCHEDULES[name]
    model, events, recorder = adapted(**uneven, max_components=components), [], Recorder()
    trainer = trainer_for(
        model,
        tmp_path,
        AromaCallback(early_stop=False, on_event=events.append),
        recorder,
        more={"optimizers": (two_groups(model), None)},
        lr_scheduler_type=name,
        save_strategy="no",
        **options,
    )
    trainer.train()
    assert_uneven(events)
    assert ("finished" in {event.kind for event in events}) == (components is not None)

    optimizer = dummy_optimizer()
    kwargs = options.get("lr_scheduler_kwargs")
    schedule = get_scheduler(name, optimizer, options.get("warmup_steps", 0), STEPS, scheduler_specific_kwargs=kwargs)
    for step, factor in enumerate(factors(events)):
        assert recorder.used[step] == pytest.approx([rate * factor for rate in rates(optimizer)], rel=1e-12), step
        optimizer.step()
        schedule.step()
    logged = [entry["learning_rate"] for entry in steps_of(trainer.state.log_history)]
    assert logged == [used[0] for used in recorder.used]
    assert rates(trainer.optimizer) == rates(optimizer)
    assert trainer.lr_scheduler.get_last_lr() == schedule.get_last_lr()
    undisturbed = {key: value for key, value in schedule.state_dict().items() if key != "lr_lambdas"}
    assert_same({key: trainer.lr_scheduler.state_dict()[key] for key in undisturbed}, undisturbed)


# In a loop of one's own ----------------------------------------------------------------------------------------------


PLAIN = {
    "LambdaLR": lambda optimizer: torch_schedules.LambdaLR(optimizer, lambda step: 1 / (1 + step / 10)),
    "CosineAnnealingLR, recursive": lambda optimizer: torch_schedules.CosineAnnealingLR(optimizer, STEPS, 1e-4),
    "SequentialLR": lambda optimizer: torch_schedules.SequentialLR(
        optimizer,
        [torch_schedules.LinearLR(optimizer, 0.1, 1.0, 5), torch_schedules.CosineAnnealingLR(optimizer, STEPS - 5)],
        [5],
    ),
}


def batches() -> Iterator[dict[str, torch.Tensor]]:
    rows = examples()
    for start in range(0, STEPS * 8, 8):
        batch = [rows[index % len(rows)] for index in range(start, start + 8)]
        yield {key: torch.stack([row[key] for row in batch]) for key in batch[0]}


@pytest.mark.parametrize(("name", "accelerated"), [*((name, True) for name in PLAIN), ("LambdaLR", False)])
def test_used_and_told_in_a_plain_loop(uneven: Any, name: str, accelerated: bool) -> None:
    model, events, recorder = adapted(**uneven), [], Recorder()
    optimizer = two_groups(model)
    schedule: Any = PLAIN[name](optimizer)
    if accelerated:
        model, optimizer, schedule = Accelerator(cpu=True).prepare(model, optimizer, schedule)
    growth = attach(model, optimizer, schedule, total_steps=STEPS, on_event=events.append)
    # After AROMA's own hook, which sets the rate.
    getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(recorder.note)
    told = []
    model.train()
    for batch in batches():
        model(**batch).loss.backward()
        optimizer.step()
        told.append(list(schedule.get_last_lr()))
        schedule.step()
        optimizer.zero_grad()
    assert growth.controller.global_step == STEPS
    assert_uneven(events)

    undisturbed_optimizer = dummy_optimizer()
    undisturbed = PLAIN[name](undisturbed_optimizer)
    for step, factor in enumerate(factors(events)):
        expected = [rate * factor for rate in rates(undisturbed_optimizer)]
        assert recorder.used[step] == pytest.approx(expected, rel=1e-12), step
        undisturbed_optimizer.step()
        undisturbed.step()
    assert told == recorder.used
    assert rates(optimizer) == rates(undisturbed_optimizer)
    assert list(schedule.get_last_lr()) == list(undisturbed.get_last_lr())
