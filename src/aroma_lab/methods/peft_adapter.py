"""What the methods that PEFT provides have in common."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from aroma.errors import bad_value

from .base import Method
from .head import base_name, head_of, require_new_trains

ADAPTER = "default"
"""The name that PEFT gives the adapter of `get_peft_model`."""

Layer = TypeVar("Layer", bound=nn.Module)


@dataclass(frozen=True)
class PeftAdapter(Method):
    """A method whose built model is a `PeftModel` with one adapter."""

    def save(self, model: Any, folder: Path) -> None:
        """Write the adapter as PEFT does, head included; see `Method.save`."""
        with staged(folder) as staging:
            model.save_pretrained(staging)


def wrap(model: Any, config: Any) -> Any:
    """Wrap `model` with PEFT, so that its head trains whole beside the adapter, and is saved with it.

    Args:
        model: A transformers classifier or causal language model.
        config: PEFT's configuration of the adapter; gets the head's modules as `modules_to_save`, and the task type
            of the model where it has none.

    Raises:
        ConfigError: A parameter that the checkpoint lacks would not train, or one of the backbone would.
    """
    from peft import get_peft_model

    config.task_type = config.task_type or task_type_of(model)
    head, asked = head_of(model), config.modules_to_save or []
    config.modules_to_save = [*asked, *head.modules_to_save()] or None
    wrapped = get_peft_model(model, config)
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    require_new_trains(head, trained)
    for name in trained:
        # PEFT takes every module whose name ends so.
        if ".modules_to_save." in name and not asked and not head.holds(name):
            raise bad_value(
                "parameter",
                base_name(name),
                f"PEFT would train it with the head, whose modules are {', '.join(head.modules)}, for its like name; "
                "take a method that is no PEFT adapter, as 'bitfit'",
            )
    return wrapped


def task_type_of(model: Any) -> str:
    """Return PEFT's name of what a model is for: it decides the wrapper, and whether a head trains."""
    return "CAUSAL_LM" if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else "SEQ_CLS"


def layers_of(model: nn.Module, kind: type[Layer]) -> dict[str, Layer]:
    """Return the adapted layers of a `PeftModel` by the names that their modules have in the base model, in order."""
    return {base_name(name): module for name, module in model.named_modules() if isinstance(module, kind)}


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files replace those of `folder` on success; on failure they vanish."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as staging:
        yield Path(staging)
        for file in Path(staging).iterdir():
            os.replace(file, folder / file.name)
