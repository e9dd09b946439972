"""Conversations as tokens and labels, cut to fit without losing a response, and an account of what was cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aroma.errors import DataError, bad_value

from .examples import Conversation
from .prompt import PromptBuilder, Segment

if TYPE_CHECKING:
    from datasets import Dataset

NOT_LEARNED = -100
"""Label of a token that the loss leaves out."""

Row = tuple[list[int], list[int]]
"""Tokens and labels of one row."""


@dataclass(frozen=True)
class EncodeReport:
    """What became of the examples of a file.

    Args:
        examples: Examples of the file.
        rows: Rows made of them.
        tokens: Tokens of all rows.
        learned_tokens: Tokens that the loss is taken of.
        cut_prompts: Examples that lost tokens from the left of their prompt.
        cut_tokens: Tokens that those lost.
        cut_responses: Earlier responses of long chats that went with them.
        rewritten_responses: Earlier responses of chats that the chat template writes otherwise once more turns follow;
            they lead up to the last one and are not learned.
        split_texts: Plain texts that make several rows.
        dropped_long_responses: Examples left out because the response alone is longer than the limit.
        dropped_empty: Examples left out because a response, or the text, is empty.
    """

    examples: int
    rows: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    cut_prompts: int = 0
    cut_tokens: int = 0
    cut_responses: int = 0
    rewritten_responses: int = 0
    split_texts: int = 0
    dropped_long_responses: int = 0
    dropped_empty: int = 0

    @property
    def kept(self) -> int:
        """Examples that were not left out."""
        return self.examples - self.dropped_long_responses - self.dropped_empty

    def __str__(self) -> str:
        special = {
            "prompts cut from the left": self.cut_prompts,
            "earlier responses cut off with them": self.cut_responses,
            "earlier responses not learned, for the chat template rewrites them": self.rewritten_responses,
            "texts split": self.split_texts,
            "left out for a response over the limit": self.dropped_long_responses,
            "left out for an empty response": self.dropped_empty,
        }
        told = [f"{count} {name}" for name, count in special.items() if count]
        return (
            f"{self.examples} examples make {self.rows} rows of {self.tokens} tokens, {self.learned_tokens} of them "
            f"learned ({', '.join(told) or 'none cut, none left out'})"
        )


def encode_conversations(
    conversations: Sequence[Conversation], builder: PromptBuilder, max_length: int, field: str
) -> tuple[Dataset, EncodeReport]:
    """Tokenize conversations in their order; none is padded.

    An example over the limit loses tokens from the left of its prompt, never of its last response; a
    beginning-of-text token stays. Of a chat, earlier responses that are cut into go as a whole. A plain text over the
    limit is split into rows, every token of which but the text's first is predicted once.

    Args:
        conversations: Examples.
        builder: Makes the tokens.
        max_length: Most tokens of a row, special tokens included.
        field: The recipe's key of the file, for errors.

    Returns:
        Rows with `input_ids`, `labels` (-100: not learned) and `length`, and the account.

    Raises:
        ConfigError: `max_length` is below 3.
        DataError: No example is left, or one that no prompt can be made of.
    """
    from datasets import Dataset

    if max_length < 3:
        raise bad_value("data.max_length", max_length, "give 3 tokens or more")
    counts: Counter[str] = Counter()
    rows: list[Row] = []
    for number, conversation in enumerate(conversations, start=1):
        if _is_empty(conversation):
            counts["dropped_empty"] += 1
            continue
        segments = builder.segments(conversation, f"{field} ({conversation.source or f'row {number}'})")
        if conversation.text is not None:
            rows.extend(_split(builder.bos_ids, segments[-1].ids, max_length, counts))
        else:
            counts["rewritten_responses"] += _responses_of(conversation) - sum(part.response for part in segments)
            rows.extend(_fit(segments, builder, max_length, counts))
    ids = [row for row, _ in rows]
    # The first token of a row has nothing to be predicted from; in a packed row it must not be from another example.
    labels = [[NOT_LEARNED, *row[1:]] for _, row in rows]
    report = EncodeReport(
        examples=len(conversations),
        rows=len(rows),
        tokens=sum(map(len, ids)),
        learned_tokens=sum(label != NOT_LEARNED for row in labels for label in row),
        **counts,
    )
    if not rows:
        remedy = (
            f"no example is left to learn from with data.max_length={max_length}; mend the file or raise the limit"
        )
        raise bad_value(field, str(report), remedy, DataError)
    data = {"input_ids": ids, "labels": labels, "length": [len(row) for row in ids]}
    return Dataset.from_dict(data), report


def _is_empty(conversation: Conversation) -> bool:
    if conversation.text is not None:
        return not conversation.text.strip()
    return not all(turn.text.strip() for turn in conversation.turns if turn.role == "assistant")


def _responses_of(conversation: Conversation) -> int:
    return sum(turn.role == "assistant" for turn in conversation.turns)


def _fit(segments: Sequence[Segment], builder: PromptBuilder, most: int, counts: Counter[str]) -> Iterator[Row]:
    """Yield the row of a conversation, cut from the left; nothing where its last response does not fit."""
    ids = [token for segment in segments for token in segment.ids]
    labels = [token if segment.learned else NOT_LEARNED for segment in segments for token in segment.ids]
    front = builder.kept_at_front(ids)
    if len(segments[-1].ids) > most - 1:  # one token must be left for it to be predicted from
        counts["dropped_long_responses"] += 1
        return
    cut = len(ids) - most
    if cut > 0:
        cut, responses = _whole_responses(segments, front + cut)
        counts["cut_prompts"] += 1
        counts["cut_tokens"] += cut - front
        counts["cut_responses"] += responses
        ids, labels = [*ids[:front], *ids[cut:]], [*labels[:front], *labels[cut:]]
    yield ids, labels


def _whole_responses(segments: Sequence[Segment], cut: int) -> tuple[int, int]:
    """Move a cut behind the response in which it falls; return where it is, and how many responses lie before it."""
    end = responses = 0
    for segment in segments:
        start, end = end, end + len(segment.ids)
        if segment.response and start < cut:
            cut, responses = max(cut, end), responses + 1
    return cut, responses


def _split(bos: list[int], ids: list[int], most: int, counts: Counter[str]) -> Iterator[Row]:
    """Yield a plain text as rows, each after a beginning-of-text token, or else after the last token before it."""
    if len(bos) + len(ids) <= most:
        yield [*bos, *ids], [*bos, *ids]
        return
    counts["split_texts"] += 1
    start = 0
    while start < len(ids):
        front = bos or ids[max(start - 1, 0) : start]
        piece = ids[start : start + most - len(front)]
        yield [*front, *piece], [*front, *piece]
        start += len(piece)
