"""Examples out of files, checked, in the forms of TRL's data sets; and commonsense questions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aroma.errors import DataError, bad_value

from ..tasks.sources import Located, of_each

Messages = list[dict[str, str]]
"""A chat as chat templates take it: messages, each with `role` and `content`."""

_PAIRS = (("instruction", "output"), ("prompt", "completion"))


@dataclass(frozen=True)
class Example:
    """A chat whose last message is the assistant's, or a plain text.

    Args:
        content: The messages, or the text.
        where: File and row, for errors; not compared.
    """

    content: Messages | str
    where: str = field(default="", compare=False, repr=False)


def examples_of(rows: list[Located], text: str | None = None) -> list[Example]:
    """Return the example of every row.

    Args:
        text: Column of plain text, whatever other columns there are; None: as in `example_of`.

    Raises:
        DataError: Damaged rows, with their numbers.
    """
    return of_each(rows, lambda located: example_of(*located, text))


def messages_of(where: str, row: Mapping[str, Any]) -> Messages:
    """Return the prompt of a row: its `messages`, its `prompt`, or its `instruction` and perhaps an `input`.

    Raises:
        DataError: The prompt is empty.
    """
    if "messages" in row:
        return _messages(where, row["messages"])
    if isinstance(row.get("prompt"), list):
        return _messages(where, row["prompt"])
    prompt = _text(where, row.get("prompt", row.get("instruction")))
    given = "" if "prompt" in row else _text(where, row.get("input"))
    if not (prompt + given).strip():
        remedy = f"the prompt is empty; give a prompt, an instruction or messages. Its columns: {', '.join(row)}"
        raise bad_value(where, prompt, remedy, DataError)
    # As `doc_to_text` of commonsense.yaml writes it.
    return [_message("user", f"{prompt}\n\n{given}" if given.strip() else prompt)]


def example_of(where: str, row: Mapping[str, Any], text: str | None = None) -> Example:
    """Return the example of a row: `messages`, `prompt` and `completion`, `text`, or LLM-Adapters' `instruction`,
    `input` and `output`; with `text` that column. An empty response stays, as an empty message.

    Raises:
        DataError: A damaged row.
    """
    reply = next((reply for prompt, reply in _PAIRS if prompt in row and "messages" not in row), None)
    if text is None and ("messages" in row or reply):
        messages, said = messages_of(where, row), row.get(reply or "")
        if isinstance(said, list):
            messages += _messages(where, said)
        elif reply:
            messages.append(_message("assistant", _text(where, said)))
        if [one["role"] for one in messages[-1:]] != ["assistant"]:
            raise bad_value(where, messages, "the last message must be the assistant's; mend the row", DataError)
        return Example(messages, where)
    if (text or "text") not in row:
        remedy = "name its columns messages, or prompt and completion, or instruction and output, or text"
        raise bad_value(where, list(row), remedy, DataError)
    return Example(_text(where, row[text or "text"]), where)


def _messages(where: str, messages: Any) -> Messages:
    for one in messages if isinstance(messages, list) else [messages]:
        if not isinstance(one, dict) or not isinstance(one.get("role"), str) or "content" not in one:
            raise bad_value(where, one, "give a list of messages, each with a role and a content", DataError)
    return [_message(one["role"], _text(where, one["content"])) for one in messages]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _text(where: str, value: Any) -> str:
    """Return a text; a missing one is empty, a number is written out."""
    if value is None or isinstance(value, str | int | float):
        return "" if value is None else str(value)
    raise bad_value(where, value, f"a {type(value).__name__}, not a text; mend the row", DataError)


_ANSWER_FORMAT = re.compile(r"^[ \t]*answer format:[ \t]*(\S.*?)\s*$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Question:
    """One question in the JSON form of LLM-Adapters.

    Args:
        prompt: The message with the question; its instruction ends with a line that lists the labels.
        output: The right response, which ends with `answer`.
        answer: The right label.
        candidates: The labels to choose from, such as `answer1`.
    """

    prompt: Messages
    output: str
    answer: str
    candidates: Sequence[str]

    @property
    def lead(self) -> str:
        """What a response says before the label, such as `the correct answer is `; may be empty."""
        return self.output.removesuffix(self.answer)

    @property
    def example(self) -> Example:
        """The question with its right response, to be trained on."""
        return Example([*self.prompt, _message("assistant", self.output)])


def questions_of(rows: list[Located]) -> list[Question]:
    """Return the question of every row; one DataError names the problems of several."""
    return of_each(rows, lambda located: question_of(*located))


def question_of(where: str, row: Mapping[str, Any]) -> Question:
    """Return the question of a row.

    Raises:
        DataError: A missing value, an instruction that does not end with a line such as `Answer format: a/b/c`, or an
            answer that is not listed or not the end of the output.
    """
    instruction, output, answer = (_text(where, row.get(name)) for name in ("instruction", "output", "answer"))
    output, answer = output.strip(), answer.strip()
    listed = _ANSWER_FORMAT.findall(instruction)
    candidates = tuple(label.strip() for label in listed[-1].split("/") if label.strip()) if listed else ()
    if not len(set(candidates)) == len(candidates) > 1:
        remedy = "end it with a line such as 'Answer format: answer1/answer2' that lists two labels or more, each once"
        raise bad_value(f"{where}, instruction", instruction[-80:], remedy, DataError)
    if answer not in candidates or not output.endswith(answer):
        remedy = f"it must be one of {', '.join(candidates)}, and end the output {output[-80:]!r}; mend the row"
        raise bad_value(f"{where}, answer", answer, remedy, DataError)
    prompt = messages_of(where, {"instruction": instruction, "input": row.get("input")})
    return Question(prompt, output, answer, candidates)
