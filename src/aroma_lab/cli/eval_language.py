"""`aroma eval` of a language model: sets of questions, a row each, and their average."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aroma.cli.extras import require_extra
from aroma.errors import bad_value

from ..progress import progress_bar

if TYPE_CHECKING:
    from ..language.evaluate import QuestionEvaluation, Scoring

_HEADINGS = {
    "accuracy": "accuracy",
    "accuracy_normalised": "per token",
    "accuracy_per_character": "per character",
    "generated": "accuracy",
}
_COUNTS = {
    "unparseable": "answers not in the form asked for, counted as wrong",
    "unfinished": "answers that ended at the limit of tokens",
    "cut_prompts": "questions cut from the left to fit",
}


def run_language(arguments: argparse.Namespace, out: Mapping[str, Path]) -> None:
    """Ask all questions, print a table, and write what was asked for into the files of `out`, by option."""
    from rich.console import Console

    from aroma.files import write_json

    require_extra("language")
    from ..language.data import write_records

    files = named_files(arguments.data)
    method: Scoring = arguments.method or "likelihood"
    found = _evaluate(arguments, files, method)
    metrics = next(iter(found.values())).metrics
    # Every set has equal weight, as in Table 3.
    means = {name: sum(one.metrics[name] for one in found.values()) / len(found) for name in metrics}
    # Written before anything is printed, so that a failing terminal loses nothing.
    if "predictions" in out:
        rows = [
            {"set": name, "example": number, **asdict(prediction)}
            for name, evaluation in found.items()
            for number, prediction in enumerate(evaluation.predictions, start=1)
        ]
        write_records(out["predictions"], rows)
    if "json" in out:
        names = ("examples", "metrics", "loss", *_COUNTS)
        sets = {
            name: {"data": files[name], **{field: getattr(one, field) for field in names}}
            for name, one in found.items()
        }
        write_json(out["json"], {"method": method, "limit": arguments.limit, "sets": sets, "average": means})
    console = Console()
    console.print(_table(method, found, means))
    for name, evaluation in found.items():
        for field, what in _COUNTS.items():
            if count := getattr(evaluation, field):
                console.print(f"{name}: {count} of {evaluation.examples} {what}", highlight=False)
    if arguments.limit is not None:
        console.print(f"the first {arguments.limit} questions of each file only: no result of a whole set")


def _evaluate(arguments: argparse.Namespace, files: dict[str, str], method: Scoring) -> dict[str, QuestionEvaluation]:
    """Ask all questions of all files, which are read before the model is."""
    from ..language.data import load_questions
    from ..language.evaluate import evaluate_questions
    from ..language.model import load_for_inference, load_language_task, positions_of

    if arguments.limit is not None and arguments.limit < 1:
        raise bad_value("limit", arguments.limit, "give 1 or more")
    task = load_language_task(arguments.adapter)
    sets = {name: load_questions("data", path, task.language)[: arguments.limit] for name, path in files.items()}
    loaded = load_for_inference(arguments.adapter, arguments.base_model)
    positions = positions_of(loaded.model.config)
    max_length = arguments.max_length
    if max_length is None:
        max_length = task.max_length or positions
    elif positions is not None and max_length > positions:
        raise bad_value("max_length", max_length, f"the model takes at most {positions} tokens")
    found = {}
    for name, questions in sets.items():
        with progress_bar(name, len(questions)) as advance:
            found[name] = evaluate_questions(
                loaded,
                questions,
                method,
                batch_size=8 if arguments.batch_size is None else arguments.batch_size,
                max_length=max_length,
                max_new_tokens=32 if arguments.max_new_tokens is None else arguments.max_new_tokens,
                advance=advance,
            )
    return found


def named_files(data: list[str]) -> dict[str, str]:
    """Return paths by name out of texts like `obqa=openbookqa/test.jsonl`; a path without a name is its own.

    Raises:
        ConfigError: A name is given twice.
    """
    files: dict[str, str] = {}
    for text in data:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            name, path = text, text
        if not name or not path:
            raise bad_value("data", text, "write FILE or NAME=FILE")
        if name in files:
            raise bad_value("data", text, f"the name {name!r} is given twice; write NAME=FILE with another")
        files[name] = path
    return files


def _table(method: str, found: Mapping[str, QuestionEvaluation], means: Mapping[str, float]) -> Any:
    from rich.table import Table

    table = Table(title=f"by {method}")
    table.add_column("set", overflow="fold")
    for heading in ("questions", *(_HEADINGS[name] for name in means)):
        table.add_column(heading, justify="right")
    for name, evaluation in found.items():
        table.add_row(name, str(evaluation.examples), *(f"{evaluation.metrics[metric]:.4f}" for metric in means))
    if len(found) > 1:
        table.add_section()
        questions = sum(evaluation.examples for evaluation in found.values())
        table.add_row("average of sets", str(questions), *(f"{value:.4f}" for value in means.values()))
    return table
