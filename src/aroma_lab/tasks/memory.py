"""A memory task: random pairs of key and value, so that the information in the data sets the rank that they need.

A small language model with random frozen weights learns to say the value after the key. Nothing in one pair tells of
another, so all that is learnt is remembered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aroma.errors import bad_value

from ..specs import TaskSpec
from ..training.job import Prediction
from .made import MadeJob

if TYPE_CHECKING:
    from datasets import Dataset

METRIC = "recalled"
"""The score: bits recalled over bits there are; 1 is perfect, 0 is as good as a guess."""
PAIRS = "pairs"
"""The one split that is evaluated: what was trained on."""
VOCABULARY, KEY_TOKENS, VALUE_TOKENS = 64, 3, 2
BITS = VALUE_TOKENS * math.log2(VOCABULARY)
_LAYERS, _WIDTH, _HEADS, _PAIRS = 4, 64, 4, 1000
_NOT_LEARNED = -100


def make_pairs(count: int, seed: int) -> Tensor:
    """Return `count` pairs as tokens, shape (count, KEY_TOKENS + VALUE_TOKENS): different keys, any values."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randperm(VOCABULARY**KEY_TOKENS, generator=generator)[:count]
    keys = [numbers // VOCABULARY**place % VOCABULARY for place in range(KEY_TOKENS)]
    values = torch.randint(VOCABULARY, (count, VALUE_TOKENS), generator=generator)
    return torch.cat([torch.stack(keys, dim=1), values], dim=1)


def make_language_model(layers: int, width: int, seed: int) -> Any:
    """Return a random Llama whose layers have effects of the size of their inputs, unlike those at 0.02."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=_HEADS,
        max_position_embeddings=KEY_TOKENS + VALUE_TOKENS,
        initializer_range=width**-0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def memory_job(spec: TaskSpec, seed: int) -> MadeJob:
    """Return the job of a task; ConfigError for more pairs than keys, or a width that attention cannot divide."""
    count, width = spec.pairs or _PAIRS, spec.width or _WIDTH
    if count > VOCABULARY**KEY_TOKENS:
        raise bad_value("data.pairs", count, f"there are {VOCABULARY**KEY_TOKENS} different keys; give no more")
    if width % (2 * _HEADS):
        remedy = f"attention has {_HEADS} heads of even width; give a multiple of {2 * _HEADS}"
        raise bad_value("data.width", width, remedy)

    from datasets import Dataset

    pairs = make_pairs(count, seed)
    labels = pairs.clone()
    labels[:, :KEY_TOKENS] = _NOT_LEARNED
    rows = Dataset.from_dict({"input_ids": pairs.tolist(), "labels": labels.tolist()})
    load = partial(make_language_model, spec.layers or _LAYERS, width, seed)
    # What was trained on is evaluated: a pair that was held out could not be known.
    parts = dict.fromkeys(("train", PAIRS), rows)
    return MadeJob(METRIC, (PAIRS,), load, _collate, parts, _evaluate, counts_items=True)


@torch.no_grad()
def _evaluate(model: Any, data: Dataset, batch_size: int) -> Prediction:
    model.eval()
    tokens = torch.tensor(data["input_ids"])
    logits = [model(input_ids=part.to(model.device)).logits.float().cpu() for part in tokens.split(batch_size)]
    # The token before gives the logits of the next.
    found = recall(torch.cat(logits)[:, KEY_TOKENS - 1 : -1], tokens[:, KEY_TOKENS:])
    return Prediction(found, found.pop("loss"))


def recall(logits: Tensor, values: Tensor) -> dict[str, float]:
    """Return what is remembered of values, JSON-able.

    Args:
        logits: Shape (pairs, tokens of a value, vocabulary).
        values: Shape (pairs, tokens of a value).

    Returns:
        `recalled`: `bits` over the bits of all values; `accuracy`: share of the values of which every token is the
        most likely; `bits`: log2 of the probability of all values over that of a guess, 0 if it is no better; `loss`:
        mean cross entropy of a token, in nats.
    """
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), values.flatten(), reduction="sum").item()
    there = values.numel() * math.log2(logits.shape[-1])
    bits = max(0.0, there - nats / math.log(2))
    right = (logits.argmax(-1) == values).all(1).double().mean().item()
    return {METRIC: bits / there, "accuracy": right, "bits": bits, "loss": nats / values.numel()}


def _collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}
