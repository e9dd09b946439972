"""What looks right and is not: a training that does not grow, a head that does not train, a name that nothing has.

Each is told while it can be helped, and once.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

from ..errors import AromaWarning
from ..patterns import is_named
from .layer import AromaLinear

if TYPE_CHECKING:
    from .config import AromaConfig


class UncontrolledWatch:
    """Forward hook of a model that tells, after the first optimizer step, that an adapter trains without a controller.

    To find out when it is saved would be to find out when the training is over. A pair (b, a) begins with b = 0, so it
    has trained where b is another.

    Attributes:
        layers: The growing layers of the model.
    """

    def __init__(self) -> None:
        self.layers: list[AromaLinear] = []
        self._versions: dict[str, int] = {}

    def __call__(self, model: nn.Module, *_: Any) -> None:
        """Look at one layer; the device is asked only after b was written to."""
        if not model.training or not torch.is_grad_enabled() or torch.compiler.is_compiling() or not self.layers:
            return
        layer = self.layers[0]
        for name in layer.active_adapters:
            b = layer.pair(name)[0] if name in layer.lora_A else None
            # What is sharded is not looked at: that would take all ranks.
            if b is None or type(b) is not nn.Parameter or layer.live[name].ever_controlled or not b.requires_grad:
                continue
            is_written = self._versions.get(name, b._version) != b._version
            self._versions[name] = b._version
            if is_written and b.numel() and b.any():
                self.layers = []  # to say it once is enough
                warn_uncontrolled(layer.live[name].config)
                return


def warn_uncontrolled(config: AromaConfig) -> None:
    """Warn that an adapter was trained without a controller, so that it did not grow.

    Warns:
        UserWarning: Always.
    """
    warnings.warn(
        "This AROMA adapter was trained without its controller, as a plain LoRA of rank "
        f"{config.pair_rank}: no component was ever checked or added. Give the Trainer "
        "`callbacks=[AromaCallback()]`, or call `aroma.attach(model, optimizer, scheduler, total_steps=...)` before a "
        "loop of your own.",
        stacklevel=3,
    )


def tell_of_unmatched(model: nn.Module, wanted: Any) -> None:
    """Warn of names in `target_modules` that no module has: where others have theirs, PEFT passes over them.

    Warns:
        AromaWarning: Naming them.
    """
    if not isinstance(wanted, list | tuple | set):
        return
    names = [name for name, _ in model.named_modules()]
    unmatched = sorted(own for own in wanted if not any(is_named(name, own) for name in names))
    if unmatched:
        warnings.warn(
            f"target_modules: no module of {type(model).__name__} is called {', '.join(map(repr, unmatched))}, so "
            "nothing grows there; take the names from model.named_modules()",
            AromaWarning,
            stacklevel=3,
        )


def tell_of_frozen_head(model: nn.Module, config: AromaConfig, wanted: Any) -> None:
    """Warn where the weights of a classification head are frozen: PEFT trains them only if it knows the task.

    Args:
        model: The model, whose layers grow by now.
        config: Of the adapter.
        wanted: `target_modules`, as it was given.

    Warns:
        AromaWarning: `task_type` is missing, and `modules_to_save` names no head.
    """
    heads = _heads(model)
    if wanted not in (None, "all-linear") and _grows_one(heads):
        return  # it was asked for
    trained = {*(config.modules_to_save or ())}
    if not heads or config.task_type is not None or config.inference_mode or trained.intersection(heads):
        return
    name = next(iter(heads))
    warnings.warn(
        f"task_type=None: the weights of the head {name!r} of {type(model).__name__} are frozen as all others are, so "
        f"a new head keeps its random start. Give AromaConfig task_type='SEQ_CLS', or modules_to_save=[{name!r}]",
        AromaWarning,
        stacklevel=2,
    )


def _grows_one(heads: dict[str, nn.Module]) -> bool:
    return any(isinstance(module, AromaLinear) for head in heads.values() for module in head.modules())


def _heads(model: nn.Module) -> dict[str, nn.Module]:
    """Return what PEFT takes for a classification head, by name."""
    found = {name: getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES}
    return {name: head for name, head in found.items() if isinstance(head, nn.Module)}
