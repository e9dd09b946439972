"""Conversations out of files: instructions with their outputs, lists of messages, or plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast, get_args

from aroma.errors import DataError, bad_value

from ..tasks.sources import Columns, read_file, read_hub
from .records import read_records
from .spec import LanguageSpec

Role = Literal["system", "user", "assistant"]

_JSON = (".json", ".jsonl", ".ndjson")


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: Role
    text: str


@dataclass(frozen=True)
class Conversation:
    """One example.

    Args:
        turns: Turns, the last one the assistant's; none where the example is plain text.
        text: The plain text; None where there are turns.
        source: File and row, for errors; "": not out of a file. It does not count in comparisons.
    """

    turns: tuple[Turn, ...]
    text: str | None = None
    source: str = dataclass_field(default="", compare=False)


def load_conversations(field: str, path: str, spec: LanguageSpec) -> list[Conversation]:
    """Read every row of a file as a conversation; an empty output stays, as an empty turn.

    Args:
        field: The recipe's key of the file, for errors.
        path: A .jsonl or .ndjson file (an object a line), a .json file (a list of objects), or .csv, .tsv, .parquet.
        spec: Names of the columns.

    Raises:
        DataError: No such file, a damaged row (with its number), a missing column, no rows, a row without
            instruction, a value that is no text, or messages in an order that no chat has.
    """
    return _from_source(path, _conversations(field, *_read_columns(field, path, spec), spec))


def load_hub_conversations(
    field: str, split: str, name: str, config: str | None, spec: LanguageSpec
) -> list[Conversation]:
    """Read every row of a split of a hub data set as a conversation; see `load_conversations`.

    Args:
        field: The recipe's key of the split, for errors.
        split: Name of the split.
        name: Hub name or local folder.
        config: Configuration, where the data set has several.
        spec: Names of the columns.

    Raises:
        DataError: As `load_conversations`; or there is no such data set or split.
    """
    choices = _choices(spec)
    index, columns = read_hub(field, split, name, config, [names for _, names in choices])
    return _from_source(f"{name} {split}", _conversations(field, choices[index][0], columns, spec))


def _from_source(source: str, conversations: Sequence[Conversation]) -> list[Conversation]:
    return [
        replace(conversation, source=f"{source}, row {row}") for row, conversation in enumerate(conversations, start=1)
    ]


def _conversations(field: str, kind: str, columns: Columns, spec: LanguageSpec) -> list[Conversation]:
    match kind:
        case "instruction":
            return _from_instructions(field, columns, spec)
        case "messages":
            values = columns[spec.messages]
            return [
                Conversation(_turns_of(_where(field, spec.messages, row), value))
                for row, value in enumerate(values, start=1)
            ]
    return [Conversation((), text) for text in _texts(field, spec.text, columns[spec.text])]


def instruction_turns(instruction: str, input: str = "") -> tuple[Turn, ...]:
    """Return the turns that ask for a response: one, in which the input follows the instruction after a blank line."""
    return (Turn("user", f"{instruction}\n\n{input}" if input.strip() else instruction),)


def order_fault(turns: Sequence[Turn], last: Role) -> str | None:
    """Return what is wrong with the order of turns, or None: a system turn or none, then user and assistant in turn.

    Args:
        turns: The turns.
        last: Whose turn must be the last.
    """
    if any(turn.role == "system" for turn in turns[1:]):
        return "a system turn can only be the first"
    spoken = [turn.role for turn in turns if turn.role != "system"]
    if not spoken or spoken[0] != "user":
        return "the user speaks first, after a system turn if there is one"
    if any(one == other for one, other in pairwise(spoken)):
        return "user and assistant take turns, and here one of them speaks twice in a row"
    if spoken[-1] != last:
        return f"the last turn must be the {last}'s"
    return None


def _read_columns(field: str, path: str, spec: LanguageSpec) -> tuple[str, Columns]:
    """Read the columns of the first format that the file has; return the format and the columns."""
    choices = _choices(spec)
    if Path(path).suffix.lower() not in _JSON:
        index, columns = read_file(field, path, [names for _, names in choices])
        return choices[index][0], columns
    rows = read_records(field, path)
    there = list(dict.fromkeys(name for row in rows for name in row))
    for kind, names in choices:
        if set(names) <= set(there):
            return kind, {name: [row.get(name) for row in rows] for name in names}
    raise bad_value(
        field,
        path,
        f"it has no {' or '.join(' and '.join(names) for names in dict(choices).values())}; its columns are "
        f"{', '.join(map(repr, there))}. Name them by language.instruction, .input, .output, .messages or .text",
        DataError,
    )


def _choices(spec: LanguageSpec) -> list[tuple[str, list[str]]]:
    """Return formats with the columns that they may have, the better ones first."""
    known = {
        "instruction": [[spec.instruction, spec.input, spec.output], [spec.instruction, spec.output]],
        "messages": [[spec.messages]],
        "text": [[spec.text]],
    }
    kinds = list(known) if spec.format == "auto" else [spec.format]
    return [(kind, names) for kind in kinds for names in known[kind]]


def _from_instructions(field: str, columns: Columns, spec: LanguageSpec) -> list[Conversation]:
    instructions = _texts(field, spec.instruction, columns[spec.instruction])
    outputs = _texts(field, spec.output, columns[spec.output])
    inputs = _texts(field, spec.input, columns.get(spec.input, [""] * len(outputs)))
    for row, parts in enumerate(zip(instructions, inputs, strict=True), start=1):
        if not "".join(parts).strip():
            raise bad_value(_where(field, spec.instruction, row), "", "fill it in or leave the row out", DataError)
    return [
        Conversation((*instruction_turns(instruction, given), Turn("assistant", output)))
        for instruction, given, output in zip(instructions, inputs, outputs, strict=True)
    ]


def _turns_of(where: str, value: Any) -> tuple[Turn, ...]:
    if not isinstance(value, list):
        raise bad_value(where, value, "give a list of messages, each with role and content", DataError)
    turns = tuple(_turn_of(where, message) for message in value)
    fault = order_fault(turns, "assistant")
    if fault is not None:
        raise bad_value(where, [turn.role for turn in turns], f"{fault}; mend the row", DataError)
    return turns


def _turn_of(where: str, message: Any) -> Turn:
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise bad_value(where, message, "a message has a role and a content; mend the row", DataError)
    if message["role"] not in get_args(Role):
        remedy = f"a message's role is one of {', '.join(get_args(Role))}; leave the row out"
        raise bad_value(where, message["role"], remedy, DataError)
    return Turn(cast(Role, message["role"]), _text(where, message["content"]))


def _texts(field: str, column: str, values: Sequence[Any]) -> list[str]:
    return [_text(_where(field, column, row), value) for row, value in enumerate(values, start=1)]


def _text(where: str, value: Any) -> str:
    """Return a text; a missing one is empty, a number is written out."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise bad_value(where, value, f"a {type(value).__name__}, not a text; mend the row", DataError)


def _where(field: str, column: str, row: int) -> str:
    return f"{field} (column {column!r}, row {row})"
