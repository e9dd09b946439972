"""The model without data: on the meta device, with its growing adapter."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import get_peft_model
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from aroma.errors import bad_value
from aroma.tuner import AromaConfig

from .attention import ATTENTION
from .quantised import replace_linears
from .settings import ScaleSettings

ADAPTER = "default"


def build(settings: ScaleSettings, config: Any, layers: int | None = None) -> Any:
    """Return the model with a growing adapter at its start; nothing is allocated.

    Args:
        settings: What is estimated.
        config: The model's configuration; left as it is.
        layers: Number of its blocks, where it is to have another.

    Raises:
        ConfigError: No such model can be made for the task, or no module of it can grow.
    """
    task = task_of(settings, config)
    config = copy.deepcopy(config)
    if layers is not None:
        _shorten(config, layers)
    if config.pad_token_id is None:
        config.pad_token_id = 0  # which a classifier of a batch needs
    kind = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    dtype = getattr(torch, settings.weight_dtype)
    with torch.device("meta"):
        try:
            model = kind.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise bad_value("model", settings.model, f"no model for {task} can be made of it ({reason})") from error
        if settings.is_quantised:
            replace_linears(model)
        targets = settings.target_modules
        adapter = AromaConfig(
            r=settings.r,
            task_type="CAUSAL_LM" if task == "causal-lm" else "SEQ_CLS",
            target_modules=targets if isinstance(targets, str) else [*targets],
        )
        return get_peft_model(model, adapter, adapter_name=ADAPTER).train()


def task_of(settings: ScaleSettings, config: Any) -> str:
    """Return what the model is to learn: `"causal-lm"` or `"classification"`.

    Raises:
        ConfigError: The model can learn neither, or is a quantised classifier.
    """
    task = settings.task
    if task == "auto":
        task = _likely_task(settings.model, config)
    if task == "classification" and settings.is_quantised:
        raise bad_value(
            "dtype",
            settings.dtype,
            "bitsandbytes quantises the head of a classifier too, which then cannot train; choose bfloat16, or the "
            "task causal-lm",
        )
    return task


def _likely_task(model: str, config: Any) -> Any:
    stated = (config.architectures or [""])[0]
    speaks = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if speaks and stated.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal-lm"
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return "classification"
    if speaks:
        return "causal-lm"
    raise bad_value("model", model, f"a {config.model_type}: neither a causal language model nor a text classifier")


def layers_of(config: Any) -> int | None:
    """Return the number of the model's blocks, None where they are not all alike or their number is not known."""
    layers: int | None = getattr(config, "num_hidden_layers", None)
    kinds = getattr(config, "layer_types", None)
    return layers if kinds is None or len(set(kinds)) == 1 else None


def _shorten(config: Any, layers: int) -> None:
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:layers]
    config.num_hidden_layers = layers
