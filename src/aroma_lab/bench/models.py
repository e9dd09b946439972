"""The model of a named shape, with random weights, and a batch of random tokens; nothing is downloaded."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, RobertaConfig

from aroma.errors import bad_value

LABELS = 2

_TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}

SHAPES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "roberta-base": (RobertaConfig, {"max_position_embeddings": 514, "type_vocab_size": 1}),
    # sentence-transformers/all-MiniLM-L6-v2
    "minilm": (BertConfig, {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}),
    "tiny": (RobertaConfig, {**_TINY, "max_position_embeddings": 66, "type_vocab_size": 1}),
}
"""Named shapes: the class of the configuration, and its arguments other than the defaults."""


@dataclass(frozen=True)
class BenchSettings:
    """Settings of one benchmark. Together with the machine they decide its numbers.

    Args:
        model: A named shape, a local folder or a hub name; only its configuration is used.
        batch_size: Sequences in a batch.
        length: Tokens in a sequence; there is no padding.
        rounds: How often each case is timed.
        dtype: Dtype of the backbone's weights, `"float32"` or `"bfloat16"`.
        device: `"cpu"` or `"cuda"`.
        threads: CPU threads; None for PyTorch's default.
        seed: Seed of weights, input and finished components.
        only: Keys of the cases to measure; None for all. The floor is always measured.

    Raises:
        ConfigError: A value that cannot work.
    """

    model: str = "roberta-base"
    batch_size: int = 8
    length: int = 128
    rounds: int = 9
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    only: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "length", "rounds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise bad_value(name, value, "give 1 or more")


def load_config(model: str) -> Any:
    """Return the configuration of a named shape, a local folder or a hub name, with all its dropouts set to 0.

    The backbone's own dropout costs every method the same, and would hide how the methods differ.

    Raises:
        ConfigError: No such shape.
    """
    if model in SHAPES:
        kind, sizes = SHAPES[model]
        config = kind(**sizes)
    else:
        try:
            config = AutoConfig.from_pretrained(model)
        except (OSError, ValueError) as error:
            remedy = f"neither a shape ({', '.join(SHAPES)}) nor a model that can be found; check its name"
            raise bad_value("model", model, remedy) from error
    config.num_labels = LABELS
    for name, value in config.to_dict().items():
        if ("dropout" in name or "pdrop" in name) and isinstance(value, float):
            setattr(config, name, 0.0)
    if config.pad_token_id is None:
        config.pad_token_id = 0
    return config


def make_model(settings: BenchSettings) -> Any:
    """Return a sequence classifier of the shape with random weights from the seed, in training mode."""
    config = load_config(settings.model)
    torch.manual_seed(settings.seed)
    dtype = getattr(torch, settings.dtype)
    model = AutoModelForSequenceClassification.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.to(settings.device).train()


def make_batch(model: Any, settings: BenchSettings) -> dict[str, Tensor]:
    """Return random tokens (batch_size, length) without padding, and random labels (batch_size,)."""
    generator = torch.Generator().manual_seed(settings.seed)
    size = (settings.batch_size, settings.length)
    tokens = torch.randint(model.config.vocab_size - 1, size, generator=generator)
    tokens[tokens >= model.config.pad_token_id] += 1
    labels = torch.randint(LABELS, size[:1], generator=generator)
    return {"input_ids": tokens.to(settings.device), "labels": labels.to(settings.device)}


def copy_model(model: Any, own_backbone: bool) -> Any:
    """Return a copy of `model` with its own head; the backbone's tensors are shared unless `own_backbone`."""
    if own_backbone:
        return copy.deepcopy(model)
    backbone = model.base_model
    shared = {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())}
    return copy.deepcopy(model, shared)
