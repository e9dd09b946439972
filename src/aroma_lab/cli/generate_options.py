"""Options that `aroma generate` and `aroma chat` share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from aroma.errors import bad_value

if TYPE_CHECKING:
    from ..language.generate import OpenedModel


def add_options(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Add the model and how it writes."""
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="folder of a language model's adapter, or of the model; or smollm2"
    )
    parser.add_argument("--base-model", metavar="NAME", help="hub name or folder, if not the one the adapter names")
    parser.add_argument("--system", metavar="TEXT", help="system turn, if not the one of the training")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", default=max_new_tokens, help="most tokens written (%(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="of the draw; 0: the likeliest token (0)")
    parser.add_argument("--top-p", type=float, help="draw among the likeliest tokens of this probability in all (1)")
    parser.add_argument("--seed", type=int, help="seed of the draw; without it every answer is another")


def check_options(arguments: argparse.Namespace) -> None:
    """Raise for a value out of range, or one that does nothing.

    Raises:
        ConfigError: Naming the option.
    """
    from ..language.stream import require_sampling

    top_p = 1.0 if arguments.top_p is None else arguments.top_p
    require_sampling(arguments.max_new_tokens, arguments.temperature, top_p)
    for option, value in (("--top-p", arguments.top_p), ("--seed", arguments.seed)):
        if value is not None and arguments.temperature == 0:
            raise bad_value(option, value, "it has a meaning only with a --temperature above 0; leave it out")


def sampling_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return how a response is drawn, as arguments of `stream`."""
    return {
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "top_p": 1.0 if arguments.top_p is None else arguments.top_p,
        "seed": arguments.seed,
    }


def opened(arguments: argparse.Namespace) -> OpenedModel:
    """Load what the arguments name; its builder puts the system turn that they give before every prompt.

    Raises:
        CheckpointError: The adapter is missing or damaged.
        ConfigError: The model cannot be loaded, does not fit the adapter, or its template has no system turn.
    """
    from dataclasses import replace

    from ..language.generate import open_adapter
    from ..language.prompt import PromptBuilder

    found = open_adapter(arguments.adapter, arguments.base_model)
    if arguments.system is None:
        return found
    builder = PromptBuilder(found.tokenizer, replace(found.builder.spec, system=arguments.system))
    return found._replace(builder=builder)
