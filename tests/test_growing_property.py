"""Whatever AromaConfig accepts is refused with nothing changed, or is saved as plain LoRA with equal answers."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from aroma import AromaConfig, AromaController, aroma_layers, save_adapter, verify_adapter
from aroma.errors import AromaError, ConfigError
from random_lora import batches, zoo

EXAMPLES = int(os.environ.get("AROMA_CASES", "40"))
SEEN: Counter[str] = Counter()
NAMES = ("linear", "layers.0.linear", "layers.1.linear", "gpt")
OTHERS = ("embed", "conv", "attention")
"""Layers that no adapter of AROMA grows."""


@dataclass(frozen=True)
class Case:
    """A random configuration, and the state that its adapter is saved in."""

    options: dict[str, Any]
    ranks: tuple[int, ...]
    moved: tuple[bool, ...]
    frozen: tuple[bool, ...]
    state: str
    dtype: torch.dtype
    second: bool
    controlled: bool


@st.composite
def cases(draw: st.DrawFn) -> Case:
    targets = draw(st.lists(st.sampled_from([*NAMES * 3, *OTHERS]), min_size=1, max_size=4, unique=True))
    form = draw(st.sampled_from(["names", "names", "pattern", "all"]))
    r = draw(st.integers(1, 3))
    options: dict[str, Any] = {
        "r": r,
        "lora_alpha": r * draw(st.sampled_from([1, 4, 0.5])),  # folded into B without rounding
        "lora_dropout": draw(st.sampled_from([0.0, 0.3])),
        "modules_to_save": draw(st.sampled_from([None, ["head"]])),
        "target_modules": {"names": targets, "pattern": r".*(linear|gpt)", "all": "all-linear"}[form],
    }
    if form == "names" and "linear" in targets and draw(st.booleans()):
        options["layers_to_transform"] = [draw(st.integers(0, 1))]
    if draw(st.booleans()):
        options["exclude_modules"] = draw(st.sampled_from([["layers.0.linear"], ["attention.out_proj", "head"]]))
    if draw(st.integers(0, 9)) == 0:
        others = [{"use_rslora": True}, {"use_dora": True}, {"bias": "all"}, {"target_parameters": ["experts.up"]}]
        options |= draw(st.sampled_from([*others, {"rank_pattern": {"gpt": 2}}, {"lora_bias": True}]))
    flags = st.lists(st.booleans(), min_size=8, max_size=8)
    return Case(
        options=options,
        ranks=tuple(draw(st.lists(st.integers(0, 9), min_size=8, max_size=8))),
        moved=tuple(draw(flags)),
        frozen=tuple(draw(flags)),
        state=draw(st.sampled_from(["grown"] * 5 + ["untouched", "merged", "disabled", "nan"])),
        dtype=draw(st.sampled_from([torch.float64] * 2 + [torch.float32, torch.bfloat16])),
        second=draw(st.booleans()),
        controlled=draw(st.booleans()),
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
def grow(model: Any, case: Case) -> None:
    """Give every matrix finished components, and a pair that has moved, or is frozen."""
    generator = torch.Generator().manual_seed(len(case.options))
    for number, layer in enumerate(aroma_layers(model, "default").values()):
        rank, r, a = case.ranks[number % 8], case.options["r"], layer.pair("default")[1]
        m, n = layer.out_features, layer.in_features
        B, A, b = (torch.randn(shape, generator=generator).to(a) / 2 for shape in ((m, rank), (rank, n), (m, r)))
        layer.finished("default").append(B, A)
        if case.frozen[number % 8]:
            layer.freeze("default")
        elif case.moved[number % 8]:
            layer.start_pair("default", a.detach().clone(), b)
    if case.options["modules_to_save"]:
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name:
                parameter.add_(0.3)


def check(case: Case) -> None:
    base = zoo()
    before = weights(base)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(base, AromaConfig(**case.options, component_seed=1)).eval()
    except (AromaError, ValueError) as error:
        SEEN["refused" if isinstance(error, AromaError) else "refused by PEFT"] += 1
        if isinstance(error, AromaError):
            assert_unchanged(base, before)
        return
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(case.dtype)
    trained = [one for one in model.parameters() if one.requires_grad]
    controller = AromaController(model, torch.optim.AdamW(trained), total_steps=100) if case.controlled else None
    if case.state != "untouched":
        grow(model, case)
    if case.second:
        model.add_adapter("other", AromaConfig(target_modules=["gpt"]))
        model.set_adapter("default")
    if case.state == "nan":
        next(iter(aroma_layers(model, "default").values())).pair("default")[0].data.fill_(torch.nan)
    if case.state == "merged":
        model.merge_adapter()
    if case.state == "disabled":
        model.base_model.disable_adapter_layers()
    before = weights(model)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            save_adapter(model, folder)
        except AromaError:
            SEEN[f"not saved: {case.state}"] += 1
            assert case.state == "nan"
            assert not [*Path(folder).iterdir()]
            return
        finally:
            assert_unchanged(model, before)
        verify_adapter(folder)
        warnings.filterwarnings("error", message="Found missing adapter keys")
        again = PeftModel.from_pretrained(zoo(), folder, autocast_adapter_dtype=False).double().eval()
    SEEN[f"came back: {case.state}"] += 1
    assert controller is None or controller.global_step == 0
    if case.state == "disabled":
        model.base_model.enable_adapter_layers()
    close = 1e-4 if case.state == "merged" and case.dtype != torch.float64 else 1e-9  # merged in float32
    with torch.no_grad():
        for batch in batches(1):
            torch.testing.assert_close(again(batch["ids"]), model.double()(batch["ids"]), rtol=close, atol=close)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[*HealthCheck], derandomize=EXAMPLES <= 300)
@given(case=cases())
def test_refused_unchanged_or_equal_in_plain_peft(case: Case) -> None:
    check(case)


@pytest.mark.slow
def test_three_hundred_cases_are_refused_unchanged_or_equal_in_plain_peft() -> None:
    wrapped = settings(max_examples=300, deadline=None, suppress_health_check=[*HealthCheck], derandomize=True)
    wrapped(given(case=cases())(check))()
    assert SEEN["came back: grown"] > 60
    assert all(SEEN[f"came back: {state}"] for state in ("untouched", "merged", "disabled"))
    assert SEEN["refused"]
    assert SEEN["not saved: nan"]


def test_a_model_that_is_refused_is_as_it_was() -> None:
    base = zoo()
    before = weights(base)
    with pytest.raises(ConfigError, match=r"^target_modules='conv'"):
        get_peft_model(base, AromaConfig(target_modules=["linear", "conv"]))
    assert_unchanged(base, before)
    model = get_peft_model(base, AromaConfig(target_modules=["gpt"]))
    before = weights(model)
    with pytest.raises(ConfigError, match=r"^target_modules='conv'"):
        model.add_adapter("other", AromaConfig(target_modules=["linear", "conv"]))
    assert_unchanged(model, before)
    assert {*model.peft_config} == {"default"}


def test_a_module_whose_name_ends_as_that_of_another_stays_without_an_adapter(tmp_path: Path) -> None:
    model = get_peft_model(zoo(), AromaConfig(target_modules=["linear"], exclude_modules=["layers.0.linear"]))
    save_adapter(model, tmp_path)
    again = PeftModel.from_pretrained(zoo(), tmp_path)
    assert {name for name, one in again.named_modules() if isinstance(one, LoraLayer)} == {"base_model.model.linear"}
