"""Dropout masks: the right rate, independent across tokens, features and calls, and a function of their seed."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from aroma import AromaConfig, aroma_layers
from aroma.tuner.dropout import draw_offsets, keep_mask

RATES = [0.003, 0.05, 0.1, 0.5, 0.9, 0.999]
LIKE = torch.empty(0)


def masks(p: float, calls: int, tokens: int, features: int, seed: int = 0) -> Tensor:
    """Return masks of successive calls, (calls, tokens, features)."""
    torch.manual_seed(seed)
    return torch.stack([keep_mask(draw_offsets(tokens * features), p, tokens, features, LIKE) for _ in range(calls)])


def correlation(one: Tensor, other: Tensor, p: float) -> float:
    """Return the correlation of Bernoulli variables, in standard errors of independent ones."""
    values = ((one - (1 - p)) * (other - (1 - p))).double()
    return float(values.mean()) / (p * (1 - p)) * math.sqrt(values.numel())


@pytest.mark.parametrize("p", RATES)
def test_the_rate(p: float) -> None:
    drawn = masks(p, 40, 250, 251)
    assert ((drawn == 0) | (drawn == 1)).all()
    count = drawn.numel()
    assert abs(float(drawn.double().mean()) - (1 - p)) < 4 * math.sqrt(p * (1 - p) / count)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_tokens_features_and_calls_are_independent(p: float) -> None:
    drawn = masks(p, 400, 64, 72)
    for lag in (1, 2, 3, 5, 8, 16, 31):
        assert abs(correlation(drawn[:, lag:], drawn[:, :-lag], p)) < 4, f"tokens {lag} apart"
        assert abs(correlation(drawn[:, :, lag:], drawn[:, :, :-lag], p)) < 4, f"features {lag} apart"
        assert abs(correlation(drawn[lag:], drawn[:-lag], p)) < 4, f"calls {lag} apart"
    assert abs(correlation(drawn[:, 3:, 5:], drawn[:, :-3, :-5], p)) < 4
    # Triples too: three banks make a mask.
    centred = (drawn - (1 - p)).double()
    triple = centred[:, 2:, 3:] * centred[:, 1:-1, 1:-2] * centred[:, :-2, :-3]
    assert abs(float(triple.mean())) < 4 * (p * (1 - p)) ** 1.5 / math.sqrt(triple.numel())


def test_one_seed_one_mask() -> None:
    assert torch.equal(masks(0.1, 3, 5, 7), masks(0.1, 3, 5, 7))
    assert not torch.equal(masks(0.1, 3, 50, 70), masks(0.1, 3, 50, 70, seed=1))
    offsets = draw_offsets(99)
    assert torch.equal(keep_mask(offsets, 0.2, 9, 11, LIKE), keep_mask(offsets, 0.2, 9, 11, LIKE))


# In the layer --------------------------------------------------------------------------------------------------------


def layer_with_dropout(p: float) -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(24, 5))
    model = get_peft_model(net, AromaConfig(target_modules=["0"], lora_dropout=p, max_inner_steps=10))
    layer = aroma_layers(model)["0"]
    layer.finished("default").append(torch.randn(5, 2), torch.randn(2, 24))
    layer.start_pair("default", torch.randn(1, 24), torch.randn(5, 1))
    return layer


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_expectation_is_the_layer_without_dropout(p: float) -> None:
    layer = layer_with_dropout(p)
    x = torch.randn(1, 24).expand(4000, 24)
    with torch.no_grad():
        layer.train()
        drawn = torch.cat([layer(x) for _ in range(5)]).double()
        layer.eval()
        exact = layer(x[:1]).double()
    error = drawn.std(0) / math.sqrt(len(drawn))
    assert float(error.min()) > 0
    assert float(((drawn.mean(0) - exact) / error).abs().max()) < 4


def test_evaluation_drops_nothing_and_draws_nothing() -> None:
    layer = layer_with_dropout(0.5).eval()
    x = torch.randn(3, 24)
    state = torch.get_rng_state()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(torch.get_rng_state(), state)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.freeze("default")
    state = torch.get_rng_state()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(torch.get_rng_state(), state), "a frozen module has no input to drop"
