"""`aroma estimate`: the memory of a fine-tuning, and on how many of which devices it fits."""

from __future__ import annotations

import argparse
from typing import Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import add_command, add_force

from ..preflight import require_model
from .bench import new_files, print_lines

SHAPES = (
    *("roberta-base", "minilm", "tiny", "gpt2", "llama3-8b", "llama3-70b", "llama3.1-405b"),
    *("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3", "kimi-k2"),
)
"""Named shapes, which are built without a configuration from anywhere."""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "estimate",
        "say what memory a fine-tuning needs, and on how many of which devices it fits",
        (
            "Say what memory a fine-tuning with AROMA or LoRA needs on each device, part by part, and on how many of\n"
            "which devices it fits. The model is built and run without data: any size takes seconds, and nothing is\n"
            "downloaded but a configuration."
        ),
        "aroma estimate roberta-base",
        "aroma estimate llama3-8b --gradient-checkpointing --sequence-length 2048",
        "aroma estimate llama3-8b --dtype nf4 --device RTX-4090 T4",
        "aroma estimate llama3-8b --adapter lora --r 8 --devices 4",
        "aroma estimate llama3.1-405b --components 1 10 100 --devices 16 --json 405b.json",
        "aroma estimate deepseek-v3 --dtype nf4 --quantise-experts --gradient-checkpointing --devices 32",
        "aroma estimate qwen3-30b-a3b --adapter lora --target-parameters experts.gate_up_proj experts.down_proj",
        "aroma estimate roberta-base --dtype float32 --batch-size 32 --sequence-length 256 --device-memory 6",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"shape ({', '.join(SHAPES)}), or a folder or hub name")
    add("--adapter", default="aroma", help="aroma or lora (%(default)s)")
    add("--components", metavar="N", type=int, nargs="+", help="finished components of a module (AROMA: 10; LoRA: 0)")
    add("--r", type=int, default=1, help="rank of one component, or of LoRA (%(default)s)")
    add("--target-modules", metavar="NAME", nargs="+", default=["all-linear"], help="adapted modules (all-linear)")
    add("--target-parameters", metavar="NAME", nargs="+", default=[], help="3-D parameters whose experts are adapted")
    add("--quantise-experts", action="store_true", help="with nf4: 3-D parameters of experts are nf4, too")
    add("--dtype", default="bfloat16", help="base weights: float32, bfloat16, float16, nf4 or int8 (%(default)s)")
    add("--batch-size", type=int, default=1, help="sequences in a batch on one device (%(default)s)")
    add("--sequence-length", type=int, help="tokens in a sequence (2048, or what the model takes if that is less)")
    add("--optimizer", default="adamw", help="adamw, adamw8bit, adafactor, sgd or sgd-momentum (%(default)s)")
    add("--gradient-checkpointing", action="store_true", help="keep only the inputs of blocks")
    add("--task", default="auto", help="causal-lm or classification (auto: what the configuration says)")
    add("--devices", type=int, default=1, help="number of devices for the table of bytes (%(default)s)")
    add("--device", metavar="NAME", nargs="+", default=[], help="kinds of devices to try (all)")
    add("--device-memory", metavar="GIB", type=float, help="try a device with this memory")
    add("--json", metavar="FILE", help="new .json file for the estimates")
    add_force(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Estimate; print the tables; write the JSON file."""
    require_extra("lab")
    files = new_files(arguments, "--json") if arguments.json is not None else []
    if arguments.model not in SHAPES:
        require_model("model", arguments.model, SHAPES)
    from aroma.cli.quiet import quiet

    quiet()
    from aroma.files import write_json

    from ..estimate.devices import estimate, kinds_of
    from ..estimate.model import EstimateSettings
    from ..estimate.report import bytes_table, fit_table, notes

    names = ("model", "adapter", "r", "dtype", "batch_size", "sequence_length", "optimizer", "task")
    given = {name: getattr(arguments, name) for name in (*names, "gradient_checkpointing")}
    targets = arguments.target_modules
    given["target_modules"] = "all-linear" if targets == ["all-linear"] else tuple(targets)
    given["target_parameters"] = tuple(arguments.target_parameters)
    given["quantise_experts"] = arguments.quantise_experts
    components = arguments.components or [0 if arguments.adapter == "lora" else 10]
    settings = [EstimateSettings(components=count, **given) for count in components]
    kinds = kinds_of(arguments.device, arguments.device_memory)
    found = estimate(settings, arguments.devices, kinds)
    for file in files:
        write_json(file, found)
    tables = [table for one in found["estimates"] for table in (bytes_table(one, found["devices"]), fit_table(one))]
    print_lines([*tables, *notes(), *(f"Left: {file}." for file in files)])
