"""`aroma eval` of a language model: sets of questions, a row each, and their average."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from aroma.cli.extras import require_extra
from aroma.errors import bad_value

if TYPE_CHECKING:
    from ..language.evaluate import QuestionEvaluation


def run_language(arguments: argparse.Namespace, out: Mapping[str, Path]) -> None:
    """Ask all questions, print a table, and write what was asked for into the files of `out`, by option."""
    from rich.console import Console
    from rich.table import Table

    from aroma.files import write_json, write_text

    require_extra("language")
    files = named_files(arguments.data)
    found = _evaluate(arguments, files)
    # Every set has equal weight, as in Table 3.
    names = [*next(iter(found.values())).metrics]
    means = {name: sum(one.metrics[name] for one in found.values()) / len(found) for name in names}
    # Written before anything is printed, so that a failing terminal loses nothing.
    if "predictions" in out:
        rows = [{"set": name, **row} for name, one in found.items() for row in one.predictions]
        write_text(out["predictions"], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if "json" in out:
        sets = {
            name: {"data": files[name], "examples": len(one.predictions), "metrics": one.metrics, "loss": one.loss}
            for name, one in found.items()
        }
        told = {"method": arguments.method or "likelihood", "limit": arguments.limit, "sets": sets, "average": means}
        write_json(out["json"], told)
    table = Table("set", "questions", *names)
    for name, one in found.items():
        table.add_row(name, str(len(one.predictions)), *(f"{one.metrics[metric]:.4f}" for metric in names))
    if len(found) > 1:
        table.add_row("average of sets", "", *(f"{value:.4f}" for value in means.values()))
    Console().print(table)
    if arguments.limit is not None:
        Console().print(f"the first {arguments.limit} questions of each file only: no result of a whole set")


def _evaluate(arguments: argparse.Namespace, files: dict[str, str]) -> dict[str, QuestionEvaluation]:
    """Ask all questions of all files, which are read before the model is."""
    from ..language.data import load_questions
    from ..language.evaluate import evaluate_questions
    from ..language.model import load_for_inference, load_language_task

    if arguments.limit is not None and arguments.limit < 1:
        raise bad_value("limit", arguments.limit, "give 1 or more")
    sets = {name: load_questions("data", path)[: arguments.limit] for name, path in files.items()}
    loaded = load_for_inference(arguments.adapter, arguments.base_model)
    return {
        name: evaluate_questions(
            loaded,
            questions,
            arguments.method or "likelihood",
            batch_size=8 if arguments.batch_size is None else arguments.batch_size,
            max_length=arguments.max_length or load_language_task(arguments.adapter).max_length,
            max_new_tokens=32 if arguments.max_new_tokens is None else arguments.max_new_tokens,
            progress=True,
        )
        for name, questions in sets.items()
    }


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
        if name in files:
            raise bad_value("data", text, f"the name {name!r} is given twice; write NAME=FILE with another")
        files[name] = path
    return files
