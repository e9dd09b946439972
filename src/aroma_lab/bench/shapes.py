"""The model that is measured: a shape with random weights, and a batch of random tokens. Nothing is downloaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, RobertaConfig

from aroma.errors import bad_value

from .settings import BenchSettings

SHAPES: dict[str, tuple[type[Any], dict[str, int]]] = {
    "roberta-base": (
        RobertaConfig,
        {
            "vocab_size": 50265,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
        },
    ),
    "minilm": (  # sentence-transformers/all-MiniLM-L6-v2
        BertConfig,
        {
            "vocab_size": 30522,
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
            "max_position_embeddings": 512,
        },
    ),
    "tiny": (
        RobertaConfig,
        {
            "vocab_size": 64,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 66,
            "type_vocab_size": 1,
        },
    ),
}
"""Named shapes: class of the configuration, and its arguments."""

LABELS = 2


def named_config(model: str, shapes: Mapping[str, tuple[type[Any], dict[str, Any]]]) -> Any:
    """Return the configuration of a named shape, a local folder or a hub name.

    Raises:
        ConfigError: There is no such configuration.
    """
    if model in shapes:
        kind, sizes = shapes[model]
        return kind(**sizes)
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise bad_value(
            "model",
            model,
            f"neither a shape ({', '.join(shapes)}) nor a folder or hub name whose configuration can be loaded",
        ) from error


def load_config(model: str) -> Any:
    """Return the configuration of a named shape, a local folder or a hub name, with all its dropouts at 0.

    The backbone's own dropout costs every method the same, and would hide what they differ in.

    Raises:
        ConfigError: There is no such configuration.
    """
    config = named_config(model, SHAPES)
    config.num_labels = LABELS
    for name, value in config.to_dict().items():
        if ("dropout" in name or "pdrop" in name) and isinstance(value, float):
            setattr(config, name, 0.0)
    if config.pad_token_id is None:
        config.pad_token_id = 0
    return config


def make_model(settings: BenchSettings) -> Any:
    """Return a sequence classifier of the shape, with random weights of the seed, in training mode.

    Raises:
        ConfigError: No such shape, one without a classifier or sdpa attention, or fewer positions than `length`.
    """
    config = load_config(settings.model)
    _check_length(config, settings.length)
    torch.manual_seed(settings.seed)
    dtype = getattr(torch, settings.dtype)
    try:
        model = AutoModelForSequenceClassification.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise bad_value("model", settings.model, f"no classifier of this shape can be made ({reason})") from error
    return model.to(settings.device).train()


def make_batch(model: Any, settings: BenchSettings) -> dict[str, Tensor]:
    """Return random tokens, (batch_size, length), none of them padding, and random labels, (batch_size,)."""
    generator = torch.Generator().manual_seed(settings.seed)
    size = (settings.batch_size, settings.length)
    tokens = torch.randint(model.config.vocab_size - 1, size, generator=generator)
    tokens[tokens >= model.config.pad_token_id] += 1
    labels = torch.randint(LABELS, size[:1], generator=generator)
    return {"input_ids": tokens.to(settings.device), "labels": labels.to(settings.device)}


def copy_model(model: Any, own_backbone: bool) -> Any:
    """Return a copy of `model` with a head of its own; the backbone's tensors are shared unless `own_backbone`."""
    if own_backbone:
        return copy.deepcopy(model)
    backbone = model.base_model
    shared = {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())}
    return copy.deepcopy(model, shared)


def _check_length(config: Any, length: int) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return
    if "roberta" in config.model_type or config.model_type == "camembert":
        positions -= config.pad_token_id + 1  # their positions begin behind the padding's
    if length > positions:
        raise bad_value("length", length, f"the model takes at most {positions} tokens")
