"""The tuner: an exact no-op at the start, base weights that are never written, buffers that grow in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from aroma import AromaConfig, aroma_layers
from models import (
    ARCHITECTURES,
    METHOD,
    adapted,
    base,
    batch,
    grow,
    logits,
    ranks,
    set_ranks,
    train,
    trainable,
)

# The start -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_start_is_the_pretrained_model_bit_for_bit(name: str) -> None:
    inputs = batch(name)
    expected = logits(base(name), inputs)
    model = adapted(name)
    layers = aroma_layers(model)
    assert len(layers) == ARCHITECTURES[name].targets
    assert torch.equal(logits(model, inputs), expected)
    assert all(layer.pair("default")[1].any() for layer in layers.values()), "a is random, b alone is 0"
    # Each module takes part: once its b moves, the answer does.
    for layer in layers.values():
        b, _ = layer.pair("default")
        with torch.no_grad():
            b.fill_(0.5)
        assert not torch.equal(logits(model, inputs), expected)
        with torch.no_grad():
            b.zero_()


# What is wrapped -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["all-linear", ["query", "key", "value", "dense"]])
def test_the_classification_head_is_not_wrapped_and_trains_fully(targets: Any) -> None:
    # The released code matched substrings, wrapped classifier.dense, and left classifier.out_proj at its random start.
    model = adapted("roberta", target_modules=targets)
    wrapped = list(aroma_layers(model))
    assert len(wrapped) == 12
    assert not [name for name in wrapped if "classifier" in name]
    head = {name: p for name, p in model.named_parameters() if ".classifier." in name and "original" not in name}
    assert {name.split("default.")[1] for name in head} == {
        "dense.weight",
        "dense.bias",
        "out_proj.weight",
        "out_proj.bias",
    }
    before = {name: parameter.detach().clone() for name, parameter in head.items()}
    grow(model, batch("roberta"), 4)
    for name, parameter in head.items():
        assert parameter.requires_grad
        assert not torch.equal(parameter, before[name]), name


def test_an_injected_adapter_without_the_peft_wrapper_grows() -> None:
    # peft #3373: without the wrapper, AdaLoRA silently became LoRA.
    model = inject_adapter_in_model(AromaConfig(**{**METHOD, "task_type": "SEQ_CLS"}), base("bert"))
    growth, _ = grow(model, batch("bert"), 9)
    assert growth.controller.total_rank > 0
    assert set(ranks(model)) == set(aroma_layers(adapted("bert")))


# The base weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_base_weights_are_bit_identical_after_growth(name: str) -> None:
    original = base(name).state_dict()
    model = adapted(name)
    growth, losses = grow(model, batch(name), 13)
    assert growth.controller.outer_number > 3
    assert losses[0] != losses[-1]
    kept = 0
    for key, tensor in model.get_base_model().state_dict().items():
        if "lora_" in key or "modules_to_save" in key:
            continue
        plain = key.replace(".base_layer", "").replace(".original_module", "")
        assert torch.equal(tensor, original[plain]), key
        kept += 1
    assert kept == len(original)


# The outer step ------------------------------------------------------------------------------------------------------


def test_a_frozen_module_is_zero_skipped_and_without_gradient() -> None:
    model, inputs = adapted("bert"), batch("bert")
    frozen = set_ranks(model, [2], pair=True)
    layers = aroma_layers(model)
    name = next(iter(frozen))
    layers[name].freeze("default")
    b, a = layers[name].pair("default")
    assert not b.any()
    assert not a.any()
    assert ranks(model)[name] == 2

    calls = []
    for module in (layers[name].lora_A["default"], layers[name].lora_B["default"]):
        module.register_forward_hook(lambda *_: calls.append("the pair was asked"))
    model.train()
    model(**inputs).loss.backward()
    assert not calls
    assert b.grad is None
    assert a.grad is None
    other_b, _ = layers["bert.pooler.dense"].pair("default")
    assert other_b.grad is not None

    x = torch.randn(2, layers[name].in_features)
    finished = layers[name].finished("default")
    W = layers[name].base_layer.weight + finished.B @ finished.A
    torch.testing.assert_close(layers[name](x), F.linear(x, W, layers[name].base_layer.bias), rtol=1e-5, atol=1e-5)


def test_weight_decay_and_momentum_do_not_move_a_frozen_pair() -> None:
    model, inputs = adapted("bert", outer_tolerance=0.5), batch("bert")
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.5)
    growth, _ = grow(model, inputs, 5, optimizer)
    assert growth.finished
    train(model, inputs, optimizer, 3)
    assert not any(parameter.any() for layer in aroma_layers(model).values() for parameter in layer.pair("default"))


WRAPPERS: dict[str, Callable[[AromaConfig], Any]] = {
    "PeftModelForCausalLM": lambda config: get_peft_model(base("gpt2"), replace(config, task_type="CAUSAL_LM")),
    "PeftModel": lambda config: get_peft_model(base("gpt2"), config),
    "GPT2LMHeadModel": lambda config: inject_adapter_in_model(config, base("gpt2")),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_loop_may_go_on_after_the_last_module_has_finished(wrapper: str) -> None:
    # Without a head nothing is left to train; torch would refuse a loss without a graph.
    inputs = batch("gpt2")
    model = WRAPPERS[wrapper](AromaConfig(**{**METHOD, "outer_tolerance": 10.0}))
    assert type(model).__name__ == wrapper
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    growth, _ = grow(model, inputs, 4, optimizer)
    assert growth.finished
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, inputs, optimizer, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert growth.controller.global_step == 6
    assert torch.equal(logits(model, inputs), logits(base("gpt2"), inputs))


@pytest.mark.parametrize("disturbance", ["disable_adapter", "set_adapter"])
def test_a_frozen_module_stays_frozen_through_peft_calls(disturbance: str) -> None:
    model = adapted("bert")
    layers = list(aroma_layers(model).values())
    layers[0].freeze("default")
    if disturbance == "disable_adapter":
        with model.disable_adapter():
            pass
    else:
        model.set_adapter("default")
    assert [p.requires_grad for layer in layers[:2] for p in layer.pair("default")] == [False, False, True, True]


def test_autograd_stops_below_the_lowest_unfrozen_module() -> None:
    model, inputs = adapted("bert"), batch("bert")
    set_ranks(model, [1], pair=True)
    for name, layer in aroma_layers(model).items():
        if "layer.0." in name:
            layer.freeze("default")
    needs_gradient = []
    for block in model.get_base_model().bert.encoder.layer:
        block.register_forward_hook(lambda _, __, output: needs_gradient.append(first(output).requires_grad))
    model.train()
    model(**inputs).loss.backward()
    assert needs_gradient == [False, True]


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


# Buffers -------------------------------------------------------------------------------------------------------------


def test_nothing_that_the_optimizer_holds_is_replaced() -> None:
    model, inputs = adapted("bert"), batch("bert")
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    before = [(id(p), p.data_ptr(), p.shape, name) for name, p in model.named_parameters()]
    held = [(id(p), p.data_ptr()) for group in optimizer.param_groups for p in group["params"]]
    events: list[str] = []
    growth, _ = grow(model, inputs, 30, optimizer, lambda event: events.append(event.kind))
    growth.controller.modules[0].layer.freeze("default")
    assert growth.controller.total_rank > 8 * len(growth.controller.modules) // 2
    assert "merged" in events
    assert [(id(p), p.data_ptr(), p.shape, name) for name, p in model.named_parameters()] == before
    assert [(id(p), p.data_ptr()) for group in optimizer.param_groups for p in group["params"]] == held


# Dropout -------------------------------------------------------------------------------------------------------------


# What PEFT offers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_disable_adapter_gives_the_pretrained_answer_and_comes_back(name: str) -> None:
    inputs = batch(name)
    model = adapted(name)
    set_ranks(model, [0, 1, 2], pair=True)
    before = logits(model, inputs)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(base(name), inputs))
    assert torch.equal(logits(model, inputs), before)
    assert not torch.allclose(before, logits(base(name), inputs), atol=1e-2)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_merging_keeps_the_answer_and_unmerging_the_weights(name: str, safe: bool) -> None:
    inputs, model = batch(name), adapted(name)
    set_ranks(model, [0, 1, 3], pair=True)
    before = logits(model, inputs)
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(logits(model, inputs), before, rtol=1e-4, atol=1e-5)
    once = weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it is merged already
        model.merge_adapter(safe_merge=safe)
        model.merge_adapter(safe_merge=safe)
    assert all(map(torch.equal, weights(model), once)), "merging thrice is merging once"
    model.unmerge_adapter()
    torch.testing.assert_close(weights(model), weights(adapted(name)), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(model, inputs), before, rtol=1e-4, atol=1e-5)


def weights(model: nn.Module) -> list[Tensor]:
    return [layer.base_layer.weight.detach().clone() for layer in aroma_layers(model).values()]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_merge_and_unload_leaves_no_growing_layer(name: str) -> None:
    inputs, model = batch(name), adapted(name)
    set_ranks(model, [0, 1, 3], pair=True)
    before = logits(model, inputs)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    torch.testing.assert_close(logits(merged, inputs), before, rtol=1e-4, atol=1e-5)


# Trained without a controller ----------------------------------------------------------------------------------------


# Quantised base weights ----------------------------------------------------------------------------------------------
