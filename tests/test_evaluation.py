"""A model that is evaluated with gradients in the midst of its training notices nothing of it."""

from __future__ import annotations

import pytest
import torch

from aroma.evaluation import evaluating
from models import adapted, batch


@pytest.mark.parametrize("checkpoints", [False, True])
def test_nothing_is_left_of_an_evaluation(checkpoints: bool) -> None:
    model, inputs = adapted("llama"), batch("llama")
    model.config.use_cache = True
    if checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.train()
    model.base_model.model.model.layers[0].mlp.eval()
    b = next(parameter for name, parameter in model.named_parameters() if ".lora_B." in name)
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    for _ in range(2):
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            torch.rand(3)
            (gradient,) = torch.autograd.grad(model(**inputs).loss, [b])
        assert gradient.any()
        assert b.grad is None
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert model.config.use_cache
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_error_ends_it_too() -> None:
    model = adapted("llama").train()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert all(module.training for module in model.modules())
