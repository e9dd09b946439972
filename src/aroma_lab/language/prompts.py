"""Files of prompts to answer, and files of their answers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from aroma.errors import DataError, bad_value
from aroma.files import write_text

from .examples import Role, Turn, instruction_turns
from .generate import Generation
from .records import read_records
from .spec import LanguageSpec

PROMPT = "prompt"
"""Key of a prompt that is a single text."""

_ADDED = ("response", "finished")


def load_prompts(path: str, spec: LanguageSpec) -> list[tuple[dict[str, Any], tuple[Turn, ...]]]:
    """Return each row of a JSONL file (or of a JSON list) with the turns that it asks to go on.

    A row has a `prompt`, or what training data has: messages (the last one the user's), or an instruction and perhaps
    an input.

    Args:
        path: The file.
        spec: Names of the columns.

    Raises:
        DataError: No such file, a damaged row (with its number), or one that has none of these.
    """
    rows = read_records("prompts", path)
    return [(row, _turns_of(f"prompts (row {number})", row, spec)) for number, row in enumerate(rows, start=1)]


def write_answers(
    path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]], answers: Sequence[Generation]
) -> None:
    """Write each row with its `response`, and whether it was `finished` or cut at the limit, as a JSON line.

    Raises:
        DataError: The file exists.
    """
    refuse_existing(path)
    lines = [
        json.dumps({**row, "response": answer.text, "finished": answer.finished}, ensure_ascii=False) + "\n"
        for row, answer in zip(rows, answers, strict=True)
    ]
    write_text(path, "".join(lines))


def refuse_existing(path: str | os.PathLike[str]) -> None:
    """Raise if there is a file already where answers are to be written.

    Raises:
        DataError: There is.
    """
    if Path(path).exists():
        raise bad_value("out", str(path), "it exists, and nothing is overwritten; give another", DataError)


def _turns_of(where: str, row: Mapping[str, Any], spec: LanguageSpec) -> tuple[Turn, ...]:
    taken = [key for key in _ADDED if key in row]
    if taken:
        raise bad_value(where, row[taken[0]], f"it has a {taken[0]}, which the answer would overwrite", DataError)
    if PROMPT in row:
        return (Turn("user", _text(where, row[PROMPT])),)
    if spec.messages in row:
        messages = row[spec.messages]
        if not isinstance(messages, list):
            raise bad_value(where, messages, "give a list of messages, each with role and content", DataError)
        return tuple(_turn_of(where, message) for message in messages)
    if spec.instruction in row:
        return instruction_turns(_text(where, row[spec.instruction]), _text(where, row.get(spec.input) or ""))
    remedy = f"it has no {PROMPT}, {spec.messages} or {spec.instruction}; give one of them"
    raise bad_value(where, list(row), remedy, DataError)


def _turn_of(where: str, message: Any) -> Turn:
    if not isinstance(message, dict) or message.get("role") not in get_args(Role):
        remedy = f"a message has a content and a role, one of {', '.join(get_args(Role))}; mend the row"
        raise bad_value(where, message, remedy, DataError)
    return Turn(message["role"], _text(where, message.get("content")))


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise bad_value(where, value, f"a {type(value).__name__}, not a text; mend the row", DataError)
    return value
