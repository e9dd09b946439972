"""The head of a transformers classifier: what did not come with the pretrained backbone, and has to train whole."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

from aroma.errors import bad_value
from aroma.tuner.layout import PEFT_PREFIX

_ATTRIBUTE = "_aroma_head"
_COPY = ".modules_to_save.default"
"""Within the name of a parameter, what PEFT puts behind a module that it trains whole."""
_WITHOUT_FORWARD = nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict


@dataclass(frozen=True)
class Head:
    """The head of a model, by names as they are before PEFT wraps it.

    Args:
        modules: The largest modules that belong to it whole.
        parameters: Parameters of it in modules that belong to the backbone otherwise.
        new: Parameters that the checkpoint lacks, so that they start at random.
    """

    modules: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    new: tuple[str, ...] = ()

    def holds(self, name: str) -> bool:
        """Whether a parameter or module, of the model as it is or wrapped by PEFT, belongs to the head."""
        name = base_name(name)
        return name in self.parameters or any(f"{name}.".startswith(f"{module}.") for module in self.modules)

    def modules_to_save(self) -> list[str]:
        """Return what PEFT must be told to train whole: all but the names that it takes for SEQ_CLS anyway."""
        return [name for name in self.modules if name not in SEQ_CLS_HEAD_NAMES]


def base_name(name: str) -> str:
    """Return the name that a module or parameter had before PEFT wrapped the model."""
    return name.removeprefix(PEFT_PREFIX)


def head_of(model: Any) -> Head:
    """Return the head of a model, wrapped by PEFT or not: if it was not loaded, what is outside its backbone."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found: Head | None = getattr(base, _ATTRIBUTE, None)
    return _find_head(base, ()) if found is None else found


def remember_head(model: Any, missing: Collection[str]) -> None:
    """Let `head_of` know what of `model` the checkpoint did not have.

    Args:
        model: A model as `from_pretrained` returns it.
        missing: The `missing_keys` that it reports.
    """
    # What transformers freezes itself is computed, as a table of sines, and nothing to be learned.
    new = [name for name, parameter in model.named_parameters() if name in missing and parameter.requires_grad]
    setattr(model, _ATTRIBUTE, _find_head(model, new))


def require_new_trains(head: Head, trained: Iterable[str]) -> None:
    """Refuse a model of which something would stay at its random start.

    Args:
        head: Head of the model.
        trained: Names of the parameters that train, wrapped by PEFT or not.

    Raises:
        ConfigError: A parameter that the checkpoint lacks does not train.
    """
    names = {base_name(name).replace(_COPY, "", 1) for name in trained}
    for name in head.new:
        if name not in names:
            raise bad_value(
                "parameter",
                name,
                "the checkpoint lacks it, and the method would leave it at its random start; take a checkpoint that "
                "has it, or another method, as 'full'",
            )


def _find_head(model: Any, new: Collection[str]) -> Head:
    names = [name for name, _ in model.named_parameters()]
    chosen = {name for name in names if name in new or _is_outside(model, name)}
    modules = tuple(_whole_modules(model, "", names, chosen))
    loose = sorted(name for name in chosen if not Head(modules).holds(name))
    return Head(modules, tuple(loose), tuple(new))


def _is_outside(model: Any, name: str) -> bool:
    """Whether a parameter is no part of the backbone; the output embeddings of a language model are part of it."""
    top, prefix = name.split(".")[0], getattr(model, "base_model_prefix", "")
    if top in SEQ_CLS_HEAD_NAMES:
        return True
    if not (prefix and hasattr(model, prefix)) or model.get_output_embeddings() is not None:
        return False
    return top != prefix


def _whole_modules(module: nn.Module, name: str, names: list[str], chosen: Collection[str]) -> Iterator[str]:
    """Yield the names of the largest modules whose parameters are all among `chosen`, and that can be called."""
    within = [other for other in names if other.startswith(f"{name}.")] if name else names
    if name and within and not isinstance(module, _WITHOUT_FORWARD) and all(other in chosen for other in within):
        yield name
    elif any(other in chosen for other in within):
        for child_name, child in module.named_children():
            yield from _whole_modules(child, f"{name}.{child_name}" if name else child_name, names, chosen)
