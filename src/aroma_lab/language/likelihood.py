"""Answers by likelihood: which label does the model find most likely after the question?

A candidate is scored as the response that training has ("the correct answer is answer2"). What every response begins
with is given, like the prompt, and not scored: only the label decides, and a label's length is the label's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from aroma.errors import NonFiniteError, bad_value

from .asked import Asked, ask
from .commonsense import Question
from .prompt import PromptBuilder


@dataclass(frozen=True)
class Ranking:
    """How likely a model finds the candidates of one question, in their order.

    Args:
        log_probs: Natural logarithm of the probability of each label, given prompt and lead: a sum over its tokens.
        tokens: Tokens of each label.
        characters: Characters of each label.
        cut: Whether the prompt lost tokens on the left to fit.
    """

    log_probs: tuple[float, ...]
    tokens: tuple[int, ...]
    characters: tuple[int, ...]
    cut: bool

    @property
    def best(self) -> int:
        """The place of the most likely candidate; of equals, the first."""
        return self._first_largest([1] * len(self.log_probs))

    @property
    def best_normalised(self) -> int:
        """The place of the most likely candidate by mean over tokens."""
        return self._first_largest(self.tokens)

    @property
    def best_per_character(self) -> int:
        """The place of the most likely candidate by mean over characters, as lm-evaluation-harness's acc_norm."""
        return self._first_largest(self.characters)

    def _first_largest(self, lengths: Sequence[int]) -> int:
        scores = [value / length for value, length in zip(self.log_probs, lengths, strict=True)]
        return scores.index(max(scores))


def rank(
    model: Any,
    builder: PromptBuilder,
    questions: Sequence[Question],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Ranking]:
    """Rank the candidates of questions. Each prompt is computed once; its candidates share the keys and values.

    Args:
        model: A causal language model; it runs where it is, in evaluation mode, and is left in its own.
        builder: Makes prompts and responses.
        questions: The questions.
        batch_size: Questions of one forward pass.
        max_length: As in `asked.ask`.
        advance: Called after each batch with its number of questions.

    Returns:
        One ranking a question, in their order.

    Raises:
        DataError: As in `asked.ask`.
        NonFiniteError: A log-probability that is no number.
    """
    asked = [ask(builder, question, max_length) for question in questions]
    # Of similar lengths together, which leaves little to pad; the longest first, so that what does not fit in memory
    # fails at once.
    order = sorted(range(len(asked)), key=lambda place: -_context_length(asked[place]))
    log_probs: dict[int, tuple[float, ...]] = {}
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            log_probs.update(zip(places, label_log_probs(model, [asked[place] for place in places]), strict=True))
            advance(len(places))
    finally:
        model.train(training)
    return [
        Ranking(
            log_probs[place],
            tuple(map(len, item.labels)),
            tuple(map(len, question.candidates)),
            item.cut,
        )
        for place, (item, question) in enumerate(zip(asked, questions, strict=True))
    ]


@torch.no_grad()
def label_log_probs(model: Any, batch: Sequence[Asked]) -> list[tuple[float, ...]]:
    """Return the log-probability of every label of every question, in float32.

    Args:
        model: A causal language model in evaluation mode.
        batch: The questions of one forward pass.

    Raises:
        NonFiniteError: One of them is no number.
    """
    context, context_mask = _padded([[*item.prompt, *item.lead] for item in batch], "left", model.device)
    labels, label_mask = _padded([label for item in batch for label in item.labels], "right", model.device)
    counts = torch.tensor([len(item.labels) for item in batch], device=model.device)
    owners = torch.arange(len(batch), device=model.device).repeat_interleave(counts)
    # A position counts tokens, not padding.
    positions = (context_mask.cumsum(1) - 1).clamp(min=0)
    cache, kept = _cache_of(model)
    whole = model(
        input_ids=context,
        attention_mask=context_mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
        **kept,
    )
    first = whole.logits[:, -1].float().log_softmax(-1)[owners]
    scores = first.gather(1, labels[:, :1])
    if labels.shape[1] > 1:
        cache.batch_select_indices(owners)
        fed = labels[:, :-1]
        more = model(
            input_ids=fed,
            attention_mask=torch.cat([context_mask[owners], label_mask[:, :-1]], dim=1),
            position_ids=positions[owners, -1:] + 1 + torch.arange(fed.shape[1], device=model.device),
            use_cache=True,
            **kept,
        )
        rest = more.logits.float().log_softmax(-1).gather(2, labels[:, 1:, None]).squeeze(2)
        # Not a product: what stands at the padding may be anything.
        scores = torch.cat([scores, rest.masked_fill(label_mask[:, 1:] == 0, 0.0)], dim=1)
    sums = scores.sum(1).cpu()
    if sums.isnan().any():
        raise bad_value(
            "log_probs", float("nan"), "the model's logits are no numbers; try another dtype", NonFiniteError
        )
    return [tuple(part.tolist()) for part in sums.split(counts.tolist())]


def _cache_of(model: Any) -> tuple[Any, dict[str, Any]]:
    """Return an empty cache of keys and values, and the argument that gives it to the model.

    Raises:
        ConfigError: The model takes none.
    """
    from transformers import DynamicCache

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = signature(base.forward).parameters
    # The newer name in transformers first: the older one still works there, but warns.
    names = [name for name in ("cache", "past_key_values") if name in known]
    if not names:
        remedy = "it keeps no keys and values, which the candidates of a question share; use generation"
        raise bad_value("model", type(base).__name__, remedy)
    cache = DynamicCache(config=base.config)
    return cache, {names[0]: cache}


def _context_length(item: Asked) -> int:
    return len(item.prompt) + len(item.lead)


def _padded(rows: Sequence[Sequence[int]], side: str, device: Any) -> tuple[Tensor, Tensor]:
    """Return rows of tokens as one tensor, and 1 where it is a token; the padding is never attended to."""
    from torch.nn.utils.rnn import pad_sequence

    tokens = [torch.tensor(row, dtype=torch.long) for row in rows]
    ones = [torch.ones_like(row) for row in tokens]
    ids, mask = (pad_sequence(part, batch_first=True, padding_side=side) for part in (tokens, ones))
    return ids.to(device), mask.to(device)
