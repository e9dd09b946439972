"""A memory task: random pairs of key and value, so that the information in the data sets the rank that they need.

A small language model with random frozen weights learns to say the value after the key. One pair says nothing about
another, so the model has to remember each. With several templates a pair is a fact with paraphrases, one of which is
held out.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aroma.errors import bad_value

from ..specs import TaskSpec
from ..training.job import Prediction
from .planted import MadeJob

if TYPE_CHECKING:
    from datasets import Dataset

METRIC = "recalled"
"""The score: bits recalled over bits there are; 1 is perfect, 0 is as good as a guess."""
PAIRS, PARAPHRASES = "pairs", "paraphrases"
"""The one split that is evaluated: the rows that were trained on or, with several templates, those held out."""
VOCABULARY, KEY_TOKENS, VALUE_TOKENS = 64, 3, 2
BITS = VALUE_TOKENS * math.log2(VOCABULARY)
_LAYERS, _WIDTH, _HEADS, _PAIRS = 4, 64, 4, 1000
_NOT_LEARNED = -100
_MOST_TEMPLATES = KEY_TOKENS * (KEY_TOKENS + 1)


def make_pairs(count: int, seed: int) -> Tensor:
    """Return `count` pairs as tokens, shape (count, KEY_TOKENS + VALUE_TOKENS): different keys, any values."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randperm(VOCABULARY**KEY_TOKENS, generator=generator)[:count]
    keys = [numbers // VOCABULARY**place % VOCABULARY for place in range(KEY_TOKENS)]
    values = torch.randint(VOCABULARY, (count, VALUE_TOKENS), generator=generator)
    return torch.cat([torch.stack(keys, dim=1), values], dim=1)


def make_facts(pairs: Tensor, templates: int) -> tuple[Tensor, Tensor]:
    """Return the rows to train on and those held out, (rows, 1 + KEY_TOKENS + VALUE_TOKENS).

    A template rotates the tokens of the key, and puts a token of its own among them. Pair i is held out in template
    i mod `templates`.

    Args:
        pairs: See `make_pairs`.
        templates: From 2 to 12.
    """
    said = []
    for template in range(templates):
        turn, place = divmod(template, KEY_TOKENS + 1)
        key = pairs[:, :KEY_TOKENS].roll(turn, 1)
        mark = torch.full((len(pairs), 1), VOCABULARY + template)
        said.append(torch.cat([key[:, :place], mark, key[:, place:], pairs[:, KEY_TOKENS:]], dim=1))
    rows = torch.stack(said, dim=1)
    is_held_out = torch.arange(len(pairs))[:, None] % templates == torch.arange(templates)
    return rows[~is_held_out], rows[is_held_out]


def make_language_model(layers: int, width: int, seed: int, vocabulary: int = VOCABULARY) -> Any:
    """Return a random Llama whose layers have effects of the size of their inputs, unlike those at 0.02."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=_HEADS,
        max_position_embeddings=1 + KEY_TOKENS + VALUE_TOKENS,
        initializer_range=width**-0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def memory_job(spec: TaskSpec, seed: int) -> MadeJob:
    """Return the job of a task; ConfigError for more pairs than keys, or a width that attention cannot divide."""
    count, width, templates = spec.pairs or _PAIRS, spec.width or _WIDTH, spec.templates or 1
    if count > VOCABULARY**KEY_TOKENS:
        raise bad_value("data.pairs", count, f"there are {VOCABULARY**KEY_TOKENS} different keys; give no more")
    if templates > _MOST_TEMPLATES:
        raise bad_value("data.templates", templates, f"there are {_MOST_TEMPLATES}; give no more")
    if width % (2 * _HEADS):
        remedy = f"attention has {_HEADS} heads of even width; give a multiple of {2 * _HEADS}"
        raise bad_value("data.width", width, remedy)

    from datasets import Dataset
    from transformers import default_data_collator

    def rows(tokens: Tensor) -> Dataset:
        labels = tokens.clone()
        labels[:, :-VALUE_TOKENS] = _NOT_LEARNED
        return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": labels.tolist()})

    pairs = make_pairs(count, seed)
    # A pair that was never trained on could not be known.
    split = PAIRS if templates == 1 else PARAPHRASES
    trained, evaluated = (pairs, pairs) if templates == 1 else make_facts(pairs, templates)
    vocabulary = VOCABULARY + (templates if templates > 1 else 0)
    load = partial(make_language_model, spec.layers or _LAYERS, width, seed, vocabulary)
    parts = {"train": rows(trained), split: rows(evaluated)}
    return MadeJob(METRIC, (split,), load, default_data_collator, parts, _evaluate, counts_items=True)


@torch.no_grad()
def _evaluate(model: Any, data: Dataset, batch_size: int) -> Prediction:
    model.eval()
    tokens = torch.tensor(data["input_ids"])
    logits = [model(input_ids=part.to(model.device)).logits.float().cpu() for part in tokens.split(batch_size)]
    # The token before gives the logits of the next.
    found = recall(torch.cat(logits)[:, -VALUE_TOKENS - 1 : -1], tokens[:, -VALUE_TOKENS:])
    return Prediction(found, found.pop("loss"))


def recall(logits: Tensor, values: Tensor) -> dict[str, float]:
    """Return the scores of recalled values, JSON-able.

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
