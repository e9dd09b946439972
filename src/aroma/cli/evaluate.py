"""`aroma eval`: an adapter against a file of examples, in plain PEFT."""

from __future__ import annotations

import argparse
from typing import Any

from .extras import require_extra
from .phases import shown_phase
from .texts import examples


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "eval",
        help="evaluate a trained adapter on all examples of a file",
        description="Load base model and adapter in plain PEFT and evaluate on all examples of a file.",
        epilog=examples(
            "aroma eval runs/mrpc/adapter --data test.jsonl",
            "aroma eval runs/mrpc/adapter --data other.csv --text first --text-pair second --label same",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of an adapter that `aroma train` or `demo` saved")
    parser.add_argument("--data", metavar="FILE", required=True, help="CSV, TSV, JSONL or Parquet file")
    parser.add_argument("--base-model", metavar="NAME", help="hub name or folder, if not the one the adapter names")
    parser.add_argument("--text", metavar="COLUMN", help="column of the text, if not the one of the training")
    parser.add_argument("--text-pair", metavar="COLUMN", help="column of the second text, if not that of the training")
    parser.add_argument("--label", metavar="COLUMN", help="column of the label, if not the one of the training")
    parser.add_argument("--batch-size", type=int, default=32, help="examples of one forward pass (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the metrics to this file too")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, and print the metrics."""
    require_extra("train")
    from .quiet import quiet

    quiet()
    from rich.console import Console
    from rich.table import Table

    from ..files import write_json
    from ..lab.evaluate import evaluate_adapter

    result = evaluate_adapter(
        arguments.adapter,
        arguments.data,
        base_model=arguments.base_model,
        text=arguments.text,
        text_pair=arguments.text_pair,
        label=arguments.label,
        batch_size=arguments.batch_size,
        phase=shown_phase,
    )
    table = Table("metric", "value", title=f"all {result.examples} examples of {arguments.data}")
    for name, value in result.metrics.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
    if arguments.json:
        write_json(arguments.json, {"data": arguments.data, "examples": result.examples, "metrics": result.metrics})
