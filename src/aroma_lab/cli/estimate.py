"""`aroma estimate`: what a fine-tuning takes, and on how many of which devices it fits."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from aroma.cli.texts import examples
from aroma.errors import bad_value

from .bench import new_files, print_lines

if TYPE_CHECKING:
    from ..estimate.devices import Device

_SHAPES = "roberta-base, minilm, gpt2, llama3-8b, llama3-70b, llama3.1-405b"


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "estimate",
        help="say what a fine-tuning takes in memory, and on how many of which devices it fits",
        description=(
            "Say what a fine-tuning takes: where the bytes go on each device, what the devices exchange, and on how\n"
            "many of which devices it fits. The model is built and run without data, so that any size takes seconds\n"
            "and nothing is downloaded but a configuration."
        ),
        epilog=examples(
            "aroma estimate llama3-8b --gradient-checkpointing --sequence-length 2048",
            "aroma estimate llama3-8b --dtype nf4 --device RTX-4090 T4",
            "aroma estimate llama3.1-405b --components 1 10 100 --devices 16 --json 405b.json",
            "aroma estimate roberta-base --dtype float32 --batch-size 32 --sequence-length 256 --device-memory 6",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=f"shape ({_SHAPES}), or a folder or hub name")
    _add_adapter_options(parser)
    _add_training_options(parser)
    _add_device_options(parser)
    parser.set_defaults(run=run)


def _add_adapter_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--components", metavar="N", type=int, nargs="+", default=[10], help="finished components a module (10)"
    )
    parser.add_argument("--r", type=int, default=1, help="rank of one component (%(default)s)")
    parser.add_argument(
        "--target-modules", metavar="NAME", nargs="+", default=["all-linear"], help="modules that grow (all-linear)"
    )


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", default="bfloat16", help="base weights: float32, bfloat16, float16, nf4 or int8 (%(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="sequences of a batch on a device (%(default)s)")
    parser.add_argument("--sequence-length", type=int, default=1024, help="tokens of a sequence (%(default)s)")
    parser.add_argument(
        "--optimizer", default="adamw", help="adamw, adamw8bit, adafactor, sgd or sgd-momentum (%(default)s)"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="keep the inputs of blocks alone")
    parser.add_argument(
        "--task", default="auto", help="causal-lm or classification (auto: what the configuration says)"
    )


def _add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--devices", type=int, default=1, help="number of devices for the table (%(default)s)")
    parser.add_argument("--device", metavar="NAME", nargs="+", default=[], help="kinds to pass a verdict on (all)")
    parser.add_argument("--device-memory", metavar="GIB", type=float, help="pass a verdict on a device of this memory")
    parser.add_argument("--json", metavar="FILE", help="new .json file for the estimates")


def run(arguments: argparse.Namespace) -> None:
    """Estimate; print the tables; write the JSON file."""
    if arguments.json and not arguments.json.endswith(".json"):
        raise bad_value("--json", arguments.json, "the name of the file must end in .json")
    files = new_files(arguments.json, "--json") if arguments.json else []
    from aroma.cli.quiet import quiet

    quiet()
    from rich.console import Console

    from aroma.files import write_json

    from ..estimate.estimate import estimate, record
    from ..estimate.settings import ScaleSettings
    from ..estimate.table import bytes_table, notes, verdict_table

    targets = arguments.target_modules
    settings = [
        ScaleSettings(
            model=arguments.model,
            components=components,
            r=arguments.r,
            target_modules="all-linear" if targets == ["all-linear"] else tuple(targets),
            dtype=arguments.dtype,
            batch_size=arguments.batch_size,
            sequence_length=arguments.sequence_length,
            optimizer=arguments.optimizer,
            gradient_checkpointing=arguments.gradient_checkpointing,
            task=arguments.task,
        )
        for components in arguments.components
    ]
    found = estimate(settings, arguments.devices, _kinds(arguments))
    for file in files:
        write_json(file, record(found))
    console = Console()
    for one in found:
        console.print(bytes_table(one))
        console.print(verdict_table(one))
    print_lines([*notes(found[-1]), *(f"Left: {file}." for file in files)])


def _kinds(arguments: argparse.Namespace) -> list[Device]:
    """Return the kinds of devices that were asked for; all where none was."""
    from ..estimate.devices import DEVICES, device_of_memory, find_device

    named = [find_device(name) for name in arguments.device]
    if arguments.device_memory is not None:
        return [*named, device_of_memory(arguments.device_memory)]
    return named or [*DEVICES.values()]
