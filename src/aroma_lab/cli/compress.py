"""`aroma compress`: a finished LoRA adapter keeps the directions that lower the loss on a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import add_command
from aroma.errors import OutputError, bad_value


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "compress",
        "shrink a LoRA adapter using held-out examples",
        "Find the directions of a LoRA adapter that save loss on examples it was not trained on, and write an\n"
        "adapter of these alone: plain LoRA for PEFT, each matrix with its own rank. It may be a classifier, a\n"
        "regression, or a causal language model, from any trainer. Each example is evaluated nine times.",
        "aroma compress runs/mrpc/adapter --data held-out.jsonl --out smaller",
        "aroma compress out/adapter --data reviews.csv --text review --label stars --out smaller",
        "aroma compress out/chat --data chats.jsonl --out smaller --base models/smollm2 --standard-errors 1",
    )
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="folder of a LoRA adapter that PEFT saved; it stays as it is")
    add("--data", metavar="FILE", required=True, help="examples that it was not trained on; as for `aroma eval`")
    add("--out", metavar="DIR", required=True, help="folder to write, new or empty")
    add("--base", "--base-model", metavar="MODEL", help="hub name or folder, if not the one the adapter names")
    words = "accept a smaller adapter within N standard errors of the lowest loss (0)"
    add("--standard-errors", type=float, metavar="N", default=0.0, help=words)
    add("--batch-size", type=int, metavar="N", help="most examples of one forward pass (16; of language models 8)")
    add("--max-length", type=int, metavar="TOKENS", help="of an example, if not as in training")
    add("--text", metavar="COLUMN", help="of classifiers: column of the text, if it is not found by its name")
    add("--text-pair", metavar="COLUMN", help="column of the second text of a pair, likewise")
    add("--label", metavar="COLUMN", help="column of the label, likewise")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Compress, and say what became of the adapter."""
    from aroma.files import require_adapter_folder
    from aroma.outputs import new_folder

    from ..tasks.sources import require_data_file

    # Before PyTorch loads.
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise bad_value("--batch-size", arguments.batch_size, "give 1 or more")
    out = Path(arguments.out)
    new_folder("--out", out)
    folder = require_adapter_folder(arguments.adapter)
    if out.resolve().is_relative_to(folder.resolve()):
        remedy = "it is ADAPTER or lies in it, which stays as it is; give another folder"
        raise bad_value("--out", arguments.out, remedy, OutputError)
    if require_data_file("--data", arguments.data).suffix.lower() == ".parquet":
        require_extra("lab")
    from aroma.cli.quiet import quiet

    quiet()
    from ..compressing import PICTURE, Wishes, compress_adapter

    print(f"loading {folder} and its base model", file=sys.stderr)  # which takes a while
    wishes = Wishes(**{field.name: getattr(arguments, field.name) for field in fields(Wishes)})
    _show(compress_adapter(folder, arguments.data, out, wishes))
    print(f"plain LoRA adapter: {out}")
    if not (out / PICTURE).exists():
        print("no picture of the ranks, which matplotlib draws; run: pip install 'aroma-peft[plot]'")


def _show(report: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    losses, ranks = report["held_out_loss"], report["ranks"]
    table = Table(f"{report['examples']} examples", "base", "adapter", "compressed")
    table.add_row("held-out loss", *(f"{losses[name]:.4f}" for name in ("base", "adapter", "compressed")))
    for name in ("largest", "mean", "total"):
        table.add_row(f"{name} rank", "", *(f"{ranks[when][name]:.4g}" for when in ("before", "after")))
    table.add_row("bytes", "", *(f"{report['bytes'][when]:,}" for when in ("before", "after")))
    Console().print(table)
    for other in ("adapter", "base"):
        saves, error = report[f"against_{other}"].values()
        print(f"compressed against {other}: loss {0 - saves:+.4f}, standard error {error:.4f}")
    print("\n".join(filter(None, (report["says"], report["note"]))))
    smaller = report["kept_at_one_standard_error"]
    if smaller < ranks["after"]["total"] and report["standard_errors"] == 0:
        print(f"{smaller} directions are within one standard error of the least loss: --standard-errors 1")
