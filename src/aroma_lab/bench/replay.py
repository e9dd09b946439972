"""Growth along a recorded trajectory: what Algorithm 1 does to the modules, at its real cost, and decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from aroma.errors import bad_value
from aroma.measures import PairSnapshot, grown_norms, inner_values, pair_norms, weight_norms
from aroma.target import TargetModule
from aroma.tuner import aroma_layers, live_adapter

from ..pictures.rank_picture import places_of
from .trajectory import Change, Trajectory


class Plan(Protocol):
    """What a replay follows: a `Trajectory`, or a `TrajectoryRecorder` of a run that is a moment ahead."""

    def changes_at(self, step: int) -> Sequence[Change]:
        """Return what happens after optimizer step `step`."""

    def is_check(self, step: int) -> bool:
        """Whether an inner check is made after optimizer step `step`."""


class Replayer:
    """Takes the place of the controller. Call `step` after every optimizer step.

    At the recorded steps it computes what the controller would have looked at, and then does what the controller did.

    Args:
        model: Model with an AROMA adapter at its start.
        optimizer: Optimizer that holds the pairs.
        plan: What to do when; of modules with the names that they have in `model`.
        freezes: Whether modules finish. If not, they reach the same ranks, but a module that the trajectory freezes
            keeps a pair in training, which is never merged.
        adapter_name: Name of the adapter.
    """

    def __init__(
        self, model: Any, optimizer: Any, plan: Plan, *, freezes: bool = True, adapter_name: str = "default"
    ) -> None:
        live = live_adapter(model, adapter_name)
        # Saving or merging a replayed model is nobody's mistake.
        live.ever_controlled = True
        self._config = live.config
        self._optimizer = optimizer
        self._plan = plan
        self._freezes = freezes
        self._modules = {
            name: TargetModule(name, index, layer, adapter_name, live)
            for index, (name, layer) in enumerate(aroma_layers(model, adapter_name).items())
        }
        norms = weight_norms(
            [module.layer.weight_matrix for module in self._modules.values()],
            [module.finished for module in self._modules.values()],
        )
        for module, norm in zip(self._modules.values(), norms, strict=True):
            module.weight_norm = norm
        self._outer_number = 1
        self._snapshot = PairSnapshot()

    def step(self, step: int) -> bool:
        """Do what the plan says of optimizer step `step`, counted from 1; return whether a module changed."""
        if self._plan.is_check(step):
            pairs = [module.pair for module in self._active()]
            _, self._snapshot = inner_values(pairs, self._snapshot, self._config.inner_criterion)
        changes = self._plan.changes_at(step)
        if changes:
            self._outer_step(changes)
        return bool(changes)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of the finished components of every module."""
        return {name: module.rank for name, module in self._modules.items()}

    @property
    def frozen(self) -> frozenset[str]:
        """Modules that have finished."""
        return frozenset(name for name, module in self._modules.items() if module.is_frozen)

    def _outer_step(self, changes: Sequence[Change]) -> None:
        pair_norms([module.pair for module in self._active()])
        self._merge([self._modules[change.module] for change in changes if change.merged])
        for change in changes:
            module = self._modules[change.module]
            if change.frozen and self._freezes:
                module.freeze()
                continue
            if change.merged:
                module.reset(self._optimizer, self._outer_number)
            module.start_component(self._outer_number + 1)
        self._outer_number += 1
        self._snapshot = PairSnapshot()

    def _merge(self, modules: Sequence[TargetModule]) -> None:
        norms = grown_norms(
            [module.layer.weight_matrix for module in modules],
            [module.finished for module in modules],
            [module.scaled(module.pair) for module in modules],
            [module.weight_norm for module in modules],
        )
        for module, norm in zip(modules, norms, strict=True):
            module.weight_norm = norm
            module.merge(module.pair)

    def _active(self) -> list[TargetModule]:
        return [module for module in self._modules.values() if not module.is_frozen]


def fit_modules(trajectory: Trajectory, model: nn.Module) -> dict[str, str]:
    """Find the modules of a model that are to grow as those of a trajectory did.

    By name; in a model that names them otherwise, by their layer's number and what they are called within it, so that
    a trajectory of one encoder can be replayed on another of as many layers.

    Args:
        trajectory: The trajectory.
        model: The model, without adapters.

    Returns:
        The module's name in `model` by its name in the trajectory, in the trajectory's order.

    Raises:
        ConfigError: The model lacks a module.
    """
    candidates = [name for name, module in model.named_modules() if _has_weight_matrix(module)]
    if set(trajectory.modules) <= set(candidates):
        return {name: name for name in trajectory.modules}
    by_place = dict(zip(places_of(candidates), candidates, strict=True))
    places = dict(zip(trajectory.modules, places_of(trajectory.modules), strict=True))
    missing = [name for name, place in places.items() if place not in by_place]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise bad_value(
            "--trajectory",
            missing[0],
            f"the model has no such module{more}; it has {len(candidates)} weight matrices and the trajectory grew "
            f"{len(places)}. Give the model that the trajectory was recorded on, or one of the same layers",
        )
    return {name: by_place[place] for name, place in places.items()}


def _has_weight_matrix(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)
