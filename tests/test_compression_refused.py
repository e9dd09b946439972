"""What compressing must not change, and what it refuses before any change."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

import aroma
from aroma.errors import AromaError, ConfigError, NonFiniteError
from compressing import reloaded
from random_lora import KINDS, adapted, answers, batches, randomize, zoo

# What must not change ------------------------------------------------------------------------------------------------


def state_of(model: Any) -> tuple[Any, ...]:
    """Return tensors by name, and all else of a model that a caller may rely on."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    tensors |= {f"{name} grad": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    tensors["random"] = torch.random.get_rng_state()
    trained = [(name, p.requires_grad, p.dtype, p.grad is None) for name, p in model.named_parameters()]
    layers = [dict(layer.scaling) for layer in model.modules() if isinstance(layer, LoraLayer)]
    return tensors, (trained, layers, [module.training for module in model.modules()], repr(model.peft_config))


def assert_unchanged(model: Any, before: tuple[Any, ...]) -> None:
    tensors, others = state_of(model)
    torch.testing.assert_close(tensors, before[0], rtol=0, atol=0, equal_nan=True)
    assert others == before[1]


@pytest.mark.parametrize("is_training", [True, False])
def test_measuring_leaves_no_trace_even_if_it_fails(is_training: bool) -> None:
    model = adapted(KINDS["experts"]).train(is_training)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    model.base_model.model.layers.eval()
    before, calls = state_of(model), 0

    def failing(model: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise RuntimeError("out of memory")
        return answers(model, batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        aroma.compress(model, batches(), outputs=failing)
    assert_unchanged(model, before)


def test_dropout_is_off_and_random_numbers_go_on_as_before() -> None:
    """Two models of one seed, of which one drops nothing: the same choice. Without `eval` they would differ."""
    found = []
    for probability in (0.5, 0.0):
        model = adapted(KINDS["linear"]).train()
        model.base_model.model.drop.p = probability
        torch.manual_seed(5)
        found.append(aroma.compress(model, batches(), outputs=answers))
        assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(5))
        assert model.training
    assert found[0] == found[1]


def test_only_the_active_adapter_is_cut(tmp_path: Path) -> None:
    model = adapted(KINDS["linear"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["gpt", "linear"]))
    randomize(model.double(), 7, adapter="other")
    model.set_adapter("default")
    other = {name: p.clone() for name, p in model.named_parameters() if ".other" in name}
    config = model.peft_config["other"].to_dict()
    found = aroma.compress(model, batches(), outputs=answers, size=0.3)
    assert found.size.share <= 0.3
    for name, value in other.items():
        assert model.get_parameter(name).equal(value)
    assert model.peft_config["other"].to_dict() == config
    model.set_adapter("other")
    assert answers(model, batches()[0]).logits.isfinite().all()


def test_the_callers_configuration_is_not_changed() -> None:
    config = LoraConfig(r=4, target_modules=["linear"], use_rslora=True)
    before = copy.deepcopy(config.to_dict())
    model = get_peft_model(zoo(), config).double()
    randomize(model, 0)
    aroma.compress(model, batches(), outputs=answers)
    assert config.to_dict() == before


def test_what_cannot_be_cut_is_still_there_after_a_reload(tmp_path: Path) -> None:
    options = {"target_modules": ["linear", "conv", "attention"], "use_rslora": True, "alpha_pattern": {"conv": 9}}
    model = adapted(options, groups=2)
    found = aroma.compress(model, batches(), outputs=answers, size=0.1)
    assert sorted(found.left_alone) == ["attention", "conv"]
    after = reloaded(model, tmp_path, zoo(2))
    for batch in batches():
        torch.testing.assert_close(answers(after, batch).logits, answers(model, batch).logits)


def test_a_name_that_ends_like_a_target_is_not_adapted_when_loaded(tmp_path: Path) -> None:
    """`linear` stays; PEFT would also match `layers.0.linear`, which has another rank or none."""
    model = adapted({"target_modules": r"linear|layers\.0\.linear"})
    found = aroma.compress(model, batches(), outputs=answers, size=1.0)
    assert {name for name, (_, after) in found.ranks.items() if after} == {"linear", "layers.0.linear"}
    after = reloaded(model, tmp_path)
    layers = {name for name, layer in after.named_modules() if isinstance(layer, LoraLayer)}
    assert layers == {"base_model.model.linear", "base_model.model.layers.0.linear"}


def test_a_zero_update_is_left_out_and_an_expert_that_no_example_reaches_costs_nothing() -> None:
    model = adapted({"target_modules": ["linear", "gpt"]}, zero=(0,))
    found = aroma.compress(model, batches(), outputs=answers, keep=1.0, size=1.0)
    assert found.ranks["linear"] == (4, 0)
    assert found.size.effect == pytest.approx(1)
    experts = adapted({"target_modules": [], "target_parameters": ["experts.up"]})
    aroma.compress(experts, batches(), outputs=answers, size=0.5)
    assert all(p.isfinite().all() for p in experts.parameters())


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, r"keep=0: .* above 0 and at most 1"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"keep": "0.9"}, "keep='0.9'"),
        ({"keep": True}, "keep=True"),
        ({"size": -0.1}, "size=-0.1"),
        ({"size": float("nan")}, "size=nan"),
        ({"rank": 0}, "rank=0: .* 1 or more"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"batches": None}, "batches=None: .* give size or rank"),
        ({"batches": None, "keep": 0.9}, "keep=0.9: .* give batches"),
        ({"batches": []}, r"batches=\[\]"),
        ({"batches": "texts"}, "batches='str'"),
        ({"batches": {"ids": torch.ones(20, 5)}}, "batches='dict'"),
        ({"batches": ["a text"], "outputs": None}, "batches='str': a batch is a mapping"),
        ({"batches": [{"ids": [[1, 2]]}], "outputs": None}, "its values must be tensors"),
        ({"batches": batches(2)}, "batches='12 examples': give 16 or more"),
        ({"outputs": None}, "outputs='Tensor': what it means is not known"),
        ({"outputs": lambda model, batch: 3}, "outputs='int': it must return a tensor"),
        ({"outputs": lambda model, batch: model(batch["ids"]).detach()}, "outputs='without gradient'"),
    ],
)
def test_bad_values_are_refused_before_any_change(options: dict[str, Any], message: str) -> None:
    model = adapted(KINDS["linear"])
    before = state_of(model)
    options = {"outputs": answers, "batches": batches(), **options}
    with pytest.raises(ConfigError, match=message):
        aroma.compress(model, options.pop("batches"), **options)
    assert_unchanged(model, before)


def merged(model: Any) -> None:
    model.merge_adapter()


def disabled(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def untouched(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()


def endless(model: Any) -> None:
    model.base_model.model.linear.lora_A["default"].weight.data[0, 0] = float("inf")


def compiled(model: Any) -> None:
    model.base_model.model.layers[0] = torch.compile(model.base_model.model.layers[0])


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (merged, ConfigError, r"model='default merged': .* unmerge_adapter"),
        (disabled, ConfigError, r"model='default disabled': .* outside disable_adapter"),
        (untouched, ConfigError, r"model='default': all its updates are zero"),
        (endless, NonFiniteError, r"linear: its adapter is NaN or infinite"),
        (compiled, ConfigError, r"use module.compile\(\)"),
    ],
)
@pytest.mark.parametrize("has_examples", [True, False])
def test_an_adapter_that_gives_no_answers_is_refused(
    change: Any, kind: type[AromaError], message: str, has_examples: bool
) -> None:
    model = adapted(KINDS["linear"])
    change(model)
    before = state_of(model)
    with pytest.raises(kind, match=message):
        aroma.compress(model, batches() if has_examples else None, size=0.5, outputs=answers)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_bias": True}, "lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ],
)
def test_updates_that_are_no_products_are_refused(options: dict[str, Any], message: str) -> None:
    model = get_peft_model(zoo().float(), LoraConfig(r=4, target_modules=["linear"], **options))
    with pytest.raises(ConfigError, match=message):
        aroma.compress(model, batches(), outputs=answers)


def test_a_model_without_one_active_lora_adapter_is_refused() -> None:
    with pytest.raises(ConfigError, match="model='Zoo': give a PeftModel with one active LoRA adapter"):
        aroma.compress(zoo(), batches(), outputs=answers)
    model = adapted(KINDS["linear"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["linear"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match=r"default \(.*other"):
        aroma.compress(model, batches(), outputs=answers)


def test_examples_that_the_adapter_does_not_touch_are_refused() -> None:
    model = adapted({"target_modules": ["linear"]})
    with pytest.raises(ConfigError, match="changes no prediction"):
        aroma.compress(model, batches(), outputs=lambda model, batch: 0 * model(batch["ids"]))
