"""One growing module as Algorithm 1 sees it: its component in training, its finished ones, its labels and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError, bad_value
from .events import ModuleSummary
from .measures import Pair
from .reset import check_resettable, component_generator, forget_moments, fresh_component, reset_state
from .sharding import is_flattened
from .spectra import effective_rank, singular_values
from .tuner import AromaLinear, LiveAdapter


class TargetModule:
    """A growing layer, with what the controller knows of it.

    Args:
        name: Its name in the base model.
        index: Its place in module order; decides its random numbers.
        layer: The layer.
        adapter_name: The adapter that grows.
        live: The adapter's live state.

    Attributes:
        weight_norm: ‖W0 + s B A‖_F over the finished components.
        converged: Whether it bears the label "inner-converged" in this inner loop.
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
        self._config = live.config

    # What there is ---------------------------------------------------------------------------------------------------

    @property
    def pair(self) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        """The component in training, b (m, r) and a (r, n), as the optimizer holds it: sharded under FSDP2.

        Methods that take a `pair` want it whole.
        """
        return self.layer.pair(self._adapter_name)

    def scaled(self, pair: Pair) -> Pair:
        """Return a component with the scale folded into b, detached."""
        b, a = pair
        return b.detach() * self._config.scale, a.detach()

    @property
    def finished(self) -> Pair:
        """The finished components, B (m, R) with the scale folded in and A (R, n)."""
        finished = self.layer.finished(self._adapter_name)
        return finished.B, finished.A

    def components(self, pair: Pair) -> Pair:
        """Return the whole update, B and A as in `finished`, with the component in training last if it has moved."""
        return self.layer.components(self._adapter_name, pair)

    @property
    def rank(self) -> int:
        """Rank R of the finished components."""
        return self.layer.finished(self._adapter_name).rank

    @property
    def component_count(self) -> int:
        """Number of finished components; a loaded rest of a rank below r counts as one."""
        return -(-self.rank // self._config.r)

    @property
    def is_frozen(self) -> bool:
        """Whether it is outer-converged."""
        return self.layer.is_frozen(self._adapter_name)

    def summary(self, pair: Pair) -> ModuleSummary:
        """Return rank, effective rank, state and last check values."""
        B, A = self.components(pair)
        return ModuleSummary(
            name=self.name,
            rank=A.shape[0],
            effective_rank=effective_rank(singular_values(B, A)),
            state="frozen" if self.is_frozen else "converged" if self.converged else "training",
            inner_value=self.inner_value,
            outer_value=self.outer_value,
        )

    # What Algorithm 1 does with it -----------------------------------------------------------------------------------

    def keeps_component(self) -> bool:
        """Whether the outer check lets it keep its component: (6) is not met, or may not decide."""
        tolerance = self._config.outer_tolerance
        if tolerance is None or self.outer_value is None or self.component_count < self._config.min_components:
            return True
        return self.outer_value >= tolerance

    def is_full(self) -> bool:
        """Whether it has `max_components` or more, as a loaded adapter may."""
        return self._config.max_components is not None and self.component_count >= self._config.max_components

    def merge(self, pair: Pair) -> None:
        """Merge: the component in training becomes a finished one."""
        self.layer.merge_pair(self._adapter_name, pair)

    def freeze(self) -> None:
        """Drop the component in training, for good."""
        self.layer.freeze(self._adapter_name)

    def forget(self, optimizer: Any) -> None:
        """Let `optimizer` leave the pair of a frozen module alone."""
        for parameter in self.pair:
            if is_flattened(parameter):
                # A flat optimizer goes on stepping it, with a gradient of zero: without moments it stays zero.
                forget_moments(optimizer, parameter)

    def stay_in_graph(self, stays: bool, growths: int | None = None) -> None:
        """Settle whether the pair goes on requiring a gradient, zero, once it is frozen; see `AromaLinear`."""
        self.layer.stay_in_graph(self._adapter_name, stays, growths)

    def require_data(self) -> None:
        """Raise ConfigError where the pair was offloaded, so that it cannot train."""
        if any(parameter.is_meta for parameter in self.pair):
            raise bad_value(
                "model",
                "offloaded",
                f"the trainable pair of {self.name!r} is on the meta device: what trains cannot be offloaded. Offload "
                "the base model (device_map of from_pretrained, dispatch_model, cpu_offload) before get_peft_model",
            )

    def start_component(self, outer_number: int) -> None:
        """Reinit: b = 0 and the a that outer step `outer_number` starts with."""
        self.layer.start_pair(self._adapter_name, self._fresh(outer_number))

    def check_resettable(self, optimizer: Any) -> None:
        """Raise ResetError where `reset` would."""
        for parameter in self.pair:
            check_resettable(optimizer, parameter, self._config.reset)

    def reset(self, optimizer: Any, outer_number: int) -> None:
        """Reset the optimizer's state of (b, a) at the end of outer step `outer_number`."""
        generator = component_generator(self._live.seed, outer_number, self.index, "reset")
        b, a = self.pair
        for parameter in (a, b):
            reset_state(optimizer, parameter, self._config.reset, self._config.prune_ratio, generator)

    # Exact restoring -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint says of the module, JSON-able."""
        return {
            "name": self.name,
            "rank": self.rank,
            "frozen": self.is_frozen,
            "converged": self.converged,
            "inner_value": self.inner_value,
            "outer_value": self.outer_value,
            "weight_norm": self.weight_norm,
        }

    def pair_tensors(self, outer_number: int, pair: Pair) -> dict[str, Tensor]:
        """Return the pair by name if the plain adapter would not give it back bit for bit."""
        if self.is_frozen:
            return {}
        b, a = (tensor.detach() for tensor in pair)
        if b.any():
            exact = torch.equal(b * self._config.scale / self._config.scale, b)
        else:
            exact = torch.equal(a, self._fresh(outer_number).to(a))
        return {} if exact else {f"pair.{self.index}.b": b.clone(), f"pair.{self.index}.a": a.clone()}

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor], outer_number: int, pair: Pair) -> None:
        """Restore `state()`, and take the component that was in training out of the loaded finished ones.

        Args:
            state: What `state()` returned.
            tensors: All tensors of the checkpoint's state.
            outer_number: Number of the outer step for random draws.
            pair: The component in training as it is now, whole: one that has moved was loaded as it was, by DeepSpeed.

        Raises:
            CheckpointError: The loaded adapter has another rank than the state says.
        """
        for name in ("converged", "inner_value", "outer_value", "weight_norm"):
            setattr(self, name, state[name])
        in_training = self._loaded_pair_rank(state["rank"], state["frozen"])
        if state["frozen"]:
            self.freeze()
            return
        self.layer.unfreeze(self._adapter_name)
        b, a = self.layer.finished(self._adapter_name).pop(in_training)
        if f"pair.{self.index}.b" in tensors:
            b, a = tensors[f"pair.{self.index}.b"], tensors[f"pair.{self.index}.a"]
            self.layer.start_pair(self._adapter_name, a, b)
        elif in_training:
            self.layer.start_pair(self._adapter_name, a, b / self._config.scale)
        elif not pair[0].any():
            self.start_component(outer_number)

    def _loaded_pair_rank(self, rank: int, frozen: bool) -> int:
        """Return how much of the loaded rank was in training: r, or 0 where b had not moved."""
        surplus = self.rank - rank
        if surplus not in (0, self._config.r) or (frozen and surplus):
            raise CheckpointError(
                f"{self.name}: the adapter has rank {self.rank}, but its aroma_state says {rank} finished and "
                f"{'no' if frozen else 'one'} component in training; the files are of different moments, use another "
                "checkpoint"
            )
        return surplus

    def _fresh(self, outer_number: int) -> Tensor:
        return fresh_component(self._live.seed, outer_number, self.index, (self._config.r, self.layer.in_features))
