"""Commonsense questions in the JSON form of LLM-Adapters: an instruction that ends with the labels to choose from.

Eight sets have it: BoolQ, PIQA, Social IQa, HellaSwag, WinoGrande, ARC-Easy, ARC-Challenge and OpenBookQA (Table 3).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aroma.errors import AromaError, DataError, bad_value

from .examples import Turn, instruction_turns
from .records import read_records
from .spec import LanguageSpec

ANSWER = "answer"
"""Column of the right label."""


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
"""Labels of each set, for rows whose instruction does not list them."""

_FORMAT = re.compile(r"^[ \t]*answer format:[ \t]*(\S.*?)\s*$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Question:
    """One question.

    Args:
        turns: What is asked, as turns of a conversation.
        candidates: The labels to choose from, such as `answer1`.
        answer: The right one of them.
        lead: What a response says before the label, such as `the correct answer is `; it may be empty.
    """

    turns: tuple[Turn, ...]
    candidates: tuple[str, ...]
    answer: str
    lead: str

    def response_of(self, label: str) -> str:
        """Return the whole response that gives a label, as training has it."""
        return f"{self.lead}{label}"


def load_questions(field: str, path: str, language: LanguageSpec) -> list[Question]:
    """Read every row of a file as a question.

    The candidates are what the instruction lists in its last line `Answer format: a/b/c`; without one, the labels of
    the set that file or folder is named after. What comes before the label in the row's output is its `lead`.

    Args:
        field: What the file is called in errors.
        path: A JSON list (.json) or JSON lines.
        language: Names of the columns of instruction, input and output; the right label is in `answer`.

    Raises:
        DataError: No such file, a damaged row, a missing column or value, no candidates, or an answer that is not
            among them or not the end of the output; with the number of the row.
    """
    rows = read_records(field, path)
    needed = [language.instruction, language.output, ANSWER]
    lacking = [name for name in needed if not any(name in row for row in rows)]
    if lacking:
        names = ", ".join(map(repr, dict.fromkeys(name for row in rows for name in row)))
        remedy = f"it has no column {', '.join(map(repr, lacking))}; its columns are {names}. A question has "
        raise bad_value(
            field, path, f"{remedy}an instruction, an output, and the right label in {ANSWER!r}", DataError
        )
    labels = _set_labels(path)
    return [_question(_Row(field, number, row), language, labels) for number, row in enumerate(rows, start=1)]


@dataclass(frozen=True)
class _Row:
    """A row and where it stands.

    Args:
        field: What the file is called in errors.
        number: The row, counted from 1.
        values: Values by column.
    """

    field: str
    number: int
    values: Mapping[str, Any]

    def bad(self, column: str, value: Any, remedy: str) -> AromaError:
        return bad_value(f"{self.field} (column {column!r}, row {self.number})", value, remedy, DataError)

    def text(self, column: str) -> str:
        value = self.values.get(column)
        if not isinstance(value, str) or not value.strip():
            raise self.bad(column, value, "give a text that is not empty, or leave the row out")
        return value


def _question(row: _Row, language: LanguageSpec, set_labels: tuple[str, ...]) -> Question:
    # As it stands: the prompt of a question is, to the last space, the prompt of a training example.
    instruction = row.text(language.instruction)
    given = row.text(language.input) if row.values.get(language.input) else ""
    output, answer = row.text(language.output).strip(), row.text(ANSWER).strip()
    candidates = _listed(instruction) or set_labels
    if len(candidates) < 2 or len(set(candidates)) < len(candidates):
        remedy = "end it with a line such as 'Answer format: answer1/answer2' that lists two labels or more, each once"
        raise row.bad(language.instruction, instruction[-80:], remedy)
    if answer not in candidates:
        raise row.bad(ANSWER, answer, f"it is none of the candidates {', '.join(candidates)}; mend the row")
    if not output.endswith(answer):
        raise row.bad(language.output, output, f"it does not end with the answer {answer!r}; mend the row")
    return Question(instruction_turns(instruction, given), candidates, answer, output.removesuffix(answer))


def _listed(instruction: str) -> tuple[str, ...]:
    """Return the labels that the last line of the form `Answer format: a/b/c` lists."""
    lines = _FORMAT.findall(instruction)
    return tuple(label.strip() for label in lines[-1].split("/") if label.strip()) if lines else ()


def _set_labels(path: str) -> tuple[str, ...]:
    """Return the labels of the set that a file, or else its folder, is named after."""
    by_name = {name.lower(): labels for name, labels in SETS.items()}
    file = Path(path).resolve()
    return by_name.get(file.stem.lower()) or by_name.get(file.parent.name.lower()) or ()
