"""What is measured: a model of a given shape with random weights, and a batch of random tokens.

Nothing is downloaded for a named shape.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, RobertaConfig

from aroma.errors import bad_value

from ..preflight import require_model

LABELS = 2

Shapes = Mapping[str, tuple[type[Any], dict[str, Any]]]
"""Named shapes: the class of the configuration, and its arguments."""

_TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}

SHAPES: Shapes = {
    "roberta-base": (RobertaConfig, {"max_position_embeddings": 514, "type_vocab_size": 1}),
    # sentence-transformers/all-MiniLM-L6-v2
    "minilm": (BertConfig, {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}),
    "tiny": (RobertaConfig, {**_TINY, "max_position_embeddings": 66, "type_vocab_size": 1}),
}
"""Named shapes; what is not given here is the default of the class."""


@dataclass(frozen=True)
class BenchSettings:
    """Settings of one benchmark. Together with the machine they decide its numbers.

    Args:
        model: A named shape, a local folder or a hub name; only its configuration is used.
        batch_size: Sequences in a batch.
        length: Tokens in a sequence; there is no padding.
        rounds: How often each case is timed.
        warmup_rounds: Rounds before those, which do not count. Each time has a warm-up of its own anyway.
        dtype: Dtype of the backbone's weights, `"float32"` or `"bfloat16"`.
        device: `"cpu"` or `"cuda"`.
        threads: CPU threads; None for PyTorch's default.
        seed: Seed of weights, input and finished components.
        only: Keys of the cases to measure; None for all. The floor is always measured.
        compiled: Whether each case is measured a second time with `torch.compile`.
        peak: Whether peak memory is measured. On a CPU each case then runs in a process of its own.
        keep_memory: Whether the process keeps the memory that it frees; see `keep_freed_memory`.

    Raises:
        ConfigError: A value that cannot work.
    """

    model: str = "roberta-base"
    batch_size: int = 8
    length: int = 128
    rounds: int = 9
    warmup_rounds: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    only: tuple[str, ...] | None = None
    compiled: bool = False
    peak: bool = True
    keep_memory: bool = True

    def __post_init__(self) -> None:
        for name, minimum in (("batch_size", 1), ("length", 1), ("rounds", 1), ("warmup_rounds", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise bad_value(name, value, f"give {minimum} or more")
        for name, choices in (("dtype", ("float32", "bfloat16")), ("device", ("cpu", "cuda"))):
            if getattr(self, name) not in choices:
                raise bad_value(name, getattr(self, name), f"choose one of {', '.join(choices)}")


def named_config(model: str, shapes: Shapes) -> Any:
    """Return the configuration of a named shape, a local folder or a hub name; ConfigError if there is none."""
    if model in shapes:
        kind, sizes = shapes[model]
        return kind(**sizes)
    require_model("model", model, shapes)
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        remedy = f"neither a shape ({', '.join(shapes)}) nor a folder or hub name whose configuration can be loaded"
        raise bad_value("model", model, remedy) from error


def longest_sequence(config: Any) -> int | None:
    """Return the number of tokens that a model takes; None where its configuration sets no limit."""
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if limit is None or limit <= 0:
        return None
    if "roberta" in config.model_type or config.model_type == "camembert":
        limit -= config.pad_token_id + 1  # their positions start after the padding token's
    return limit


def load_config(model: str) -> Any:
    """Return the configuration of a named shape, a local folder or a hub name, with all its dropouts set to 0.

    The backbone's own dropout costs every method the same, and would hide how the methods differ.
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
    """Return a sequence classifier of the shape with random weights from the seed, in training mode.

    Raises:
        ConfigError: No such shape, one without a classifier or sdpa attention, or fewer positions than `length`.
    """
    config = load_config(settings.model)
    limit = longest_sequence(config)
    if limit is not None and settings.length > limit:
        raise bad_value("length", settings.length, f"the model takes at most {limit} tokens")
    torch.manual_seed(settings.seed)
    dtype = getattr(torch, settings.dtype)
    try:
        model = AutoModelForSequenceClassification.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise bad_value("model", settings.model, f"no classifier of this shape can be made ({reason})") from error
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
