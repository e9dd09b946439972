"""AdaLoRA's allocator around the optimizer's step, and all that it remembers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aroma.errors import CheckpointError, bad_value

from .hooks import Hooks
from .peft_adapter import ADAPTER

_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""What PEFT's `RankAllocator` keeps of every parameter: its last sensitivity, and two averages over the steps."""
_PATTERN = "rank_pattern"


class Allocation(Hooks):
    """Calls PEFT's allocator after every optimizer step, while the gradients that it judges by are there.

    Args:
        model: A PeftModel with an AdaLoRA adapter.
        planned_steps: Optimizer steps of the run.

    Raises:
        ConfigError: The adapter was made for a run of another length, so its budget would shrink at other steps.
    """

    def __init__(self, model: Any, planned_steps: int) -> None:
        self._model = model
        self._config = model.peft_config[ADAPTER]
        # The allocator's names are those below the tuner.
        self._parameters = {
            name: parameter for name, parameter in model.base_model.model.named_parameters() if ".lora_" in name
        }
        if self._config.total_step != planned_steps:
            raise bad_value(
                "planned_steps",
                planned_steps,
                f"AdaLoRA's budget was planned for total_step={self._config.total_step}; build the model for the "
                "steps that the run will take",
            )

    def after_step(self, step: int) -> None:
        """Judge every triplet by the gradients, and mask those that the budget does not reach."""
        self._model.base_model.update_and_allocate(step)

    def state_dict(self) -> dict[str, Tensor]:
        """Return sensitivities, averages and masks; see `Hooks.state_dict`."""
        state = {
            f"{kind}.{name}": values.detach().clone()
            for kind in _AVERAGES
            for name, values in getattr(self._model.base_model.rankallocator, kind).items()
        }
        for module, kept in kept_triplets(self._model).items():
            state[f"{_PATTERN}.{_values_of(module)}"] = torch.tensor(kept, dtype=torch.bool)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict()`; see `Hooks.load_state_dict`."""
        parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in (*_AVERAGES, _PATTERN)}
        for key, values in state.items():
            kind, _, name = key.partition(".")
            if kind not in parts or name not in self._parameters:
                raise CheckpointError(f"hooks: {key!r} is of no AdaLoRA adapter like this one; use another checkpoint")
            parts[kind][name] = values
        for kind in _AVERAGES:
            averages = {name: values.to(self._parameters[name], copy=True) for name, values in parts[kind].items()}
            setattr(self._model.base_model.rankallocator, kind, averages)
        # None, not empty, before the first allocation: as PEFT has it.
        self._config.rank_pattern = {name: kept.tolist() for name, kept in parts[_PATTERN].items()} or None


def kept_triplets(model: Any) -> dict[str, list[bool]]:
    """Return which triplets the last allocation left, by module name; empty before the first."""
    pattern = model.peft_config[ADAPTER].rank_pattern or {}
    # PEFT shortens the names when it saves.
    return {name.removesuffix(f".{ADAPTER}").removesuffix(".lora_E"): kept for name, kept in pattern.items()}


def _values_of(module: str) -> str:
    return f"{module}.lora_E.{ADAPTER}"
