"""Every field of AromaConfig: what is refused when it is made, and what PEFT does with the rest."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig, TaskType, get_peft_model

from aroma import AromaConfig
from aroma.errors import ConfigError
from aroma.tuner.config import _AS_IN_LORA, METHOD_FIELDS
from models import base, batch, logits

POOL: dict[str, Any] = {
    "None": None,
    "True": True,
    "-1": -1,
    "0": 0,
    "2": 2,
    "2**63": 2**63,
    "0.5": 0.5,
    "nan": math.nan,
    "inf": math.inf,
    "text": "query",
    "list": [0],
    "numpy integer": np.int64(2),
}

ACCEPTED = {
    "r": {"2"},
    "lora_alpha": {"2", "0.5", "2**63"},
    "lora_dropout": {"0", "0.5"},
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
}
"""Which of the pool a field of the method takes."""


@pytest.mark.parametrize("name", METHOD_FIELDS)
def test_a_value_is_taken_or_refused_when_the_configuration_is_made(name: str) -> None:
    for kind, value in POOL.items():
        if kind in ACCEPTED[name]:
            assert getattr(AromaConfig(**{name: value}), name) == value
            continue
        with pytest.raises(ConfigError, match=f"^{name}="):
            AromaConfig(**{name: value})


@pytest.mark.parametrize("name", sorted({item.name for item in fields(LoraConfig)} - {*METHOD_FIELDS, *_AS_IN_LORA}))
def test_a_field_of_a_variant_of_lora_is_refused_unless_unset(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}=.*not supported by AROMA: .*; leave it unset"):
        AromaConfig(**{name: "something"})


@pytest.mark.parametrize("task", [*TaskType, *(task.value for task in TaskType)])
def test_a_task_of_peft_is_taken(task: str) -> None:
    assert AromaConfig(task_type=task).task_type == task


@pytest.mark.parametrize(
    "given",
    [
        {"target_modules": ["query", "value"], "exclude_modules": ["0.attention.self.value"]},
        {"target_modules": ["query"], "layers_to_transform": [0], "layers_pattern": ["layer"]},
        {"target_modules": "all-linear", "modules_to_save": ["pooler"]},
        {"target_modules": ["query"], "fan_in_fan_out": True, "ensure_weight_tying": True, "inference_mode": True},
    ],
)
def test_what_means_the_same_as_in_lora_lasts_a_whole_life(given: dict[str, Any], tmp_path: Path) -> None:
    config = AromaConfig(**given)
    config.save_pretrained(str(tmp_path))
    read = AromaConfig.from_pretrained(str(tmp_path))
    model, plain = (get_peft_model(base("bert"), one) for one in (config, LoraConfig(**{**given, "r": 1})))
    assert logits(model, batch("bert")).isfinite().all()
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in plain.named_parameters()}
    assert get_peft_model(base("bert"), read).targeted_module_names == model.targeted_module_names
    model.save_pretrained(tmp_path / "adapter")
