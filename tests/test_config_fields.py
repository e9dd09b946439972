"""Every field of AromaConfig, with values of every kind: refused when it is made, or good for a whole life."""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftType, TaskType, get_peft_model

from aroma import AromaConfig
from aroma.errors import ConfigError, bad_value
from aroma.tuner.config import METHOD_FIELDS
from models import base, batch, logits

POOL: dict[str, Any] = {
    "None": None,
    "True": True,
    "False": False,
    "-1": -1,
    "0": 0,
    "2": 2,
    "10**400": 10**400,
    "2**63": 2**63,
    "0.5": 0.5,
    "-0.5": -0.5,
    "nan": math.nan,
    "inf": math.inf,
    "1j": 1j,
    "empty text": "",
    "text": "query",
    "bad expression": "(query",
    "bytes": b"query",
    "[]": [],
    "[0]": [0],
    "[-1]": [-1],
    "[True]": [True],
    "[None]": [None],
    "names": ["query", "value"],
    "a bad expression among names": ["query", "*"],
    "tuple": ("query",),
    "set": {"query"},
    "{}": {},
    "mapping": {"query": 2},
    "object": object(),
    "type": int,
    "array": np.ones(3),
    "tensor": torch.ones(2),
    "numpy integer": np.int64(2),
    "numpy boolean": np.bool_(True),
}

NAMES = {"names", "tuple", "set", "text"}
SWITCH = {"True", "False"}
ACCEPTED: dict[str, set[str]] = {
    "task_type": {"None"},
    "peft_type": {"None"},
    "auto_mapping": {"None", "{}", "mapping"},
    "peft_version": {"None", "text", "bad expression"},
    "base_model_name_or_path": {"None", "text", "bad expression"},
    "revision": {"None", "text", "bad expression"},
    "inference_mode": SWITCH,
    "r": {"2"},
    "target_modules": {"None", *NAMES, "a bad expression among names"},  # names are compared as they stand
    "split_modules": {"None", "{}", "mapping"},
    "target_parameters": {"None", "names", "tuple", "set", "a bad expression among names"},
    "exclude_modules": {"None", "[]", *NAMES, "a bad expression among names"},
    "lora_alpha": {"2", "0.5", "2**63"},
    "lora_dropout": {"0", "0.5"},
    "fan_in_fan_out": SWITCH,
    "modules_to_save": {"None", "[]", "names", "tuple", "set"},
    "layers_to_transform": {"None"},
    "layers_pattern": {"None"},
    "ensure_weight_tying": SWITCH,
    "bias": set(),
    "use_rslora": {"False"},
    "init_lora_weights": {"True"},
    "use_dora": {"False"},
    "use_qalora": {"False"},
    "lora_bias": {"False"},
    "rank_pattern": {"None", "{}"},
    "alpha_pattern": {"None", "{}"},
    "loftq_config": {"None", "{}"},
    "inner_tolerance": {"None", "2", "0.5", "2**63"},
    "inner_check_interval": {"2"},
    "max_inner_steps": {"None"},
    "outer_tolerance": {"None", "2", "0.5", "2**63"},
    "min_components": {"0", "2"},
    "max_components": {"None", "2"},
    "inner_criterion": set(),
    "reset": set(),
    "prune_ratio": {"0", "0.5"},
    "rewarmup_steps": {"0", "2"},
    "component_seed": {"None", "0", "2"},
    # Whatever PEFT has beyond: its default alone.
    "megatron_core": set(),
    "qalora_group_size": set(),
    "runtime_config": set(),
}
"""Which of the pool a field takes; one that is not named here takes None alone, its default."""


def test_every_field_is_in_the_table() -> None:
    known = {item.name for item in fields(AromaConfig)}
    assert ACCEPTED.keys() <= known
    for item in fields(AromaConfig):
        if item.name not in ACCEPTED:
            assert item.default is None, f"{item.name}: a field of PEFT's with a default needs a line in the table"


@pytest.mark.parametrize("name", [item.name for item in fields(AromaConfig)])
def test_a_value_of_any_kind_is_taken_or_refused_when_the_configuration_is_made(name: str) -> None:
    accepted = ACCEPTED.get(name, {"None"})
    if "2" in accepted:
        accepted = {*accepted, "numpy integer"}
    for kind, value in POOL.items():
        given = {name: value}
        if kind in accepted:
            assert not isinstance(getattr(AromaConfig(**given), name), np.generic)
            continue
        with pytest.raises(ConfigError) as caught:
            AromaConfig(**given)
        said = str(caught.value)
        start = str(bad_value(name, value, ""))
        assert said.startswith(start), kind
        remedy = said.removeprefix(start)
        assert re.search(r"\b(give|leave|choose|set|try|switches|make|must be|at least|for no)\b", remedy), remedy


@pytest.mark.parametrize("task", [*TaskType, *(task.value for task in TaskType)])
def test_a_task_of_peft_is_taken(task: str) -> None:
    assert AromaConfig(task_type=task).task_type == task


def test_its_own_type_is_taken_and_another_is_not() -> None:
    assert AromaConfig(peft_type="AROMA").peft_type == "AROMA"
    for other in ("LORA", PeftType.LORA):
        with pytest.raises(ConfigError, match=r"^peft_type=.*for another method take its configuration"):
            AromaConfig(peft_type=other)


NOTHING_LEFT = {
    ("target_modules", "text"),  # an expression for the whole name
    ("exclude_modules", "names"),
    ("modules_to_save", "names"),
}


@pytest.mark.parametrize("name", sorted(ACCEPTED))
def test_what_is_taken_never_fails_later(name: str, tmp_path: Path) -> None:
    """Made into a model, run, and saved: no error of PEFT's, and where nothing is left to grow, ours."""
    for kind in sorted(ACCEPTED[name]):
        config = AromaConfig(**{"target_modules": ["query", "value"], name: POOL[kind]})
        if (name, kind) in NOTHING_LEFT:
            with pytest.raises(ConfigError, match=r"^target_modules=.*no module of Bert"):
                get_peft_model(base("bert"), config)
            continue
        if name == "target_parameters" and kind != "None":
            with pytest.raises(ConfigError, match=r"^target_parameters=.*no such parameter"):
                get_peft_model(base("bert"), config)
            continue
        model = get_peft_model(base("bert"), config)
        assert logits(model, batch("bert")).isfinite().all()
        model.save_pretrained(tmp_path / f"{name}-{len(kind)}")


# Layers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [0, [0], [1, 0]])
@pytest.mark.parametrize("pattern", [None, "layer", ["layer"]])
def test_layers_to_transform_picks_layers(layers: Any, pattern: Any) -> None:
    config = AromaConfig(target_modules=["query"], layers_to_transform=layers, layers_pattern=pattern)
    model = get_peft_model(base("bert"), config)
    grown = {name for name, module in model.named_modules() if type(module).__name__ == "AromaLinear"}
    wanted = layers if isinstance(layers, list) else [layers]
    assert len(grown) == len(wanted)
    assert all(any(f"layer.{number}." in name for name in grown) for number in wanted)


@pytest.mark.parametrize(
    ("given", "named", "remedy"),
    [
        ({"layers_to_transform": [0]}, "layers_to_transform=[0]", "target_modules='all-linear'"),
        (
            {"layers_to_transform": 0, "target_modules": ".*query"},
            "layers_to_transform=0",
            "a regular expression that",
        ),
        ({"layers_pattern": "layer"}, "layers_pattern='layer'", "layers of layers_to_transform; set that too"),
        (
            {"layers_pattern": "layer", "target_modules": ["query"]},
            "layers_pattern='layer'",
            "layers of layers_to_transform; set that too",
        ),
        *(
            ({"layers_to_transform": value, "target_modules": ["query"]}, f"layers_to_transform={value!r}", "from 0")
            for value in (-1, [-1], [], True, [True], 1.0, "0", ["0"], (0,), {0: 1})
        ),
        *(
            (
                {"layers_pattern": value, "layers_to_transform": 0, "target_modules": ["query"]},
                f"layers_pattern={value!r}",
                "such as 'layers'",
            )
            for value in ("", [], [""], [None], "(layer", ["layer", "*"], 3, {"layer": 1})
        ),
    ],
)
def test_layers_that_cannot_work(given: dict[str, Any], named: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AromaConfig(**given)
    assert str(caught.value).startswith(f"{named}: ")
    assert remedy in str(caught.value)


def test_layers_that_the_model_lacks_are_named() -> None:
    with pytest.raises(ConfigError, match=r"^target_modules=.*layers_to_transform"):
        get_peft_model(base("bert"), AromaConfig(target_modules=["query"], layers_to_transform=[7]))


# As PEFT handles configurations --------------------------------------------------------------------------------------


def test_a_configuration_that_was_written_is_read_again(tmp_path: Path) -> None:
    """PEFT reads it through the same constructor, from JSON: lists for sets, and fields that it filled in."""
    config = AromaConfig(
        target_modules=["query"], layers_to_transform=[0], layers_pattern=["layer"], exclude_modules="x", r=2
    )
    config.save_pretrained(str(tmp_path))
    read = AromaConfig.from_pretrained(str(tmp_path))
    assert {**read.to_dict(), "target_modules": {"query"}} == {**config.to_dict(), "target_modules": {"query"}}


def test_a_field_that_peft_will_have_is_refused_unless_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later release's field would be ignored in silence."""
    item = next(item for item in fields(LoraConfig) if item.name == "use_dora")
    monkeypatch.setattr("aroma.tuner.lora_fields._WHY", {})
    with pytest.raises(ConfigError, match=r"^use_dora=True: not supported by AROMA: it belongs to a variant of LoRA"):
        AromaConfig(use_dora=True)
    assert item.default is False
    assert item.default_factory is MISSING


def test_every_field_that_decides_a_run_is_checked() -> None:
    for name in METHOD_FIELDS:
        with pytest.raises(ConfigError, match=f"^{name}="):
            AromaConfig(**{name: object()})
