"""AromaConfig: what one component is, and when a module has enough of them. Data only; see `live` for the rest."""

from __future__ import annotations

import math
import sys
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from peft import LoraConfig
from peft.utils import CONFIG_NAME

from ..card import Subject, files_beside, write_card
from ..errors import bad_value
from ..files import write_json
from .live import take_collected
from .lora_fields import check_lora_fields
from .state import write_adapter_state


class _Registered(str):
    """The name of a PEFT method that is not in PEFT's own enumeration; reads as its members do."""

    __slots__ = ()

    @property
    def value(self) -> str:
        """The name."""
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return _Registered, (self.value,)


PEFT_TYPE = _Registered("AROMA")

_COMPONENT_FIELDS = ("r", "lora_alpha", "lora_dropout")
"""Fields of LoraConfig that say something else here."""

METHOD_FIELDS = (
    *_COMPONENT_FIELDS,
    "max_components",
    "component_seed",
    "inner_tolerance",
    "inner_check_interval",
    "max_inner_steps",
    "outer_tolerance",
    "min_components",
    "inner_criterion",
    "reset",
    "prune_ratio",
    "rewarmup_steps",
)
"""Fields that decide a run: a resumed run must have the same values as its checkpoint."""

_MOST_LIKELY_MEANT = 8
"""The largest rank of a component that is in use; a larger one is likely that of a LoraConfig, of a whole matrix."""


@dataclass
class AromaConfig(LoraConfig):
    """Configuration of an AROMA adapter (arXiv 2504.05343), given to `peft.get_peft_model`.

    Every target module trains one pair (b, a) of rank `r` at a time. With the defaults and 1,200 planned steps, the
    first inner loop lasts at most 1200 / 12 = 100 optimizer steps and is checked at steps 10, 20, …, 100. A module
    whose ‖b a‖_F grew by less than 10 % since the previous check is labelled converged. When all are labelled, or at
    step 100, each module either keeps its component (if ‖s b a‖_F ≥ 0.005 ‖W0 + s B A‖_F) and starts the next one, or
    drops it and stays frozen.

    ReLoRA is the special case without checks: ``AromaConfig(inner_tolerance=None, outer_tolerance=None,
    max_components=8)`` trains eight components of equal length.

    Args:
        r (`int`, *optional*, defaults to 1): Rank of one component. The paper uses 1, and 8 for hard tasks.
        lora_alpha (`float`, *optional*, defaults to 4): Every component is scaled by s = lora_alpha / r.
        lora_dropout (`float`, *optional*, defaults to 0): Dropout on the input of the component in training. Finished
            components count as merged and have no dropout.
        target_modules (`str` or `list[str]`, *optional*, defaults to `"all-linear"`): As in `LoraConfig`; linear
            layers only. For convolutions, embeddings and experts use evidence on PEFT's `LoraConfig`.
        inner_tolerance (`float` or `None`, *optional*, defaults to 0.1): ε_in of equation (5). `None`: no inner
            checks, every inner loop lasts `max_inner_steps`.
        inner_check_interval (`int`, *optional*, defaults to 10): ΔT_in, in optimizer steps.
        max_inner_steps (`int`, *optional*): T_in, in optimizer steps. `None`: a twelfth of the planned steps, at
            least 50; for ReLoRA, the planned steps divided by `max_components`.
        outer_tolerance (`float` or `None`, *optional*, defaults to 0.005): ε_out of equation (6). `None`: every
            component is kept.
        min_components (`int`, *optional*, defaults to 0): A module keeps this many components whatever equation (6)
            says. The paper's released code behaves like 1.
        max_components (`int`, *optional*): A module with this many components is frozen.
        inner_criterion (`str`, *optional*, defaults to `"norm_change"`): `"norm_change"` is equation (5), the relative
            change of the norm; `"update_change"` is the relative norm of the change.
        reset (`str`, *optional*, defaults to `"prune"`): What happens to the optimizer state of (b, a) after a merge:
            `"prune"` zeroes a random `prune_ratio` of the moments, the same entries in each, and keeps the step count
            (section 3.2); `"zero"` zeroes moments and step count; `"none"` keeps everything (ablation of Table 4).
        prune_ratio (`float`, *optional*, defaults to 0.999): Share of moment entries that `"prune"` zeroes.
        rewarmup_steps (`int`, *optional*, defaults to 50): Optimizer steps in which the learning rate climbs from 0
            back to the schedule at the start of every later inner loop (Figure 2). 0: no re-warm-up.
        component_seed (`int`, *optional*): Seed of the components' own generator. `None`: `torch.initial_seed()` when
            the adapter is made, so that `set_seed` decides it.

    Raises:
        ConfigError: A value cannot work; the error names the field and the remedy.
    """

    r: int = field(default=1, metadata={"help": "Rank of one component."})
    lora_alpha: float = field(default=4, metadata={"help": "Every component is scaled by lora_alpha / r."})
    target_modules: list[str] | str | None = field(
        default="all-linear", metadata={"help": "Modules that grow: names, a regular expression, or 'all-linear'."}
    )
    inner_tolerance: float | None = field(
        default=0.1, metadata={"help": "Tolerance of the inner check, equation (5); None: no inner checks."}
    )
    inner_check_interval: int = field(default=10, metadata={"help": "Optimizer steps between inner checks."})
    max_inner_steps: int | None = field(
        default=None,
        metadata={"help": "Maximum optimizer steps of an inner loop; None: a twelfth of the run, at least 50."},
    )
    outer_tolerance: float | None = field(
        default=5e-3, metadata={"help": "Tolerance of the outer check, equation (6); None: keep every component."}
    )
    min_components: int = field(
        default=0, metadata={"help": "Components that a module keeps whatever the outer check says."}
    )
    max_components: int | None = field(
        default=None, metadata={"help": "A module with this many components is frozen."}
    )
    inner_criterion: Literal["norm_change", "update_change"] = field(
        default="norm_change",
        metadata={"help": "'norm_change': change of the norm, equation (5); 'update_change': norm of the change."},
    )
    reset: Literal["prune", "zero", "none"] = field(
        default="prune", metadata={"help": "What a merge does to the optimizer state of the pair."}
    )
    prune_ratio: float = field(default=0.999, metadata={"help": "Share of moment entries zeroed by reset='prune'."})
    rewarmup_steps: int = field(
        default=50, metadata={"help": "Optimizer steps of re-warm-up at the start of every later inner loop."}
    )
    component_seed: int | None = field(
        default=None, metadata={"help": "Seed of new components; None: torch.initial_seed()."}
    )

    def __post_init__(self) -> None:
        self._check_component()
        self._check_loops()
        self._check_reset()
        check_lora_fields(self, _COMPONENT_FIELDS)
        for item in fields(self):
            if isinstance(value := getattr(self, item.name), np.number):
                setattr(self, item.name, value.item())  # JSON has none of numpy's numbers
        # PEFT reads them, also where they were given as None.
        self.rank_pattern: dict[str, int] = {}
        self.alpha_pattern: dict[str, float] = {}
        super().__post_init__()
        self.peft_type = PEFT_TYPE

    def _check_component(self) -> None:
        _require_int("r", self.r, 1, "the rank of one component is at least 1 (the paper uses 1, or 8 for hard tasks)")
        _require_positive("lora_alpha", self.lora_alpha, "the scale lora_alpha / r must be a positive number; try 4")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise bad_value("lora_dropout", self.lora_dropout, "give a probability in [0, 1)")
        if self.component_seed is not None:
            _require_int("component_seed", self.component_seed, 0, "give a non-negative seed below 2**63, or None")

        if self.r > _MOST_LIKELY_MEANT:
            warnings.warn(
                f"r={self.r} is the rank of one component, not of a matrix: two make rank {2 * self.r}, ten "
                f"{10 * self.r}. The paper uses 1, and 8 for hard tasks; max_components bounds what a matrix gets",
                stacklevel=4,
            )

    def _check_loops(self) -> None:
        for name in ("inner_tolerance", "outer_tolerance"):
            value = getattr(self, name)
            if value is not None:
                _require_positive(name, value, "a tolerance must be a positive number; None switches the check off")
        _require_int(
            "inner_check_interval", self.inner_check_interval, 1, "checks are at least one step apart; try 10"
        )
        if self.max_inner_steps is not None:
            _require_int("max_inner_steps", self.max_inner_steps, 1, "an inner loop lasts at least one optimizer step")
            self._check_inner_steps(self.max_inner_steps)
        _require_int("min_components", self.min_components, 0, "give 0 or more")
        if self.max_components is not None:
            _require_int("max_components", self.max_components, 1, "give 1 or more, or None for no limit")
            if self.max_components < self.min_components:
                raise bad_value(
                    "max_components", self.max_components, f"it must be at least min_components={self.min_components}"
                )
        if not isinstance(self.inner_criterion, str) or self.inner_criterion not in ("norm_change", "update_change"):
            raise bad_value("inner_criterion", self.inner_criterion, "choose 'norm_change' or 'update_change'")

    def _check_inner_steps(self, inner_steps: int) -> None:
        """Raise if an inner loop of `inner_steps` would end before its first check."""
        if self.inner_tolerance is not None and inner_steps < self.inner_check_interval:
            raise bad_value(
                "max_inner_steps",
                inner_steps,
                f"it is smaller than inner_check_interval={self.inner_check_interval}, so no inner check would ever "
                "run; raise it, lower inner_check_interval, or set inner_tolerance=None",
            )

    def _check_reset(self) -> None:
        if not isinstance(self.reset, str) or self.reset not in ("prune", "zero", "none"):
            raise bad_value("reset", self.reset, "choose 'prune', 'zero' or 'none'")
        if not _is_number(self.prune_ratio) or not 0 <= self.prune_ratio <= 1:
            raise bad_value("prune_ratio", self.prune_ratio, "give the share of entries to zero, in [0, 1]")
        _require_int("rewarmup_steps", self.rewarmup_steps, 0, "give 0 for no re-warm-up, or a number of steps")

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
            raise bad_value(
                "inner_check_interval",
                self.inner_check_interval,
                f"it is longer than the run of {total_steps} optimizer steps; lower it or train longer",
            )
        if self.max_inner_steps is not None:
            return self.max_inner_steps
        if total_steps is None:
            raise bad_value(
                "max_inner_steps", None, "set it, or give the controller total_steps, from which it is derived"
            )
        if self.inner_tolerance is None and self.outer_tolerance is None and self.max_components is not None:
            return max(1, total_steps // self.max_components)
        inner_steps = max(50, total_steps // 12)
        self._check_inner_steps(inner_steps)
        if inner_steps > total_steps:
            warnings.warn(
                f"max_inner_steps=None gives {inner_steps} steps, and the run has {total_steps}: it ends within its "
                "first inner loop, so no rank will grow; set max_inner_steps below the run, or train longer",
                stacklevel=2,
            )
        return inner_steps

    def method(self) -> dict[str, Any]:
        """Return the fields that decide a run; JSON-able."""
        return {name: getattr(self, name) for name in METHOD_FIELDS}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the configuration.

        While PEFT saves a model, that is the plain LoRA configuration of the tensors it has just collected, with
        `aroma_state.json` beside it. Called at any other moment it writes this configuration itself.
        """
        collected = take_collected(self)
        if collected is None:
            super().save_pretrained(save_directory, **kwargs)
            return
        live, snapshot = collected
        plain = snapshot.plain.lora_config(self).to_dict()
        if kwargs.get("auto_mapping_dict") is not None:
            plain["auto_mapping"] = kwargs["auto_mapping_dict"]
        ordered = {key: sorted(plain[key]) if isinstance(plain[key], set) else plain[key] for key in sorted(plain)}
        write_json(Path(save_directory) / CONFIG_NAME, ordered)
        state = write_adapter_state(save_directory, live, snapshot.plain, ordered, snapshot.exported)
        write_card(save_directory, Subject.of(ordered, state, files=files_beside(save_directory)))
        live.saved_to = str(save_directory)


def _is_number(value: object) -> bool:
    # An integer can be above what a float holds, and would fail where it is divided.
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    largest: Any = sys.float_info.max
    return not abs(value) > largest


def _require_positive(name: str, value: Any, remedy: str) -> None:
    # Finite, too: infinity is not JSON, so the first save would fail.
    if not _is_number(value) or not 0 < value < math.inf:
        raise bad_value(name, value, remedy)


def _require_int(name: str, value: object, minimum: int, remedy: str) -> None:
    # Processes exchange these numbers as 64-bit integers.
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not minimum <= value < 2**63:
        raise bad_value(name, value, remedy)
