"""Configurations: of a named shape, a local folder or a hub name."""

from __future__ import annotations

from typing import Any

from transformers import GPT2Config, LlamaConfig

from aroma.errors import bad_value

from ..bench.models import SHAPES as ENCODERS
from ..bench.models import named_config

_LLAMA_3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "num_key_value_heads": 8,
}

_DECODERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "gpt2": (GPT2Config, {"architectures": ["GPT2LMHeadModel"]}),
    "llama3-8b": (
        LlamaConfig,
        {
            **_LLAMA_3,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 8192,
        },
    ),
    "llama3-70b": (
        LlamaConfig,
        {
            **_LLAMA_3,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "max_position_embeddings": 8192,
        },
    ),
    "llama3.1-405b": (
        LlamaConfig,
        {
            **_LLAMA_3,
            "hidden_size": 16384,
            "intermediate_size": 53248,
            "num_hidden_layers": 126,
            "num_attention_heads": 128,
            "max_position_embeddings": 131072,
        },
    ),
}

SHAPES = {**ENCODERS, **_DECODERS}
"""Named shapes, by the values of their published configurations: class of the configuration, and its arguments."""


def load_config(model: str) -> Any:
    """Return the configuration of a model.

    Raises:
        ConfigError: There is none, or its checkpoint is quantised already.
    """
    config = named_config(model, SHAPES)
    if getattr(config, "quantization_config", None) is not None:
        remedy = "its checkpoint is quantised already; give the model that it was made from, and the dtype nf4 or int8"
        raise bad_value("model", model, remedy)
    return config


def require_length(config: Any, length: int) -> None:
    """Raise where the model takes fewer tokens than `length`.

    Raises:
        ConfigError: It does.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or positions <= 0:
        return
    if "roberta" in config.model_type or config.model_type == "camembert":
        positions -= config.pad_token_id + 1  # their positions begin behind the padding's
    if length > positions:
        raise bad_value("sequence_length", length, f"the model takes at most {positions} tokens")
