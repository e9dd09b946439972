"""AromaConfig: the settings of one component, and of when a module stops growing. Data only."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from peft import LoraConfig
from peft.utils import CONFIG_NAME
from torch import Tensor

from ..card import write_ranks
from ..errors import AromaWarning, bad_value
from ..files import write_json
from ..state import write_adapter_state
from .layout import plain_config


class _Registered(str):
    """The name of a PEFT method that is not in PEFT's own enumeration; has a `value`, as its members do."""

    value = property(str.__str__)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"


PEFT_TYPE = _Registered("AROMA")


class Collected(NamedTuple):
    """An adapter at the moment its tensors were collected: what the files beside the tensors need to know."""

    state: dict[str, Any]  # what aroma_state.json says, but for the configuration
    tensors: dict[str, Tensor]  # what the state of the run needs beside it, by name; of any shape
    names: set[str]  # of all modules of the base model
    fan_in_fan_out: bool  # whether a base layer stores its weight as (n, m)


_LARGEST_USUAL_RANK = 8
"""Of a component; a larger `r` is likely meant as that of a LoraConfig, of a whole matrix."""


@dataclass
class AromaConfig(LoraConfig):
    """Configuration of an AROMA adapter (arXiv 2504.05343), given to `peft.get_peft_model`.

    Every target module trains one pair (b, a) of rank `r` at a time. With the defaults and 1,200 planned steps, the
    first inner loop lasts at most 1200 / 12 = 100 optimizer steps and is checked at steps 10, 20, …, 100. A module
    whose ‖b a‖_F grew by less than 10 % since the previous check is labelled converged. When all are labelled, or at
    step 100, each module either keeps its component (if ‖s b a‖_F ≥ 0.005 ‖W0 + s B A‖_F) and starts the next one, or
    drops it and stays frozen. Without checks it is ReLoRA: ``AromaConfig(inner_tolerance=None, outer_tolerance=None,
    max_components=8)`` trains eight components of equal length.

    Args:
        r: Rank of one component. The paper uses 1, and 8 for hard tasks.
        lora_alpha: Every component is scaled by s = lora_alpha / r.
        lora_dropout: Dropout on the input of the component in training; finished components have none.
        target_modules: As in `LoraConfig`; linear layers only. For convolutions, embeddings and experts, use
            PEFT's `LoraConfig` and `aroma.compress`.
        inner_tolerance: ε_in of equation (5). `None`: every inner loop lasts `max_inner_steps`.
        inner_check_interval: ΔT_in, in optimizer steps.
        max_inner_steps: T_in, in optimizer steps. `None`: a twelfth of the planned steps, at least 50; for ReLoRA, the
            planned steps divided by `max_components`.
        outer_tolerance: ε_out of equation (6). `None`: every component is kept.
        min_components: A module keeps this many components whatever equation (6) says. The paper's released code
            behaves like 1.
        max_components: A module with this many components is frozen.
        inner_criterion: `"norm_change"` is equation (5), the relative change of the norm; `"update_change"` is the
            relative norm of the change.
        reset: What happens to the optimizer state of (b, a) after a merge: `"prune"` zeroes a random `prune_ratio` of
            the moments, the same entries in each, and keeps the step count (section 3.2); `"zero"` zeroes moments and
            step count; `"none"` keeps everything (ablation of Table 4).
        prune_ratio: Share of moment entries that `"prune"` zeroes.
        rewarmup_steps: Optimizer steps in which the learning rate climbs from 0 back to the schedule at the start of
            every later inner loop (Figure 2). 0: no re-warm-up.
        component_seed: Seed of the components' own generator. `None`: `torch.initial_seed()` when the adapter is made,
            so that `set_seed` decides it.

    Raises:
        ConfigError: A value cannot work; the error names the field and the remedy.
    """

    r: int = 1
    lora_alpha: float = 4
    target_modules: list[str] | str | None = "all-linear"
    inner_tolerance: float | None = 0.1
    inner_check_interval: int = 10
    max_inner_steps: int | None = None
    outer_tolerance: float | None = 5e-3
    min_components: int = 0
    max_components: int | None = None
    inner_criterion: Literal["norm_change", "update_change"] = "norm_change"
    reset: Literal["prune", "zero", "none"] = "prune"
    prune_ratio: float = 0.999
    rewarmup_steps: int = 50
    component_seed: int | None = None
    collected = cast("Collected | None", None)  # unannotated, so no field
    """Set while the tensors that were collected last live: PEFT holds them while it saves the configuration."""

    def __post_init__(self) -> None:
        for name, (fits, remedy) in _CHECKS.items():
            if not fits(getattr(self, name)):
                raise bad_value(name, getattr(self, name), remedy)
        _require_inherited(self)
        if self.max_inner_steps is not None:
            self._require_inner_check(self.max_inner_steps)
        if self.max_components is not None and self.max_components < self.min_components:
            remedy = f"it must be at least min_components={self.min_components}"
            raise bad_value("max_components", self.max_components, remedy)
        if self.r > _LARGEST_USUAL_RANK:
            warnings.warn(
                f"r={self.r} is the rank of one component, not of a matrix: two make rank {2 * self.r}, ten "
                f"{10 * self.r}. The paper uses 1, and 8 for hard tasks; max_components bounds what a matrix gets",
                AromaWarning,
                stacklevel=3,
            )
        # PEFT reads them, also where they were given as None.
        self.rank_pattern: dict[str, int] = {}
        self.alpha_pattern: dict[str, float] = {}
        super().__post_init__()
        self.peft_type = PEFT_TYPE

    def _require_inner_check(self, inner_steps: int) -> None:
        """Raise if an inner loop of `inner_steps` would end before its first check."""
        if self.inner_tolerance is not None and inner_steps < self.inner_check_interval:
            raise bad_value(
                "max_inner_steps",
                inner_steps,
                f"it is smaller than inner_check_interval={self.inner_check_interval}, so no inner check would ever "
                "run; raise it, lower inner_check_interval, or set inner_tolerance=None",
            )

    @property
    def scale(self) -> float:
        """Scale s = lora_alpha / r of every component."""
        return self.lora_alpha / self.r

    def resolve_inner_steps(self, total_steps: int | None) -> int:
        """Return T_in, in optimizer steps, for a run of `total_steps` planned optimizer steps.

        Raises:
            ConfigError: T_in cannot be derived, or the run or its inner loops would end before the first check.
        """
        if total_steps is not None and self.inner_tolerance is not None and self.inner_check_interval > total_steps:
            remedy = f"it is longer than the run of {total_steps} optimizer steps; lower it or train longer"
            raise bad_value("inner_check_interval", self.inner_check_interval, remedy)
        if self.max_inner_steps is not None:
            return self.max_inner_steps
        if total_steps is None:
            remedy = "set it, or give the controller total_steps, from which it is derived"
            raise bad_value("max_inner_steps", None, remedy)
        if self.inner_tolerance is None and self.outer_tolerance is None and self.max_components is not None:
            return max(1, total_steps // self.max_components)
        inner_steps = max(50, total_steps // 12)
        self._require_inner_check(inner_steps)
        if inner_steps > total_steps:
            warnings.warn(
                f"max_inner_steps=None gives {inner_steps} steps, and the run has {total_steps}: it ends within its "
                "first inner loop, with one component in each matrix; set max_inner_steps below that, or train longer",
                AromaWarning,
                stacklevel=2,
            )
        return inner_steps

    def method(self) -> dict[str, Any]:
        """Return the fields that decide a run; JSON-able."""
        return {name: getattr(self, name) for name in METHOD_FIELDS}

    def collect(self, collected: Collected, one: Tensor) -> None:
        """Note what was collected, as long as `one` (any shape) of the adapter's plain tensors lives."""
        self.collected = collected
        weakref.finalize(one, self._forget, collected).atexit = False

    def _forget(self, collected: Collected) -> None:
        if self.collected is collected:
            del self.collected

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the configuration.

        Where someone holds the adapter's plain tensors, as PEFT does when it saves a model, that is their plain LoRA
        configuration, with `aroma_state.json` beside it. At any other moment it is this configuration itself.
        """
        collected = self.collected
        if collected is None:
            super().save_pretrained(save_directory, **kwargs)
            return
        ranks = {name: entry["rank"] for name, entry in collected.state["modules"].items()}
        plain = plain_config(self, ranks, collected.names, collected.fan_in_fan_out)
        if kwargs.get("auto_mapping_dict") is not None:
            plain["auto_mapping"] = kwargs["auto_mapping_dict"]
        write_json(Path(save_directory) / CONFIG_NAME, plain)
        # PEFT has written the tensors, and gives that argument; transformers writes them after the configuration.
        with_weights = "auto_mapping_dict" in kwargs
        write_adapter_state(save_directory, collected.state, plain, collected.tensors, with_weights)
        write_ranks(save_directory, ranks, collected.state["config"])


# What the fields may be ----------------------------------------------------------------------------------------------


def _whole(least: int, optional: bool = False) -> Callable[[Any], bool]:
    # Processes exchange these numbers as 64-bit integers.
    return lambda value: (optional and value is None) or (type(value) is int and least <= value < 2**63)


def _number(fits: Callable[[float], bool], optional: bool = False) -> Callable[[Any], bool]:
    # Infinity and NaN are not JSON, so the first save would fail.
    def check(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return (optional and value is None) or (is_number and abs(value) < math.inf and fits(value))

    return check


def _one_of(*values: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in values


_TOLERANCE = (_number(lambda x: x > 0, optional=True), "give a positive number; None switches the check off")

_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_whole(1), "the rank of one component is at least 1 (the paper uses 1, or 8 for hard tasks)"),
    "lora_alpha": (_number(lambda x: x > 0), "the scale lora_alpha / r must be a positive number; try 4"),
    "lora_dropout": (_number(lambda x: 0 <= x < 1), "give a probability in [0, 1)"),
    "inner_tolerance": _TOLERANCE,
    "inner_check_interval": (_whole(1), "checks are at least one step apart; try 10"),
    "max_inner_steps": (_whole(1, optional=True), "an inner loop lasts at least one optimizer step"),
    "outer_tolerance": _TOLERANCE,
    "min_components": (_whole(0), "give 0 or more"),
    "max_components": (_whole(1, optional=True), "give 1 or more, or None for no limit"),
    "inner_criterion": (_one_of("norm_change", "update_change"), "choose 'norm_change' or 'update_change'"),
    "reset": (_one_of("prune", "zero", "none"), "choose 'prune', 'zero' or 'none'"),
    "prune_ratio": (_number(lambda x: 0 <= x <= 1), "give the share of entries to zero, in [0, 1]"),
    "rewarmup_steps": (_whole(0), "give 0 for no re-warm-up, or a number of steps"),
    "component_seed": (_whole(0, optional=True), "give a non-negative seed below 2**63, or None"),
}
"""Whether a value fits a field, and what to do if not."""

METHOD_FIELDS = tuple(_CHECKS)
"""Fields that decide a run: a resumed run must have the same values as its checkpoint."""

_AS_IN_LORA = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "fan_in_fan_out", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "ensure_weight_tying"),
}
"""Fields of LoraConfig that mean for AROMA what they mean there; all others belong to variants of LoRA."""


def _require_inherited(config: AromaConfig) -> None:
    """Raise if a field of LoraConfig that cannot work with growth is set."""
    for item in fields(LoraConfig):
        if item.name in _CHECKS or item.name in _AS_IN_LORA:
            continue
        value = getattr(config, item.name)
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        # Of another type than its default a field says something, however empty it is.
        if (type(value) is type(default) and value == default) or (value is None and default == {}):
            continue
        remedy = f"not supported by AROMA: a growing adapter cannot have it; leave it unset, at {default!r}"
        raise bad_value(item.name, value, remedy)
