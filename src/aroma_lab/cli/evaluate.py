"""`aroma eval`: an adapter against files of examples, in plain PEFT."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import add_command, add_force
from aroma.errors import bad_value

from ..language.gguf_source import PACKAGED


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "eval",
        "evaluate a trained adapter on all examples of files",
        "Load base model and adapter in plain PEFT and evaluate on all examples of a file; a language model answers\n"
        "the questions of several.",
        "aroma eval runs/mrpc/adapter --data test.jsonl",
        "aroma eval out/adapter --data other.csv --text first --text-pair second --label same",
        "aroma eval runs/commonsense/adapter --data obqa=openbookqa/test.jsonl --data arc=ARC-Easy/test.jsonl",
        "aroma eval runs/commonsense/adapter --data test.jsonl --predictions answers.jsonl",
    )
    parser.add_argument(
        "adapter",
        metavar="ADAPTER",
        help="folder of an adapter, or of a language model without one; where neither `aroma train` nor `demo` saved "
        "it, columns have usual names, as for `aroma compress`, or are named with --text and --label",
    )
    parser.add_argument(
        "--data",
        metavar="[NAME=]FILE",
        action="append",
        required=True,
        help="CSV, TSV, JSONL or Parquet file; of language models JSONL or a JSON list, and several may be given",
    )
    parser.add_argument("--base-model", metavar="NAME", help="hub name or folder, if not the one the adapter names")
    parser.add_argument("--batch-size", type=int, help="examples of one forward pass (32; of language models 8)")
    parser.add_argument("--max-length", type=int, metavar="TOKENS", help="of an example, if not as in training")
    parser.add_argument("--json", metavar="FILE", help="write the metrics to this new file too")
    add_force(parser)
    classifiers = parser.add_argument_group("classifiers and regressions")
    classifiers.add_argument("--text", metavar="COLUMN", help="column of the text, if not the one of the training")
    classifiers.add_argument(
        "--text-pair", metavar="COLUMN", help="column of the second text, if not that of the training"
    )
    classifiers.add_argument("--label", metavar="COLUMN", help="column of the label, if not the one of the training")
    language = parser.add_argument_group("language models")
    language.add_argument("--predictions", metavar="FILE", help="write every answer as JSON lines to a new file")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, and print the metrics."""
    require_extra("lab")
    from aroma.files import require_adapter_folder, write_json, write_text
    from aroma.outputs import new_file

    from ..tasks.sources import require_data_file

    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise bad_value("--batch-size", arguments.batch_size, "give 1 or more")
    named = {name: getattr(arguments, name) for name in ("json", "predictions")}
    files = {name: new_file(f"--{name}", path, force=arguments.force) for name, path in named.items() if path}
    if arguments.adapter != PACKAGED:
        require_adapter_folder(arguments.adapter)
    for path in arguments.data:
        if "=" not in path:
            require_data_file("data", path)
    from aroma.cli.quiet import quiet

    quiet()
    from rich.console import Console

    from ..language.model import is_language_model

    evaluate = _evaluate_questions if is_language_model(arguments.adapter) else _classify
    scores, answers, table = evaluate(arguments)
    # Written before anything is printed, so that a failing terminal loses nothing.
    if "predictions" in files:
        write_text(files["predictions"], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers))
    if "json" in files:
        write_json(files["json"], scores)
    Console().print(table)


def _classify(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]], Any]:
    """Return the JSON of a classifier or regression, no answers, and a table."""
    from rich.table import Table

    from ..tasks.saved import evaluate_adapter

    if len(arguments.data) > 1 or arguments.predictions:
        raise bad_value("--data", arguments.data, "only a language model takes several files, or --predictions")
    names = ("base_model", "max_length", "batch_size", "text", "text_pair", "label")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    result = evaluate_adapter(arguments.adapter, arguments.data[0], progress=True, **given)
    table = Table("metric", "value", title=f"all {result.examples} examples of {arguments.data[0]}")
    for name, value in result.metrics.items():
        table.add_row(name, f"{value:.4f}")
    return {"data": arguments.data[0], **result._asdict()}, [], table


def _evaluate_questions(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]], Any]:
    """Return the JSON of a language model on all questions of all files, its answers, and a table."""
    from rich.table import Table

    require_extra("language")
    from ..language.data import questions_of
    from ..language.evaluate import evaluate_questions
    from ..language.model import language_task, load_for_inference
    from ..tasks.sources import read_located

    named = {text if Path(text).exists() else text.partition("=")[0]: text for text in arguments.data}
    named = {name: text.removeprefix(f"{name}=") for name, text in named.items()}
    if len(named) < len(arguments.data):
        raise bad_value("--data", arguments.data, "two files have one name; give each its own")
    sets = {name: questions_of(read_located("data", path)) for name, path in named.items()}  # before the model
    loaded = load_for_inference(arguments.adapter, arguments.base_model)
    length = arguments.max_length or language_task(arguments.adapter).max_length
    scores, answers, table = {}, [], Table("set", "questions", "accuracy")
    for name, questions in sets.items():
        size = arguments.batch_size or 8
        found = evaluate_questions(loaded, questions, batch_size=size, max_length=length, progress=True)
        scores[name] = {"data": named[name], "examples": len(questions), "metrics": {"accuracy": found.accuracy}}
        scores[name]["loss"] = found.loss
        answers += [{"set": name, **row} for row in found.predictions]
        table.add_row(name, str(len(questions)), f"{found.accuracy:.4f}")
    accuracies = [one["metrics"]["accuracy"] for one in scores.values()]
    average = sum(accuracies) / len(accuracies)  # sets weigh the same, as in Table 3
    if len(scores) > 1:
        table.add_row("average of sets", "", f"{average:.4f}")
    return {"sets": scores, "average": {"accuracy": average}}, answers, table
