"""Planted ranks in a pretrained encoder: it learns the hidden states of itself with updates, on real sentences."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from aroma.errors import DataError, bad_value

from ..methods.head import encoder_linears
from ..specs import HELD_OUT, TaskSpec
from .classification import check_positions, load_tokenizer
from .data import source_of
from .planted import (
    FRESH,
    METRIC,
    GivenModel,
    Hidden,
    MadeJob,
    deal_ranks,
    evaluate,
    planted_update,
    rows_of,
    squared_error,
)

_STRENGTH = 0.5


class HiddenStates(GivenModel):
    """An encoder that is trained on its last hidden states.

    Args:
        unit: Mean squared error that is a loss of 1.
    """

    _supports_sdpa = True  # whatever attention the encoder has chosen
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, encoder: Any, unit: float = 1.0) -> None:
        super().__init__(encoder.config)
        self.unit = unit
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # nothing of it reaches the hidden states
        self.encoder = encoder
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **_: Any) -> Hidden:
        """Return hidden states (batch, tokens, width); the loss is the mean squared error over `unit`."""
        h = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if labels is None:
            return Hidden(last_hidden_state=h)
        squared, count = squared_error(h, labels, attention_mask)
        return Hidden(squared / count / self.unit, h)


def load_encoder(name: str, unit: float = 1.0) -> HiddenStates:
    """Return a pretrained encoder in float32 without dropout, whose loss is in this unit.

    Dropout would move the hidden states further than the planted updates do.
    """
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(name)
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return HiddenStates(AutoModel.from_pretrained(name, config=config, dtype=torch.float32), unit)


@torch.no_grad()
def plant(model: nn.Module, ranks: Mapping[str, int], strength: float, generator: torch.Generator) -> nn.Module:
    """Return a copy of `model` with updates of these ranks, by module name.

    The singular values of an update are `strength` times 0.7 to 1.3, in units of ‖W0‖_F / √min(m, n), the root mean
    square of the singular values of its matrix.
    """
    teacher = copy.deepcopy(model)
    for name, rank in ranks.items():
        if rank:
            weight = teacher.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            size = strength * float(weight.detach().norm()) / math.sqrt(min(weight.shape))
            m, n = weight.shape
            weight += size * planted_update(m, n, rank, generator)
    return teacher


def encoder_job(spec: TaskSpec, seed: int, model: str) -> MadeJob:
    """Return the job of a planted encoder.

    Args:
        seed: Seed of the planted updates.
        model: Hub name or folder of the encoder.

    Raises:
        ConfigError: No such encoder, a text longer than it takes, or a rank that is larger than its matrices.
        DataError: The texts cannot be read, or are too few.
    """
    texts = split_texts(spec)
    tokenizer = load_tokenizer(model, spec.max_length)
    check_positions(model, spec.max_length)
    tokenizer.padding_side = "right"  # as the hidden states are padded
    generator = torch.Generator().manual_seed(seed)
    base = load_encoder(model).eval()
    shapes = {name: base.get_submodule(name).weight.shape for name in encoder_linears(base)}
    ranks = deal_ranks(spec, shapes, generator)
    teacher = plant(base, ranks, _STRENGTH if spec.strength is None else spec.strength, generator).eval()
    targets: list[Tensor] = []
    parts, squared, count = {}, 0.0, 0
    for split, some in texts.items():
        encoded = tokenizer(some, truncation=True, max_length=spec.max_length)
        inputs = [torch.tensor(ids) for ids in encoded["input_ids"]]
        goals = _hidden_states(teacher, inputs)
        columns = {key: encoded[key] for key in ("input_ids", "attention_mask")}
        if split == "train":
            goals = [goal + (spec.noise or 0.0) * torch.randn(goal.shape, generator=generator) for goal in goals]
        else:
            own = _hidden_states(base, inputs)
            errors = [float((h - goal).double().square().sum()) for h, goal in zip(own, goals, strict=True)]
            columns["base_error"] = errors
            squared, count = squared + math.fsum(errors), count + sum(goal.numel() for goal in goals)
        parts[split] = rows_of(len(targets), len(goals), columns)
        targets += goals
    # A loss of 1 is the base's, whatever the size of the hidden states.
    unit = squared / count if any(ranks.values()) else 1.0

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = tokenizer.pad(
            [{key: row[key] for key in ("input_ids", "attention_mask")} for row in rows], return_tensors="pt"
        )
        return {**batch, "labels": pad_sequence([targets[row["row"]] for row in rows], batch_first=True)}

    load, measure = partial(load_encoder, model, unit), partial(evaluate, collate, any(ranks.values()))
    return MadeJob(METRIC, (HELD_OUT, FRESH), load, collate, parts, measure, ranks, tokenizer)


@torch.no_grad()
def _hidden_states(model: nn.Module, inputs: Sequence[Tensor], batch_size: int = 64) -> list[Tensor]:
    """Return the hidden states (tokens, width) of every text."""
    found: list[Tensor] = []
    for start in range(0, len(inputs), batch_size):
        some = [*inputs[start : start + batch_size]]
        padded, mask = (pad_sequence(one, batch_first=True) for one in (some, [torch.ones_like(ids) for ids in some]))
        states = model(padded, mask).last_hidden_state
        found += [row[: len(ids)].clone() for row, ids in zip(states, some, strict=True)]
    return found


def split_texts(spec: TaskSpec) -> dict[str, list[str]]:
    """Return different texts by split: `train`, held out, and `FRESH`; the last two have a share of them each.

    Raises:
        DataError: There are too few.
    """
    rows = source_of(spec).read("train", spec.train or "train")
    texts = (row.get(spec.text or "text") for _, row in rows)
    different = list(dict.fromkeys(text for text in texts if text and text.strip()))
    size = int(spec.held_out * len(different))
    if size < 1 or len(different) - 2 * size < 1:
        remedy = f"{len(different)} different texts cannot be split that way; give more, or another share"
        raise bad_value("data.held_out", spec.held_out, remedy, DataError)
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(spec.split_seed)).tolist()
    shuffled = [different[place] for place in order]
    train = shuffled[2 * size :][: spec.train_examples]
    return {"train": train, HELD_OUT: shuffled[:size], FRESH: shuffled[size : 2 * size]}
