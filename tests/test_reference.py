"""The controller against Algorithm 1 in paper notation, over whole runs: ranks, labels, events, ΔW, losses."""

from __future__ import annotations

from dataclasses import asdict, astuple
from functools import partial

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from aroma import AromaConfig, Event, aroma_layers, attach
from reference import ReferenceAroma, Settings

SHAPES = {"still": (12, 9), "one": (10, 14), "two": (16, 8), "many": (18, 20), "up": (24, 7), "down": (5, 24)}
TRUE_RANK = {"still": 0, "one": 1, "two": 2, "many": 5}
"""Rank of the update each module has to learn: modules that need different numbers of components."""


class Net(nn.Module):
    """Four modules with a regression each, and two in a chain."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        for name, (m, n) in SHAPES.items():
            layer = nn.Linear(n, m, bias=False)
            layer.weight = nn.Parameter(draw(m, n))
            self.add_module(name, layer)
        self.inputs = {name: draw(40, n) for name, (_, n) in SHAPES.items()}
        self.targets = {name: self.inputs[name] @ self.goal(name, draw).T for name in TRUE_RANK}
        self.targets["chain"] = draw(40, 5)
        self.to(dtype)
        self.inputs = {name: tensor.to(dtype) for name, tensor in self.inputs.items()}
        self.targets = {name: tensor.to(dtype) for name, tensor in self.targets.items()}

    def goal(self, name: str, draw: partial[Tensor]) -> Tensor:
        m, n = SHAPES[name]
        rank = TRUE_RANK[name]
        weight: Tensor = self.get_submodule(name).weight.detach()  # type: ignore[assignment]
        return weight + draw(m, rank) @ draw(rank, n)

    def forward(self) -> Tensor:
        return self.loss({name: self.get_submodule(name) for name in SHAPES})

    def loss(self, maps: dict) -> Tensor:
        """The loss where module `name` maps its input by `maps[name]`."""
        parts = [mse_loss(maps[name](self.inputs[name]), self.targets[name]) for name in TRUE_RANK]
        chained = maps["down"](torch.tanh(maps["up"](self.inputs["up"])))
        return sum(parts) + mse_loss(chained, self.targets["chain"])

    def reference_loss(self, weights: dict[str, Tensor], step: int) -> Tensor:
        return self.loss({name: partial(torch.nn.functional.linear, weight=W) for name, W in weights.items()})


def learning_rate(peak: float, total: int, step: int) -> float:
    """Linear warm-up of ten steps, then linear decay to a tenth."""
    return peak * min((step + 1) / 10, 1.0) * (1 - 0.9 * step / total)


RUNS = {
    "paper": {},
    "rank 3": {"r": 3, "lora_alpha": 5},
    "update_change": {"inner_criterion": "update_change", "inner_tolerance": 0.3},
    "update_change of rank 2": {"inner_criterion": "update_change", "inner_tolerance": 0.3, "r": 2},
    "zero": {"reset": "zero"},
    "no reset": {"reset": "none"},
    "no re-warm-up": {"rewarmup_steps": 0},
    "at least two": {"min_components": 2},
    "at most two": {"max_components": 2},
    "ReLoRA": {"inner_tolerance": None, "outer_tolerance": None, "max_components": 3},
    "no inner checks": {"inner_tolerance": None},
}


def settings_of(**changes: object) -> Settings:
    defaults = {
        "max_inner_steps": 40,
        "inner_check_interval": 5,
        "inner_tolerance": 0.1,
        "outer_tolerance": 0.1,
        "rewarmup_steps": 6,
        "lora_alpha": 2,
        "component_seed": 3,
    }
    return Settings(**{**defaults, **changes})  # type: ignore[arg-type]


def run_both(settings: Settings, total: int, dtype: torch.dtype, make_optimizer, peak: float):
    """Train the same net by the reference and by the library; return the reference, our model, events and losses."""
    net = Net(dtype)
    weights = {name: net.get_submodule(name).weight.detach().clone() for name in SHAPES}
    rate = partial(learning_rate, peak, total)
    reference = ReferenceAroma(weights, settings, make_optimizer).train(net.reference_loss, total, rate)

    model = get_peft_model(net, AromaConfig(target_modules=list(SHAPES), **asdict(settings)))
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    events: list[Event] = []
    losses: list[float] = []
    growth = attach(model, optimizer, scheduler, total_steps=total, on_event=events.append)
    while len(losses) < total and not growth.finished:
        loss = model()
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return reference, model, growth.controller, events, losses


def assert_equal_runs(reference: ReferenceAroma, model, controller, events: list[Event], losses: list[float], tol):
    assert [tuple_without_value(astuple(event)[:8]) for event in events] == [
        tuple_without_value(event) for event in reference.events
    ]
    for ours, theirs in zip(events, reference.events, strict=True):
        assert (ours.value is None) == (theirs[5] is None)
        assert ours.value is None or ours.value == pytest.approx(theirs[5], rel=tol, abs=tol)
    summary = {module.name: module for module in controller.summary()}
    assert {name: module.state for name, module in summary.items()} == reference.states()
    for name, layer in aroma_layers(model, "default").items():
        torch.testing.assert_close(layer.get_delta_weight("default"), reference.updates()[name], rtol=0, atol=1e-5)
    assert losses == pytest.approx(reference.losses, rel=tol)
    assert controller.finished == reference.finished


def tuple_without_value(event: tuple) -> tuple:
    return event[:5] + event[6:]


def adamw(parameters):
    return torch.optim.AdamW(parameters, weight_decay=0.01)


def sgd(parameters):
    return torch.optim.SGD(parameters, momentum=0.9, lr=1.0)


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS.keys())
def test_equal_to_the_reference_over_a_whole_run(changes: dict) -> None:
    settings = settings_of(**changes)
    runs = run_both(settings, 330, torch.float64, adamw, peak=0.05)
    assert_equal_runs(*runs, tol=1e-5)
    assert sum(runs[0].ranks().values()) > 4, "a run without growth proves nothing"


def test_modules_finish_at_different_outer_steps_and_one_at_rank_0() -> None:
    reference, model, controller, events, losses = run_both(settings_of(), 500, torch.float64, adamw, peak=0.05)
    assert_equal_runs(reference, model, controller, events, losses, tol=1e-5)
    frozen = {event.module: event.outer_step for event in events if event.kind == "frozen"}
    assert frozen["still"] == 1
    assert len(set(frozen.values())) >= 3
    assert reference.ranks()["still"] == 0
    assert len(set(reference.ranks().values())) >= 3


@pytest.mark.parametrize("total", [61, 77, 118])
def test_the_end_inside_an_inner_loop_keeps_the_component_in_training(total: int) -> None:
    reference, model, controller, events, losses = run_both(settings_of(), total, torch.float64, adamw, peak=0.05)
    assert controller.inner_step not in (0, 40), "the run is meant to end inside an inner loop"
    assert_equal_runs(reference, model, controller, events, losses, tol=1e-5)
    training = [module for module in controller.summary() if module.state != "frozen"]
    assert all(module.rank == reference.ranks()[module.name] + 1 for module in training)


def test_momentum_sgd_equals_the_reference() -> None:
    assert_equal_runs(*run_both(settings_of(reset="zero"), 200, torch.float64, sgd, peak=2e-3), tol=1e-5)


@pytest.mark.parametrize("criterion", ["norm_change", "update_change"])
def test_single_precision_stays_within_1e_5(criterion: str) -> None:
    settings = settings_of(inner_criterion=criterion, reset="zero")
    runs = run_both(settings, 90, torch.float32, partial(torch.optim.SGD, momentum=0.9, lr=1.0), peak=2e-3)
    assert_equal_runs(*runs, tol=1e-3)


def test_the_comparison_can_fail() -> None:
    settings = settings_of()
    reference, *_ = run_both(settings, 120, torch.float64, adamw, peak=0.05)
    _, *ours = run_both(settings_of(component_seed=4), 120, torch.float64, adamw, peak=0.05)
    with pytest.raises(AssertionError):
        assert_equal_runs(reference, *ours, tol=1e-5)
