"""`aroma predict`: what an adapter says of every row of a file."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import add_command, add_force
from aroma.errors import DataError, bad_value

from ..progress import progress_bar
from ..tasks.sources import read_rows


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "predict",
        "label every row of a file, or let a language model answer it",
        (
            "Load base model and adapter in plain PEFT, and answer every row of a file: the label and the\n"
            "probability of each (classifiers), a number (regressions), or a text (language models). Rows keep all\n"
            "their columns."
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

    out = new_file("--out", arguments.out, force=arguments.force)  # before PyTorch loads
    if out.suffix.lower() not in (".csv", ".jsonl"):
        raise bad_value("--out", arguments.out, "unknown format; its name must end in .csv or .jsonl")
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise bad_value("--batch-size", arguments.batch_size, "give 1 or more")
    require_extra("lab")
    rows = read_rows("data", arguments.data)
    for taken in ("prediction", "probabilities", "finished"):
        if any(taken in row for row in rows):
            remedy = f"it has a column {taken!r}, which a prediction would overwrite; rename it"
            raise bad_value("data", arguments.data, remedy, DataError)
    from aroma.cli.quiet import quiet

    quiet()
    from ..language.model import is_language_model
    from ..predict import classify, respond, write_answers

    speaks = is_language_model(arguments.adapter)
    answer: Callable[..., list[Any]] = respond if speaks else classify
    names = ["base_model", "text", "batch_size", *(["max_new_tokens"] if speaks else ["text_pair", "max_length"])]
    given: dict[str, Any] = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    with progress_bar("predict", len(rows)) as advance:
        answers = answer(rows, arguments.adapter, on_batch=advance, **given)
    write_answers(out, rows, answers)
    print(f"{len(rows)} predictions: {arguments.out}")
