"""Reinit & Reset on real optimizers after real steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.optimization import Adafactor as TransformersAdafactor

from aroma.errors import ResetError
from aroma.reset import check_resettable, component_generator, fresh_component, reset_state

RESET_KINDS = ("prune", "zero", "none")

SHAPES = [(1, 5000), (600, 1), (8, 700), (3, 40)]
"""Pairs of rank 1, 8 and 3; bitsandbytes keeps 8-bit states from 4096 elements on."""

OPTIMIZERS: dict[str, Callable[[list], Any]] = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Adamax": torch.optim.Adamax,
    "Adadelta": torch.optim.Adadelta,
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9),
    "Adagrad": torch.optim.Adagrad,
    "Adafactor": torch.optim.Adafactor,
    "Adafactor (transformers)": TransformersAdafactor,
    "Adafactor (transformers, first moment)": lambda p: TransformersAdafactor(
        p, lr=1e-3, relative_step=False, beta1=0.9
    ),
    "AdamW8bit": bitsandbytes.optim.AdamW8bit,
    "AdamW32bit": bitsandbytes.optim.AdamW32bit,
    "Lion8bit": bitsandbytes.optim.Lion8bit,
}

MOMENTS = {  # how many moments each keeps; factors of a factored one count singly
    "SGD": 0,
    "SGD momentum": 1,
    "Adagrad": 1,
    "Lion8bit": 1,
    "AdamW amsgrad": 3,
    "Adafactor (transformers, first moment)": 3,
}


@pytest.fixture(params=list(OPTIMIZERS), ids=str)
def optimizer_name(request: pytest.FixtureRequest) -> str:
    return request.param


def trained(name: str, steps: int = 3) -> tuple[Any, list[nn.Parameter]]:
    """Return an optimizer after real steps, and its parameters: one of each shape, then a bystander of each."""
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES * 2]
    optimizer = OPTIMIZERS[name](params)
    for _ in range(steps):
        step(optimizer, params)
    return optimizer, params


def step(optimizer: Any, params: list[nn.Parameter], seed: int | None = None) -> None:
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) + 0.1
    optimizer.step()
    optimizer.zero_grad()


def snapshot(optimizer: Any, params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [copy.deepcopy(optimizer.state.get(param, {})) for param in params]


def assert_same_bits(before: Any, after: Any) -> None:
    assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def moments(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield every moment by name as the optimizer sees it, i.e. an 8-bit one dequantized by bitsandbytes."""
    for key, value in state.items():
        if key in ("step", "mu_product", "RMS") or key.startswith(("qmap", "absmax")):
            continue
        if value.dtype == torch.uint8:
            number = key.removeprefix("state")
            yield (
                key,
                bitsandbytes.functional.dequantize_blockwise(
                    value, absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=256
                ),
            )
        else:
            yield key, value


def reset_first_half(
    optimizer: Any, params: list[nn.Parameter], kind: str, ratio: float = 0.999, seed: int = 5
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params[: len(SHAPES)]:
        reset_state(optimizer, param, kind, ratio, generator)


# Every optimizer, every kind -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RESET_KINDS)
def test_parameters_that_are_not_reset_keep_their_state_bit_for_bit(optimizer_name: str, kind: str) -> None:
    optimizer, params = trained(optimizer_name)
    before, values = snapshot(optimizer, params), copy.deepcopy(params)
    reset_first_half(optimizer, params, kind)
    after = snapshot(optimizer, params)
    assert_same_bits(before[len(SHAPES) :], after[len(SHAPES) :])
    assert_same_bits(values, params)
    if kind == "none":
        assert_same_bits(before, after)


def test_prune_zeroes_most_entries_and_keeps_the_rest_and_the_step(optimizer_name: str) -> None:
    optimizer, params = trained(optimizer_name)
    before = snapshot(optimizer, params)
    reset_first_half(optimizer, params, "prune", ratio=0.75)
    for param, old in zip(params[: len(SHAPES)], before, strict=False):
        state = optimizer.state.get(param, {})
        assert state.keys() == old.keys()
        assert_same_bits(old.get("step", 3), state.get("step", 3))
        assert_same_bits(old.get("mu_product", 3), state.get("mu_product", 3))
        old_moments = dict(moments(old))
        assert len(old_moments) == MOMENTS.get(optimizer_name, 2)
        for key, moment in moments(state):
            kept = moment != 0
            assert_same_bits(old_moments[key][kept], moment[kept])
            alive = int((old_moments[key] != 0).sum())
            deviations = (int(kept.sum()) - 0.25 * alive) / math.sqrt(alive * 0.25 * 0.75)
            assert abs(deviations) < 5, f"{key} of {tuple(param.shape)}: {int(kept.sum())} of {alive} kept"


def test_zero_makes_the_next_steps_those_of_a_new_parameter(optimizer_name: str) -> None:
    optimizer, params = trained(optimizer_name)
    reset_first_half(optimizer, params, "zero")
    count = len(SHAPES)
    new_params = copy.deepcopy(params[:count])
    new_optimizer = OPTIMIZERS[optimizer_name](new_params)
    before = copy.deepcopy(params[:count])
    for seed in (3, 4):
        step(optimizer, params[:count], seed)
        step(new_optimizer, new_params, seed)
    for old, param, new in zip(before, params, new_params, strict=False):
        assert not torch.equal(old, param)
        assert_close(param, new, rtol=1e-6, atol=1e-7)


# Particular optimizers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gradient", "most"), [("zero", 1.5), ("fresh", 3.5)])
def test_no_update_after_a_pruning_is_many_times_the_learning_rate(gradient: str, most: float) -> None:
    # While b is 0 the gradient of a is 0: a first moment without its second one would move a by lr · m / eps.
    param = nn.Parameter(torch.randn(64, 768))
    optimizer = torch.optim.AdamW([param], lr=1e-3, weight_decay=0.0)
    for _ in range(50):
        step(optimizer, [param])
    reset_state(optimizer, param, "prune", 0.999, torch.Generator().manual_seed(0))
    before = param.detach().clone()
    param.grad = torch.zeros_like(param) if gradient == "zero" else torch.randn_like(param)
    optimizer.step()
    assert float((param.detach() - before).abs().max()) < most * 1e-3


def test_eight_bit_moments_are_pruned_by_code_not_by_a_zero_byte() -> None:
    optimizer, params = trained("AdamW8bit")
    state = optimizer.state[params[0]]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    qmaps = [state["qmap1"].clone(), state["qmap2"].clone()]
    assert qmaps[0][0] != 0, "in the signed map, byte 0 is the most negative value"
    for kind in ("prune", "zero"):
        reset_state(optimizer, params[0], kind, 1.0, torch.Generator())
        assert (qmaps[0][state["state1"].long()] == 0).all()
        assert (qmaps[1][state["state2"].long()] == 0).all()
    assert_same_bits(qmaps, [state["qmap1"], state["qmap2"]])  # shared by all parameters
    assert not state["absmax1"].any()
    assert not state["absmax2"].any()


# Refusals ------------------------------------------------------------------------------------------------------------


class Strange(torch.optim.Optimizer):
    """Keeps Adam's moments and whatever else it is told to."""

    def __init__(self, params: list, extra: dict[str, Any]) -> None:
        super().__init__(params, {})
        for param in params:
            known = {"step": 7, "exp_avg": torch.ones_like(param), "exp_avg_sq": torch.ones_like(param)}
            self.state[param] = {**known, **extra}


@pytest.mark.parametrize("kind", ["prune", "zero", "none"])
def test_other_weights_than_the_parameter_are_refused_whatever_the_reset(kind: str) -> None:
    """Schedule-free methods draw the parameter towards them."""
    param = nn.Parameter(torch.randn(3, 5))
    with pytest.raises(ResetError, match=r"^optimizer=Strange: it keeps other weights of a parameter, \['z'\]"):
        check_resettable(Strange([param], {"z": torch.ones(3, 5)}), param, kind)


CODES = {"state1": torch.ones(3, 5, dtype=torch.uint8), "qmap1": torch.linspace(-1, 1, 255)}
REFUSED = {
    "an object": ({"projector": object()}, ["'projector'", "type object"]),
    "another shape": ({"exp_avg": torch.ones(5, 3)}, ["'exp_avg'", "shape (5, 3)", "(3, 5)"]),
    "no block scales": (CODES, ["'state1'"]),
}


@pytest.mark.parametrize(("extra", "words"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("kind", ["prune", "zero"])
def test_strange_state_is_refused_before_anything_is_modified(extra: dict, words: list, kind: str) -> None:
    param = nn.Parameter(torch.randn(3, 5))
    optimizer = Strange([param], extra)
    before = {
        key: value.clone() if isinstance(value, Tensor) else value for key, value in optimizer.state[param].items()
    }
    generator = torch.Generator().manual_seed(0)
    drawn = generator.get_state()
    with pytest.raises(ResetError) as refusal:
        reset_state(optimizer, param, kind, 0.999, generator)
    for word in ["Strange", "reset='none'", "another optimizer", *words]:
        assert word in str(refusal.value)
    for key, value in before.items():
        now = optimizer.state[param][key]
        assert torch.equal(now, value) if isinstance(value, Tensor) else now is value
    assert torch.equal(generator.get_state(), drawn)
    with pytest.raises(ResetError):
        check_resettable(optimizer, param, kind)
    reset_state(optimizer, param, "none", 0.999, generator)  # the remedy that the message names


def test_a_step_count_of_the_whole_group_cannot_be_zeroed_for_one_parameter() -> None:
    param = nn.Parameter(torch.randn(3, 5))
    optimizer = Strange([param], {})
    del optimizer.state[param]["step"]
    optimizer.param_groups[0]["step"] = 7
    with pytest.raises(ResetError, match=r"Strange: it counts the steps of many.*reset='prune'"):
        reset_state(optimizer, param, "zero", 0.999, torch.Generator())
    assert optimizer.state[param]["exp_avg"].all()
    reset_state(optimizer, param, "prune", 1.0, torch.Generator())
    assert not optimizer.state[param]["exp_avg"].any()


# Random draws --------------------------------------------------------------------------------------------------------


def test_generators_are_the_same_in_every_process_and_release() -> None:
    assert component_generator(42, 1, 0, "fresh").initial_seed() == 9190238854156502875
    assert component_generator(2**64 - 1, 10**6, 10**4, "reset").initial_seed() == 7942744762921005877


def test_fresh_component_is_torchs_kaiming_uniform() -> None:
    expected = torch.empty(3, 50)
    nn.init.kaiming_uniform_(expected, a=math.sqrt(5), generator=component_generator(7, 2, 4, "fresh"))
    assert_close(fresh_component(7, 2, 4, (3, 50)), expected)
