"""The layer's one node against the same arithmetic in PyTorch's own operations, and what it keeps for backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from aroma import AromaConfig, aroma_layers
from aroma.tuner import AromaLinear, fused
from aroma.tuner.fused import linear_with_update
from quick import slow_but

N, M = 6, 5
FOLDED = [False, True]


@contextmanager
def folding(wanted: bool) -> Iterator[None]:
    """Fold components into a copy of the weight always, or never."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_is_folded", lambda tokens, components, weight: wanted and components > 0)
        yield


def grown(
    base: nn.Module, rank: int, frozen: bool = False, dtype: torch.dtype = torch.float32, **method: Any
) -> AromaLinear:
    """Return a growing layer over `base` with random finished components and a random pair."""
    model = get_peft_model(nn.Sequential(base), AromaConfig(target_modules=["0"], max_inner_steps=10, **method))
    model.to(dtype)
    layer = aroma_layers(model)["0"]
    torch.manual_seed(3)
    b, a = layer.pair("default")
    if rank:
        finished = torch.randn(b.shape[0], rank, dtype=dtype), torch.randn(rank, a.shape[1], dtype=dtype)
        layer.finished("default").append(*finished)
    layer.start_pair("default", torch.randn_like(a), torch.randn_like(b))
    if frozen:
        layer.freeze("default")
    return layer


def composed(layer: AromaLinear, x: Tensor) -> Tensor:
    """The layer in PyTorch's own operations."""
    return layer._composed(x, [*layer.active_adapters])


def answer(function: Callable[[Tensor], Tensor], layer: AromaLinear, x: Tensor) -> list[Tensor | None]:
    """Output of `function` on `x`, and gradients for x, a and b of a loss that weighs all outputs differently."""
    x = x.detach().requires_grad_(x.requires_grad)
    for parameter in layer.parameters():
        parameter.grad = None
    y = function(x)
    if y.requires_grad:
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    b, a = layer.pair("default")
    return [y.detach(), x.grad, a.grad, b.grad]


def assert_same(layer: AromaLinear, x: Tensor, **tolerance: float) -> None:
    for mine, theirs in zip(answer(layer, layer, x), answer(lambda x: composed(layer, x), layer, x), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, **tolerance)


# Equal to PyTorch's operations ---------------------------------------------------------------------------------------

BASES: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(N, M),
    "Linear without bias": lambda: nn.Linear(N, M, bias=False),
    "Conv1D": lambda: Conv1D(M, N),
}


@pytest.mark.parametrize("folded", FOLDED)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 9, 20])
@pytest.mark.parametrize("base", BASES)
def test_equal_to_the_composed_layer(base: str, rank: int, frozen: bool, folded: bool) -> None:
    layer = grown(BASES[base](), rank, frozen, torch.float64, lora_alpha=3, r=2)
    with folding(folded):
        for wants_gradient in (False, True):
            x = torch.randn(4, 3, N, dtype=torch.float64, requires_grad=wants_gradient)
            assert_same(layer, x, rtol=1e-12, atol=1e-12)


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "one token": torch.randn(N),
        "tokens": torch.randn(7, N),
        "four axes": torch.randn(2, 3, 2, N),
        "transposed": torch.randn(N, 7).T,
        "strided": torch.randn(4, 6, 2 * N)[:, ::2, ::2],
        "swapped": torch.randn(3, 4, N).transpose(0, 1),
        "expanded": torch.randn(1, N).expand(5, N),
        "no token": torch.randn(0, N),
        "no sequence": torch.randn(3, 0, N),
    }


@pytest.mark.parametrize("folded", FOLDED)
@pytest.mark.parametrize("name", inputs())
def test_any_shape_and_layout_of_the_input(name: str, folded: bool) -> None:
    layer = grown(nn.Linear(N, M), 3)
    x = inputs()[name].requires_grad_()
    with folding(folded):
        assert layer(x).shape == (*x.shape[:-1], M)
        assert_same(layer, x, rtol=1e-5, atol=1e-5)
        # What the layer above sends down may be just as odd.
        y = layer(x)
        (gx,) = torch.autograd.grad(y.sum(), x)
        assert gx.shape == x.shape


@pytest.mark.parametrize(
    ("frozen", "dropout", "folded"),
    slow_but([(False, 0.0, True), (False, 0.5, False)], product([False, True], [0.0, 0.5], FOLDED)),
)
def test_gradcheck(frozen: bool, dropout: float, folded: bool) -> None:
    layer = grown(nn.Linear(N, M), 2, frozen, torch.float64, lora_alpha=3, r=2, lora_dropout=dropout)
    x = torch.randn(2, 3, N, dtype=torch.float64, requires_grad=True)
    b, a = (p.detach().requires_grad_(not frozen) for p in layer.pair("default"))
    update = layer._update("default")
    base = layer.base_layer

    def whole(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(8)
        pair = {} if frozen else {"a": a, "b": b}
        return linear_with_update(x, base.weight, base.bias, update._replace(**pair))

    with folding(folded):
        assert torch.autograd.gradcheck(whole, (x, a, b))
        assert torch.autograd.gradgradcheck(whole, (x, a, b))


# Precisions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_autocast_computes_in_its_dtype(base: str) -> None:
    layer = grown(BASES[base](), 9)
    x = torch.randn(4, 3, N, requires_grad=True)
    exact = answer(layer, layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = answer(layer, layer, x), answer(lambda x: composed(layer, x), layer, x)
    assert mine[0].dtype == theirs[0].dtype == torch.bfloat16
    for one, other, true in zip(mine, theirs, exact, strict=True):
        assert one.dtype == other.dtype
        error = (one.double() - true).norm() / true.norm()
        assert error < 0.02
        assert error < 2 * (other.double() - true).norm() / true.norm() + 1e-3, "no worse than PyTorch's operations"


@pytest.mark.parametrize("frozen", [False, True])
def test_a_bfloat16_base_under_a_float32_pair_rounds_the_update_once(frozen: bool) -> None:
    layer = grown(nn.Linear(N, M), 3, frozen)
    layer.base_layer.bfloat16()
    x = torch.randn(2, 3, N, dtype=torch.bfloat16, requires_grad=True)
    assert_same(layer, x, rtol=2e-2, atol=2e-2)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    B, A = layer.components("default")
    update = (x.double().detach() @ A.double().T @ B.double().T).bfloat16()
    torch.testing.assert_close(y.detach(), layer.base_layer(x).detach() + update, rtol=2**-7, atol=2**-7)


# Inside PyTorch ------------------------------------------------------------------------------------------------------


def test_a_module_used_twice_gets_both_gradients() -> None:
    layer = grown(nn.Linear(N, N), 3, dtype=torch.float64)
    x = torch.randn(4, N, dtype=torch.float64, requires_grad=True)
    mine = answer(lambda x: layer(torch.tanh(layer(x))) + layer(2 * x), layer, x)
    theirs = answer(lambda x: composed(layer, torch.tanh(composed(layer, x))) + composed(layer, 2 * x), layer, x)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["compile", "vmap", "trace"])
def test_what_looks_into_the_operations_finds_them(kind: str) -> None:
    layer = grown(nn.Linear(N, M), 3)
    x = torch.randn(4, N)
    if kind == "compile":
        graphs: list[Any] = []

        def look(graph: Any, _: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        result = torch.compile(layer, backend=look, fullgraph=True)(x)
        assert not any("_LinearWithUpdate" in str(node.target) for graph in graphs for node in graph.graph.nodes)
        assert len(graphs) == 1
    elif kind == "vmap":
        result = torch.func.vmap(layer)(x)
    else:
        result = torch.jit.trace(layer, x, check_trace=False)(x)
    torch.testing.assert_close(result, layer(x))


def test_a_compiled_layer_survives_eight_growths_with_one_graph() -> None:
    layer = grown(nn.Linear(N, M), 1)
    graphs: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=count)
    x = torch.randn(4, N)
    for _ in range(7):
        torch.testing.assert_close(compiled(x), layer(x))
        layer.merge_pair("default")
    assert len(graphs) == 1


# Whoever has an interest in the base layer ---------------------------------------------------------------------------


def test_hooks_and_replacements_of_the_base_layer_are_called() -> None:
    layer = grown(nn.Linear(N, M), 3)
    x = torch.randn(2, 3, N, requires_grad=True)
    expected = answer(layer, layer, x)
    seen: list[Tensor] = []
    handle = layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    for one, other in zip(answer(layer, layer, x), expected, strict=True):
        torch.testing.assert_close(one, other)
    handle.remove()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], F.linear(x, layer.base_layer.weight, layer.base_layer.bias))

    original = layer.base_layer.forward
    layer.base_layer.forward = lambda x: 2 * original(x)
    torch.testing.assert_close(layer(x), composed(layer, x))
    del layer.base_layer.forward

    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(output))
    layer(x)
    handle.remove()
    assert len(seen) == 1 + 5, "the base layer, the pair, its dropout, and the layer"


def test_two_active_adapters_add_up() -> None:
    net = nn.Sequential(nn.Linear(N, M))
    model = get_peft_model(net, AromaConfig(target_modules=["0"], max_inner_steps=10))
    model.add_adapter("second", AromaConfig(target_modules=["0"], max_inner_steps=10, inference_mode=True, r=2))
    layer = aroma_layers(model)["0"]
    for name in ("default", "second"):
        layer.finished(name).append(torch.randn(M, 2), torch.randn(2, N))
        layer.start_pair(name, torch.randn_like(layer.pair(name)[1]), torch.randn_like(layer.pair(name)[0]))
    layer.set_adapter(["default", "second"])
    x = torch.randn(4, 3, N)
    both = sum(B @ A for B, A in map(layer.components, ("default", "second")))
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ both.T, rtol=1e-4, atol=1e-4)
    assert_same(layer, x.requires_grad_(), rtol=1e-4, atol=1e-4)


# What is kept for backward -------------------------------------------------------------------------------------------


def kept(layer: AromaLinear, x: Tensor) -> list[Tensor]:
    """The tensors that autograd keeps for one pass, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    tensors: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return tensors


@pytest.mark.parametrize("folded", FOLDED)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("r", [1, 2])
def test_only_the_input_and_r_numbers_a_token_are_kept(r: int, dropout: float, folded: bool) -> None:
    layer = grown(nn.Linear(N, M), 9, r=r, lora_dropout=dropout)
    x = torch.randn(4, 3, N, requires_grad=True)
    with folding(folded):
        tensors = kept(layer, x)
    assert {tuple(t.shape) for t in tensors} == {(4, 3, N), (12, r)}
    assert sum(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for t in tensors) == 1
    assert {t.untyped_storage().nbytes() for t in tensors} == {4 * 12 * N, 4 * 12 * r}


@pytest.mark.parametrize("folded", FOLDED)
def test_a_frozen_module_keeps_nothing(folded: bool) -> None:
    layer = grown(nn.Linear(N, M), 9, frozen=True)
    with folding(folded):
        assert kept(layer, torch.randn(4, N, requires_grad=True)) == []
