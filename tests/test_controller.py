"""The state machine of Algorithm 1, driven by hand: every component is put where the test wants it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from aroma import AromaConfig, AromaController, Event, aroma_layers
from aroma.errors import NonFiniteError, ResetError
from models import trainable

M, N = 6, 5
WEIGHT_NORM = 10.0

METHOD: dict[str, Any] = {
    "target_modules": ["first", "second", "third"],
    "inner_check_interval": 1,
    "inner_tolerance": 0.1,
    "max_inner_steps": 4,
    "outer_tolerance": 0.5,
    "lora_alpha": 1,
    "rewarmup_steps": 2,
    "component_seed": 3,
}


class Net(nn.Module):
    """Three parallel maps of equal shape whose weights have norm 10."""

    def __init__(self) -> None:
        super().__init__()
        for name in METHOD["target_modules"]:
            layer = nn.Linear(N, M, bias=False, dtype=torch.float64)
            layer.weight.data *= WEIGHT_NORM / torch.linalg.norm(layer.weight.data)
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: module(x) for name, module in self.named_children()}


class Bench:
    """A controller whose modules are set by hand; its optimizer never steps unless asked."""

    def __init__(self, **changes: Any) -> None:
        self.model = get_peft_model(Net(), AromaConfig(**{**METHOD, **changes}))
        self.layers = aroma_layers(self.model)
        self.optimizer = torch.optim.AdamW(trainable(self.model), lr=0.1)
        self.controller = AromaController(self.model, self.optimizer, total_steps=100)
        self.events: list[Event] = []
        self.controller.subscribe(self.events.append)

    def put(self, *norms: float, turned: bool = False) -> None:
        """Give the components the norms ‖b a‖; `turned`: another direction, of the same norm."""
        for layer, norm in zip(self.layers.values(), norms, strict=True):
            if not layer.is_frozen("default"):
                b, a = torch.zeros(M, 1).double(), torch.zeros(1, N).double()
                b[int(turned), 0], a[0, int(turned)] = norm, 1
                layer.start_pair("default", a, b)

    def step(self, *norms: float, turned: bool = False) -> list[tuple[str, str | None, bool]]:
        """Take a step after which the components have these norms; return kind, module and label of its events."""
        self.put(*norms, turned=turned)
        return [(event.kind, event.module, event.converged) for event in self.controller.step()]

    def labels(self) -> list[bool]:
        return [module.converged for module in self.controller.modules]

    def ranks(self) -> list[int]:
        return [layer.finished("default").rank for layer in self.layers.values()]

    def frozen(self) -> list[bool]:
        return [layer.is_frozen("default") for layer in self.layers.values()]


def of_kind(events: list[Event], kind: str) -> list[Event]:
    return [event for event in events if event.kind == kind]


# The inner loop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tolerance", "earlier", "now", "value", "label"),
    [
        (0.1, 0.0, 0.0, None, False),
        (0.5, 1.0, 1.5, 0.5, False),
        (0.5, 1.0, 1.5 - 1e-9, 0.5, True),
        (0.1, 1.0, 0.2, -0.8, True),
    ],
    ids=["unmoved", "at the tolerance", "below it", "shrinking"],
)
def test_the_inner_check(tolerance: float, earlier: float, now: float, value: float | None, label: bool) -> None:
    bench = Bench(inner_tolerance=tolerance)
    bench.step(earlier, 1.0, 1.0)
    assert [(event.value, event.converged) for event in bench.events] == [(None, False)] * 3
    bench.step(now, 2.0, 2.0)
    assert bench.events[3].value == (None if value is None else pytest.approx(value))
    assert bench.labels() == [label, False, False]


@pytest.mark.parametrize(("criterion", "label"), [("norm_change", True), ("update_change", False)])
def test_the_criteria_differ_where_a_component_turns(criterion: str, label: bool) -> None:
    bench = Bench(inner_criterion=criterion, max_inner_steps=9)
    bench.step(1.0, 1.0, 1.0)
    bench.step(1.0, 1.0, 1.0, turned=True)
    assert bench.events[3].value == pytest.approx(0.0 if label else 2**0.5)
    assert of_kind(bench.events, "checked")[3].converged == label


# The outer check -----------------------------------------------------------------------------------------------------


def test_a_component_below_the_tolerance_is_dropped_and_its_module_frozen() -> None:
    bench = Bench()
    bench.put(5.0, 5.0 - 1e-9, 20.0)
    bench.controller.outer_step()
    assert [(event.kind, event.module, event.rank) for event in bench.events] == [
        ("merged", "first", 1),
        ("frozen", "second", 0),
        ("merged", "third", 1),
    ]
    assert [event.value for event in bench.events] == pytest.approx([0.5, 0.5, 2.0])
    assert bench.controller.active_modules == 2
    assert bench.controller.total_rank == 2
    b, a = bench.layers["second"].pair("default")
    assert not b.any()
    assert not a.any()
    assert not b.requires_grad
    assert not a.requires_grad


# Merging, and beginning anew -----------------------------------------------------------------------------------------


def train(bench: Bench, steps: int) -> None:
    """Steps of the optimizer on a made-up loss, which the controller does not see."""
    x = torch.randn(8, N, dtype=torch.float64)
    for _ in range(steps):
        sum(output.square().sum() for output in bench.model(x).values()).backward()
        bench.optimizer.step()
        bench.optimizer.zero_grad()


def test_finished_it_counts_steps_and_does_nothing_more() -> None:
    bench = Bench()
    bench.put(0.0, 0.0, 0.0)
    bench.controller.outer_step()
    assert bench.controller.finished
    assert bench.events[-1] == Event("finished", 0, 1, 0, None, None, 0, True)
    seen = len(bench.events)
    for _ in range(10):
        assert bench.controller.step() == []
        assert bench.controller.lr_factor == 1.0
    assert bench.controller.global_step == 10
    assert bench.controller.active_modules == 0
    assert len(bench.events) == seen


def test_the_summary() -> None:
    bench = Bench(max_inner_steps=50)
    bench.put(20.0, 1.0, 20.0)
    bench.controller.outer_step()
    bench.step(1.0, 0.0, 1.0)
    bench.step(1.01, 0.0, 3.0, turned=True)
    first, second, third = bench.controller.summary()
    assert (first.name, first.rank, first.state) == ("first", 2, "converged")
    assert (second.name, second.rank, second.effective_rank, second.state) == ("second", 0, 0.0, "frozen")
    assert (third.name, third.rank, third.state) == ("third", 2, "training")
    assert (first.inner_value, first.outer_value) == pytest.approx((0.01, 2.0))
    assert (second.inner_value, second.outer_value) == (None, pytest.approx(0.1))
    assert 1 < third.effective_rank < 2
    assert bench.controller.total_rank == 2 + 0 + 2, "as the summary says, the pair in training included"


def test_frozen_pairs_that_stay_in_the_graph_stay_at_zero_after_detaching() -> None:
    bench = Bench()
    controller = AromaController(bench.model, bench.optimizer, total_steps=100, compiled=True)
    train(bench, 3)
    bench.put(0.0, 0.0, 0.0)
    controller.outer_step()
    assert controller.finished
    controller.detach()
    train(bench, 2)
    for layer in bench.layers.values():
        assert all(parameter.requires_grad and not parameter.any() for parameter in layer.pair("default"))


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_component_that_is_not_finite_is_named_at_a_check(value: float) -> None:
    bench = Bench()
    bench.step(1.0, 1.0, 1.0)
    bench.put(1.0, value, 1.0)
    message = r"^second: .*inner check of optimizer step 2 \(outer step 1, inner step 2\)"
    with pytest.raises(NonFiniteError, match=message):
        bench.controller.step()
    with pytest.raises(NonFiniteError, match=r"^second: .*outer check"):
        bench.controller.outer_step()
    with pytest.raises(NonFiniteError, match=r"^second: .*save check"):
        bench.controller.require_finite()
    assert bench.ranks() == [0, 0, 0], "nothing was merged"


def test_an_optimizer_whose_state_is_unknown_is_refused_at_the_first_step() -> None:
    bench = Bench()
    train(bench, 1)
    bench.optimizer.state[bench.layers["first"].pair("default")[0]]["mask"] = torch.zeros(2, 1)
    message = r"optimizer=AdamW: .*'mask' of shape \(2, 1\).*AdamW, or reset='none', which leaves it alone"
    with pytest.raises(ResetError, match=message):
        bench.controller.step()


# Cost ----------------------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Counts what makes the host wait for the device, and notes the size of the largest tensor that is newly made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.syncs = 0
        self.largest = 0
        # tolist reads the memory of a CPU tensor without a call that a dispatch mode could see.
        really_tolist = Tensor.tolist
        monkeypatch.setattr(Tensor, "tolist", lambda tensor: self._count(really_tolist(tensor)))

    def _count(self, result: Any) -> Any:
        self.syncs += 1
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self.syncs += 1
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors([args, list((kwargs or {}).values())])}
        made = [tensor for tensor in tensors(result) if tensor.untyped_storage().data_ptr() not in given]
        self.largest = max([self.largest, *(tensor.numel() for tensor in made)])
        return result


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part)


WIDE, SQUARE, COMPONENTS = 1024, 512, 5


def wide(**changes: Any) -> tuple[nn.Module, AromaController]:
    """Modules of two shapes, with some finished components; m n is a hundred times (m + n) R."""
    net = nn.ModuleDict(
        {
            "wide": nn.Linear(SQUARE, WIDE, bias=False),
            "square": nn.Linear(SQUARE, SQUARE, bias=False),
            "other": nn.Linear(SQUARE, WIDE, bias=False),
        }
    )
    config = AromaConfig(**{**METHOD, "target_modules": list(net), "outer_tolerance": None, **changes})
    model = get_peft_model(net, config)
    controller = AromaController(model, torch.optim.AdamW(trainable(model)), total_steps=100)
    for _ in range(COMPONENTS):
        shake(controller)
        controller.outer_step()
    shake(controller)
    return model, controller


def shake(controller: AromaController) -> None:
    for module in controller.modules:
        for parameter in module.layer.pair("default"):
            parameter.data += torch.randn_like(parameter)


@pytest.mark.parametrize("criterion", ["norm_change", "update_change"])
@pytest.mark.parametrize("r", [1, 4])
def test_a_check_costs_one_sync_and_no_matrix(monkeypatch: pytest.MonkeyPatch, criterion: str, r: int) -> None:
    _, controller = wide(inner_criterion=criterion, r=r)
    controller.step()
    shake(controller)
    with Watch(monkeypatch) as watch:
        events = controller.step()
    assert [event.kind for event in events] == ["checked"] * 3
    assert all(event.value is not None for event in events)
    assert watch.syncs == 1
    assert watch.largest <= 2 * (2 * WIDE * r), "the two modules of one shape, stacked"


@pytest.mark.parametrize("outer_tolerance", [1e-9, 1e9], ids=["merging", "freezing"])
def test_an_outer_step_makes_no_matrix(monkeypatch: pytest.MonkeyPatch, outer_tolerance: float) -> None:
    _, controller = wide(min_components=COMPONENTS, outer_tolerance=outer_tolerance)
    with Watch(monkeypatch) as watch:
        controller.outer_step()
    assert controller.finished == (outer_tolerance > 1)
    # Blocks of the weight are read in float64.
    assert watch.largest <= WIDE * SQUARE / 8
