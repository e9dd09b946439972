"""One growing matrix of a run: its layer, its component in training, and what Algorithm 1 notes about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .events import ModuleSummary
from .measures import Pair
from .reset import fresh_component
from .spectra import effective_rank, singular_values
from .tuner import AromaLinear
from .tuner.live import LiveAdapter


class GrowingMatrix:
    """One growing layer, with its place among the others and what the rule notes about it.

    Args:
        name: Its name in the base model.
        index: Its place in module order; it seeds the random numbers.
        layer: The layer.
        adapter_name: The adapter that grows.
        live: Its live state.

    Attributes:
        weight_norm: ‖W0 + s B A‖_F over the finished components.
        converged: Whether it has the label "inner-converged" in this inner loop.
        inner_value: Left side of (5) at the last check, None where undefined.
        outer_value: Left side of (6) at the last outer check, None before the first.
    """

    def __init__(self, name: str, index: int, layer: AromaLinear, adapter_name: str, live: LiveAdapter) -> None:
        self.name = name
        self.index = index
        self.layer = layer
        self.weight_norm = 0.0
        self.converged = False
        self.inner_value: float | None = None
        self.outer_value: float | None = None
        self._adapter_name = adapter_name
        self._live = live

    @property
    def pair(self) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        """The component in training, b (m, r) and a (r, n), as the optimizer holds it: sharded under FSDP2."""
        return self.layer.pair(self._adapter_name)

    @property
    def finished(self) -> Pair:
        """The finished components, B (m, R) with the scale folded in and A (R, n)."""
        finished = self.layer.finished(self._adapter_name)
        return finished.B, finished.A

    def components(self, pair: Pair) -> Pair:
        """Return the whole update, B (m, R) and A (R, n), the component in training last if it has moved.

        Args:
            pair: The component in training, b (m, r) and a (r, n), whole.
        """
        return self.layer.components(self._adapter_name, pair)

    @property
    def rank(self) -> int:
        """Rank R of the finished components."""
        return self.layer.finished(self._adapter_name).rank

    @property
    def component_count(self) -> int:
        """Number of finished components; a loaded one of a rank below r counts, too."""
        return -(-self.rank // self._live.config.r)

    @property
    def is_frozen(self) -> bool:
        """Whether it has stopped growing, for good."""
        return self.layer.is_frozen(self._adapter_name)

    def summary(self, pair: Pair) -> ModuleSummary:
        """Return rank, effective rank, state and last check values.

        Args:
            pair: The component in training, b (m, r) and a (r, n), whole.
        """
        B, A = self.components(pair)
        return ModuleSummary(
            name=self.name,
            rank=A.shape[0],
            effective_rank=effective_rank(singular_values(B, A)),
            state="frozen" if self.is_frozen else "converged" if self.converged else "training",
            inner_value=self.inner_value,
            outer_value=self.outer_value,
        )

    def start_component(self, draw: int) -> None:
        """Reinit: b = 0, and the a that outer step `draw` starts with."""
        self.layer.start_pair(self._adapter_name, self._fresh(draw))

    def _fresh(self, draw: int) -> Tensor:
        """Return the a (r, n) that outer step `draw` starts with."""
        return fresh_component(self._live.seed, draw, self.index, (self._live.config.r, self.layer.in_features))

    # Saved and restored ----------------------------------------------------------------------------------------------

    _NOTED = ("converged", "inner_value", "outer_value", "weight_norm")

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint says of the matrix, JSON-able."""
        noted = {name: getattr(self, name) for name in self._NOTED}
        return {"name": self.name, "rank": self.rank, "frozen": self.is_frozen, **noted}

    def pair_tensors(self, draw: int, pair: Pair) -> dict[str, Tensor]:
        """Return the component in training by name, if the plain adapter would not give it back bit for bit.

        Args:
            draw: Number of the outer step that it began in.
            pair: The component, b (m, r) and a (r, n), whole.
        """
        if self.is_frozen:
            return {}
        b, a = (tensor.detach() for tensor in pair)
        scale = self._live.config.scale
        exact = torch.equal(b * scale / scale, b) if b.any() else torch.equal(a, self._fresh(draw).to(a))
        return {} if exact else {f"pair.{self.index}.b": b.clone(), f"pair.{self.index}.a": a.clone()}

    def restore(self, state: dict[str, Any], tensors: Mapping[str, Tensor], draw: int, pair: Pair) -> None:
        """Restore `state()`, and take the component that was in training out of the loaded finished ones.

        Args:
            state: What `state()` returned.
            tensors: All tensors of the checkpoint's state.
            draw: Number of the outer step for random draws.
            pair: The component in training as it is now, b (m, r) and a (r, n), whole. DeepSpeed loads it as it was.
        """
        for name in self._NOTED:
            setattr(self, name, state[name])
        if state["frozen"]:
            self.layer.freeze(self._adapter_name)
            return
        self.layer.unfreeze(self._adapter_name)
        b, a = self.layer.finished(self._adapter_name).pop(self.rank - state["rank"])
        if f"pair.{self.index}.b" in tensors:
            b, a = tensors[f"pair.{self.index}.b"], tensors[f"pair.{self.index}.a"]
            self.layer.start_pair(self._adapter_name, a, b)
        elif a.shape[0]:
            self.layer.start_pair(self._adapter_name, a, b / self._live.config.scale)
        elif not pair[0].any():
            self.start_component(draw)
