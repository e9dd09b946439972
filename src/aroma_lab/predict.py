"""Predictions of a saved adapter for every row of a file, written as they come.

The file is read twice: once to look at every row before a model is loaded, and once to answer. Neither its rows nor
the answers are ever in memory together.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from aroma.errors import DataError, NonFiniteError, bad_value
from aroma.files import replacing
from aroma.outputs import new_file

from .progress import Progress, no_progress
from .tasks.saved import SavedClassifier, open_classifier
from .tasks.sources import stream_rows

SUFFIXES = (".csv", ".jsonl")
PREDICTION, PROBABILITIES, PROBABILITY = "prediction", "probabilities", "probability_"
"""What predictions are called: a column; in JSON lines the probabilities by label; in CSV a column for each label."""

_BATCHES_AT_ONCE = 16
"""Batches whose rows are in memory together, so that rows of similar lengths can be answered together."""

Values = dict[str, Any]


class Predictor(Protocol):
    """What answers rows.

    Attributes:
        checks_when_loaded: Whether `check` sees more once the model is loaded.
    """

    checks_when_loaded: bool

    @property
    def fields(self) -> list[str]:
        """Names of what it adds to a row."""

    def check(self, where: str, row: Values) -> None:
        """Raise DataError for a row that cannot be answered."""

    def load(self) -> None:
        """Load the model."""

    def answer(self, rows: Sequence[tuple[str, Values]]) -> list[Values]:
        """Return what is added to each row."""


def predict_file(
    predictor: Predictor,
    data: str,
    out: str | os.PathLike[str],
    *,
    batch_size: int,
    headless: bool = False,
    force: bool | None = None,
    progress: Progress = no_progress,
) -> int:
    """Answer every row of a file, and return how many there were.

    Args:
        predictor: What answers.
        data: A CSV, TSV, JSONL or Parquet file.
        out: New file, .csv or .jsonl: the rows with all their columns, in their order, and what was predicted.
        batch_size: Rows of one forward pass.
        headless: Whether the file, CSV or TSV, has no header line.
        force: Whether `out` may exist, and is replaced.
        progress: Shows how far it is.

    Raises:
        OutputError: `out` exists, or cannot be written.
        ConfigError: Its suffix is another, `batch_size` is below 1, or the model cannot be loaded.
        DataError: The file has no rows, or one that cannot be read or answered.
    """
    if Path(out).suffix.lower() not in SUFFIXES:
        raise bad_value("--out", str(out), f"unknown format; its name must end in {' or '.join(SUFFIXES)}")
    if batch_size < 1:
        raise bad_value("--batch-size", batch_size, "give 1 or more")
    target = new_file("--out", out, force=force)
    count, columns = _survey(predictor, data, headless)
    predictor.load()
    if predictor.checks_when_loaded:
        _survey(predictor, data, headless)
    columns += predictor.fields
    with (
        replacing(target) as temporary,
        _writing(temporary, target.suffix.lower(), columns) as write,
        progress("predict", count) as advance,
    ):
        for rows in _in_chunks(stream_rows("data", data, headless=headless), _BATCHES_AT_ONCE * batch_size):
            for (_, row), answer in zip(rows, predictor.answer(rows), strict=True):
                write({**row, **answer})
            advance(len(rows))
    return count


def _survey(predictor: Predictor, data: str, headless: bool) -> tuple[int, list[str]]:
    count, columns = 0, dict[str, None]()
    for where, row in stream_rows("data", data, headless=headless):
        columns.update(dict.fromkeys(row))
        if taken := {PROBABILITIES, *predictor.fields} & {*row}:
            name = min(taken)
            remedy = f"it has a column {name!r}, which a prediction would overwrite; rename it"
            raise bad_value(f"data ({where})", data, remedy, DataError)
        predictor.check(f"data ({where})", row)
        count += 1
    if not count:
        raise bad_value("data", data, "it has no rows; give at least one", DataError)
    return count, [*columns]


@contextmanager
def _writing(path: Path, suffix: str, columns: Sequence[str]) -> Iterator[Callable[[Values], None]]:
    """Yield a function that writes a row."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        if suffix == ".jsonl":
            yield lambda row: print(_as_json(row), file=stream)
        else:
            table = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
            table.writeheader()
            yield lambda row: _write_row(table, row)


def _write_row(table: Any, row: Values) -> None:
    flat = {name: value for name, value in row.items() if name != PROBABILITIES}
    flat |= {f"{PROBABILITY}{label}": value for label, value in row.get(PROBABILITIES, {}).items()}
    table.writerow({key: _as_json(value) if isinstance(value, list | dict) else value for key, value in flat.items()})


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _in_chunks(items: Iterable[Any], size: int) -> Iterator[tuple[Any, ...]]:
    """Yield `size` items at a time; `itertools.batched` is younger than Python 3.11."""
    rest = iter(items)
    while chunk := tuple(islice(rest, size)):
        yield chunk


# Classifiers and regressions -----------------------------------------------------------------------------------------


@dataclass
class ClassifierPredictor:
    """Answers with the label and the probabilities of all labels, or with the number of a regression.

    Args:
        batch_size: Rows of one forward pass.
    """

    saved: SavedClassifier
    batch_size: int = 32
    _model: Any = None

    checks_when_loaded = False

    @property
    def fields(self) -> list[str]:
        """`prediction`, and a column of CSV for the probability of each label."""
        return [PREDICTION, *(f"{PROBABILITY}{name}" for name in self.saved.task.label_names or ())]

    @property
    def headless(self) -> bool:
        """Whether the columns are named by position, `#1`, `#2`, …."""
        return all(re.fullmatch(r"#[1-9]\d*", name) for name in self._columns)

    @property
    def _columns(self) -> list[str]:
        task = self.saved.task
        return [task.text] if task.text_pair is None else [task.text, task.text_pair]

    def check(self, where: str, row: Values) -> None:
        """Raise DataError for a row without its texts."""
        for option, column in zip(("--text", "--text-pair"), self._columns, strict=False):
            _require_column(option, column, where, row)
            if row[column] is None or row[column] == "":
                remedy = f"a text is missing in column {column!r}; fill it in, or leave the row out"
                raise bad_value(where, row[column], remedy, DataError)

    def load(self) -> None:
        """Load the model."""
        self._model = self.saved.load()

    def answer(self, rows: Sequence[tuple[str, Values]]) -> list[Values]:
        """Return `prediction`, and `probabilities` of a classifier by label."""
        logits = self._logits([row for _, row in rows])
        for (where, _), row_logits in zip(rows, logits, strict=True):
            if not row_logits.isfinite().all():
                raise NonFiniteError(f"data ({where}): the model's answer is NaN or infinite; check the model")
        names = self.saved.task.label_names
        if names is None:
            return [{PREDICTION: value} for value in logits[:, 0].tolist()]
        if self.saved.is_multi_label:
            shares = [dict(zip(names, row, strict=True)) for row in logits.sigmoid().tolist()]
            chosen = [[name for name, share in row.items() if share >= 0.5] for row in shares]
            return [{PREDICTION: some, PROBABILITIES: row} for some, row in zip(chosen, shares, strict=True)]
        shares = [dict(zip(names, row, strict=True)) for row in logits.softmax(-1).tolist()]
        best = logits.argmax(-1).tolist()
        return [{PREDICTION: names[index], PROBABILITIES: row} for index, row in zip(best, shares, strict=True)]

    @torch.inference_mode()
    def _logits(self, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return logits (rows, outputs) in float64."""
        tokenizer, task = self.saved.tokenizer, self.saved.task
        texts = [[str(row[column]) for row in rows] for column in self._columns]
        tokens = tokenizer(*texts, truncation=True, max_length=task.max_length)
        encoded = [{name: values[number] for name, values in tokens.items()} for number in range(len(rows))]
        order = sorted(range(len(rows)), key=lambda number: -len(encoded[number]["input_ids"]))
        logits: list[Any] = [None] * len(rows)
        for numbers in _in_chunks(order, self.batch_size):
            batch = tokenizer.pad([encoded[number] for number in numbers], return_tensors="pt").to(self._model.device)
            found = self._model(**batch).logits.double().cpu()
            for number, row in zip(numbers, found, strict=True):
                logits[number] = row
        return torch.stack(logits)


def open_classifier_predictor(
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
) -> ClassifierPredictor:
    """Return what predicts with a saved classifier or regression; see `open_classifier` for arguments and errors."""
    saved = open_classifier(
        folder, base_model=base_model, text=text, text_pair=text_pair, max_length=max_length, needs_label=False
    )
    return ClassifierPredictor(saved, batch_size)


# Language models -----------------------------------------------------------------------------------------------------


@dataclass
class LanguagePredictor:
    """Answers with the text that a language model writes after a prompt, always the likeliest token.

    Args:
        folder: The adapter, or a whole model.
        base_model: Folder or hub name of the base model; None for the adapter's own.
        text: Column of the prompt; None: `prompt`, or the columns of the training.
        max_new_tokens: Most tokens of an answer.
        batch_size: Rows of one forward pass.
    """

    folder: str
    base_model: str | None = None
    text: str | None = None
    max_new_tokens: int = 256
    batch_size: int = 8
    _loaded: Any = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise bad_value("--max-new-tokens", self.max_new_tokens, "give 1 or more")
        from .language.model import load_language_task

        self._spec = load_language_task(self.folder).language

    @property
    def fields(self) -> list[str]:
        """`prediction`, and whether it was `finished` before the limit of tokens."""
        return [PREDICTION, "finished"]

    headless = False
    checks_when_loaded = True

    def check(self, where: str, row: Values) -> None:
        """Raise DataError for a row that asks nothing, and once the model is loaded for one that leaves it no room."""
        from .language.generate import require_room

        turns = self._turns(where, row)
        if self._loaded is not None:
            model, template = self._loaded
            require_room(model, [*template.prompt(turns, where), *template.lead], self.max_new_tokens, where)

    def load(self) -> None:
        """Load the model."""
        from .language.model import load_for_inference

        self._loaded = load_for_inference(self.folder, self.base_model)

    def answer(self, rows: Sequence[tuple[str, Values]]) -> list[Values]:
        """Return `prediction` and `finished`."""
        from .language.generate import generate_batch

        template = self._loaded.template
        prompts = [template.prompt(self._turns(where, row), where) for where, row in rows]
        answers = generate_batch(self._loaded, prompts, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        return [{PREDICTION: answer.text, "finished": answer.finished} for answer in answers]

    def _turns(self, where: str, row: Values) -> Any:
        from .language.generate import turns_of_row

        if self.text is None:
            return turns_of_row(where, row, self._spec)
        _require_column("--text", self.text, where, row)
        return turns_of_row(where, {"prompt": row[self.text]}, self._spec)


def _require_column(option: str, column: str, where: str, row: Values) -> None:
    if column not in row:
        there = ", ".join(map(repr, row))
        raise bad_value(option, column, f"{where} has no such column; its columns are {there}", DataError)
