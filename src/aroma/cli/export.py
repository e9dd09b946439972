"""`aroma export`: an adapter for serving engines or for llama.cpp, or the whole merged model."""

from __future__ import annotations

import argparse
from typing import Any

from .texts import add_command

BASE_MODEL_GROUP = "aroma.base_models"
"""Entry points that map (adapter folder, given name or None) to a base-model name, or None."""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "export",
        "write an adapter for serving engines or llama.cpp, or the merged model",
        "Write an adapter of one rank (vLLM, TGI, SGLang), an adapter file for llama.cpp, or the merged model.",
        "aroma export runs/mrpc/adapter served --uniform",
        "aroma export runs/mrpc/adapter served --uniform --rank 32",
        "aroma export runs/mrpc/adapter merged --merged",
        "aroma export runs/smollm2/adapter adapter.gguf --gguf",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of a plain LoRA adapter")
    parser.add_argument("out", metavar="OUT", help="folder to write, new or empty; with --gguf a new file")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--uniform", action="store_true", help="an adapter of one rank, zero-padded, scale 1")
    kind.add_argument("--merged", action="store_true", help="the full model, merged in float32")
    kind.add_argument("--gguf", action="store_true", help="an adapter file for llama.cpp (Llama's architecture)")
    parser.add_argument("--rank", type=int, help="with --uniform: rank to pad to (the next of 8, 16, 32, … 256)")
    parser.add_argument(
        "--base-model", metavar="NAME", help="with --merged, --gguf: if not the one named in the adapter"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="with --merged: type of the written weights, rounded once after the merge (float32)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Export, and say where to."""
    # Before PyTorch loads, and before a model does.
    from ..files import require_adapter_folder
    from ..outputs import new_file, new_folder
    from .quiet import quiet

    if arguments.gguf:
        new_file("OUT", arguments.out)
    else:
        new_folder("OUT", arguments.out)
    require_adapter_folder(arguments.adapter)
    quiet()
    from rich.console import Console

    Console(soft_wrap=True, markup=False).print(f"{_export(arguments)}: {arguments.out}")


def _export(arguments: argparse.Namespace) -> str:
    from ..export import export_merged, export_uniform

    if arguments.gguf:
        from ..gguf import export_gguf

        ranks = export_gguf(arguments.adapter, arguments.out, _base_of(arguments))
        return f"adapter of {len(ranks)} matrices with ranks up to {max(ranks.values())} for llama.cpp's --lora"
    if arguments.uniform:
        return f"adapter of rank {export_uniform(arguments.adapter, arguments.out, arguments.rank)}"
    export_merged(arguments.adapter, arguments.out, _base_of(arguments), arguments.dtype)
    return "merged model"


def _base_of(arguments: argparse.Namespace) -> str | None:
    """Return where the base model is, if it is another place than the one that PEFT recorded."""
    from importlib.metadata import entry_points

    name: str | None = arguments.base_model
    known = (entry.load()(arguments.adapter, name) for entry in entry_points(group=BASE_MODEL_GROUP))
    return next((found for found in known if found is not None), name)
