"""Examples out of files, checked and encoded: instructions, chats, plain text, and commonsense questions."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from aroma.errors import DataError, bad_value
from aroma.files import write_text

from ..specs import LanguageSpec
from ..tasks.sources import Columns, read_file, read_hub
from .template import Role, Segment, Template, Turn, instruction_turns

if TYPE_CHECKING:
    from datasets import Dataset

NOT_LEARNED = -100
"""Label of a token that the loss leaves out."""

# Reading -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A conversation whose last turn is the assistant's, or a plain text.

    Args:
        turns: The conversation; empty where the example is plain text.
        text: The plain text; None where there are turns.
        source: File and row, for errors; not compared.
    """

    turns: tuple[Turn, ...]
    text: str | None = None
    source: str = field(default="", compare=False)

    @property
    def learned_texts(self) -> list[str]:
        """The texts of the assistant, or the plain text."""
        return [turn.text for turn in self.turns if turn.role == "assistant"] if self.text is None else [self.text]


def load_examples(key: str, path: str, spec: LanguageSpec) -> list[Example]:
    """Read every row of a file as an example; an empty output stays, as an empty turn.

    Args:
        key: The recipe's key of the file, for errors.
        path: A .jsonl or .ndjson file (an object a line), a .json file (a list of objects), or .csv, .tsv, .parquet.
        spec: Names of the columns.

    Raises:
        DataError: No such file, a damaged row (with its number), a missing column, no rows, a row without
            instruction, or a value that is not text.
    """
    formats = _formats(spec)
    if Path(path).suffix.lower() not in (".json", ".jsonl", ".ndjson"):
        index, columns = read_file(key, path, [names for _, names in formats])
        return _examples(key, path, formats[index][0], _rows_of(columns), spec)
    rows = read_records(key, path)
    there = dict.fromkeys(name for row in rows for name in row)
    kind = next((kind for kind, names in formats if there.keys() >= set(names)), None)
    if kind is None:
        wanted = " or ".join(" and ".join(names) for names in dict(formats).values())
        remedy = "Name them by language.instruction, .input, .output, .messages or .text"
        columns_there = ", ".join(map(repr, there))
        raise bad_value(key, path, f"it has no {wanted}; its columns are {columns_there}. {remedy}", DataError)
    return _examples(key, path, kind, rows, spec)


def load_hub_examples(key: str, split: str, name: str, config: str | None, spec: LanguageSpec) -> list[Example]:
    """Read every row of a split of a hub data set as an example; see `load_examples` and `read_hub`."""
    formats = _formats(spec)
    index, columns = read_hub(key, split, name, config, [names for _, names in formats])
    return _examples(key, f"{name} {split}", formats[index][0], _rows_of(columns), spec)


def load_joined(
    load: Callable[[str, str, LanguageSpec], list[Any]], key: str, path: str, spec: LanguageSpec
) -> list[Any]:
    """Return what `load` reads from a file, or from several files joined by `+`, one after another."""
    return [example for one in joined_files(path) for example in load(key, one, spec)]


def joined_files(path: str) -> list[str]:
    """Return the paths of several files joined by `+`, or of the one file that there is."""
    return [path] if Path(path).exists() else path.split("+")


def read_records(key: str, path: str) -> list[dict[str, Any]]:
    """Return the objects of a JSON list (.json) or of JSON lines (any other suffix).

    Args:
        key: The recipe's key, for errors.

    Raises:
        DataError: No such file, not UTF-8, not JSON, something that is not an object (with its line or row), or no
            rows.
    """
    file = Path(path)
    if not file.is_file():
        raise bad_value(key, path, "no such file; give the path of a JSONL file or of a JSON list", DataError)
    where = ""
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".json":
            values = json.loads(text)
            if not isinstance(values, list):
                raise bad_value(key, path, f"it holds a {type(values).__name__}, not a list; mend it", DataError)
            rows = {f"row {number}": value for number, value in enumerate(values, start=1)}
        else:
            rows = {}
            for number, line in enumerate(text.split("\n"), start=1):
                where = f"line {number}"
                if line.strip():
                    rows[where] = json.loads(line)
    except UnicodeDecodeError as error:
        raise bad_value(key, path, f"not UTF-8 text (byte {error.start}); convert the file", DataError) from error
    except json.JSONDecodeError as error:
        raise bad_value(key, path, f"{where or 'it is'} not JSON ({error}); mend it", DataError) from error
    for where, row in rows.items():
        if not isinstance(row, dict):
            raise bad_value(key, path, f"{where}: a {type(row).__name__}, not an object; mend it", DataError)
    if not rows:
        raise bad_value(key, path, "it has no rows; give at least one example", DataError)
    return list(rows.values())


def write_records(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write objects to a file, a line each."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def turns_of_messages(where: str, messages: Any) -> tuple[Turn, ...]:
    """Return the turns of a list of `{role, content}`, in whatever order; a content may be missing or a number.

    Raises:
        DataError: Not a list, or a message without a known role.
    """
    if not isinstance(messages, list):
        raise bad_value(where, messages, "give a list of messages, each with role and content", DataError)
    turns = []
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise bad_value(where, message, "a message has a role and a content; mend the row", DataError)
        if message["role"] not in get_args(Role):
            remedy = f"a message's role is one of {', '.join(get_args(Role))}; leave the row out"
            raise bad_value(where, message["role"], remedy, DataError)
        turns.append(Turn(cast(Role, message["role"]), _text(where, message["content"])))
    return tuple(turns)


def _formats(spec: LanguageSpec) -> list[tuple[str, list[str]]]:
    """Return formats with the columns that they may have, the preferred ones first."""
    known = [
        ("instruction", [spec.instruction, spec.input, spec.output]),
        ("instruction", [spec.instruction, spec.output]),
        ("messages", [spec.messages]),
        ("text", [spec.text]),
    ]
    return [(kind, names) for kind, names in known if spec.format in ("auto", kind)]


def _rows_of(columns: Columns) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _examples(
    key: str, source: str, kind: str, rows: Sequence[Mapping[str, Any]], spec: LanguageSpec
) -> list[Example]:
    return [_example(key, number, f"{source}, row {number}", kind, row, spec) for number, row in enumerate(rows, 1)]


def _example(key: str, number: int, source: str, kind: str, row: Mapping[str, Any], spec: LanguageSpec) -> Example:
    if kind == "text":
        return Example((), _text(_where(key, spec.text, number), row.get(spec.text)), source)
    if kind == "messages":
        return Example(turns_of_messages(_where(key, spec.messages, number), row.get(spec.messages)), None, source)
    instruction, given, output = (
        _text(_where(key, column, number), row.get(column)) for column in (spec.instruction, spec.input, spec.output)
    )
    if not (instruction + given).strip():
        where = _where(key, spec.instruction, number)
        raise bad_value(where, "", "fill it in or leave the row out", DataError)
    return Example((*instruction_turns(instruction, given), Turn("assistant", output)), None, source)


def _text(where: str, value: Any) -> str:
    """Return a text; a missing one is empty, a number is written out."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise bad_value(where, value, f"a {type(value).__name__}, not a text; mend the row", DataError)


def _where(key: str, column: str, row: int) -> str:
    return f"{key} (column {column!r}, row {row})"


# Commonsense questions -----------------------------------------------------------------------------------------------

_ANSWER_FORMAT = re.compile(r"^[ \t]*answer format:[ \t]*(\S.*?)\s*$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Question:
    """One question in the JSON form of LLM-Adapters.

    Args:
        instruction: The question, with a last line that lists the labels.
        input: What the instruction is about; may be empty.
        output: The right response, which ends with `answer`.
        answer: The right label.
        candidates: The labels to choose from, such as `answer1`.
    """

    instruction: str
    input: str
    output: str
    answer: str
    candidates: tuple[str, ...]

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The prompt, as in training."""
        return instruction_turns(self.instruction, self.input)

    @property
    def lead(self) -> str:
        """What a response says before the label, such as `the correct answer is `; may be empty."""
        return self.output.removesuffix(self.answer)

    def response_of(self, label: str) -> str:
        """Return the whole response that gives a label."""
        return f"{self.lead}{label}"


def load_questions(key: str, path: str, spec: LanguageSpec) -> list[Question]:
    """Read every row of a file as a question; its instruction ends with a line such as `Answer format: a/b/c`.

    Args:
        key: What the file is called in errors.
        path: A JSON list (.json) or JSON lines.
        spec: Names of the columns of instruction, input and output; the right label is in `answer`.

    Raises:
        DataError: No such file, a damaged row, a missing column or value, no candidates, or an answer that is not
            among them or not the end of the output; with the number of the row.
    """
    return [_question(key, number, row, spec) for number, row in enumerate(read_records(key, path), start=1)]


def _question(key: str, number: int, row: Mapping[str, Any], spec: LanguageSpec) -> Question:
    def require(column: str, value: Any, fine: Any, remedy: str) -> None:
        if not fine:
            raise bad_value(_where(key, column, number), value, remedy, DataError)

    def text(column: str) -> str:
        value = row.get(column)
        fine = isinstance(value, str) and value.strip()
        require(column, value, fine, "give a text that is not empty, or leave the row out")
        return cast(str, value)

    # Not stripped: the prompt of a question is, to the last space, the prompt of a training example.
    instruction = text(spec.instruction)
    given = text(spec.input) if row.get(spec.input) else ""
    output, answer = text(spec.output).strip(), text("answer").strip()
    lines = _ANSWER_FORMAT.findall(instruction)
    candidates = tuple(label.strip() for label in lines[-1].split("/") if label.strip()) if lines else ()
    remedy = "end it with a line such as 'Answer format: answer1/answer2' that lists two labels or more, each once"
    require(spec.instruction, instruction[-80:], len(set(candidates)) == len(candidates) > 1, remedy)
    remedy = f"it is none of the candidates {', '.join(candidates)}; mend the row"
    require("answer", answer, answer in candidates, remedy)
    remedy = f"it does not end with the answer {answer!r}; mend the row"
    require(spec.output, output, output.endswith(answer), remedy)
    return Question(instruction, given, output, answer, candidates)


# Encoding ------------------------------------------------------------------------------------------------------------

CUT_PROMPTS = "prompts cut from the left"
CUT_RESPONSES = "earlier responses cut off with them"
REWRITTEN = "earlier responses not learned, for the chat template rewrites them"
SPLIT_TEXTS = "texts split"
LONG_RESPONSES = "left out for a response over the limit"
EMPTY_RESPONSES = "left out for an empty response"


@dataclass(frozen=True)
class EncodeReport:
    """What became of the examples of a file.

    Args:
        examples: Examples of the file.
        rows: Rows made of them.
        tokens: Tokens of all rows.
        learned_tokens: Tokens that the loss is taken of.
        counts: How many examples were cut or left out, or responses not learned, by the names above.
    """

    examples: int
    rows: int
    tokens: int
    learned_tokens: int
    counts: Counter[str]

    @property
    def kept(self) -> int:
        """Examples that were not left out."""
        return self.examples - self.counts[LONG_RESPONSES] - self.counts[EMPTY_RESPONSES]

    def __str__(self) -> str:
        names = (CUT_PROMPTS, CUT_RESPONSES, REWRITTEN, SPLIT_TEXTS, LONG_RESPONSES, EMPTY_RESPONSES)
        told = ", ".join(f"{self.counts[name]} {name}" for name in names if self.counts[name])
        return (
            f"{self.examples} examples make {self.rows} rows of {self.tokens} tokens, {self.learned_tokens} of them "
            f"learned ({told or 'none cut, none left out'})"
        )


Row = tuple[list[int], list[bool]]
"""Tokens of one row, and which of them are learned."""


def encode(examples: Sequence[Example], template: Template, max_length: int, key: str) -> tuple[Dataset, EncodeReport]:
    """Return what `encode_rows` returns, in the form that TRL's SFTTrainer takes as already tokenized."""
    from datasets import Dataset

    rows, report = encode_rows(examples, template, max_length, key)
    return Dataset.from_dict(rows), report


def encode_rows(
    examples: Sequence[Example], template: Template, max_length: int, key: str
) -> tuple[dict[str, list[list[int]]], EncodeReport]:
    """Tokenize examples in their order.

    An example over the limit loses tokens from the left of its prompt, never of its last response; a
    beginning-of-text token stays. In a chat, earlier responses that are cut into go as a whole. A plain text over the
    limit is split into rows; every token but the text's first is predicted once.

    Args:
        template: Makes the tokens.
        max_length: Most tokens of a row, special tokens included.
        key: The recipe's key of the file, for errors.

    Returns:
        `input_ids` and `labels` (-100: not learned) of every row, and the account.

    Raises:
        ConfigError: `max_length` is below 3.
        DataError: No example is left, or one that no prompt can be made of.
    """
    if max_length < 3:
        raise bad_value("data.max_length", max_length, "give 3 tokens or more")
    counts: Counter[str] = Counter()
    rows: list[Row] = []
    for number, example in enumerate(examples, start=1):
        texts = example.learned_texts
        if not all(text.strip() for text in texts):
            counts[EMPTY_RESPONSES] += 1
        elif example.text is not None:
            rows.extend(_split(template.bos_ids, template.plain_text(example.text), max_length, counts))
        else:
            segments = template.segments(example.turns, f"{key} ({example.source or f'row {number}'})")
            counts[REWRITTEN] += len(texts) - sum(segment.response for segment in segments)
            rows.extend(_fit(segments, template, max_length, counts))
    ids = [row for row, _ in rows]
    # The first token of a row has nothing to be predicted from; in a packed row it must not be the example before it.
    labels = [
        [NOT_LEARNED, *(token if chosen else NOT_LEARNED for token, chosen in zip(row[1:], learned[1:], strict=True))]
        for row, learned in rows
    ]
    learned_tokens = sum(label != NOT_LEARNED for row in labels for label in row)
    report = EncodeReport(len(examples), len(rows), sum(map(len, ids)), learned_tokens, counts)
    if not rows:
        remedy = f"no example is left to learn from with data.max_length={max_length}; "
        raise bad_value(key, str(report), f"{remedy}mend the file or raise the limit", DataError)
    return {"input_ids": ids, "labels": labels}, report


def _fit(segments: Sequence[Segment], template: Template, most: int, counts: Counter[str]) -> Iterator[Row]:
    """Yield the row of a conversation, cut from the left; nothing where its last response does not fit."""
    ids = [token for segment in segments for token in segment.ids]
    learned = [segment.response or template.spec.learn == "all" for segment in segments for _ in segment.ids]
    if len(segments[-1].ids) > most - 1:  # one token must be left for it to be predicted from
        counts[LONG_RESPONSES] += 1
        return
    if len(ids) > most:
        front = template.kept_at_front(ids)
        cut, responses = _whole_responses(segments, front + len(ids) - most)
        counts[CUT_PROMPTS] += 1
        counts[CUT_RESPONSES] += responses
        ids, learned = [*ids[:front], *ids[cut:]], [*learned[:front], *learned[cut:]]
    yield ids, learned


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
    counts[SPLIT_TEXTS] += len(bos) + len(ids) > most
    start = 0
    while start < len(ids):
        front = bos or ids[max(start - 1, 0) : start]
        piece = ids[start : start + most - len(front)]
        yield [*front, *piece], [True] * (len(front) + len(piece))
        start += len(piece)
