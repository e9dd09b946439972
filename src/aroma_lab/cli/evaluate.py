"""`aroma eval`: an adapter against files of examples, in plain PEFT."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import add_command, add_force
from aroma.errors import OutputError, bad_value

from ..preflight import require_saved
from ..progress import progress_bar

_CLASSIFIER_OPTIONS = ("text", "text_pair", "label")
_LANGUAGE_OPTIONS = ("method", "max_new_tokens", "limit", "predictions")


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "eval",
        "evaluate a trained adapter on all examples of files",
        (
            "Load base model and adapter in plain PEFT and evaluate on all examples of a file; a language "
            "model answers the questions of several."
        ),
        "aroma eval runs/mrpc/adapter --data test.jsonl",
        "aroma eval out/adapter --data other.csv --text first --text-pair second --label same",
        "aroma eval runs/commonsense/adapter --data obqa=openbookqa/test.jsonl --data arc=ARC-Easy/test.jsonl",
        "aroma eval runs/commonsense/adapter --data test.jsonl --method generation --predictions answers.jsonl",
    )
    parser.add_argument(
        "adapter",
        metavar="ADAPTER",
        help="folder of an adapter, or of a language model without one; columns of one that neither `aroma train` nor "
        "`demo` saved are named with --text and --label",
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
    language.add_argument(
        "--method",
        choices=("likelihood", "generation"),
        help="rank the candidate answers by likelihood (the default), or read the answer out of a generated text",
    )
    language.add_argument("--max-new-tokens", type=int, metavar="TOKENS", help="of a generated answer (32)")
    language.add_argument("--limit", type=int, metavar="N", help="ask the first N questions of each file only")
    language.add_argument("--predictions", metavar="FILE", help="write every answer as JSON lines to a new file")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, and print the metrics."""
    require_extra("lab")
    from aroma.outputs import new_file

    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise bad_value("--batch-size", arguments.batch_size, "give 1 or more")
    named = {name: getattr(arguments, name) for name in ("json", "predictions")}
    files = {name: new_file(f"--{name}", path, force=arguments.force) for name, path in named.items() if path}
    if len(files) == 2 and files["json"].absolute() == files["predictions"].absolute():
        raise bad_value("--predictions", arguments.predictions, "it is --json's file; give two names", OutputError)
    require_saved(arguments.adapter, *(path for path in arguments.data if "=" not in path))
    from aroma.cli.quiet import quiet

    quiet()
    from ..language.model import is_language_model

    if is_language_model(arguments.adapter):
        from .eval_language import run_language

        refuse_options(arguments, _CLASSIFIER_OPTIONS, "only classifiers and regressions have it, and this is none")
        run_language(arguments, files)
    else:
        refuse_options(arguments, _LANGUAGE_OPTIONS, "only language models have it, and this is none")
        _run_classifier(arguments, files.get("json"))


def _run_classifier(arguments: argparse.Namespace, json_file: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from aroma.files import write_json

    from ..tasks.saved import evaluate_adapter

    if len(arguments.data) > 1:
        raise bad_value("data", arguments.data, "give one file; only a language model answers several")
    names = ("base_model", "max_length", "batch_size", *_CLASSIFIER_OPTIONS)
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    data = arguments.data[0]
    result = evaluate_adapter(arguments.adapter, data, progress=progress_bar, **given)
    table = Table("metric", "value", title=f"all {result.examples} examples of {data}")
    for name, value in result.metrics.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
    if json_file is not None:
        write_json(json_file, {"data": data, "examples": result.examples, "metrics": result.metrics})


def refuse_options(arguments: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    """Raise ConfigError for the first of these options that was given."""
    for name in names:
        if (value := getattr(arguments, name)) is not None:
            raise bad_value(f"--{name.replace('_', '-')}", value, f"{why}; leave it out")
