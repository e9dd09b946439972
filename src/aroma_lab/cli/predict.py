"""`aroma predict`: what an adapter says of every row of a file."""

from __future__ import annotations

import argparse
from typing import Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import add_command, add_force

from ..preflight import require_saved
from ..progress import progress_bar
from .evaluate import refuse_options

_CLASSIFIER_OPTIONS = ("text_pair", "max_length")
_LANGUAGE_OPTIONS = ("max_new_tokens",)


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "predict",
        "label every row of a file, or let a language model answer it",
        (
            "Load base model and adapter in plain PEFT, and answer every row of a file: the label and the\n"
            "probability of each (classifiers), a number (regressions), or a text (language models). Rows keep all\n"
            "their columns, and are written as they are answered."
        ),
        "aroma predict runs/mrpc/adapter new.csv --out labelled.csv",
        "aroma predict out/adapter new.jsonl --out labelled.jsonl --text sentence",
        "aroma predict runs/smollm2/adapter prompts.jsonl --out answers.jsonl --max-new-tokens 64",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of an adapter, or of a language model without one")
    parser.add_argument("data", metavar="DATA", help="CSV, TSV, JSONL or Parquet file")
    parser.add_argument("--out", metavar="FILE", required=True, help="new file, .csv or .jsonl")
    parser.add_argument(
        "--text",
        metavar="COLUMN",
        help="column of the text, if not the one of the training; `aroma train` records that, a Trainer does not",
    )
    parser.add_argument("--text-pair", metavar="COLUMN", help="column of the second text of a pair, likewise")
    parser.add_argument("--base-model", metavar="NAME", help="hub name or folder, if not the one the adapter names")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="rows of one forward pass (32; of language models 8)"
    )
    parser.add_argument("--max-length", type=int, metavar="TOKENS", help="of a text, if not as in training")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of a language model's answer (256)")
    add_force(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Predict, and say where to."""
    from aroma.outputs import new_file

    new_file("--out", arguments.out, force=arguments.force)  # before PyTorch loads
    require_extra("lab")
    require_saved(arguments.adapter, arguments.data)
    from aroma.cli.quiet import quiet

    quiet()
    from ..language.model import LANGUAGE_KIND, task_kind
    from ..predict import predict_file

    is_language = task_kind(arguments.adapter) == LANGUAGE_KIND
    default = 8 if is_language else 32
    batch_size = default if arguments.batch_size is None else arguments.batch_size
    predictor = _language(arguments, batch_size) if is_language else _classifier(arguments, batch_size)
    count = predict_file(
        predictor,
        arguments.data,
        arguments.out,
        batch_size=batch_size,
        headless=predictor.headless,
        force=arguments.force,
        progress=progress_bar,
    )
    print(f"{count} predictions: {arguments.out}")


def _classifier(arguments: argparse.Namespace, batch_size: int) -> Any:
    from ..predict import open_classifier_predictor

    refuse_options(arguments, _LANGUAGE_OPTIONS, "a language model has it, and this is none")
    return open_classifier_predictor(
        arguments.adapter,
        base_model=arguments.base_model,
        text=arguments.text,
        text_pair=arguments.text_pair,
        max_length=arguments.max_length,
        batch_size=batch_size,
    )


def _language(arguments: argparse.Namespace, batch_size: int) -> Any:
    from ..predict import LanguagePredictor

    refuse_options(arguments, _CLASSIFIER_OPTIONS, "a language model does not have it")
    tokens = 256 if arguments.max_new_tokens is None else arguments.max_new_tokens
    return LanguagePredictor(arguments.adapter, arguments.base_model, arguments.text, tokens, batch_size)
