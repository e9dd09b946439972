"""The growing matrices of a run: measured together, and changed one by one.

Algorithm 1 calls these classes. They hold the layers, and change optimizer state and sharded parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .criteria import Pair, difference, inner_value, outer_value, pair_norms, relative_norms, weight_norms
from .distributed import agree
from .errors import CheckpointError, bad_value
from .events import ModuleSummary
from .files import tensors_digest
from .reset import check_resettable, component_generator, forget_moments, fresh_component, reset_state
from .sharding import gathered, is_flattened, sharding_of_model
from .spectra import effective_rank, singular_values
from .tuner import AromaLinear, LiveAdapter, aroma_layers


class GrowingMatrix:
    """One growing layer, with its name, its place in module order, and what the rule notes about it.

    Attributes:
        converged: Whether it has the label "inner-converged" in this inner loop.
        inner_value: Left side of (5) at the last check, None where undefined.
        outer_value: Left side of (6) at the last outer check, None before the first.
        checked_norm: ‖b a‖_F at the previous inner check of this inner loop, None before the first.
        checked_pair: b (m, r) and a (r, n) then; only kept where the criterion needs more than the norm.
    """

    _NOTED = ("converged", "inner_value", "outer_value", "checked_norm")

    def __init__(self, name: str, index: int, layer: AromaLinear, adapter_name: str, live: LiveAdapter) -> None:
        self.name = name
        self.index = index
        self.layer = layer
        self.converged = False
        self.inner_value: float | None = None
        self.outer_value: float | None = None
        self.checked_norm: float | None = None
        self.checked_pair: Pair | None = None
        self._adapter_name = adapter_name
        self._live = live

    @property
    def pair(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The component in training, b (m, r) and a (r, n), as the optimizer holds it: sharded under FSDP2."""
        return self.layer.pair(self._adapter_name)

    @property
    def finished(self) -> Pair:
        """The finished components, B (m, R) with the scale folded in and A (R, n)."""
        finished = self.layer.finished(self._adapter_name)
        return finished.B, finished.A

    def components(self, pair: Pair) -> Pair:
        """Return the whole update, B (m, R) and A (R, n), with the whole `pair` b (m, r), a (r, n) if it has moved."""
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
        """Return rank, effective rank, state and last check values; `pair`, b (m, r) and a (r, n), is whole."""
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
        shape = self._live.config.r, self.layer.in_features
        self.layer.start_pair(self._adapter_name, fresh_component(self._live.seed, draw, self.index, shape))

    # Saved and restored ----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint says of the matrix, JSON-able."""
        noted = {name: getattr(self, name) for name in self._NOTED}
        return {"name": self.name, "rank": self.rank, "frozen": self.is_frozen, **noted}

    def tensors(self, pair: Pair) -> dict[str, Tensor]:
        """Return copies of the component in training, `pair` b (m, r) and a (r, n), and of that of the last check."""
        found = {"pair": None if self.is_frozen else pair, "checked": self.checked_pair}
        return {
            f"{kind}.{self.index}.{side}": tensor.detach().clone()
            for kind, one in found.items()
            for side, tensor in zip("ba", one or (), strict=False)
        }

    def restore(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restore `state()`, and out of all saved `tensors` (any shapes) the pair, which was loaded as finished."""
        for name in self._NOTED:
            setattr(self, name, state[name])
        pair, checked = (
            [tensors[name] for side in "ba" if (name := f"{kind}.{self.index}.{side}") in tensors]
            for kind in ("pair", "checked")
        )
        self.checked_pair = (checked[0], checked[1]) if checked else None
        if state["frozen"]:
            self.layer.freeze(self._adapter_name)
            return
        self.layer.unfreeze(self._adapter_name)
        self.layer.finished(self._adapter_name).pop(self.rank - state["rank"])  # DeepSpeed loads them apart
        self.layer.start_pair(self._adapter_name, pair[1], pair[0])


class GrowingMatrices:
    """All growing matrices of one adapter, and the optimizer that trains them.

    Measurements are the same on every process that trains. Where parameters are sharded, all ranks call the methods
    that read components, together.

    Args:
        model: The model, unwrapped.
        adapter_name: The adapter that grows.
        live: Its live state.
        optimizer: Optimizer that holds the pairs; wrapped by accelerate or not, or DeepSpeed's.
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
        """Return the rank of every update: its finished components, and the one in training once it has moved."""
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
    def parameters(self) -> list[nn.Parameter]:
        """The pairs of all matrices, b (m, r) and a (r, n) one after the other, as the optimizer holds them."""
        return [parameter for matrix in self._all for parameter in matrix.pair]

    def pairs(self, matrices: Sequence[GrowingMatrix]) -> list[Pair]:
        """Return the components in training, b (m, r) and a (r, n), whole; sharded ones by one collective."""
        self.sharding.reshard(self.model)
        tensors = gathered([tensor for matrix in matrices for tensor in matrix.pair])
        return [*zip(tensors[::2], tensors[1::2], strict=True)]

    # Measured together -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def relative_updates(self) -> dict[str, float | None]:
        """Return ‖ΔW‖_F / ‖W0‖_F of every matrix by its name; None where W0 is 0."""
        updates = [matrix.components(pair) for matrix, pair in zip(self._all, self.pairs(self._all), strict=True)]
        found = relative_norms([matrix.layer.weight_matrix for matrix in self._all], updates)
        return {matrix.name: one for matrix, one in zip(self._all, found, strict=True)}

    def norms(self, matrices: Sequence[GrowingMatrix]) -> list[float]:
        """Return ‖b a‖_F of the components in training."""
        return self._agree(matrices, pair_norms(self.pairs(matrices)))[0]

    def inner_values(self, matrices: Sequence[GrowingMatrix]) -> tuple[list[float], list[float | None]]:
        """Return ‖b a‖_F of the components in training, and the left side of (5) since the previous call.

        The value is None where the earlier norm was 0, and at the first call since `forget_check`.
        """
        pairs = self.pairs(matrices)
        together = zip(pairs, matrices, strict=True)
        moves = [difference(pair, matrix.checked_pair) for pair, matrix in together if matrix.checked_pair]
        measured = pair_norms([*pairs, *moves])
        norms, changes = self._agree(matrices, measured[: len(pairs)], measured[len(pairs) :])
        values: list[float | None] = []
        for index, (matrix, norm, (b, a)) in enumerate(zip(matrices, norms, pairs, strict=True)):
            before = matrix.checked_norm or 0.0
            values.append(inner_value(changes[index] if moves else norm - before, before))
            matrix.checked_norm = norm
            if self._live.config.inner_criterion == "update_change":
                matrix.checked_pair = b.detach().clone(), a.detach().clone()
        return norms, values

    def outer_values(self, matrices: Sequence[GrowingMatrix]) -> tuple[list[float], list[float | None]]:
        """Return ‖b a‖_F of the components in training, and the left side of (6); None where W0 + s B A is zero."""
        weights = weight_norms([one.layer.weight_matrix for one in matrices], [one.finished for one in matrices])
        norms, weights = self._agree(matrices, pair_norms(self.pairs(matrices)), weights)
        scale = self._live.config.scale
        return norms, [outer_value(scale * norm, weight) for norm, weight in zip(norms, weights, strict=True)]

    def forget_check(self) -> None:
        """Forget the previous inner check: the components are new."""
        for matrix in self._all:
            matrix.checked_norm = matrix.checked_pair = None

    def _agree(
        self, matrices: Sequence[GrowingMatrix], norms: Sequence[float], others: Sequence[float] = ()
    ) -> tuple[list[float], list[float]]:
        """Return norms of the components, and other norms, that are the same on all ranks."""
        names = [matrix.name for matrix in matrices]
        agreed = agree([*names, *names[: len(others)]], [*norms, *others], self.device)
        return agreed[: len(norms)], agreed[len(norms) :]

    # Changed one by one ----------------------------------------------------------------------------------------------

    def merge(self, matrices: Sequence[GrowingMatrix]) -> None:
        """Merge: components in training become finished ones."""
        for matrix, pair in zip(matrices, self.pairs(matrices), strict=True):
            matrix.layer.merge_pair(self._adapter_name, pair)

    def renew(self, matrix: GrowingMatrix, draw: int) -> None:
        """Reset and Reinit when outer step `draw` ends: prune the optimizer's state, and start a fresh component."""
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
        """Drop the component in training, and train this matrix no more; `loaded`: the optimizer has nothing of it."""
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
        self.drop_gradients_of_frozen()
        state = self.sharding.base_optimizer(self._optimizer).state
        for matrix in self._all:
            for parameter in matrix.pair if matrix.is_frozen else ():
                state.pop(parameter, None)

    # Refused ---------------------------------------------------------------------------------------------------------

    def require_held_by_optimizer(self) -> None:
        """Raise for a pair that needs no gradient, or that the optimizer does not hold, so that it would never learn.

        Raises:
            ConfigError: Naming the first.
        """
        held = {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}
        for matrix in self.active():
            if not all(one.requires_grad and (id(one) in held or is_flattened(one)) for one in matrix.pair):
                raise bad_value(
                    "optimizer",
                    type(self._optimizer).__name__,
                    f"it does not train the pair of {matrix.name!r}, so that module would never learn; make it after "
                    "get_peft_model and fully_shard, with this adapter active (model.set_adapter), and load a saved "
                    "one with is_trainable=True",
                )

    def require_resettable(self) -> None:
        """Raise if `renew` cannot reset the state of this optimizer.

        Raises:
            ResetError: Naming the state.
        """
        for matrix in self.active():
            for parameter in matrix.pair:
                check_resettable(self._optimizer, parameter, self._live.config.reset)

    # Saved and restored ----------------------------------------------------------------------------------------------

    def state(self, pairs: Sequence[Pair]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what an exact resume needs, JSON-able and tensors by name; `pairs`, b (m, r), a (r, n), are whole."""
        tensors: dict[str, Tensor] = {}
        for matrix, pair in zip(self._all, pairs, strict=True):
            tensors |= matrix.tensors(pair)
        # A list: the Trainer sorts the keys of a dict, and the order of modules seeds their random numbers.
        modules = [matrix.state() for matrix in self._all]
        return {"adapter_digest": self.digest(pairs), "modules": modules}, tensors

    def require_same(self, state: Mapping[str, Any], pairs: Sequence[Pair]) -> None:
        """Raise unless a saved `state()` is of these matrices, with these whole `pairs`, b (m, r) and a (r, n).

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

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restore `state()`, after `require_same`; `tensors` (any shapes) belong to it."""
        for matrix, entry in zip(self._all, state["modules"], strict=True):
            matrix.restore(entry, tensors)
        self.require_held_by_optimizer()

    def digest(self, pairs: Sequence[Pair]) -> str:
        """Return a digest of all components, `pairs` b (m, r), a (r, n) included: the same before a save and after."""
        tensors = {}
        for matrix, pair in zip(self._all, pairs, strict=True):
            B, A = matrix.components(pair)
            if A.shape[0]:
                tensors[f"{matrix.name}.B"], tensors[f"{matrix.name}.A"] = B, A
        return tensors_digest(tensors)
