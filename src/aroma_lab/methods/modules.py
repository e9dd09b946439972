"""Which modules and parameters of a transformers classifier a method touches, by the names that they have in it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from aroma.errors import bad_value

from .head import head_of


def encoder_linears(model: nn.Module) -> list[str]:
    """Return the full names of the linear modules in numbered layers: PEFT's "all-linear" without head and pooler.

    In RoBERTa these are query, key, value, attention output, intermediate and output of every layer.
    """
    return [name for name in _linears(model) if re.search(r"\.\d+\.", name)]


def find_targets(chosen: Sequence[str] | str | None, model: nn.Module) -> list[str]:
    """Return the full names of the linear modules that are to be adapted; the head is never among them.

    Args:
        chosen: Names or their endings, a regular expression of whole names, "all-linear", or None for
            `encoder_linears`.
        model: The model, without adapters.

    Raises:
        ConfigError: A name that no linear module has, or a pattern that matches none.
    """
    if chosen is None:
        return encoder_linears(model)
    names = _linears(model)
    if chosen == "all-linear":
        # As in PEFT: the output embeddings of a language model are not among them.
        outputs = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        return [name for name in names if outputs is None or model.get_submodule(name) is not outputs]
    if isinstance(chosen, str):
        return [name for name in names if re.fullmatch(chosen, name)] or _refuse(chosen, names)
    for ending in chosen:
        if not any(_ends(name, ending) for name in names):
            _refuse(ending, names)
    return [name for name in names if any(_ends(name, ending) for ending in chosen)] or _refuse(chosen, names)


def train_head_only(model: nn.Module) -> None:
    """Freeze everything but the head."""
    head = head_of(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(head.holds(name))


def count_active(model: nn.Module) -> int:
    """Return the number of parameters that train outside the head."""
    head = head_of(model)
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not head.holds(name)
    )


def _linears(model: nn.Module) -> list[str]:
    """Return the names of the linear modules outside the head."""
    head = head_of(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return [name for name in linears if not head.holds(name)]


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _refuse(chosen: Sequence[str] | str, names: list[str]) -> list[str]:
    example = f", such as {names[0]!r} or its last parts" if names else ""
    raise bad_value(
        "target_modules",
        chosen,
        f"no linear module outside the head is called so; give names as model.named_modules() lists them{example}",
    )
