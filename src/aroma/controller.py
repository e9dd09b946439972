"""Algorithm 1: the dual loop over all growing modules, as a state machine that knows no trainer.

Check & Merge & Reinit & Reset (section 3.2). All modules run in lock-step: an inner loop trains one component of every
unfrozen module; when it ends, every unfrozen module keeps its component and starts the next, or drops it and freezes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .errors import CheckpointError, NonFiniteError, bad_value
from .events import Event, ModuleSummary
from .files import tensors_digest
from .measures import Pair, PairSnapshot, grown_norms, inner_values, outer_value, pair_norms, weight_norms
from .refusals import refuse_changed_processes, refuse_missing_pairs, refuse_other_modules
from .sharding import (
    agree,
    gathered,
    is_distributed,
    is_sharded,
    is_zero,
    of_first_rank,
    refuse_sharding,
    refuse_together,
    require_equal_replicas,
    reshard,
    sharding_modules,
    unwrapped,
    unwrapped_optimizer,
    world_size,
)
from .target import TargetModule
from .tuner import aroma_layers, live_adapter
from .tuner.graph import is_compiled
from .warmup import rewarmup_factor

_COMPILED_GROWTHS = 8
"""Growths that one compiled graph takes."""


class AromaController:
    """Runs Algorithm 1 for one adapter. Call `step()` after every optimizer step.

    Under DistributedDataParallel every rank makes one, after the model was wrapped, and steps it in step with the
    others: they agree on every decision, and an error of one is raised on all. The same under FSDP2, after
    `fully_shard` and the optimizer, and under ZeRO, after `deepspeed.initialize`; whatever reads components
    (`summary`, `state_dict`) is then called by all ranks.

    Args:
        model: Model with an AROMA adapter; wrapped, sharded or neither.
        optimizer: Optimizer that holds the trainable pairs; wrapped by accelerate or not, or DeepSpeed's.
        total_steps: Planned optimizer steps T; needed where `max_inner_steps` is None.
        adapter_name: Name of the adapter.
        compiled: Whether `torch.compile` wraps the model though `model` does not show it; then, as for a compiled
            `model`, neither growing nor freezing changes the graph.

    Attributes:
        global_step: Optimizer steps taken so far.
        inner_step: Optimizer steps taken in this inner loop, t.
        outer_number: Outer step, p, counted from 1.
        max_inner_steps: T_in.

    Raises:
        ConfigError: No growing module, a pair that the optimizer does not hold or that is offloaded, loops that
            cannot fit the run, replicas that differ between the ranks, or parameters sharded otherwise than by FSDP2
            or ZeRO.
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
        layers = aroma_layers(model, adapter_name)
        if not layers:
            raise bad_value(
                "model",
                type(model).__name__,
                f"it has no AROMA adapter {adapter_name!r}; make one with get_peft_model(model, AromaConfig(...))",
            )
        self.live = live_adapter(model, adapter_name)
        self.config = self.live.config
        self.adapter_name = adapter_name
        self.optimizer = optimizer
        self.total_steps = total_steps
        self.modules = [
            TargetModule(name, index, layer, adapter_name, self.live)
            for index, (name, layer) in enumerate(layers.items())
        ]
        self._processes = world_size()
        self._wrapper = wrapper if wrapper is not model else None
        self._sharding = sharding_modules(model)
        self._zero = is_zero(unwrapped_optimizer(optimizer))
        reshard(self._sharding)
        self._held: dict[str, Pair] | None = None
        with self.together():
            refuse_sharding(wrapper, optimizer)
            for module in self.modules:
                module.require_data()
            self.max_inner_steps = self.config.resolve_inner_steps(total_steps)
            refuse_missing_pairs(self.optimizer, self._active())
        self._settle_graph(compiled or is_compiled(wrapper))
        self._join_ranks(model)
        self._measure_weights()
        self.global_step = 0
        self.inner_step = 0
        self.outer_number = 1
        # A continued adapter must not draw again the directions it has.
        self._earlier_outer_steps = max(module.component_count for module in self.modules)
        self._continue_loaded()
        self._snapshot = PairSnapshot()
        self._listeners: list[Callable[[Event], None]] = []
        self._stale = False
        self._state_is_known = False
        self.live.attach_controller(self)

    # What a loop asks ------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether every module is outer-converged."""
        return not self._active()

    @property
    def active_modules(self) -> int:
        """Number of modules that still train."""
        return len(self._active())

    @property
    def total_rank(self) -> int:
        """Sum of the ranks of the finished components over all modules; no device is asked."""
        return sum(module.rank for module in self.modules)

    @property
    def lr_factor(self) -> float:
        """Factor of the re-warm-up for the optimizer step about to be taken (Figure 2)."""
        if self.finished:
            return 1.0
        return rewarmup_factor(self.outer_number, self.inner_step, self.config.rewarmup_steps)

    def subscribe(self, listener: Callable[[Event], None]) -> None:
        """Call `listener` with every event from now on."""
        self._listeners.append(listener)

    def summary(self) -> list[ModuleSummary]:
        """Return rank, effective rank, state and last check values of every module, in module order."""
        pairs = self._pairs(self.modules)
        return [module.summary(pair) for module, pair in zip(self.modules, pairs, strict=True)]

    # What a loop does ------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Count one optimizer step; check, and end the inner loop, where it is due.

        Returns:
            The events of this step.

        Raises:
            NonFiniteError: A component is NaN or infinite at a check.
            ResetError: The optimizer keeps state that `reset` cannot reset; found out at the first step.
        """
        self._refuse_stale()
        self._held = None
        self.live.ever_controlled = True
        self.global_step += 1
        if self.finished:
            return []
        if not self._state_is_known:
            self._check_optimizer_state()
        self.inner_step += 1
        events = self._inner_check() if self._check_is_due() else []
        if self.inner_step >= self.max_inner_steps or all(module.converged for module in self._active()):
            events += self.outer_step()
        return events

    def outer_step(self) -> list[Event]:
        """End the inner loop now: check every unfrozen module, merge or freeze it, and start the next inner loop.

        Returns:
            The events of this outer step.

        Raises:
            NonFiniteError: A component is NaN or infinite.
        """
        self._refuse_stale()
        self._held = None
        if self.finished:
            return []
        active = self._active()
        names = [module.name for module in active]
        pairs = self._pairs(active)
        norms = pair_norms(pairs)
        weights = [module.weight_norm for module in active]
        agreed, _ = agree([*names, *names], [*norms, *weights], [], self._device)
        norms, weights = agreed[: len(active)], agreed[len(active) :]
        self._require_finite(active, norms, "outer")
        for module, norm, weight in zip(active, norms, weights, strict=True):
            module.weight_norm = weight
            module.outer_value = outer_value(self.config.scale * norm, weight)
        kept = {module: pair for module, pair in zip(active, pairs, strict=True) if module.keeps_component()}
        self._merge(kept)
        events = [event for module in active for event in self._decide(module, module in kept)]
        if self.finished:
            events.append(self._event("finished"))
        self._emit(events)
        self._start_inner_loop()
        return events

    def require_finite(self, *, alone: bool = False) -> None:
        """Check every component in training, as a check would; called before a checkpoint is written.

        Args:
            alone: Whether this rank asks by itself; otherwise all ranks call this, and all raise. Under FSDP2 and
                ZeRO-3 they gather the components for what rank 0 does alone until the next step, and it asks after
                that only.

        Raises:
            NonFiniteError: A component is NaN or infinite.
            CheckpointError: A rank asks by itself for sharded components that nobody has gathered.
        """
        active = self._active()
        if self._pairs_are_shared():
            self._require_held() if alone else self._hold_pairs()
        norms = pair_norms(self._pairs(active))
        if not alone:
            norms, _ = agree([module.name for module in active], norms, [], self._device)
        self._require_finite(active, norms, "save")

    def together(self) -> AbstractContextManager[None]:
        """Return a context in which what one rank refuses is raised on all; see `refuse_together`."""
        return refuse_together(self._device)

    # State -----------------------------------------------------------------------------------------------------------

    def state_dict(self, pairs: Sequence[Pair] | None = None) -> dict[str, Any]:
        """Return what an exact resume needs beside the adapter's own tensors.

        Args:
            pairs: The component in training of every module, whole, where they are known; otherwise all ranks gather
                sharded ones together.

        Returns:
            `{"state": JSON-able dict, "tensors": {name: Tensor}}`. Tensors are there only where the plain adapter
            does not carry them exactly: the earlier component of `inner_criterion="update_change"`, and a pair whose
            folded form does not unfold to the same bits.
        """
        if self._stale:
            return {"state": None, "tensors": {}}
        pairs = self._pairs(self.modules) if pairs is None else pairs
        tensors = self._snapshot.tensors()
        for module, pair in zip(self.modules, pairs, strict=True):
            tensors.update(module.pair_tensors(self._draw_number, pair))
        state = {
            "config": self.live.method(),
            "global_step": self.global_step,
            "inner_step": self.inner_step,
            "outer_number": self.outer_number,
            "max_inner_steps": self.max_inner_steps,
            "earlier_outer_steps": self._earlier_outer_steps,
            "snapshot_norms": self._snapshot.norms,
            "adapter_digest": self._digest(pairs),
            # A list: the Trainer sorts the keys of a dict, and the order of modules decides their random numbers.
            "modules": [module.state() for module in self.modules],
        }
        return {"state": state, "tensors": tensors}

    @torch.no_grad()
    def load_state_dict(self, exported: dict[str, Any]) -> None:
        """Restore what `state_dict()` returned, onto the adapter loaded from the same checkpoint.

        All ranks call it; the checkpoint may be of another number of processes.

        Raises:
            ConfigError: The checkpoint has another configuration or other modules; every difference is named. Or the
                optimizer does not hold the pair of a module that trained then.
        """
        self._held = None
        pairs = self._pairs(self.modules)
        with self.together():
            self._restore(exported["state"], exported["tensors"], pairs)

    def _restore(self, state: dict[str, Any], tensors: dict[str, Any], pairs: Sequence[Pair]) -> None:
        self.live.check_resumable(state["config"])
        refuse_other_modules([module.name for module in self.modules], [entry["name"] for entry in state["modules"]])
        if self._digest(pairs) != state["adapter_digest"]:
            raise CheckpointError(
                "adapter_model.safetensors: its components are not those that aroma_state.json was written with, so "
                "one of the files was edited or comes from another moment; use another checkpoint"
            )
        for name in ("global_step", "inner_step", "outer_number", "max_inner_steps"):
            setattr(self, name, state[name])
        self._earlier_outer_steps = state["earlier_outer_steps"]
        for module, entry, pair in zip(self.modules, state["modules"], pairs, strict=True):
            module.restore(entry, tensors, self._draw_number, pair)
        refuse_missing_pairs(self.optimizer, self._active())
        self._snapshot = PairSnapshot.restore(
            state["snapshot_norms"], tensors, [module.pair for module in self._active()]
        )
        self._stale = False

    def invalidate(self) -> None:
        """Note that other components were loaded under the controller's feet."""
        self._stale = True
        self._held = None

    # Checks ----------------------------------------------------------------------------------------------------------

    def _check_is_due(self) -> bool:
        return self.config.inner_tolerance is not None and self.inner_step % self.config.inner_check_interval == 0

    def _inner_check(self) -> list[Event]:
        active = self._active()
        values, snapshot = inner_values(self._pairs(active), self._snapshot, self.config.inner_criterion)
        norms, values = agree([module.name for module in active], snapshot.norms, values, self._device)
        self._snapshot = PairSnapshot(norms, snapshot.pairs)
        self._require_finite(active, norms, "inner")
        tolerance = self.config.inner_tolerance
        assert tolerance is not None, "no inner check is due without a tolerance"
        events = []
        for module, value in zip(active, values, strict=True):
            module.inner_value = value
            module.converged = module.converged or (value is not None and value < tolerance)
            events.append(self._event("checked", module, value))
        self._emit(events)
        return events

    def _require_finite(self, modules: list[TargetModule], values: list[float], where: str) -> None:
        for module, value in zip(modules, values, strict=True):
            if not -torch.inf < value < torch.inf:
                raise NonFiniteError(
                    f"{module.name}: the component in training is not finite (its norm is {value}) at the {where} "
                    f"check of optimizer step {self.global_step} (outer step {self.outer_number}, inner step "
                    f"{self.inner_step}). Training stopped, and earlier checkpoints are untouched: resume from the "
                    "last one with a lower learning rate, or look at the data of the last "
                    f"{self.config.inner_check_interval} steps"
                )

    # Merge & Reinit & Reset, Freeze ----------------------------------------------------------------------------------

    def _merge(self, kept: dict[TargetModule, Pair]) -> None:
        norms = grown_norms(
            [module.layer.weight_matrix for module in kept],
            [module.finished for module in kept],
            [module.scaled(pair) for module, pair in kept.items()],
            [module.weight_norm for module in kept],
        )
        for (module, pair), norm in zip(kept.items(), norms, strict=True):
            module.weight_norm = norm
            module.merge(pair)

    def _decide(self, module: TargetModule, kept: bool) -> list[Event]:
        """Freeze `module`, or start its next component; return what happened to it."""
        events = [self._event("merged", module, module.outer_value)] if kept else []
        if kept and not module.is_full():
            module.reset(self.optimizer, self._draw_number)
            module.start_component(self._draw_number + 1)
            return events
        module.freeze()
        module.forget(self.optimizer)
        return [*events, self._event("frozen", module, module.outer_value)]

    def _start_inner_loop(self) -> None:
        self.outer_number += 1
        self.inner_step = 0
        self._snapshot = PairSnapshot()
        for module in self.modules:
            module.converged = False

    # Compiled graphs and several processes ---------------------------------------------------------------------------

    def _settle_graph(self, compiled: bool) -> None:
        """Let frozen pairs stay in the graph where DistributedDataParallel or a compiler want it unchanged."""
        # FSDP2 and ZeRO-3 wait for no gradient: they reduce those that there are. ZeRO-1 and ZeRO-2 fail without any.
        stays = compiled or ((is_distributed() or self._zero) and not self._pairs_are_shared())
        for module in self.modules:
            module.stay_in_graph(stays, _COMPILED_GROWTHS if compiled else None)
        if stays and not self._zero:
            # Their gradients are zero. Without any, the optimizer leaves them and its state alone, as anywhere else.
            inner = unwrapped_optimizer(self.optimizer)
            inner.register_step_pre_hook(partial(_drop_gradients_of_frozen, self.modules))

    @property
    def _device(self) -> torch.device:
        """Where collectives take place; a model that is moved takes it along."""
        return _communicating_device(self.modules[0])

    def _join_ranks(self, model: nn.Module) -> None:
        """Settle what depends on how many processes train, and refuse replicas that differ."""
        if not is_distributed():
            return
        # torch's seed, which was taken where none was chosen, may differ between the ranks.
        require_equal_replicas(self._facts(), self._tensors(model), self._device)
        self.live.seed = of_first_rank(self.live.seed, self._device)

    def _facts(self) -> dict[str, object]:
        return {
            "adapter_name": self.adapter_name,
            **self.live.method(),
            "component_seed": self.config.component_seed,
            "total_steps": self.total_steps,
            "target_modules": [(module.name, module.rank, module.is_frozen) for module in self.modules],
            "optimizer": type(unwrapped_optimizer(self.optimizer)).__name__,
            "fully_shard": len(self._sharding),
        }

    def _tensors(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        # The one is DDP's own mark for what it does not keep equal; of the other there is one in all.
        yield from (
            (name, parameter)
            for name, parameter in model.named_parameters()
            if not hasattr(parameter, "_ddp_ignored") and not is_sharded(parameter)
        )
        for module in self.modules:
            B, A = module.finished
            yield from ((f"{module.name}: finished B", B), (f"{module.name}: finished A", A))

    # Refusals --------------------------------------------------------------------------------------------------------

    def _check_optimizer_state(self) -> None:
        """Refuse an optimizer whose state cannot be reset now that it has some, not at the end of the inner loop."""
        # With ZeRO a rank may hold no state of any pair.
        with self.together() if self._zero else nullcontext():
            for module in self._active():
                module.check_resettable(self.optimizer)
        self._state_is_known = True

    def _refuse_stale(self) -> None:
        refuse_changed_processes(self._processes, self._wrapper)
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

    # Small things ----------------------------------------------------------------------------------------------------

    def _pairs(self, modules: Sequence[TargetModule]) -> list[Pair]:
        """Return the components in training, whole; where they are sharded by one collective."""
        if self._held is not None:
            return [self._held[module.name] for module in modules]
        reshard(self._sharding)
        tensors = gathered([tensor for module in modules for tensor in module.pair])
        return [*zip(tensors[::2], tensors[1::2], strict=True)]

    def _pairs_are_shared(self) -> bool:
        """Whether the ranks must gather pairs; FSDP2 may hold whole ones for a while, after an evaluation."""
        return bool(self._sharding) or any(
            is_sharded(parameter) for module in self.modules for parameter in module.pair
        )

    def _hold_pairs(self) -> None:
        """Gather all components for what rank 0 does alone until the next step."""
        self._held = None
        self._held = dict(zip([module.name for module in self.modules], self._pairs(self.modules), strict=True))

    def _require_held(self) -> None:
        if self._held is None:
            raise CheckpointError(
                f"the Trainer saves at optimizer step {self.global_step} without a word to AromaCallback before, and "
                "one rank alone cannot gather components that are sharded; list AromaCallback behind the callbacks "
                "that set should_save"
            )

    def _digest(self, pairs: Sequence[Pair]) -> str:
        """Return a digest of all components, equal before a save and after the load."""
        tensors = {}
        for module, pair in zip(self.modules, pairs, strict=True):
            B, A = module.components(pair)
            if A.shape[0]:
                tensors[f"{module.name}.B"], tensors[f"{module.name}.A"] = B, A
        return tensors_digest(tensors)

    @property
    def _draw_number(self) -> int:
        """Number of the outer step for random draws: counted over all runs of the adapter."""
        return self._earlier_outer_steps + self.outer_number

    def _continue_loaded(self) -> None:
        """Let modules with components from an earlier run go on: full ones are frozen, new ones start afresh."""
        for module, (b, _) in zip(self.modules, self._pairs(self.modules), strict=True):
            if module.is_full() and not module.is_frozen:
                module.freeze()
            elif self._earlier_outer_steps and not module.is_frozen and not b.any():
                module.start_component(self._draw_number)

    def _measure_weights(self) -> None:
        norms = weight_norms(
            [module.layer.weight_matrix for module in self.modules], [module.finished for module in self.modules]
        )
        for module, norm in zip(self.modules, norms, strict=True):
            module.weight_norm = norm

    def _active(self) -> list[TargetModule]:
        return [module for module in self.modules if not module.is_frozen]

    def _event(self, kind: Any, module: TargetModule | None = None, value: float | None = None) -> Event:
        return Event(
            kind=kind,
            step=self.global_step,
            outer_step=self.outer_number,
            inner_step=self.inner_step,
            module=module.name if module else None,
            value=value,
            rank=module.rank if module else self.total_rank,
            converged=module.converged if module else True,
        )

    def _emit(self, events: list[Event]) -> None:
        for event in events:
            for listener in self._listeners:
                listener(event)


def _communicating_device(module: TargetModule) -> torch.device:
    """Return a device that the process group can reduce tensors of: not the CPU that shards may be offloaded to."""
    b, _ = module.pair
    return torch.device(b.device_mesh.device_type) if isinstance(b, DTensor) else b.device


def _drop_gradients_of_frozen(modules: list[TargetModule], *_: Any) -> None:
    for module in modules:
        if module.is_frozen:
            for parameter in module.pair:
                parameter.grad = None
