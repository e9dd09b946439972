"""The growing matrices of a run: measured together, one host sync each, and changed one by one.

Algorithm 1 acts on these. They know layers, the optimizer, and sharded parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import agree
from .errors import CheckpointError, bad_value
from .files import tensors_digest
from .matrix import GrowingMatrix
from .measures import (
    Pair,
    PairSnapshot,
    grown_norms,
    inner_values,
    outer_value,
    pair_norms,
    relative_norms,
    weight_norms,
)
from .reset import check_resettable, component_generator, forget_moments, reset_state
from .sharding import gathered, refuse_missing_pairs, sharding_of_model
from .tuner import aroma_layers
from .tuner.live import LiveAdapter


class GrowingMatrices:
    """All growing matrices of one adapter, and the optimizer that trains them.

    Measurements are the same on every process that trains. Where parameters are sharded, all ranks call the methods
    that read components, together.

    Args:
        model: The model, unwrapped.
        adapter_name: The adapter that grows.
        live: Its live state.
        optimizer: Optimizer that holds the pairs; wrapped by accelerate or not, or DeepSpeed's.

    Attributes:
        model: The model, unwrapped.
        sharding: How the processes hold the parameters.
    """

    def __init__(self, model: nn.Module, adapter_name: str, live: LiveAdapter, optimizer: Any) -> None:
        layers = aroma_layers(model, adapter_name)
        self._all = [
            GrowingMatrix(name, index, layer, adapter_name, live) for index, (name, layer) in enumerate(layers.items())
        ]
        self._adapter_name = adapter_name
        self._live = live
        self._optimizer = optimizer
        self.model = model
        self.sharding = sharding_of_model(model, optimizer)
        self._snapshot = PairSnapshot()
        self._checked: dict[str, Pair] = {}
        self.sharding.reshard(model)

    # What there is ---------------------------------------------------------------------------------------------------

    def all(self) -> list[GrowingMatrix]:
        """Return all matrices, in module order."""
        return self._all

    def active(self) -> list[GrowingMatrix]:
        """Return the matrices that still train, in module order."""
        return [matrix for matrix in self._all if not matrix.is_frozen]

    @property
    def known_rank(self) -> int:
        """Sum of the ranks of all finished components; the device is not read."""
        return sum(matrix.rank for matrix in self._all)

    @torch.no_grad()
    def ranks(self) -> dict[str, int]:
        """Return the rank of every update: its finished components, and the one in training once it has moved.

        It is the rank that a save at this moment has. If pairs are sharded, all ranks call this together.
        """
        device, r = self.device, self._live.config.r
        moved = torch.stack([b.any().to(device) for b, _ in self.pairs(self._all)]).tolist()  # the device waits once
        return {one.name: one.rank + (r if has_moved else 0) for one, has_moved in zip(self._all, moved, strict=True)}

    @property
    def device(self) -> torch.device:
        """Where collectives take place; a model that is moved takes it along."""
        return self.sharding.device(self._all[0].pair[0])

    @property
    def are_sharded(self) -> bool:
        """Whether the ranks must gather pairs; FSDP2 may hold whole ones for a while, after an evaluation."""
        return self.sharding.must_gather(self.parameters)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The pairs of all matrices, b (m, r) and a (r, n) one after the other, as the optimizer holds them."""
        return [parameter for matrix in self._all for parameter in matrix.pair]

    def pairs(self, matrices: Sequence[GrowingMatrix]) -> list[Pair]:
        """Return the components in training, b (m, r) and a (r, n), whole; sharded ones by one collective."""
        self.sharding.reshard(self.model)
        tensors = gathered([tensor for matrix in matrices for tensor in matrix.pair])
        return [*zip(tensors[::2], tensors[1::2], strict=True)]

    # Measured together -----------------------------------------------------------------------------------------------

    def measure_weights(self) -> None:
        """Measure ‖W0 + s B A‖_F of every matrix, from scratch."""
        norms = weight_norms(
            [matrix.layer.weight_matrix for matrix in self._all], [matrix.finished for matrix in self._all]
        )
        for matrix, norm in zip(self._all, norms, strict=True):
            matrix.weight_norm = norm

    @torch.no_grad()
    def relative_updates(self) -> dict[str, float | None]:
        """Return ‖ΔW‖_F / ‖W0‖_F of every matrix by its name; None where W0 is 0."""
        updates = [matrix.components(pair) for matrix, pair in zip(self._all, self.pairs(self._all), strict=True)]
        found = relative_norms([matrix.layer.weight_matrix for matrix in self._all], updates)
        return {matrix.name: one for matrix, one in zip(self._all, found, strict=True)}

    def norms(self, matrices: Sequence[GrowingMatrix]) -> list[float]:
        """Return ‖b a‖_F of the components in training."""
        return self._agree(matrices, pair_norms(self.pairs(matrices)), [])[0]

    def inner_values(self, matrices: Sequence[GrowingMatrix]) -> tuple[list[float], list[float | None]]:
        """Return ‖b a‖_F of the components in training, and the left side of (5) since the previous call.

        The value is None where the earlier norm was 0, and at the first call since `forget_check`.
        """
        criterion = self._live.config.inner_criterion
        values, snapshot = inner_values(self.pairs(matrices), self._snapshot, criterion)
        norms, values = self._agree(matrices, snapshot.norms, values)
        self._snapshot = PairSnapshot(norms, snapshot.pairs)
        return norms, values

    def outer_values(self, matrices: Sequence[GrowingMatrix]) -> tuple[list[float], list[float | None]]:
        """Return ‖b a‖_F of the components in training, and the left side of (6); None where W0 + s B A is zero."""
        pairs = self.pairs(matrices)
        self._checked = {matrix.name: pair for matrix, pair in zip(matrices, pairs, strict=True)}
        norms = pair_norms(pairs)
        weights = [matrix.weight_norm for matrix in matrices]
        agreed, _ = self._agree([*matrices, *matrices], [*norms, *weights], [])
        norms, weights = agreed[: len(matrices)], agreed[len(matrices) :]
        for matrix, weight in zip(matrices, weights, strict=True):
            matrix.weight_norm = weight
        scale = self._live.config.scale
        return norms, [outer_value(scale * norm, weight) for norm, weight in zip(norms, weights, strict=True)]

    def forget_check(self) -> None:
        """Forget the previous inner check: the components are new."""
        self._snapshot = PairSnapshot()

    def _agree(
        self, matrices: Sequence[GrowingMatrix], norms: Sequence[float], values: Sequence[float | None]
    ) -> tuple[list[float], list[float | None]]:
        return agree([matrix.name for matrix in matrices], norms, values, self.device)

    # Changed one by one ----------------------------------------------------------------------------------------------

    def merge(self, matrices: Sequence[GrowingMatrix]) -> None:
        """Merge what `outer_values` measured: components become finished ones, and ‖W0 + s B A‖_F grows with them."""
        pairs, self._checked = [self._checked[matrix.name] for matrix in matrices], {}
        scale = self._live.config.scale
        norms = grown_norms(
            [matrix.layer.weight_matrix for matrix in matrices],
            [matrix.finished for matrix in matrices],
            [(b.detach() * scale, a.detach()) for b, a in pairs],
            [matrix.weight_norm for matrix in matrices],
        )
        for matrix, pair, norm in zip(matrices, pairs, norms, strict=True):
            matrix.weight_norm = norm
            matrix.layer.merge_pair(self._adapter_name, pair)

    def renew(self, matrix: GrowingMatrix, draw: int) -> None:
        """Reset and Reinit: prune the optimizer's state of the pair, and start a fresh component.

        Args:
            matrix: The matrix, just merged.
            draw: Number of the outer step that ends. With the place of the matrix it seeds the random numbers.
        """
        config = self._live.config
        generator = component_generator(self._live.seed, draw, matrix.index, "reset")
        b, a = matrix.pair
        for parameter in (a, b):
            reset_state(self._optimizer, parameter, config.reset, config.prune_ratio, generator)
        matrix.start_component(draw + 1)

    def start_unmoved(self, draw: int) -> None:
        """Start a fresh component of outer step `draw` wherever the one in training has not moved."""
        for matrix, (b, _) in zip(self._all, self.pairs(self._all), strict=True):
            if not matrix.is_frozen and not b.any():
                matrix.start_component(draw)

    def freeze(self, matrix: GrowingMatrix, *, loaded: bool = False) -> None:
        """Drop the component in training, and train this matrix no more.

        Args:
            matrix: The matrix.
            loaded: Whether it was loaded so, so that the optimizer has nothing of it to forget yet.
        """
        matrix.layer.freeze(self._adapter_name)
        for parameter in () if loaded else matrix.pair:
            forget_moments(self._optimizer, parameter)

    def stay_in_graph(self, stays: bool, growths: int | None) -> None:
        """Set whether frozen pairs still require a gradient, of zero; see `AromaLinear.stay_in_graph`."""
        for matrix in self._all:
            matrix.layer.stay_in_graph(self._adapter_name, stays, growths)

    def drop_gradients_of_frozen(self, *_: Any) -> None:
        """Drop the zero gradients of frozen pairs, so that the optimizer leaves them and its state alone."""
        for matrix in self._all:
            if matrix.is_frozen:
                for parameter in matrix.pair:
                    parameter.grad = None

    def forget_frozen(self) -> None:
        """Let the optimizer forget frozen pairs: without `drop_gradients_of_frozen` old moments would move them."""
        state = self.sharding.base_optimizer(self._optimizer).state
        for matrix in self._all:
            if matrix.is_frozen:
                for parameter in matrix.pair:
                    parameter.grad = None
                    state.pop(parameter, None)

    # Refused ---------------------------------------------------------------------------------------------------------

    def require_held_by_optimizer(self) -> None:
        """Raise for a pair that needs no gradient, or that the optimizer does not hold, so that it would never learn.

        Raises:
            ConfigError: Naming the first.
        """
        for matrix in self.active():
            if not all(parameter.requires_grad for parameter in matrix.pair):
                raise bad_value(
                    "model",
                    type(self.model).__name__,
                    f"the pair of {matrix.name!r} needs no gradient, so it would never learn; load the adapter with "
                    f"is_trainable=True, or call model.set_adapter({self._adapter_name!r})",
                )
        refuse_missing_pairs(self._optimizer, [(matrix.name, matrix.pair) for matrix in self.active()])

    def require_resettable(self) -> None:
        """Raise where `renew` would fail for want of an optimizer state that is understood.

        Raises:
            ResetError: Naming the state.
        """
        for matrix in self.active():
            for parameter in matrix.pair:
                check_resettable(self._optimizer, parameter, self._live.config.reset)

    # Saved and restored ----------------------------------------------------------------------------------------------

    def state(self, draw: int, pairs: Sequence[Pair]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what an exact resume needs of the matrices: JSON-able, and tensors by name.

        Args:
            draw: Number of the outer step that the components in training began in.
            pairs: The components in training of all matrices, b (m, r) and a (r, n), whole.
        """
        tensors = self._snapshot.tensors()
        for matrix, pair in zip(self._all, pairs, strict=True):
            tensors.update(matrix.pair_tensors(draw, pair))
        state = {
            "snapshot_norms": self._snapshot.norms,
            "adapter_digest": self.digest(pairs),
            # A list: the Trainer sorts the keys of a dict, and the order of modules seeds their random numbers.
            "modules": [matrix.state() for matrix in self._all],
        }
        return state, tensors

    def require_same(self, state: Mapping[str, Any], pairs: Sequence[Pair]) -> None:
        """Raise unless a saved `state()` is of these matrices with these components.

        Args:
            state: What `state()` returned.
            pairs: The components in training of all matrices, b (m, r) and a (r, n), whole.

        Raises:
            CheckpointError: It was saved with others.
        """
        names = [matrix.name for matrix in self._all]
        if names != [entry["name"] for entry in state["modules"]] or self.digest(pairs) != state["adapter_digest"]:
            raise CheckpointError(
                "adapter_model.safetensors: its components are not those that aroma_state.json was written with: the "
                "model has other target_modules, or a file was edited or comes from another moment; use another "
                "checkpoint"
            )

    def restore(
        self, state: Mapping[str, Any], tensors: Mapping[str, Tensor], draw: int, pairs: Sequence[Pair]
    ) -> None:
        """Restore `state()`, after `require_same`; `pairs`, b (m, r) and a (r, n), are the components in training."""
        for matrix, entry, pair in zip(self._all, state["modules"], pairs, strict=True):
            matrix.restore(entry, tensors, draw, pair)
        self.require_held_by_optimizer()
        self._snapshot = PairSnapshot.restore(
            state["snapshot_norms"], tensors, [matrix.pair for matrix in self.active()]
        )

    def digest(self, pairs: Sequence[Pair]) -> str:
        """Return a digest of all components, `pairs` b (m, r), a (r, n) included: the same before a save and after."""
        tensors = {}
        for matrix, pair in zip(self._all, pairs, strict=True):
            B, A = matrix.components(pair)
            if A.shape[0]:
                tensors[f"{matrix.name}.B"], tensors[f"{matrix.name}.A"] = B, A
        return tensors_digest(tensors)
