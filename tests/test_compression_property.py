"""Whatever PEFT accepts is refused with nothing changed, or comes back equal from the saved files in plain PEFT."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from peft import LoraConfig, PeftModel
from torch import Tensor

import aroma
from aroma.errors import AromaError
from random_lora import Case, adapted, answers, batches, cases, randomize, zoo

EXAMPLES = int(os.environ.get("AROMA_CASES", "40"))
SEEN: Counter[str] = Counter()


def build(case: Case) -> Any:
    """Return the model of a case, or None where PEFT refuses the configuration."""
    try:
        model = adapted(case.options, case.groups, zero=case.zero)
    except (ValueError, TypeError, AttributeError, NotImplementedError):
        return None
    if case.second:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_adapter("other", LoraConfig(r=2, target_modules=["linear"]))
            randomize(model, 5, adapter="other")
        model.set_adapter("default")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(case.dtype)
            if case.state == "untouched" and ("lora_B" in name or "embedding_B" in name):
                parameter.data.zero_()
            if case.state == "nan" and "lora_A" in name:
                parameter.data[:1] = float("nan")
    return model


def snapshot(model: Any) -> tuple[dict[str, Tensor], str, set[str]]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return state, repr(sorted(model.peft_config["default"].to_dict().items(), key=str)), trained


def assert_unchanged(model: Any, before: tuple[dict[str, Tensor], str, set[str]]) -> None:
    state, config, trained = snapshot(model)
    assert (config, trained) == before[1:]
    assert state.keys() == before[0].keys()
    for name, value in before[0].items():
        assert value.dtype == state[name].dtype
        torch.testing.assert_close(state[name], value, rtol=0, atol=0, equal_nan=True)


def check(case: Case) -> None:
    model = build(case)
    if model is None:
        SEEN["refused by PEFT"] += 1
        assume(False)
    if case.state == "merged":
        try:
            model.merge_adapter()
        except (NotImplementedError, ValueError, TypeError):
            assume(False)
    if case.state == "disabled":
        model.base_model.disable_adapter_layers()
    if case.state == "trained" and not comes_back(model, case):
        SEEN["lost by PEFT itself"] += 1
        assume(False)
    before = snapshot(model)
    given_batches = batches() if case.has_examples else None
    try:
        found = aroma.compress(model, given_batches, outputs=answers, **case.limits)
    except AromaError:
        SEEN[f"refused: {case.state}"] += 1
        assert_unchanged(model, before)
        return
    SEEN[f"compressed: {case.state}"] += 1
    assert case.state == "trained"
    for limit, most in (("size", found.size.share), ("rank", found.size.largest_rank)):
        pinned = case.options.get("bias") != "none" or case.options.get("use_dora") or limit == "size"
        assert most <= case.limits.get(limit, most) + 1e-9 or pinned
    for name in before[2]:  # what trained still trains, if it is still there
        assert name not in dict(model.named_parameters()) or dict(model.named_parameters())[name].requires_grad
    assert difference_after_reload(model, case) < 1e-9


def comes_back(model: Any, case: Case) -> bool:
    """Whether PEFT loads what it saved, which are not the biases of layers that another adapter adapts."""
    return difference_after_reload(model, case) < 1e-9


@torch.no_grad()
def difference_after_reload(model: Any, case: Case) -> float:
    """Return the largest difference of answers between a model and what plain PEFT loads from its saved files."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, selected_adapters=["default"])
        again = PeftModel.from_pretrained(zoo(case.groups), folder, autocast_adapter_dtype=False).double().eval()
    live = copy.deepcopy(model).double().eval()
    return max(float((again(batch["ids"]) - live(batch["ids"])).abs().max()) for batch in batches())


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[*HealthCheck], derandomize=EXAMPLES <= 300)
@given(case=cases())
def test_refused_unchanged_or_equal_after_reload(case: Case) -> None:
    check(case)


@pytest.mark.slow
def test_three_hundred_cases_are_refused_unchanged_or_equal_after_reload() -> None:
    wrapped = settings(max_examples=300, deadline=None, suppress_health_check=[*HealthCheck], derandomize=True)
    wrapped(given(case=cases())(check))()
    assert SEEN["compressed: trained"] > 100
    assert all(SEEN[f"refused: {state}"] for state in ("untouched", "merged", "disabled", "nan"))
