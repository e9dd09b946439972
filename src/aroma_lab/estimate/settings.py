"""What is estimated: a model, an adapter of some size, a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from aroma.errors import bad_value

Dtype = Literal["float32", "bfloat16", "float16", "nf4", "int8"]
Optimizer = Literal["adamw", "adamw8bit", "adafactor", "sgd", "sgd-momentum"]
Task = Literal["auto", "causal-lm", "classification"]
QUANTISED = ("nf4", "int8")


@dataclass(frozen=True)
class ScaleSettings:
    """Settings of one estimate.

    Args:
        model: A named shape, a local folder or a hub name; only its configuration is used.
        components: Finished components of every module, each of rank `r`; one more is in training.
        r: Rank of one component.
        target_modules: As in `AromaConfig`.
        dtype: Of the base weights; `"nf4"` and `"int8"` as bitsandbytes stores them, the rest in bfloat16.
        batch_size: Sequences of a batch on one device; nothing is padded.
        sequence_length: Tokens of a sequence.
        optimizer: `"sgd"` is without momentum.
        gradient_checkpointing: Whether each block keeps its input alone and is computed again for backward.
        task: `"auto"` is a causal language model where the configuration says so, else a classifier of two classes.

    Raises:
        ConfigError: A value that cannot work.
    """

    model: str
    components: int = 10
    r: int = 1
    target_modules: str | tuple[str, ...] = "all-linear"
    dtype: Dtype = "bfloat16"
    batch_size: int = 1
    sequence_length: int = 1024
    optimizer: Optimizer = "adamw"
    gradient_checkpointing: bool = False
    task: Task = "auto"

    def __post_init__(self) -> None:
        require_whole("components", self.components, 0)
        for name in ("r", "batch_size", "sequence_length"):
            require_whole(name, getattr(self, name), 1)
        for name, kinds in (("dtype", Dtype), ("optimizer", Optimizer), ("task", Task)):
            choices: tuple[Any, ...] = get_args(kinds)
            if getattr(self, name) not in choices:
                raise bad_value(name, getattr(self, name), f"choose one of {', '.join(choices)}")

    @property
    def rank(self) -> int:
        """Rank of the finished components of a module."""
        return self.components * self.r

    @property
    def weight_dtype(self) -> str:
        """Dtype of the weights that are not quantised, and of the activations."""
        return "bfloat16" if self.is_quantised else self.dtype

    @property
    def is_quantised(self) -> bool:
        """Whether bitsandbytes holds the weights."""
        return self.dtype in QUANTISED

    @property
    def tokens(self) -> int:
        """Tokens of a batch on one device."""
        return self.batch_size * self.sequence_length


def require_whole(name: str, value: object, minimum: int) -> None:
    """Raise unless `value` is a whole number of at least `minimum`.

    Raises:
        ConfigError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise bad_value(name, value, f"give a whole number, {minimum} or more")
