"""Algorithm 1: the dual loop over all growing modules, as a state machine that knows no trainer.

Check & Merge & Reinit & Reset (section 3.2). All modules run in lock-step: an inner loop trains one component of every
unfrozen module; when it ends, every unfrozen module keeps its component and starts the next, or drops it and freezes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError, NonFiniteError, bad_value
from .events import Event, ModuleSummary
from .files import tensors_digest
from .measures import Pair, PairSnapshot, grown_norms, inner_values, outer_value, pair_norms, weight_norms
from .reset import check_resettable, component_generator, fresh_component, reset_state
from .spectra import effective_rank, singular_values
from .tuner import AromaConfig, AromaLinear, aroma_layers
from .warmup import rewarmup_factor


@dataclass(eq=False)
class TargetModule:
    """What the controller knows of one growing module.

    Args:
        name: Its name in the base model.
        index: Its place in module order; decides its random numbers.
        layer: The growing layer.
        weight_norm: ‖W0 + s B A‖_F over the finished components.
        converged: Whether it bears the label "inner-converged" in this inner loop.
        inner_value: Left side of (5) at the last check, None where undefined.
        outer_value: Left side of (6) at the last outer check.
    """

    name: str
    index: int
    layer: AromaLinear
    weight_norm: float = 0.0
    converged: bool = False
    inner_value: float | None = None
    outer_value: float | None = None


class AromaController:
    """Runs Algorithm 1 for one adapter. Call `step()` after every optimizer step.

    Args:
        model: Model with an AROMA adapter.
        optimizer: Optimizer that holds the trainable pairs; wrapped by accelerate or not.
        total_steps: Planned optimizer steps T; needed where `max_inner_steps` is None.
        adapter_name: Name of the adapter.

    Attributes:
        global_step: Optimizer steps taken so far.
        inner_step: Optimizer steps taken in this inner loop, t.
        outer_number: Outer step, p, counted from 1.
        max_inner_steps: T_in.

    Raises:
        ConfigError: No growing module, a pair that the optimizer does not hold, or loops that cannot fit the run.
    """

    def __init__(
        self, model: nn.Module, optimizer: Any, *, total_steps: int | None = None, adapter_name: str = "default"
    ) -> None:
        layers = aroma_layers(model, adapter_name)
        if not layers:
            raise bad_value(
                "model",
                type(model).__name__,
                f"it has no AROMA adapter {adapter_name!r}; make one with get_peft_model(model, AromaConfig(...))",
            )
        self.config = _find_config(model, adapter_name)
        self.adapter_name = adapter_name
        self.optimizer = optimizer
        self.total_steps = total_steps
        self.max_inner_steps = self.config.resolve_inner_steps(total_steps)
        self.modules = [TargetModule(name, index, layer) for index, (name, layer) in enumerate(layers.items())]
        self._check_optimizer()
        self._measure_weights()
        self.global_step = 0
        self.inner_step = 0
        self.outer_number = 1
        self._snapshot = PairSnapshot()
        self._listeners: list[Callable[[Event], None]] = []
        self._stale = False
        self._state_is_known = False
        self.config.attach_controller(self)

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
        return sum(self._finished_rank(module) for module in self.modules)

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
        return [self._summarise(module) for module in self.modules]

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
        active = self._active()
        norms = pair_norms(self._pairs(active))
        self._require_finite(active, norms, "outer")
        kept = []
        for module, norm in zip(active, norms, strict=True):
            module.outer_value = outer_value(self.config.scale * norm, module.weight_norm)
            if self._keeps(module):
                kept.append(module)
        self._merge(kept)
        events = [event for module in active for event in self._decide(module, module in kept)]
        if self.finished:
            events.append(self._event("finished"))
        self._emit(events)
        self._start_inner_loop()
        return events

    def require_finite(self) -> None:
        """Check every component in training, as a check would; called before a checkpoint is written.

        Raises:
            NonFiniteError: A component is NaN or infinite.
        """
        active = self._active()
        self._require_finite(active, pair_norms(self._pairs(active)), "save")

    # State -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what an exact resume needs beside the adapter's own tensors.

        Returns:
            `{"state": JSON-able dict, "tensors": {name: Tensor}}`. Tensors are there only where the plain adapter
            does not carry them exactly: the earlier component of `inner_criterion="update_change"`, and a pair whose
            folded form does not unfold to the same bits.
        """
        if self._stale:
            return {"state": None, "tensors": {}}
        tensors = self._snapshot.tensors()
        for module in self.modules:
            tensors.update(self._pair_tensors(module))
        state = {
            "config": self.config.method(),
            "global_step": self.global_step,
            "inner_step": self.inner_step,
            "outer_number": self.outer_number,
            "max_inner_steps": self.max_inner_steps,
            "snapshot_norms": self._snapshot.norms,
            "adapter_digest": self._digest(),
            # A list: the Trainer sorts the keys of a dict, and the order of modules decides their random numbers.
            "modules": [self._module_state(module) for module in self.modules],
        }
        return {"state": state, "tensors": tensors}

    @torch.no_grad()
    def load_state_dict(self, exported: dict[str, Any]) -> None:
        """Restore what `state_dict()` returned, onto the adapter loaded from the same checkpoint.

        Raises:
            ConfigError: The checkpoint has another configuration or other modules; every difference is named. Or the
                optimizer does not hold the pair of a module that trained then.
        """
        state, tensors = exported["state"], exported["tensors"]
        self.config.check_resumable(state["config"])
        self._refuse_other_modules([entry["name"] for entry in state["modules"]])
        if self._digest() != state["adapter_digest"]:
            raise CheckpointError(
                "adapter_model.safetensors: its components are not those that aroma_state.json was written with, so "
                "one of the files was edited or comes from another moment; use another checkpoint"
            )
        for name in ("global_step", "inner_step", "outer_number", "max_inner_steps"):
            setattr(self, name, state[name])
        for module, entry in zip(self.modules, state["modules"], strict=True):
            for name in ("converged", "inner_value", "outer_value", "weight_norm"):
                setattr(module, name, entry[name])
            self._restore_pair(module, entry["rank"], entry["frozen"], tensors)
        self._check_optimizer()
        self._snapshot = PairSnapshot.restore(state["snapshot_norms"], tensors, self._pairs(self._active()))
        self._stale = False

    def invalidate(self) -> None:
        """Note that other components were loaded under the controller's feet."""
        self._stale = True

    # Checks ----------------------------------------------------------------------------------------------------------

    def _check_is_due(self) -> bool:
        return self.config.inner_tolerance is not None and self.inner_step % self.config.inner_check_interval == 0

    def _inner_check(self) -> list[Event]:
        active = self._active()
        values, self._snapshot = inner_values(self._pairs(active), self._snapshot, self.config.inner_criterion)
        self._require_finite(active, self._snapshot.norms, "inner")
        tolerance = self.config.inner_tolerance
        assert tolerance is not None, "no inner check is due without a tolerance"
        events = []
        for module, value in zip(active, values, strict=True):
            module.inner_value = value
            module.converged = module.converged or (value is not None and value < tolerance)
            events.append(self._event("checked", module, value))
        self._emit(events)
        return events

    def _keeps(self, module: TargetModule) -> bool:
        """Whether the outer check lets `module` keep its component: (6) is not met, or may not decide."""
        tolerance = self.config.outer_tolerance
        if tolerance is None or module.outer_value is None or self._components(module) < self.config.min_components:
            return True
        return module.outer_value >= tolerance

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

    def _merge(self, modules: list[TargetModule]) -> None:
        added = [(b.detach() * self.config.scale, a.detach()) for b, a in self._pairs(modules)]
        norms = grown_norms(
            [module.layer.weight_matrix for module in modules],
            self._updates(modules),
            added,
            [module.weight_norm for module in modules],
        )
        for module, norm in zip(modules, norms, strict=True):
            module.weight_norm = norm
            module.layer.merge_pair(self.adapter_name)

    def _decide(self, module: TargetModule, kept: bool) -> list[Event]:
        """Freeze `module`, or start its next component; return what happened to it."""
        events = [self._event("merged", module, module.outer_value)] if kept else []
        if kept and self._components(module) != self.config.max_components:
            self._reset(module)
            self._start_component(module, self.outer_number + 1)
            return events
        module.layer.freeze(self.adapter_name)
        return [*events, self._event("frozen", module, module.outer_value)]

    def _reset(self, module: TargetModule) -> None:
        b, a = module.layer.pair(self.adapter_name)
        generator = component_generator(self._seed, self.outer_number, module.index, "reset")
        for parameter in (a, b):
            reset_state(self.optimizer, parameter, self.config.reset, self.config.prune_ratio, generator)

    def _check_optimizer(self) -> None:
        """Refuse an optimizer without the pair of a module that trains."""
        held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        for module in self._active():
            if not all(id(parameter) in held for parameter in module.layer.pair(self.adapter_name)):
                raise bad_value(
                    "optimizer",
                    type(self.optimizer).__name__,
                    f"it does not hold the trainable pair of {module.name!r}, so that module would never learn; make "
                    "the optimizer after get_peft_model, over every parameter that requires a gradient",
                )

    def _check_optimizer_state(self) -> None:
        """Refuse an optimizer whose state cannot be reset now that it has some, not at the end of the inner loop."""
        for module in self._active():
            for parameter in module.layer.pair(self.adapter_name):
                check_resettable(self.optimizer, parameter, self.config.reset)
        self._state_is_known = True

    def _start_component(self, module: TargetModule, outer_number: int) -> None:
        module.layer.start_pair(self.adapter_name, self._fresh(module, outer_number))

    def _start_inner_loop(self) -> None:
        self.outer_number += 1
        self.inner_step = 0
        self._snapshot = PairSnapshot()
        for module in self.modules:
            module.converged = False

    # Exact restoring -------------------------------------------------------------------------------------------------

    def _module_state(self, module: TargetModule) -> dict[str, Any]:
        return {
            "name": module.name,
            "rank": self._finished_rank(module),
            "frozen": self._is_frozen(module),
            "converged": module.converged,
            "inner_value": module.inner_value,
            "outer_value": module.outer_value,
            "weight_norm": module.weight_norm,
        }

    def _refuse_other_modules(self, saved: list[str]) -> None:
        names = [module.name for module in self.modules]
        if names == saved:
            return
        differing = sorted(set(names) ^ set(saved)) or names
        raise bad_value(
            "target_modules",
            differing[0],
            f"the checkpoint grows {len(saved)} modules and this model {len(names)}, and they differ in "
            f"{len(differing)}; make the adapter with the target_modules of the checkpoint",
        )

    def _pair_tensors(self, module: TargetModule) -> dict[str, Tensor]:
        """Return the pair of `module` if the plain adapter would not give it back bit for bit."""
        if self._is_frozen(module):
            return {}
        b, a = (parameter.detach() for parameter in module.layer.pair(self.adapter_name))
        if b.any():
            exact = torch.equal(b * self.config.scale / self.config.scale, b)
        else:
            exact = torch.equal(a, self._fresh(module, self.outer_number).to(a))
        return {} if exact else {f"pair.{module.index}.b": b.clone(), f"pair.{module.index}.a": a.clone()}

    def _restore_pair(self, module: TargetModule, rank: int, frozen: bool, tensors: dict[str, Tensor]) -> None:
        """Take the component that was in training out of the loaded finished ones."""
        finished = module.layer.finished(self.adapter_name)
        surplus = finished.rank - rank
        if surplus not in (0, self.config.r) or (frozen and surplus):
            raise CheckpointError(
                f"{module.name}: the adapter has rank {finished.rank}, but its aroma_state says {rank} finished and "
                f"{'no' if frozen else 'one'} component in training; the files are of different moments, use another "
                "checkpoint"
            )
        if frozen:
            module.layer.freeze(self.adapter_name)
            return
        module.layer.unfreeze(self.adapter_name)
        b, a = finished.pop(surplus)
        if f"pair.{module.index}.b" in tensors:
            module.layer.start_pair(
                self.adapter_name, tensors[f"pair.{module.index}.a"], tensors[f"pair.{module.index}.b"]
            )
        elif surplus:
            module.layer.start_pair(self.adapter_name, a, b / self.config.scale)
        else:
            self._start_component(module, self.outer_number)

    def _digest(self) -> str:
        """Return a digest of all components, equal before a save and after the load."""
        tensors = {}
        for module in self.modules:
            B, A = module.layer.components(self.adapter_name)
            if A.shape[0]:
                tensors[f"{module.name}.B"], tensors[f"{module.name}.A"] = B, A
        return tensors_digest(tensors)

    # Small things ----------------------------------------------------------------------------------------------------

    @property
    def _seed(self) -> int:
        assert self.config.component_seed is not None, "AromaModel settles the seed when the adapter is made"
        return self.config.component_seed

    def _fresh(self, module: TargetModule, outer_number: int) -> Tensor:
        _, a = module.layer.pair(self.adapter_name)
        return fresh_component(self._seed, outer_number, module.index, (a.shape[0], a.shape[1]))

    def _measure_weights(self) -> None:
        norms = weight_norms([module.layer.weight_matrix for module in self.modules], self._updates(self.modules))
        for module, norm in zip(self.modules, norms, strict=True):
            module.weight_norm = norm

    def _active(self) -> list[TargetModule]:
        return [module for module in self.modules if not self._is_frozen(module)]

    def _is_frozen(self, module: TargetModule) -> bool:
        return module.layer.is_frozen(self.adapter_name)

    def _pairs(self, modules: list[TargetModule]) -> list[Pair]:
        return [module.layer.pair(self.adapter_name) for module in modules]

    def _updates(self, modules: list[TargetModule]) -> list[Pair]:
        finished = [module.layer.finished(self.adapter_name) for module in modules]
        return [(components.B, components.A) for components in finished]

    def _finished_rank(self, module: TargetModule) -> int:
        return module.layer.finished(self.adapter_name).rank

    def _components(self, module: TargetModule) -> int:
        return self._finished_rank(module) // self.config.r

    def _summarise(self, module: TargetModule) -> ModuleSummary:
        B, A = module.layer.components(self.adapter_name)
        frozen = self._is_frozen(module)
        return ModuleSummary(
            name=module.name,
            rank=A.shape[0],
            effective_rank=effective_rank(singular_values(B, A)),
            state="frozen" if frozen else "converged" if module.converged else "training",
            inner_value=module.inner_value,
            outer_value=module.outer_value,
        )

    def _event(self, kind: Any, module: TargetModule | None = None, value: float | None = None) -> Event:
        return Event(
            kind=kind,
            step=self.global_step,
            outer_step=self.outer_number,
            inner_step=self.inner_step,
            module=module.name if module else None,
            value=value,
            rank=self._finished_rank(module) if module else self.total_rank,
            converged=module.converged if module else True,
        )

    def _emit(self, events: list[Event]) -> None:
        for event in events:
            for listener in self._listeners:
                listener(event)

    def _refuse_stale(self) -> None:
        if self._stale:
            raise CheckpointError(
                "load_adapter replaced the components while this controller was attached; attach a new controller, "
                "or restore the checkpoint's state with load_state_dict"
            )


def _find_config(model: nn.Module, adapter_name: str) -> AromaConfig:
    for module in model.modules():
        configs = module.__dict__.get("peft_config")
        if configs is not None and isinstance(configs.get(adapter_name), AromaConfig):
            config: AromaConfig = configs[adapter_name]
            return config
    raise bad_value("adapter_name", adapter_name, "the model has growing layers of that name but no AromaConfig")
