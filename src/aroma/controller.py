"""Algorithm 1 in a training run: stepped after the optimizer, resumed exactly."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .algorithm import PaperRule
from .compat import is_compiled
from .criteria import Pair
from .distributed import is_distributed, of_first_rank, refuse_together, require_equal, unwrapped, unwrapped_optimizer
from .errors import AromaWarning, CheckpointError, bad_value
from .events import Event, ModuleSummary
from .matrices import GrowingMatrices, GrowingMatrix
from .sharding import refuse_sharding, sharding_modules
from .state import read_controller_state
from .tuner import live_adapter
from .tuner.fused import without_autocast

_COMPILED_GROWTHS = 8
"""Growths that one compiled graph takes."""


class AromaController(PaperRule):
    """Lets one adapter grow. Call `step()` after every optimizer step.

    Under DistributedDataParallel, create one controller per rank after wrapping the model, and call `step` on every
    rank. All ranks take the same decisions; an error on one rank is raised on all. The same holds under FSDP2, after
    `fully_shard` and the optimizer, and under ZeRO, after `deepspeed.initialize`; there all ranks call `summary` and
    `state_dict` together, because these read components.

    Args:
        model: Model with an AROMA adapter; wrapped, sharded or neither.
        optimizer: Optimizer that holds the trainable pairs; wrapped by accelerate or not, or DeepSpeed's.
        total_steps: Planned optimizer steps T; needed where `max_inner_steps` is None.
        adapter_name: Name of the adapter.
        compiled: True if the model is compiled and `model` is the module inside, as the Trainer gives it. The graph
            then stays the same while the adapter grows.

    Attributes:
        live: The live state of the adapter: its seed and controller. All others are those of `PaperRule`.

    Raises:
        ConfigError: No growing module, a pair that the optimizer does not hold, loops that cannot fit the run,
            replicas that differ between the ranks, or parameters sharded otherwise than by FSDP2 or ZeRO.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        total_steps: int | None = None,
        adapter_name: str = "default",
        compiled: bool = False,
    ) -> None:
        wrapper, model = model, unwrapped(model)
        self.adapter_name = adapter_name
        self.optimizer = optimizer
        self.total_steps = total_steps
        with refuse_together():
            self.live = live_adapter(model, adapter_name)
            self.config = self.live.config
            self.matrices = matrices = GrowingMatrices(model, adapter_name, self.live, optimizer)
            refuse_sharding(wrapper, optimizer)
            inner_steps = self.config.resolve_inner_steps(total_steps)
            matrices.require_held_by_optimizer()
        self._hooks: list[Any] = []
        self._keep_graph(compiled or is_compiled(wrapper))
        self._join_ranks(model)
        super().__init__(self.config, inner_steps, matrices)
        self._stale = False
        self._state_is_known = False
        self.live.attach_controller(self)

    # What a loop asks ------------------------------------------------------------------------------------------------

    @property
    def modules(self) -> list[GrowingMatrix]:
        """The growing matrices, in module order."""
        return self.matrices.all()

    @property
    def active_modules(self) -> int:
        """Number of matrices that still train."""
        return len(self.matrices.active())

    @property
    def total_rank(self) -> int:
        """Sum of the `ranks()`; if parameters are sharded, without the pairs in training, so that one rank may ask."""
        return self.matrices.known_rank if self.matrices.are_sharded else sum(self.ranks().values())

    def ranks(self) -> dict[str, int]:
        """Return the rank of every update by module name: finished components, and those in training that have moved.

        It reads the device. If parameters are sharded, all ranks call this together.
        """
        return self.matrices.ranks()

    def summary(self) -> list[ModuleSummary]:
        """Return rank, effective rank, state and last check values of every matrix, in module order.

        Raises:
            ConfigError: The adapter was deleted.
        """
        live_adapter(self.matrices.model, self.adapter_name)
        pairs = self.matrices.pairs(self.modules)
        return [matrix.summary(pair) for matrix, pair in zip(self.modules, pairs, strict=True)]

    def relative_updates(self) -> dict[str, float | None]:
        """Return ‖ΔW‖_F / ‖W0‖_F of every matrix by its name; None where W0 is 0. Sharded: all ranks together."""
        return self.matrices.relative_updates()

    # What a loop does ------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Count one optimizer step, and let the rule act where that is due.

        Returns:
            The events of this step.

        Raises:
            NonFiniteError: A component is NaN or infinite at a check.
            ResetError: The optimizer keeps state that `reset` cannot reset; found out at the first step.
        """
        self._refuse_stale()
        self.live.ever_controlled = True
        if not (self._state_is_known or self.finished):
            # Not at the end of the inner loop. A rank may hold no part of a flat optimizer's state for any pair.
            with refuse_together():
                self.matrices.require_resettable()
            self._state_is_known = True
        with without_autocast(self.matrices.device):  # a loop may step within it
            return super().step()

    def detach(self) -> None:
        """Remove the hooks that the controller has made; the adapter stays as it is."""
        if self._hooks:
            self.matrices.forget_frozen()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    # State -----------------------------------------------------------------------------------------------------------

    def state_dict(self, pairs: Sequence[Pair] | None = None) -> dict[str, Any]:
        """Return what an exact resume needs beside the adapter: `{"state": JSON-able, "tensors": {name: Tensor}}`.

        The tensors are the components in training, and with `inner_criterion="update_change"` those of the last check.

        Args:
            pairs: The components in training of all matrices, b (m, r) and a (r, n), whole, where they are known.
                Otherwise all ranks gather sharded ones together.
        """
        if self._stale:
            return {"state": None, "tensors": {}}
        state, tensors = self.matrices.state(self.matrices.pairs(self.modules) if pairs is None else pairs)
        return {"state": {"config": self.live.method(), **self.counters(), **state}, "tensors": tensors}

    @torch.no_grad()
    def load_state_dict(self, exported: dict[str, Any]) -> None:
        """Restore what `state_dict()` returned, onto the adapter loaded from the same checkpoint; all ranks call it.

        The number of processes may be another, and so may planned steps, batches and learning rates. The fields of the
        configuration that decide growth must be the same, and T_in stays what it was.

        Warns:
            AromaWarning: The planned steps would give another T_in.

        Raises:
            ConfigError: The checkpoint has another configuration, or the optimizer lacks a pair that trained then.
            CheckpointError: The components are not those that the state was saved with.
        """
        pairs = self.matrices.pairs(self.modules)
        state = exported["state"]
        with refuse_together():
            self.live.check_resumable(state["config"])
            self.matrices.require_same(state, pairs)
            if (inner_steps := state["max_inner_steps"]) != self.max_inner_steps:
                warnings.warn(
                    f"max_inner_steps=None: {self.total_steps} planned steps would give {self.max_inner_steps}, and "
                    f"the run goes on with its own {inner_steps}; start a new run for another",
                    AromaWarning,
                    stacklevel=2,
                )
            self.set_counters(state)
            self.matrices.restore(state, exported["tensors"])
            self._stale = False

    def resume(self, folder: str | os.PathLike[str]) -> None:
        """Restore the state of the run whose adapter was saved in `folder`, onto that adapter; all ranks call it.

        Raises:
            ConfigError: As `load_state_dict`.
            CheckpointError: As `load_state_dict`, or `folder` holds no state of a run, or a damaged one.
        """
        with refuse_together():
            exported = read_controller_state(folder)
            if exported is None:
                raise CheckpointError(
                    f"resume_from={os.fspath(folder)!r}: saved without a controller, so there is no run to resume; "
                    "use another checkpoint, or load the adapter and start a new run"
                )
        self.load_state_dict(exported)

    def invalidate(self) -> None:
        """Note that components were loaded without the controller."""
        self._stale = True

    # Compiled graphs and several processes ---------------------------------------------------------------------------

    def _keep_graph(self, compiled: bool) -> None:
        """Keep frozen pairs in the graph where DistributedDataParallel or a compiler needs it unchanged."""
        matrices, sharding = self.matrices, self.matrices.sharding
        stays = compiled or sharding.needs_all_gradients(matrices.parameters)
        matrices.stay_in_graph(stays, _COMPILED_GROWTHS if compiled else None)
        if stays and not sharding.has_flat_optimizer:
            optimizer = sharding.base_optimizer(self.optimizer)
            self._hooks.append(optimizer.register_step_pre_hook(matrices.drop_gradients_of_frozen))

    def _join_ranks(self, model: nn.Module) -> None:
        """Refuse ranks with different settings, and agree on the seed: each may have taken its own."""
        if not is_distributed():
            return
        facts = {
            "adapter_name": self.adapter_name,
            **self.config.method(),
            "component_seed": self.live.seed if self.live.chose_seed else None,
            "total_steps": self.total_steps,
            "target_modules": [(matrix.name, matrix.rank, matrix.is_frozen) for matrix in self.modules],
            "optimizer": type(unwrapped_optimizer(self.optimizer)).__name__,
            "fully_shard": len(sharding_modules(model)),
        }
        require_equal(facts)
        self.live.seed = of_first_rank(self.live.seed)

    def _refuse_stale(self) -> None:
        if self.live.controller is not self:
            raise bad_value(
                "controller",
                self.adapter_name,
                "another controller was attached to this adapter later, and two would freeze each other's components; "
                "give the Trainer a single AromaCallback, do not combine it with attach(), and call attach() once",
            )
        if self._stale:
            raise CheckpointError(
                "load_adapter replaced the components while this controller was attached; attach a new controller, "
                "or restore the checkpoint's state with load_state_dict"
            )
