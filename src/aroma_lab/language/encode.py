"""Examples as tokens, by the tokenizer's chat template: the learned tokens follow the prompt of generation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from aroma.errors import DataError, bad_value

from .data import Example, Messages

NOT_LEARNED = -100
"""Label of a token that the loss leaves out."""

PLAIN_TEMPLATE = (
    "{% set headings = {'system': 'Context', 'user': 'Request', 'assistant': 'Reply'} %}"
    "{% for message in messages %}{{ headings[message['role']] }}:\n"
    "{{ message['content'] ~ (eos_token if message['role'] == 'assistant' else '') }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Reply:\n{% endif %}"
)
"""For tokenizers without a chat template: each message under its heading, a blank line after it."""

_CUT, _SPLIT = "prompts cut from the left", "texts split"
_LONG, _EMPTY = "left out for a response over the limit", "left out for an empty response"

_Row = tuple[list[int], list[int]]  # tokens and labels


class Encoded(NamedTuple):
    """Rows of tokens, and what became of the examples."""

    rows: dict[str, list[list[int]]]
    """`input_ids` and `labels` of every row, which TRL's SFTTrainer takes as prepared."""
    kept: int
    """Examples that were not left out."""
    note: str
    """How many examples were cut or left out."""


def encode_rows(examples: Sequence[Example], tokenizer: Any, max_length: int, key: str) -> Encoded:
    """Tokenize examples in their order; of a chat every response is learned, with what ends it, and of a text all.

    A chat over the limit loses tokens from the left. A text over the limit is split into rows, and every token but
    the text's first is predicted once.

    Args:
        tokenizer: It has a chat template.
        max_length: Most tokens of a row, special tokens included.
        key: The recipe's key of the file, for errors.

    Raises:
        DataError: No example is left, or one that the chat template cannot write.
    """
    counts: Counter[str] = Counter()
    rows: list[_Row] = []
    for example in examples:
        content = example.content
        chat = content if isinstance(content, list) else [{"role": "assistant", "content": content}]
        if not all(one["content"].strip() for one in chat if one["role"] == "assistant"):
            counts[_EMPTY] += 1
        elif isinstance(content, str):
            rows += _split(tokenizer, content, max_length, counts)
        else:
            rows += _fit(encode_chat(tokenizer, content, example.where or key), max_length, counts)
    for _, labels in rows:
        labels[0] = NOT_LEARNED  # in a packed row it must not be predicted from the example before it
    learned = sum(label != NOT_LEARNED for _, labels in rows for label in labels)
    cut = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    note = (
        f"{len(examples)} examples make {len(rows)} rows of {sum(len(ids) for ids, _ in rows)} tokens, {learned} of "
        f"them learned ({cut or 'none cut, none left out'})"
    )
    if not learned:
        remedy = f"no example is left to learn from with max_length={max_length}; mend the file or raise the limit"
        raise bad_value(key, note, remedy, DataError)
    columns = zip(("input_ids", "labels"), zip(*rows, strict=True), strict=True)
    kept = len(examples) - counts[_LONG] - counts[_EMPTY]
    return Encoded({name: list(values) for name, values in columns}, kept, note)


def encode_chat(tokenizer: Any, messages: Messages, where: str) -> _Row:
    """Return a chat as tokens and labels, up to the end of its last response or to the heading of the next.

    Prompts and responses are tokenized apart, so that the learned tokens follow the tokens that generation begins
    from. Where the template rewrites earlier responses once others follow, as those with thoughts, the later ones
    alone are learned.

    Raises:
        DataError: The template refuses the messages, or writes a response in another way than after its prompt.
    """
    ids: list[int] = []
    labels: list[int] = []
    written = ""

    def add(text: str, learned: bool) -> None:
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids.extend(tokens)
        labels.extend(tokens if learned else [NOT_LEARNED] * len(tokens))

    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    for number in answers if answers[-1:] == [len(messages) - 1] else [*answers, len(messages)]:
        prompt = _render(tokenizer, messages[:number], True, where)
        if not prompt.startswith(written):
            ids, labels, written = [], [], ""
        add(prompt[len(written) :], False)
        if number == len(messages):
            break
        written = _render(tokenizer, messages[: number + 1], False, where)
        content, response = messages[number]["content"].strip(), written[len(prompt) :]
        if not written.startswith(prompt) or content not in response:
            remedy = "the chat template does not write this response after its prompt; leave the row out"
            raise bad_value(where, content[-80:], remedy, DataError)
        stop = _stop(tokenizer, response.rpartition(content)[2])
        end = response.index(stop, response.rindex(content) + len(content)) + len(stop) if stop else len(response)
        add(response[:end] + ("" if stop else tokenizer.eos_token), True)
        if number + 1 < len(messages):
            add(response[end:], False)
    return ids, labels


def begins_with(tokenizer: Any) -> list[int]:
    """Return the beginning-of-text token, if the tokenizer begins texts with one."""
    first: list[int] = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _render(tokenizer: Any, messages: Messages, to_follow: bool, where: str) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=to_follow)
    except TemplateError as error:
        remedy = f"the tokenizer's chat template refuses these messages ({error}); mend or leave out the row"
        raise bad_value(where, [message["role"] for message in messages], remedy, DataError) from error
    return text


def _stop(tokenizer: Any, text: str) -> str:
    """Return the first special token in a text; of two at one place the longer."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    return min((one for one in added if one in text), key=lambda one: (text.index(one), -len(one)), default="")


def _fit(row: _Row, most: int, counts: Counter[str]) -> Iterator[_Row]:
    """Yield the row of a chat, cut from the left; nothing where its last response does not fit."""
    ids, labels = row[0][-most:], row[1][-most:]
    if NOT_LEARNED not in labels:
        counts[_LONG] += 1
        return
    counts[_CUT] += len(row[0]) > most
    broken = labels.index(NOT_LEARNED)  # the rest of an earlier response
    yield ids, [NOT_LEARNED] * broken + labels[broken:]


def _split(tokenizer: Any, text: str, most: int, counts: Counter[str]) -> Iterator[_Row]:
    """Yield a plain text as rows, each after a beginning-of-text token, or else after the last token before it."""
    bos = begins_with(tokenizer)
    ids = [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
    counts[_SPLIT] += len(bos) + len(ids) > most
    start = 0
    while start < len(ids):
        front = bos or ids[max(start - 1, 0) : start]
        piece = ids[start : start + max(most - len(front), 1)]
        yield [*front, *piece], [*front, *piece]
        start += len(piece)
