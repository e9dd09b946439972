"""Examples out of files, checked and encoded: instructions, chats, plain text, and commonsense questions."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from aroma.errors import AromaError, DataError, bad_value

from ..specs import LanguageSpec
from ..tasks.sources import Columns, read_file, read_hub
from .template import Role, Segment, Template, Turn, instruction_turns, order_fault

if TYPE_CHECKING:
    from datasets import Dataset

NOT_LEARNED = -100
"""Label of a token that the loss leaves out."""

_JSON = (".json", ".jsonl", ".ndjson")

# Reading -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One example.

    Args:
        turns: Turns, the last one the assistant's; none where the example is plain text.
        text: The plain text; None where there are turns.
        source: File and row, for errors; not compared.
    """

    turns: tuple[Turn, ...]
    text: str | None = None
    source: str = dataclass_field(default="", compare=False)

    @property
    def responses(self) -> list[str]:
        """The texts of the assistant."""
        return [turn.text for turn in self.turns if turn.role == "assistant"]


def load_examples(field: str, path: str, spec: LanguageSpec) -> list[Example]:
    """Read every row of a file as an example; an empty output stays, as an empty turn.

    Args:
        field: The recipe's key of the file, for errors.
        path: A .jsonl or .ndjson file (an object a line), a .json file (a list of objects), or .csv, .tsv, .parquet.
        spec: Names of the columns.

    Raises:
        DataError: No such file, a damaged row (with its number), a missing column, no rows, a row without
            instruction, a value that is not text, or messages in a wrong order.
    """
    return _with_source(path, _examples(field, *_read_columns(field, path, spec), spec))


def load_hub_examples(field: str, split: str, name: str, config: str | None, spec: LanguageSpec) -> list[Example]:
    """Read every row of a split of a hub data set as an example; see `load_examples`.

    Args:
        field: The recipe's key of the split, for errors.
        split: Name of the split.
        name: Hub name or local folder.
        config: Configuration, where the data set has several.
        spec: Names of the columns.

    Raises:
        DataError: As `load_examples`; or there is no such data set or split.
    """
    formats = _formats(spec)
    index, columns = read_hub(field, split, name, config, [names for _, names in formats])
    return _with_source(f"{name} {split}", _examples(field, formats[index][0], columns, spec))


def load_joined(
    load: Callable[[str, str, LanguageSpec], list[Any]], field: str, path: str, spec: LanguageSpec
) -> list[Any]:
    """Return what `load` reads from a file, or from several files joined by `+`, one after another."""
    paths = [path] if Path(path).exists() else path.split("+")
    return [example for one in paths for example in load(field, one, spec)]


def read_records(field: str, path: str) -> list[dict[str, Any]]:
    """Return the objects of a JSON list (.json) or of JSON lines (any other suffix).

    Args:
        field: The recipe's key, for errors.
        path: The file.

    Raises:
        DataError: No such file, not UTF-8, not JSON, something that is not an object (with its line or row), or no
            rows.
    """
    file = Path(path)
    if not file.is_file():
        raise bad_value(field, path, "no such file; give the path of a JSONL file or of a JSON list", DataError)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise bad_value(field, path, f"not UTF-8 text (byte {error.start}); convert the file", DataError) from error
    rows: list[tuple[str, Any]] = []
    where = ""
    try:
        if file.suffix.lower() == ".json":
            values = json.loads(text)
            if not isinstance(values, list):
                raise bad_value(field, path, f"it holds a {type(values).__name__}, not a list; mend it", DataError)
            rows = [(f"row {number}", value) for number, value in enumerate(values, start=1)]
        else:
            for number, line in enumerate(text.split("\n"), start=1):
                where = f"line {number}: "
                if line.strip():
                    rows.append((f"line {number}", json.loads(line)))
    except json.JSONDecodeError as error:
        raise bad_value(field, path, f"{where}not JSON ({error}); mend it", DataError) from error
    for place, row in rows:
        if not isinstance(row, dict):
            raise bad_value(field, path, f"{place}: a {type(row).__name__}, not an object; mend it", DataError)
    if not rows:
        raise bad_value(field, path, "it has no rows; give at least one example", DataError)
    return [row for _, row in rows]


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


def _with_source(source: str, examples: Sequence[Example]) -> list[Example]:
    return [replace(example, source=f"{source}, row {row}") for row, example in enumerate(examples, start=1)]


def _formats(spec: LanguageSpec) -> list[tuple[str, list[str]]]:
    """Return formats with the columns that they may have, the preferred ones first."""
    known = {
        "instruction": [[spec.instruction, spec.input, spec.output], [spec.instruction, spec.output]],
        "messages": [[spec.messages]],
        "text": [[spec.text]],
    }
    kinds = list(known) if spec.format == "auto" else [spec.format]
    return [(kind, names) for kind in kinds for names in known[kind]]


def _read_columns(field: str, path: str, spec: LanguageSpec) -> tuple[str, Columns]:
    """Read the columns of the first format that the file has; return the format and the columns."""
    formats = _formats(spec)
    if Path(path).suffix.lower() not in _JSON:
        index, columns = read_file(field, path, [names for _, names in formats])
        return formats[index][0], columns
    rows = read_records(field, path)
    there = list(dict.fromkeys(name for row in rows for name in row))
    for kind, names in formats:
        if set(names) <= set(there):
            return kind, {name: [row.get(name) for row in rows] for name in names}
    raise bad_value(
        field,
        path,
        f"it has no {' or '.join(' and '.join(names) for names in dict(formats).values())}; its columns are "
        f"{', '.join(map(repr, there))}. Name them by language.instruction, .input, .output, .messages or .text",
        DataError,
    )


def _examples(field: str, kind: str, columns: Columns, spec: LanguageSpec) -> list[Example]:
    match kind:
        case "instruction":
            return _from_instructions(field, columns, spec)
        case "messages":
            found = []
            for row, value in enumerate(columns[spec.messages], start=1):
                where = _where(field, spec.messages, row)
                turns = turns_of_messages(where, value)
                fault = order_fault(turns, "assistant")
                if fault is not None:
                    raise bad_value(where, [turn.role for turn in turns], f"{fault}; mend the row", DataError)
                found.append(Example(turns))
            return found
    return [Example((), text) for text in _texts(field, spec.text, columns[spec.text])]


def _from_instructions(field: str, columns: Columns, spec: LanguageSpec) -> list[Example]:
    instructions = _texts(field, spec.instruction, columns[spec.instruction])
    outputs = _texts(field, spec.output, columns[spec.output])
    inputs = _texts(field, spec.input, columns.get(spec.input, [""] * len(outputs)))
    for row, parts in enumerate(zip(instructions, inputs, strict=True), start=1):
        if not "".join(parts).strip():
            raise bad_value(_where(field, spec.instruction, row), "", "fill it in or leave the row out", DataError)
    return [
        Example((*instruction_turns(instruction, given), Turn("assistant", output)))
        for instruction, given, output in zip(instructions, inputs, outputs, strict=True)
    ]


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


# Commonsense questions -----------------------------------------------------------------------------------------------


def _numbered(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}{number}" for number in range(1, count + 1))


SETS: dict[str, tuple[str, ...]] = {
    "boolq": ("true", "false"),
    "piqa": _numbered("solution", 2),
    "social_i_qa": _numbered("answer", 3),
    "hellaswag": _numbered("ending", 4),
    "winogrande": _numbered("option", 2),
    "ARC-Easy": _numbered("answer", 4),
    "ARC-Challenge": _numbered("answer", 4),
    "openbookqa": _numbered("answer", 4),
}
"""The eight sets of Table 3, and the labels of each for rows whose instruction does not list them."""

_ANSWER_FORMAT = re.compile(r"^[ \t]*answer format:[ \t]*(\S.*?)\s*$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Question:
    """One question in the JSON form of LLM-Adapters; the fields are the columns of the lm-evaluation-harness task.

    Args:
        instruction: What is asked, usually with a last line that lists the labels.
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


def load_questions(field: str, path: str, spec: LanguageSpec) -> list[Question]:
    """Read every row of a file as a question.

    The candidates are those that the instruction lists in its last line `Answer format: a/b/c`; without one, the
    labels of the set that file or folder is named after.

    Args:
        field: What the file is called in errors.
        path: A JSON list (.json) or JSON lines.
        spec: Names of the columns of instruction, input and output; the right label is in `answer`.

    Raises:
        DataError: No such file, a damaged row, a missing column or value, no candidates, or an answer that is not
            among them or not the end of the output; with the number of the row.
    """
    rows = read_records(field, path)
    lacking = [name for name in (spec.instruction, spec.output, "answer") if not any(name in row for row in rows)]
    if lacking:
        names = ", ".join(map(repr, dict.fromkeys(name for row in rows for name in row)))
        remedy = f"it has no column {', '.join(map(repr, lacking))}; its columns are {names}. A question has "
        raise bad_value(field, path, f"{remedy}an instruction, an output, and the right label in 'answer'", DataError)
    by_name = {name.lower(): labels for name, labels in SETS.items()}
    file = Path(path).resolve()
    known = by_name.get(file.stem.lower()) or by_name.get(file.parent.name.lower()) or ()
    return [_question(field, number, row, spec, known) for number, row in enumerate(rows, start=1)]


def _question(
    field: str, number: int, row: Mapping[str, Any], spec: LanguageSpec, set_labels: tuple[str, ...]
) -> Question:
    def bad(column: str, value: Any, remedy: str) -> AromaError:
        return bad_value(_where(field, column, number), value, remedy, DataError)

    def text(column: str) -> str:
        value = row.get(column)
        if not isinstance(value, str) or not value.strip():
            raise bad(column, value, "give a text that is not empty, or leave the row out")
        return value

    # Not stripped: the prompt of a question is, to the last space, the prompt of a training example.
    instruction = text(spec.instruction)
    given = text(spec.input) if row.get(spec.input) else ""
    output, answer = text(spec.output).strip(), text("answer").strip()
    lines = _ANSWER_FORMAT.findall(instruction)
    listed = tuple(label.strip() for label in lines[-1].split("/") if label.strip()) if lines else ()
    candidates = listed or set_labels
    if len(candidates) < 2 or len(set(candidates)) < len(candidates):
        remedy = "end it with a line such as 'Answer format: answer1/answer2' that lists two labels or more, each once"
        raise bad(spec.instruction, instruction[-80:], remedy)
    if answer not in candidates:
        raise bad("answer", answer, f"it is none of the candidates {', '.join(candidates)}; mend the row")
    if not output.endswith(answer):
        raise bad(spec.output, output, f"it does not end with the answer {answer!r}; mend the row")
    return Question(instruction, given, output, answer, candidates)


# Encoding ------------------------------------------------------------------------------------------------------------


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
        rewritten_responses: Earlier responses of chats that the chat template writes differently once more turns
            follow; they are part of the prompt and not learned.
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


Row = tuple[list[int], list[bool]]
"""Tokens of one row, and which of them are learned."""


def encode(
    examples: Sequence[Example], template: Template, max_length: int, field: str
) -> tuple[Dataset, EncodeReport]:
    """Tokenize examples in their order, in the form that TRL's SFTTrainer takes as already tokenized.

    An example over the limit loses tokens from the left of its prompt, never of its last response; a
    beginning-of-text token stays. In a chat, earlier responses that are cut into go as a whole. A plain text over the
    limit is split into rows; every token but the text's first is predicted once.

    Args:
        examples: Examples.
        template: Makes the tokens.
        max_length: Most tokens of a row, special tokens included.
        field: The recipe's key of the file, for errors.

    Returns:
        Rows with `input_ids` and `labels` (-100: not learned), and the account.

    Raises:
        ConfigError: `max_length` is below 3.
        DataError: No example is left, or one that no prompt can be made of.
    """
    from datasets import Dataset

    if max_length < 3:
        raise bad_value("data.max_length", max_length, "give 3 tokens or more")
    counts: Counter[str] = Counter()
    rows: list[Row] = []
    for number, example in enumerate(examples, start=1):
        texts = example.responses if example.text is None else [example.text]
        if not all(text.strip() for text in texts):
            counts["dropped_empty"] += 1
        elif example.text is not None:
            rows.extend(_split(template.bos_ids, template.plain_text(example.text), max_length, counts))
        else:
            segments = template.segments(example.turns, f"{field} ({example.source or f'row {number}'})")
            counts["rewritten_responses"] += len(texts) - sum(segment.response for segment in segments)
            rows.extend(_fit(segments, template, max_length, counts))
    ids = [row for row, _ in rows]
    # The first token of a row has nothing to be predicted from; in a packed row it must not be the example before it.
    labels = [
        [NOT_LEARNED, *(token if chosen else NOT_LEARNED for token, chosen in zip(row[1:], learned[1:], strict=True))]
        for row, learned in rows
    ]
    report = EncodeReport(
        examples=len(examples),
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
    return Dataset.from_dict({"input_ids": ids, "labels": labels}), report


def _fit(segments: Sequence[Segment], template: Template, most: int, counts: Counter[str]) -> Iterator[Row]:
    """Yield the row of a conversation, cut from the left; nothing where its last response does not fit."""
    ids = [token for segment in segments for token in segment.ids]
    learned = [segment.response or template.spec.learn == "all" for segment in segments for _ in segment.ids]
    front = template.kept_at_front(ids)
    if len(segments[-1].ids) > most - 1:  # one token must be left for it to be predicted from
        counts["dropped_long_responses"] += 1
        return
    cut = len(ids) - most
    if cut > 0:
        cut, responses = _whole_responses(segments, front + cut)
        counts["cut_prompts"] += 1
        counts["cut_tokens"] += cut - front
        counts["cut_responses"] += responses
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
    if len(bos) + len(ids) <= most:
        yield [*bos, *ids], [True] * (len(bos) + len(ids))
        return
    counts["split_texts"] += 1
    start = 0
    while start < len(ids):
        front = bos or ids[max(start - 1, 0) : start]
        piece = ids[start : start + most - len(front)]
        yield [*front, *piece], [True] * (len(front) + len(piece))
        start += len(piece)
