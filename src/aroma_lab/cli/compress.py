"""`aroma compress`: a finished LoRA adapter keeps the directions that carry its answers."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import add_command
from aroma.errors import OutputError, bad_value

if TYPE_CHECKING:
    from aroma import Compression

_OF_DATA = ("keep", "base", "examples", "batch_size", "max_length", "text", "text_pair", "label")
"""Options that say something of the examples."""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "compress",
        "shrink a LoRA adapter and keep its answers",
        "Keep the directions of a LoRA adapter that carry its answers, and write an adapter of these alone: plain\n"
        "LoRA for PEFT, each matrix with its own rank. It may be a classifier, a regression, an encoder or a causal\n"
        "language model, from any trainer. The examples may be those of the training. They need no labels; if they\n"
        "have some, the score of every size is shown. Without examples the largest directions stay, and no base\n"
        "model is read.",
        "aroma compress runs/mrpc/adapter --data train.jsonl --out smaller",
        "aroma compress out/adapter --data reviews.csv --text review --out smaller --rank 8",
        "aroma compress out/chat --data chats.jsonl --out smaller --base models/smollm2 --keep 0.99",
        "aroma compress out/adapter --out smaller --size 0.2",
    )
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="folder of a LoRA adapter that PEFT saved; it stays as it is")
    add("--out", metavar="DIR", required=True, help="folder to write, new or empty")
    add("--data", metavar="FILE", help="examples, CSV, TSV, JSONL or Parquet; 16 or more, some hundreds if there are")
    words = "keep this share of the effect on the answers (0.998; with --size or --rank what they allow)"
    add("--keep", type=float, metavar="SHARE", help=words)
    add("--size", type=float, metavar="SHARE", help="keep at most this share of the adapter's parameters")
    add("--rank", type=int, metavar="R", help="give no matrix a larger rank")
    add("--base", "--base-model", metavar="MODEL", help="hub name or folder, if not the one the adapter names")
    add("--examples", type=int, metavar="N", help="draw this many of the examples (256)")
    add("--batch-size", type=int, metavar="N", help="examples of one forward pass (8)")
    add("--max-length", type=int, metavar="TOKENS", help="of an example, if not as in training")
    add("--text", metavar="COLUMN", help="column of the text, if it is not found by its name")
    add("--text-pair", metavar="COLUMN", help="of classifiers: column of the second text of a pair, likewise")
    add("--label", metavar="COLUMN", help="of classifiers: column of the label, likewise")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Compress, and say what became of the adapter."""
    from aroma.files import require_adapter_folder
    from aroma.outputs import new_folder

    from ..tasks.sources import require_data_file

    # Before PyTorch loads.
    _check(arguments)
    out = Path(arguments.out)
    new_folder("--out", out)
    folder = require_adapter_folder(arguments.adapter)
    if out.resolve().is_relative_to(folder.resolve()):
        remedy = "it is ADAPTER or lies in it, which stays as it is; give another folder"
        raise bad_value("--out", arguments.out, remedy, OutputError)
    if arguments.data and require_data_file("--data", arguments.data).suffix.lower() == ".parquet":
        require_extra("lab")
    from aroma.cli.quiet import quiet

    quiet()
    from ..compressing import PICTURE, Wishes, compress_adapter

    if arguments.data:
        print(f"loading {folder} and its base model", file=sys.stderr)  # which takes a while
    given = {field.name: getattr(arguments, field.name) for field in fields(Wishes)}
    wishes = Wishes(**{name: value for name, value in given.items() if value is not None})
    found, note = compress_adapter(folder, arguments.data, out, wishes)
    print("\n".join(filter(None, (note, str(found)))))
    if found.left_alone:
        print(f"cannot be cut, and stay as they are: {', '.join(found.left_alone)}")
    if arguments.data:
        _show(found)
    print(f"plain LoRA adapter: {out}")
    if not (out / PICTURE).exists():
        print("no picture, which matplotlib draws; run: pip install 'aroma-peft[plot]'")


def _check(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for a value out of range, and for one that says nothing."""
    for name in ("keep", "size"):
        if (share := getattr(arguments, name)) is not None and not 0 < share <= 1:
            raise bad_value(f"--{name}", share, "give a share above 0 and at most 1")
    for name, least in {"rank": 1, "examples": 16, "batch_size": 1, "max_length": 3}.items():
        if (number := getattr(arguments, name)) is not None and number < least:
            raise bad_value(f"--{name.replace('_', '-')}", number, f"give {least} or more")
    if arguments.data is None:
        for name in _OF_DATA:
            if (value := getattr(arguments, name)) is not None:
                raise bad_value(f"--{name.replace('_', '-')}", value, "it is about examples; give --data, too")
        if arguments.size is None and arguments.rank is None:
            raise bad_value("--data", None, "give examples, or say how much stays with --size or --rank")


def _show(found: Compression) -> None:
    """Print the curve as a table; the chosen size is marked."""
    from rich.console import Console
    from rich.table import Table

    labels = {"loss": ("loss", "{:.4f}"), "score": ("right answers", "{:.1%}")}
    labels = {key: shown for key, shown in labels.items() if getattr(found.size, key) is not None}
    table = Table(box=None, pad_edge=False)
    for title in ("size", "directions", "rank", "bytes", "effect kept", *(title for title, _ in labels.values())):
        table.add_column(title, justify="right", no_wrap=True)
    for place, one in enumerate(found.curve):
        mark, style = ("→ ", "bold") if place == found.chosen else ("", "")
        counts = [f"{mark}{one.share:.1%}", str(one.directions), str(one.largest_rank), f"{one.bytes:,}"]
        values = [form.format(getattr(one, key)) for key, (_, form) in labels.items()]
        table.add_row(*counts, f"{one.effect or 0.0:.2%} ± {one.standard_error or 0.0:.2%}", *values, style=style)
    Console().print(table)
