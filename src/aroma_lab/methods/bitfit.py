"""BitFit (arXiv 2106.10199): the biases train, the weights do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from aroma.errors import bad_value

from .base import Method
from .head import head_of
from .modules import train_head_only


@dataclass(frozen=True)
class BitFit(Method):
    """All bias vectors of the backbone train, those of its LayerNorms among them, and the head.

    In a layer of RoBERTa these are the biases of query, key and value (d each), of the attention's output and its
    LayerNorm (d each), and of the FFN: intermediate (4d), output and LayerNorm (d each).
    """

    writes_backbone: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Name for tables and pictures."""
        return "BitFit"

    def build(self, model: Any, planned_steps: int) -> Any:
        """Freeze all but biases and head; see `Method.build`.

        Raises:
            ConfigError: A backbone without biases, as LLaMA's.
        """
        train_head_only(model)
        head = head_of(model)
        biases = [
            parameter
            for name, parameter in model.named_parameters()
            if name.split(".")[-1] == "bias" and not head.holds(name)
        ]
        if not biases:
            raise bad_value(
                "model", type(model).__name__, "its backbone has no bias to train; compare another method on it"
            )
        for bias in biases:
            bias.requires_grad_(True)
        return model
