"""What PyTorch and PEFT promise of any layer, and ours must keep: it is one node, but nobody needs to know."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.pytorch_utils import Conv1D

from aroma import AromaConfig, aroma_layers
from aroma.tuner import AromaLinear
from test_fused import FOLDED, M, N, answer, assert_same, composed, folding, grown

SHAPES = [(4, N), (2, 3, N)]


def seeded(layer: AromaLinear, function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor | None]:
    torch.manual_seed(6)
    return answer(function, layer, x)


def assert_equal(one: list[Tensor | None], other: list[Tensor | None]) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# Its output belongs to the caller ------------------------------------------------------------------------------------

WRITES: dict[str, Callable[[Tensor], Any]] = {
    "relu": F.relu_,
    "divide": lambda y: y.div_(2),
    "clamp": lambda y: y.clamp_(-1, 1),
    "a view of it": lambda y: y.view(-1, 1, M).transpose(0, 1).mul_(3),
}


@pytest.mark.parametrize("folded", FOLDED)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (N,)])
@pytest.mark.parametrize("write", WRITES)
def test_the_output_may_be_written_to(write: str, shape: tuple[int, ...], frozen: bool, folded: bool) -> None:
    layer = grown(nn.Linear(N, M), 3, frozen)
    x = torch.randn(shape, requires_grad=True)

    def then_written(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            y = function(x)
            WRITES[write](y)
            return y

        return run

    with folding(folded):
        mine = answer(then_written(layer), layer, x)
        theirs = answer(then_written(lambda x: composed(layer, x)), layer, x)
        assert_equal(mine, theirs)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(then_written(layer)(x), theirs[0], rtol=1e-5, atol=1e-5)


# Half-precision bases ------------------------------------------------------------------------------------------------


def over_half(base: nn.Module, dtype: torch.dtype) -> AromaLinear:
    """Return a growing layer of rank 0 with a random pair over a base that was of half precision before."""
    model = get_peft_model(nn.Sequential(base).to(dtype), AromaConfig(target_modules=["0"], max_inner_steps=10))
    layer = aroma_layers(model)["0"]
    b, a = layer.pair("default")
    torch.manual_seed(3)
    layer.start_pair("default", torch.randn_like(a), torch.randn_like(b))
    return layer


@pytest.mark.parametrize("base", [nn.Linear(N, M), Conv1D(M, N)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_first_component_over_a_half_base_is_computed_like_all_others(base: nn.Module, dtype: torch.dtype) -> None:
    layer = over_half(base, dtype)
    finished = layer.finished("default")
    assert finished.storage_A.dtype == finished.storage_B.dtype == layer.pair("default")[1].dtype == torch.float32
    x = torch.randn(4, N, dtype=dtype)
    before = layer(x)
    for looked_into in (composed(layer, x), torch.func.vmap(layer)(x), compiled(layer)(x)):
        torch.testing.assert_close(looked_into, before, rtol=2**-7, atol=2**-7)
    layer.merge_pair("default")
    layer.start_pair("default", torch.zeros(1, N))
    torch.testing.assert_close(layer(x), before, rtol=2**-7, atol=2**-7)


# Base layers that are not what they seem -----------------------------------------------------------------------------


class Tanh(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


class Centred(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-2, keepdim=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [Tanh, Centred])
def test_a_derived_layer_is_called_as_it_is_and_its_result_left_alone(
    kind: type[nn.Linear], shape: tuple[int, ...]
) -> None:
    layer = grown(kind(N, N), 3)
    x = torch.randn(shape, requires_grad=True)
    assert_same(layer, x, rtol=1e-5, atol=1e-5)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            given = x.detach().clone()
            result, expected = layer(given), composed(layer, given)
            assert torch.equal(given, x)
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


# Modes of PyTorch ----------------------------------------------------------------------------------------------------


def test_growth_in_inference_mode_makes_buffers_that_train() -> None:
    layer = grown(nn.Linear(N, M), 0)
    finished = layer.finished("default")
    with torch.inference_mode():
        for _ in range(9):
            layer.merge_pair("default")
        finished.pop(1)
    assert finished.rank == 8
    assert not finished.storage_A.is_inference()
    assert not finished.storage_B.is_inference()
    layer(torch.randn(4, N, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant", "selective"])
def test_checkpointing(kind: str, dropout: float, autocast: bool) -> None:
    layer = grown(nn.Linear(N, N), 3, lora_dropout=dropout)
    x = torch.randn(4, N, requires_grad=True)
    function: Callable[[Tensor], Tensor] = layer
    settings: dict[str, Any] = {"use_reentrant": kind == "reentrant"}
    if kind == "selective":
        function = partial(composed, layer)  # which it does: dropout is drawn otherwise
        saved = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, saved)

    def twice(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.tanh(layer(torch.tanh(layer(x))))

    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        whole = seeded(layer, partial(twice, function), x)
        again = seeded(layer, lambda x: checkpoint(partial(twice, layer), x, **settings), x)
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one, other)


def compiled(layer: AromaLinear) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(layer, backend="eager", fullgraph=True)


@pytest.mark.parametrize("kind", ["dropout", "bfloat16", "autocast"])
def test_compiled(kind: str) -> None:
    layer = grown(nn.Linear(N, M), 3, lora_dropout=0.5 if kind == "dropout" else 0.0)
    x = torch.randn(4, N)
    if kind == "bfloat16":
        layer.base_layer.bfloat16()
        x = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else nullcontext():
        for one, other in zip(
            seeded(layer, compiled(layer), x), seeded(layer, partial(composed, layer), x), strict=True
        ):
            torch.testing.assert_close(one, other)


def test_a_copy_made_in_training_goes_its_own_way() -> None:
    layer = grown(nn.Linear(N, M), 3)
    x = torch.randn(4, N)
    loss = layer(x).sum()
    twin = copy.deepcopy(layer)
    loss.backward()
    expected = twin(x)
    layer.merge_pair("default")
    layer.start_pair("default", torch.randn(1, N), torch.randn(M, 1))
    assert torch.equal(twin(x), expected)
    assert not torch.allclose(layer(x), expected)
    twin(x).sum().backward()
    assert (twin.finished("default").rank, layer.finished("default").rank) == (3, 4)


# What PEFT and its users do to the pair ------------------------------------------------------------------------------


def test_a_scale_for_a_while_is_neither_merged_nor_saved() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(N, M)), AromaConfig(target_modules=["0"], max_inner_steps=10, r=2))
    layer = aroma_layers(model)["0"]
    b, a = layer.pair("default")
    layer.finished("default").append(torch.randn(M, 3), torch.randn(3, N))
    layer.start_pair("default", torch.randn_like(a), torch.randn_like(b))
    x = torch.randn(4, N)
    expected = layer(x)
    saved = get_peft_model_state_dict(model)
    with rescale_adapter_scale(model, 0.0):
        torch.testing.assert_close(layer(x), layer.base_layer(x))
        assert not layer.get_delta_weight("default").any()
    with rescale_adapter_scale(model, 0.25):
        scaled = layer(x)
        again = get_peft_model_state_dict(model)
        layer.merge_pair("default")
        layer.start_pair("default", torch.zeros_like(a))
        torch.testing.assert_close(layer(x), scaled)
    torch.testing.assert_close(layer(x), expected)
    assert all(torch.equal(saved[key], again[key]) for key in saved)
