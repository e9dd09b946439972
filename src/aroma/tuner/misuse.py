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

HEADS = {"SEQ_CLS": SEQ_CLS_HEAD_NAMES, "TOKEN_CLS": SEQ_CLS_HEAD_NAMES, "QUESTION_ANS": ["qa_outputs"]}
"""Names of the heads that PEFT trains whole, by task type."""
_HEAD_NAMES = {name: None for names in HEADS.values() for name in names}
"""The same of all tasks, each once and in order."""


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
                warn_uncontrolled()
                return


def warn_uncontrolled() -> None:
    """Warn that an adapter was trained without a controller, so that it did not grow.

    Warns:
        UserWarning: Always.
    """
    warnings.warn(
        "This AROMA adapter was trained without its controller, as a plain LoRA: no component was ever checked or "
        "added. Give the Trainer `callbacks=[AromaCallback()]`, or call `aroma.attach(model, optimizer, scheduler, "
        "total_steps=...)` before a loop of your own.",
        stacklevel=3,
    )


def tell_of_unmatched(model: nn.Module, config: AromaConfig, wanted: Any) -> None:
    """Warn of names that no module has: where others have theirs, PEFT passes over them.

    Args:
        model: The model, whose layers grow by now.
        config: Of the adapter, for its `modules_to_save`.
        wanted: `target_modules`, as it was given.

    Warns:
        AromaWarning: Naming them.
    """
    names = [name for name, _ in model.named_modules()]
    given = [*wanted] if isinstance(wanted, list | tuple | set) else []
    unmatched = {"target_modules": [own for own in given if not any(is_named(name, own) for name in names)]}
    # PEFT adds the heads of a task by itself, whichever of them a model has.
    kept = {*(config.modules_to_save or ())} - _HEAD_NAMES.keys()
    unmatched["modules_to_save"] = [own for own in kept if not any(name.endswith(own) for name in names)]
    for field, missing in unmatched.items():
        if missing:
            warnings.warn(
                f"{field}: no module of {type(model).__name__} is called {', '.join(map(repr, sorted(missing)))}, so "
                "nothing trains there; take the names from model.named_modules()",
                AromaWarning,
                stacklevel=3,
            )


def tell_of_frozen_head(model: nn.Module, config: AromaConfig, wanted: Any) -> None:
    """Warn where the weights of a head are frozen: PEFT trains them only if it knows the task.

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
        f"a new head keeps its random start. Give AromaConfig task_type={_task_of(model)!r}, or "
        f"modules_to_save=[{name!r}]",
        AromaWarning,
        stacklevel=2,
    )


def _grows_one(heads: dict[str, nn.Module]) -> bool:
    return any(isinstance(module, AromaLinear) for head in heads.values() for module in head.modules())


def _heads(model: nn.Module) -> dict[str, nn.Module]:
    """Return what PEFT takes for a head, by name."""
    found = {name: getattr(model, name, None) for name in _HEAD_NAMES}
    return {name: head for name, head in found.items() if isinstance(head, nn.Module)}


def _task_of(model: nn.Module) -> str:
    """Return the task type of a model with a head, which its class names."""
    name = type(model).__name__
    named = {"TokenClassification": "TOKEN_CLS", "QuestionAnswering": "QUESTION_ANS"}
    return next((task for ending, task in named.items() if ending in name), "SEQ_CLS")
