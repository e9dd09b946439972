"""What is compared: every method, and AROMA at several stages of its growth."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from aroma.errors import bad_value
from aroma.tuner import AromaLinear, aroma_layers

from ..methods import AdaLora, Aroma, Frozen, Full, HeadOnly, Lora, Method, ReLoraMerge

FLOOR = "floor"
"""Key of the case that all others are compared with."""

_COMPONENTS_WHEN_FROZEN = 8
"""Finished components of every module in the cases where some modules are finished for good."""

_NEVER_ENDS = {"inner_tolerance": 1e-12, "max_inner_steps": 10**9}
"""The controller checks as ever and yet ends no inner loop, so that a case stays the case that it is."""

FrozenModules = Literal["none", "half", "lower", "all"]


@dataclass(frozen=True)
class Case:
    """One method, at one stage.

    Args:
        key: Short name, for `--only`.
        method: The method.
        components: Finished components of every module (AROMA).
        frozen: Modules that are finished for good (AROMA): `"half"`, every second one; `"lower"`, those in the lower
            half of the model; `"all"`.
        compiled: Whether the model is compiled.
    """

    key: str
    method: Method
    components: int = 0
    frozen: FrozenModules = "none"
    compiled: bool = False

    @property
    def name(self) -> str:
        """Name for tables and pictures."""
        parts = [self.method.name]
        if isinstance(self.method, Aroma):
            parts.append(f"{self.components} finished")
        if self.frozen != "none":
            parts.append({"half": "half frozen", "lower": "lower half frozen", "all": "all frozen"}[self.frozen])
        return ", ".join([*parts, "compiled"] if self.compiled else parts)

    def build(self, model: Any, planned_steps: int, seed: int) -> Any:
        """Return `model` adapted and brought to the stage of the case; see `Method.build`."""
        torch.manual_seed(seed)
        model = self.method.build(model, planned_steps)
        if isinstance(self.method, Aroma):
            self._bring_to_stage(model)
        return model.train()

    def _bring_to_stage(self, model: nn.Module) -> None:
        layers = list(aroma_layers(model).values())
        if self.components:
            for layer in layers:
                _finish_components(layer, self.components)
        for layer in self._frozen_of(layers):
            layer.freeze("default")

    def _frozen_of(self, layers: list[AromaLinear]) -> list[AromaLinear]:
        half = len(layers) // 2
        return {"none": [], "half": layers[::2], "lower": layers[:half], "all": layers}[self.frozen]


def all_cases() -> list[Case]:
    """Return all cases, none of them compiled, in the order in which they take turns."""
    adapters = [
        Case(f"lora-r{r}{_suffix(dropout)}", Lora(r=r, dropout=dropout)) for dropout in (0.0, 0.1) for r in (1, 8, 16)
    ]
    stages = [(0.0, count) for count in (0, 4, 8, 16, 64)] + [(0.1, count) for count in (0, 8, 64)]
    grown = [
        Case(f"aroma-{count}{_suffix(dropout)}", Aroma(dropout=dropout, options=_NEVER_ENDS), components=count)
        for dropout, count in stages
    ]
    finished: tuple[FrozenModules, ...] = ("half", "lower", "all")
    frozen = [
        Case(f"aroma-{frozen}", Aroma(options=_NEVER_ENDS), _COMPONENTS_WHEN_FROZEN, frozen) for frozen in finished
    ]
    return [
        Case(FLOOR, Frozen()),
        Case("head", HeadOnly()),
        *adapters,
        Case("adalora", AdaLora()),
        Case("relora", ReLoraMerge()),
        Case("full", Full()),
        *grown,
        *frozen,
    ]


def select_cases(only: Sequence[str] | None, compiled: bool) -> list[Case]:
    """Return the cases named in `only`, the floor always among them, and if `compiled` each a second time, compiled.

    Raises:
        ConfigError: An unknown key.
    """
    cases = all_cases()
    keys = [case.key for case in cases]
    for key in only or ():
        if key not in keys:
            raise bad_value("only", key, f"no such case; choose from {', '.join(keys)}")
    if only:
        cases = [case for case in cases if case.key in (FLOOR, *only)]
    if compiled:
        cases += [dataclasses.replace(case, key=f"{case.key}-compiled", compiled=True) for case in cases]
    return cases


def _suffix(dropout: float) -> str:
    return "-dropout" if dropout else ""


def _finish_components(layer: AromaLinear, count: int) -> None:
    """Put small random components behind the finished ones."""
    b, a = layer.pair("default")
    B = 1e-3 * torch.randn(b.shape[0], count)
    A = torch.randn(count, a.shape[1]) / a.shape[1] ** 0.5
    layer.finished("default").append(B.to(b), A.to(a))
