"""What an AromaConfig may say in the fields that it has from LoraConfig.

PEFT looks at few of them when a configuration is made. Others fail in the midst of `get_peft_model`, with an error of
`re` or of `set`, and some are ignored in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import MISSING, fields
from typing import Any

from peft import LoraConfig, TaskType

from ..errors import bad_value

_WHY: dict[str, str] = {
    "bias": "AROMA trains no biases",
    "lora_bias": "a component has no bias",
    "use_rslora": "the scale of a component is lora_alpha / r and never changes as the rank grows",
    "use_dora": "DoRA's magnitude cannot be written as a plain LoRA adapter of growing rank",
    "init_lora_weights": "b starts at 0 and a Kaiming-uniform, so that training starts at the pretrained model",
    "target_parameters": "its rule grows linear layers; for experts use evidence on PEFT's LoraConfig",
    "layer_replication": "replicated layers share a base weight",
    "trainable_token_indices": "train token embeddings with a LoraConfig instead",
    "rank_pattern": "AROMA finds the ranks; use max_components to bound them",
    "alpha_pattern": "AROMA finds the ranks; use max_components to bound them",
}
"""Why a field of LoraConfig is not supported. All others that are not checked here belong to variants of LoRA."""


def check_lora_fields(config: LoraConfig, own: Collection[str]) -> None:
    """Raise unless the fields that `config` has from LoraConfig can work, or are at their default.

    Args:
        config: The configuration.
        own: Fields that `config` checks itself.

    Raises:
        ConfigError: Naming the field and the remedy.
    """
    for name, check in _CHECKS.items():
        value = getattr(config, name)
        remedy = check(value)
        if remedy is not None:
            raise bad_value(name, value, remedy)
    for item in fields(LoraConfig):
        value = getattr(config, item.name)
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        # Of another type than its default a field says something, however empty it is.
        unset = type(value) is type(default) and value == default
        if item.name in _CHECKS or item.name in own or unset or (value is None and default == {}):
            continue
        why = _WHY.get(item.name, "it belongs to a variant of LoRA, which cannot grow")
        raise bad_value(item.name, value, f"not supported by AROMA: {why}; leave it unset, at {default!r}")
    if config.layers_to_transform is not None and isinstance(config.target_modules, str):
        raise bad_value(
            "layers_to_transform",
            config.layers_to_transform,
            f"it works with a list of names only, and target_modules={config.target_modules!r}; give "
            "target_modules=['q_proj', …], or a regular expression that says the layers too, without it",
        )
    if config.layers_pattern is not None and config.layers_to_transform is None:
        raise bad_value(
            "layers_pattern",
            config.layers_pattern,
            "it says where to count the layers of layers_to_transform; set that too",
        )


# Each returns what to do about a value, or None if it can work -------------------------------------------------------


def _modules(value: Any) -> str | None:
    if value is None:
        return None
    remedy = "give a list of names or of their ends, such as ['q_proj', 'v_proj'], or a regular expression"
    if isinstance(value, str):
        return _expression(value, remedy)
    return None if _are_names(value) and value else remedy


def _saved_modules(value: Any) -> str | None:
    if value is None:
        return None
    remedy = "give a list of names of modules that are trained and saved whole, such as ['classifier']"
    if not _are_names(value):
        return remedy
    # PEFT puts them into a regular expression.
    return next((wrong for name in value if (wrong := _expression(name, remedy))), None)


def _excluded(value: Any) -> str | None:
    return None if isinstance(value, list) and not value else _modules(value)


def _layers(value: Any) -> str | None:
    numbers = value if isinstance(value, list) else [value]
    if value is None or (numbers and all(type(number) is int and number >= 0 for number in numbers)):
        return None
    return "give the number of a layer, from 0, or a list of numbers"


def _layer_pattern(value: Any) -> str | None:
    remedy = "give the name of the list of layers, such as 'layers', or a list of names"
    if value is None:
        return None
    names = [value] if isinstance(value, str) else value
    if not _are_names(names) or not names:
        return remedy
    return next((wrong for name in names if (wrong := _expression(name, remedy))), None)


def _task(value: Any) -> str | None:
    tasks = [task.value for task in TaskType]
    return (
        None if value is None or (isinstance(value, str) and value in tasks) else f"choose one of {', '.join(tasks)}"
    )


def _text(value: Any) -> str | None:
    return None if value is None or (isinstance(value, str) and value) else "give a text, or leave it unset"


def _switch(value: Any) -> str | None:
    return None if isinstance(value, bool) else "give True or False"


def _mapping(value: Any) -> str | None:
    return None if value is None or isinstance(value, dict) else "leave it unset; PEFT fills it in"


def _own_type(value: Any) -> str | None:
    return (
        None
        if value is None or (isinstance(value, str) and value == "AROMA")
        else "leave it unset; for another method take its configuration"
    )


def _are_names(value: Any) -> bool:
    return isinstance(value, list | tuple | set) and all(isinstance(name, str) and name for name in value)


def _expression(text: str, remedy: str) -> str | None:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        return f"it is no regular expression ({error}); {remedy}"
    return None if text else remedy


_CHECKS: dict[str, Callable[[Any], str | None]] = {
    "task_type": _task,
    "peft_type": _own_type,
    "auto_mapping": _mapping,
    "peft_version": _text,
    "base_model_name_or_path": _text,
    "revision": _text,
    "inference_mode": _switch,
    "target_modules": _modules,
    "exclude_modules": _excluded,
    "fan_in_fan_out": _switch,
    "modules_to_save": _saved_modules,
    "layers_to_transform": _layers,
    "layers_pattern": _layer_pattern,
    "ensure_weight_tying": _switch,
}
"""Fields of LoraConfig that mean for AROMA what they mean for LoRA."""
