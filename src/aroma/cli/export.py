"""`aroma export`: an adapter for serving engines, or the whole merged model."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import bad_value
from .texts import examples


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "export",
        help="write an adapter of one rank for serving engines, or the merged model",
        description="Write an adapter of one rank, as vLLM, TGI, SGLang and llama.cpp serve it, or the merged model.",
        epilog=examples(
            "aroma export runs/mrpc/adapter served --uniform",
            "aroma export runs/mrpc/adapter served --uniform --rank 32",
            "aroma export runs/mrpc/adapter merged --merged",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of a plain LoRA adapter")
    parser.add_argument("out", metavar="OUT", help="folder to write; must be new or empty")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--uniform", action="store_true", help="an adapter of one rank, zero-padded, scale 1")
    kind.add_argument("--merged", action="store_true", help="the full model, merged in float32")
    parser.add_argument("--rank", type=int, help="with --uniform: rank to pad to (the next of 8, 16, 32, … 256)")
    parser.add_argument("--base-model", metavar="NAME", help="with --merged: if not the one that the adapter names")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="with --merged: type of the written weights, rounded once after the merge (float32)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Export, and say where to."""
    _refuse_idle_options(arguments)
    from .quiet import quiet

    quiet()
    from rich.console import Console

    from ..export import export_merged, export_uniform

    console = Console(soft_wrap=True, markup=False)
    if arguments.uniform:
        rank = export_uniform(arguments.adapter, arguments.out, arguments.rank)
        console.print(f"adapter of rank {rank}: {arguments.out}")
    else:
        export_merged(arguments.adapter, arguments.out, arguments.base_model, arguments.dtype or "float32")
        console.print(f"merged model: {arguments.out}")


def _refuse_idle_options(arguments: argparse.Namespace) -> None:
    """Raise for an option that belongs to the other kind of export and would do nothing.

    Raises:
        ConfigError: Always naming the option.
    """
    other, options = ("--merged", ("base_model", "dtype")) if arguments.uniform else ("--uniform", ("rank",))
    for option in options:
        value = getattr(arguments, option)
        if value is not None:
            raise bad_value(
                f"--{option.replace('_', '-')}", value, f"it has a meaning only with {other}; leave it out"
            )
