"""The contenders: every method, and AROMA at several stages of its growth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aroma.compression.compress import FEWEST, compress
from aroma.errors import bad_value
from aroma.integrations.loop import attach
from aroma.tuner import aroma_layers

from ..methods import AdaLora, Aroma, Frozen, Full, HeadOnly, Lora, Method
from .models import copy_model

FLOOR = "floor"
"""Key of the case that all others are compared with."""

COMPRESS = "compress"
"""Key of the case that trains nothing, and compresses an adapter of LoRA r=16."""

PLANNED_STEPS = 10_000
"""Length of the run that the methods plan for; they are measured at its beginning."""

_NEVER_ENDS = {"inner_tolerance": 1e-12, "max_inner_steps": 10**9}
"""The controller checks as usual but never ends an inner loop, so that a case keeps its stage."""

_LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Case:
    """One method; of AROMA at the stage where every module has so many finished components."""

    key: str
    method: Method
    components: int = 0

    @property
    def rival(self) -> str:
        """Key of LoRA r=8 with the same dropout, if it has one."""
        return "lora-r8-dropout" if self.key.endswith("-dropout") else "lora-r8"

    def build(self, model: Any, seed: int) -> Any:
        """Return `model` adapted and brought to the stage of the case; see `Method.build`."""
        torch.manual_seed(seed)
        model = self.method.build(model, PLANNED_STEPS)
        for layer in aroma_layers(model).values() if self.components else ():
            b, a = layer.pair("default")
            B = 1e-3 * torch.randn(b.shape[0], self.components)
            A = torch.randn(self.components, a.shape[1]) / a.shape[1] ** 0.5
            layer.finished("default").append(B.to(b), A.to(a))
        return model.train()


class Contender:
    """A case that trains on one batch again and again; optimizer and hooks are None if nothing trains.

    The model is a copy of `base`, and shares the backbone's tensors if the method does not write them.
    """

    def __init__(self, case: Case, base: Any, batch: dict[str, Tensor], seed: int) -> None:
        self.case = case
        self.model = case.build(copy_model(base, case.method.writes_backbone), seed)
        self._batch = batch
        self._steps = 0
        self.optimizer: Any = None
        self.hooks: Any = None
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if parameters:
            self.optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=0.0)
            self.hooks = case.method.hooks(self.model)
            if isinstance(case.method, Aroma):
                attach(self.model, self.optimizer, total_steps=PLANNED_STEPS)

    def forward(self) -> Tensor:
        """Return the loss, a scalar."""
        loss: Tensor = self.model(**self._batch).loss
        return loss

    def forward_backward(self) -> None:
        """Clear the gradients, then run forward and backward."""
        self.clear()
        self.forward().backward()

    def update(self) -> None:
        """Run the rest of a step: the optimizer, and what the method does around it."""
        self._steps += 1
        if self.optimizer is not None:
            self.optimizer.step()
            self.hooks.after_step(self._steps)

    def clear(self) -> None:
        """Drop the gradients."""
        if self.optimizer is not None:
            self.optimizer.zero_grad()


class Compressing(Contender):
    """Compresses a finished adapter by the least number of examples; its time is that of all of it.

    All directions stay, so that every round has the same work.
    """

    def __init__(self, case: Case, base: Any, batch: dict[str, Tensor], seed: int) -> None:
        super().__init__(case, base, batch, seed)
        self.optimizer = None
        self._batches = [batch] * math.ceil(FEWEST / len(batch["input_ids"]))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=1e-2)

    def forward_backward(self) -> None:
        """Compress."""
        compress(self.model, self._batches, keep=1.0, size=1.0)


def all_cases() -> list[Case]:
    """Return all cases in the order in which they take turns."""
    cases = [Case(FLOOR, Frozen()), Case("head", HeadOnly()), Case("adalora", AdaLora()), Case("full", Full())]
    for dropout, suffix in ((0.0, ""), (0.1, "-dropout")):
        cases += [Case(f"lora-r{r}{suffix}", Lora(r=r, dropout=dropout)) for r in (1, 8, 16)]
        aroma = Aroma(lora_dropout=dropout, **_NEVER_ENDS)
        cases += [Case(f"aroma-{count}{suffix}", aroma, components=count) for count in (0, 8, 64)]
    return [*cases, Case(COMPRESS, Lora(r=16))]


def select_cases(only: Sequence[str] | None) -> list[Case]:
    """Return the floor and the cases named in `only` (None: all).

    Raises:
        ConfigError: An unknown key.
    """
    cases = all_cases()
    keys = [case.key for case in cases]
    for key in only or ():
        if key not in keys:
            raise bad_value("only", key, f"no such case; choose from {', '.join(keys)}")
    return [case for case in cases if not only or case.key in (FLOOR, *only)]
