"""What drives a growth rule in a training run: it is stepped after the optimizer, and resumes exactly."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import compat
from .algorithm import GrowthRule, PaperRule
from .algorithm.duels import flips_to_birth
from .algorithm.evidence import CHECK_INTERVAL, EvidenceRule, EvidenceSettings
from .algorithm.paper import PaperSettings
from .errors import AromaWarning, CheckpointError, bad_value
from .events import Event, Summary
from .matrices import GrowingMatrices, GrowingMatrix
from .measures import Pair
from .reset import makes_state_only
from .sharding import (
    is_distributed,
    is_sharded,
    of_first_rank,
    refuse_changed_processes,
    refuse_sharding,
    refuse_together,
    require_equal_replicas,
    sharding_facts,
    unwrapped,
    unwrapped_optimizer,
    world_size,
)
from .slots import SlotMatrices
from .tuner import AromaConfig
from .tuner.fused import without_autocast
from .tuner.graph import is_compiled
from .tuner.live import live_adapter
from .tuner.state import is_whole

RulePlan = Callable[[Any], GrowthRule]
"""Makes a growth rule of the matrices of a run."""


class HeldOut(Protocol):
    """Batches of examples that are not trained on, and their loss."""

    @property
    def count(self) -> int | None:
        """Number of batches without an example in common; None if nobody knows."""

    def losses(self, model: nn.Module, number: int) -> Iterable[Tensor]:
        """Yield the scalar losses of the micro-batches of batch `number`, from 0; every process has its own."""


_COMPILED_GROWTHS = 8
"""Growths that one compiled graph takes."""


class AromaController:
    """Lets one adapter grow. Call `step()` after every optimizer step.

    Under DistributedDataParallel every rank makes one after the model was wrapped, and steps it in step with the
    others. They agree on every decision, and an error of one is raised on all. The same holds under FSDP2, after
    `fully_shard` and the optimizer, and under ZeRO, after `deepspeed.initialize`; there all ranks call what reads
    components (`summary`, `state_dict`) together.

    Args:
        model: Model with an AROMA adapter; wrapped, sharded or neither.
        optimizer: Optimizer that holds the trainable pairs; wrapped by accelerate or not, or DeepSpeed's.
        total_steps: Planned optimizer steps T; needed with `growth="evidence"`, and where `max_inner_steps` is None.
        adapter_name: Name of the adapter.
        compiled: Whether `torch.compile` wraps the model though `model` does not show it. As for a compiled `model`,
            neither growing nor freezing then changes the graph.
        plan_rule: Checks the configuration against the planned steps, and returns what makes the growth rule of the
            matrices; `paper_rule`, Algorithm 1, by default.

    Attributes:
        rule: The growth rule; `PaperRule` is Algorithm 1.
        matrices: The growing matrices.
        live: The live state of the adapter: its seed, and who drives it.

    Raises:
        ConfigError: No growing module, a pair that the optimizer does not hold or that is offloaded, loops that
            cannot fit the run, replicas that differ between the ranks, or parameters sharded otherwise than by FSDP2
            or ZeRO.
    """

    rule: GrowthRule

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        total_steps: int | None = None,
        adapter_name: str = "default",
        compiled: bool = False,
        plan_rule: Callable[[AromaConfig, int | None], RulePlan] | None = None,
    ) -> None:
        wrapper, model = model, unwrapped(model)
        self.live = live_adapter(model, adapter_name)
        if not hasattr(optimizer, "param_groups"):
            remedy = "it is no optimizer; give the one that trains the adapter (the Trainer has it once it trains)"
            raise bad_value("optimizer", type(optimizer).__name__, remedy)
        if total_steps is not None and not is_whole(total_steps, 1, 2**62):
            raise bad_value("total_steps", total_steps, "give the number of optimizer steps that are planned")
        self.adapter_name = adapter_name
        self.optimizer = optimizer
        self.total_steps = None if total_steps is None else int(total_steps)
        self.config = self.live.config
        kind = SlotMatrices if self.config.has_slots else GrowingMatrices
        self.matrices: GrowingMatrices = kind(model, adapter_name, self.live, optimizer)
        self._processes = world_size()
        self._wrapper = wrapper if wrapper is not model else None
        self._sharding = self.matrices.sharding
        with self.together():
            refuse_sharding(wrapper, optimizer)
            self._sharding.belongs(optimizer, self.matrices.parameters)
            self.matrices.require_data()
            plan = (plan_rule or _RULES[self.config.growth])(self.config, self.total_steps)
            self.matrices.require_held_by_optimizer()
            self.matrices.refuse_other_adapters(wrapper)
            if self.config.has_slots:
                _refuse_odd_steps(self._sharding.base_optimizer(optimizer))
        self._held_out: HeldOut | None = None
        self._first_pass: int | None = None
        self._has_told_of_few = False
        self._hooks: list[Any] = []
        self._settle_graph(compiled or is_compiled(wrapper))
        self._join_ranks(model)
        earlier = self.live.controller
        self._keeps_undecided = earlier is not None and earlier.has_undecided
        self.matrices.start()
        self._listeners: list[Callable[[Event], None]] = []
        self.rule = plan(self.matrices)
        # Not a method: the controller would live in a circle, and be there for a save after its run is dropped.
        self.rule.tell = partial(_tell, self._listeners)
        if self.config.has_slots:
            base, rest = self._sharding.base_optimizer(optimizer), _Rest(self.rule)
            self._hooks += [base.register_step_pre_hook(rest.begin), base.register_step_post_hook(rest.end)]
        self._stale = False
        self._state_is_known = False
        self.live.attach_controller(self)

    # What a loop asks ------------------------------------------------------------------------------------------------

    @property
    def modules(self) -> list[GrowingMatrix]:
        """The growing matrices, in module order."""
        return self.matrices.all()

    @property
    def finished(self) -> bool:
        """Whether every matrix is frozen."""
        return self.rule.finished

    @property
    def has_undecided(self) -> bool:
        """Whether the adapter has components of a trial that is not over."""
        return self.rule.is_in_trial and self.matrices.known_rank > 0

    def warn_of_undecided(self) -> None:
        """Warn where an earlier training of the model was stopped in its trial: this one keeps what that had."""
        if self._keeps_undecided:
            warnings.warn(
                f"the training before was stopped in its trial, so its {self.matrices.known_rank} components stay, of "
                "which none was judged, and those of this one come beside them. To go on, resume from a checkpoint; "
                "to begin anew, make a new model",
                AromaWarning,
                stacklevel=3,
            )

    @property
    def active_modules(self) -> int:
        """Number of matrices that still train."""
        return len(self.matrices.active())

    @property
    def total_rank(self) -> int:
        """Sum of the ranks of all matrices, as `ranks` counts them.

        If parameters are sharded, one rank alone may ask, and no other is waited for: under Algorithm 1 the pairs in
        training are then left out, and in growth by evidence those that have not moved count, too.
        """
        return self.matrices.known_rank if self.matrices.are_sharded else sum(self.ranks().values())

    @property
    def global_step(self) -> int:
        """Optimizer steps taken so far."""
        return self.rule.global_step

    @property
    def inner_step(self) -> int:
        """Optimizer steps taken in this inner loop, t."""
        return self.rule.inner_step

    @property
    def outer_number(self) -> int:
        """Number of the current outer step, p, counted from 1."""
        return self.rule.outer_number

    @property
    def max_inner_steps(self) -> int:
        """Most optimizer steps of one inner loop, T_in."""
        return self.rule.max_inner_steps

    @property
    def lr_factor(self) -> float:
        """Factor on the scheduled learning rate for the optimizer step about to be taken (Figure 2)."""
        return self.rule.lr_factor

    def subscribe(self, listener: Callable[[Event], None]) -> None:
        """Call `listener` with every event from now on."""
        self._listeners.append(listener)

    def ranks(self) -> dict[str, int]:
        """Return the rank of every matrix by its name, in module order.

        It is the rank of its update: of the finished components, and of those in training that have moved from 0.
        Logs, `summary()`, `aroma inspect` and a saved adapter all say this number. The device is asked. If parameters
        are sharded, all ranks call this together.
        """
        return self.matrices.ranks()

    def summary(self) -> Summary:
        """Return rank, effective rank, state and last check values of every matrix, in module order.

        It is a list that prints as a short table, by kind of matrix.

        Raises:
            ConfigError: The adapter was deleted.
        """
        live_adapter(self.matrices.model, self.adapter_name)
        pairs = self.matrices.pairs(self.modules)
        return Summary(matrix.summary(pair) for matrix, pair in zip(self.modules, pairs, strict=True))

    def relative_updates(self) -> dict[str, float | None]:
        """Return ‖ΔW‖_F / ‖W0‖_F of every matrix by its name; None where W0 is 0. Sharded: all ranks together."""
        return self.matrices.relative_updates()

    def explanation(self) -> str:
        """Return in one sentence why the matrices grow no more, or what is open; no device is asked.

        For example: `no evidence for another component in 31 of 36 matrices; some in 5, the most in
        encoder.layer.3.output.dense (E = 8.2 of 20.0); last birth at step 420`.
        """
        return self.rule.explanation

    # What a loop does ------------------------------------------------------------------------------------------------

    def step(self, *, is_new: bool = True, loss_scale: float = 1.0) -> list[Event]:
        """Count one optimizer step, and let the rule act where that is due.

        Args:
            is_new: Whether its batches had not been trained on before. If they had, they are no evidence.
            loss_scale: By what a gradient scaler multiplied its loss.

        Returns:
            The events of this step.

        Raises:
            NonFiniteError: A component is NaN or infinite at a check.
            ResetError: The optimizer keeps state that `reset` cannot reset; found out at the first step.
        """
        self._refuse_stale()
        self.matrices.release_pairs()
        self.live.ever_controlled = True
        if not (self._state_is_known or self.finished):
            self._check_optimizer_state()
        # A loop may step within autocast, in whose precision directions would not be orthogonal.
        with without_autocast(self.matrices.device):
            self._gather_evidence(is_new, loss_scale)
            return self.rule.step() + self._ask_held_out()

    def decide_by(self, held_out: HeldOut | None, first_pass: int | None) -> None:
        """Say on which examples growth is decided; without this call, on every batch.

        Args:
            held_out: Batches that are not trained on. They decide what stays after the trial, from the second pass
                over the data on what is born, and what goes where growth ends. None: the training batches go on
                deciding.
            first_pass: Optimizer steps of the first pass; None if no example comes twice.

        Warns:
            AromaWarning: Too few batches decide for any birth after the trial.
            UserWarning: The run is longer than the first pass, and nothing is held out.
        """
        self._held_out, self._first_pass = held_out, first_pass
        if not self.config.has_slots:
            return
        count = None if held_out is None else held_out.count
        # A rank that asked more batches than the others would wait for them.
        agreed = of_first_rank(-1 if count is None else count, self.matrices.device)
        self.rule.hold_out(None if agreed < 0 else agreed, decide=held_out is not None)
        self._tell_if_too_few_decide(stacklevel=4)
        if held_out is not None or first_pass is None:
            return
        if self.total_steps is None or self.total_steps > first_pass:
            warnings.warn(
                f"From optimizer step {first_pass} on, growth is decided on examples that have been trained on: what "
                "is learnt by heart seems to save loss, so matrices may keep or get what they should not. Hold some "
                "examples out: train, growth = aroma.hold_out(dataset), and give growth_dataset=growth to "
                "AromaCallback (growth_batches= to attach)",
                stacklevel=3,
            )

    def _tell_if_too_few_decide(self, stacklevel: int) -> None:
        """Warn, once, where too few batches decide for a birth."""
        alpha = self.config.significance
        least, found = flips_to_birth(alpha), self.rule.duels(self._first_pass, held_out=self._held_out is not None)
        if found < least and not self._has_told_of_few:
            self._has_told_of_few = True
            warnings.warn(
                f"significance={alpha}: a birth takes {least} batches, and {found} decide after the "
                "trial, so nothing will be born then. Train longer, or in fewer passes over more data",
                AromaWarning,
                stacklevel=stacklevel,
            )

    def _gather_evidence(self, is_new: bool, loss_scale: float) -> None:
        """Take what this step's backwards say, and, when it is their turn, what held-out examples say."""
        step, first_pass, held_out = self.rule.global_step, self._first_pass, self._held_out
        if held_out is None or first_pass is None or step < first_pass:
            self.matrices.absorb(record=is_new, loss_scale=loss_scale)
            return
        for number in () if self.finished else self.rule.held_out_duels(step - first_pass):
            self.matrices.weigh_held_out(held_out.losses(self.matrices.model, number))
        self.matrices.absorb(record=False, loss_scale=loss_scale)

    def _ask_held_out(self) -> list[Event]:
        """Let held-out examples say at once what stays where the trial or growth ends: no training step is spent."""
        events: list[Event] = []
        if self._held_out is None:
            return events
        try:
            while numbers := self.rule.held_out_questions():
                for number in numbers:
                    self.matrices.weigh_held_out(self._held_out.losses(self.matrices.model, number))
                events += self.rule.answer()
        except BaseException:
            self.rule.give_up()
            raise
        if any(event.kind == "settled" for event in events):  # a trial that went on leaves fewer
            self._tell_if_too_few_decide(stacklevel=2)
        return events

    def require_answers(self) -> None:
        """Refuse a model in which no gradient reaches what grows, before the optimizer changes anything.

        `step()` finds out, too. Before an optimizer step its backwards have to be over, so one with a closure has to
        wait. All ranks call together.

        Raises:
            ConfigError: Growth by evidence asks, and no backward of this step has reached a growing layer.
        """
        self.matrices.require_answers()

    def skip_step(self, *, is_planned: bool = False) -> None:
        """Forget the batches of an optimizer step that was not taken, because a gradient overflowed.

        Args:
            is_planned: Whether it is one of `total_steps`, so that fewer are taken, as by the Trainer.
        """
        self.matrices.discard()
        if is_planned:
            self.rule.skip_step()

    def outer_step(self) -> list[Event]:
        """End the inner loop now: check every unfrozen matrix, merge or freeze it, and start the next inner loop.

        Returns:
            The events of this outer step.

        Raises:
            NonFiniteError: A component is NaN or infinite.
        """
        self._refuse_stale()
        self.matrices.release_pairs()
        return self.rule.outer_step()

    def require_finite(self, *, alone: bool = False) -> None:
        """Check every component in training, as a check would; called before a checkpoint is written.

        Args:
            alone: Whether only this rank calls. Otherwise all ranks call, and all raise. If parameters are sharded,
                call it on all ranks first: that gathers the components for what rank 0 does alone until the next step.

        Raises:
            NonFiniteError: A component is NaN or infinite.
            CheckpointError: One rank calls alone, and the sharded components have not been gathered.
        """
        if self.matrices.are_sharded:
            self._require_held() if alone else self.matrices.hold_pairs()
        active = self.matrices.active()
        self.rule.require_finite(active, self.matrices.norms(active, alone=alone), "save")

    def together(self) -> AbstractContextManager[None]:
        """Return a context in which an error of one rank is raised on all; see `refuse_together`."""
        return refuse_together(self.matrices.device)

    def detach(self) -> None:
        """Remove the hooks that the controller has made; the adapter stays as it is."""
        if self._hooks:
            self.matrices.forget_frozen()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.matrices.stop_asking()

    # State -----------------------------------------------------------------------------------------------------------

    def state_dict(self, pairs: Sequence[Pair] | None = None) -> dict[str, Any]:
        """Return what an exact resume needs beside the adapter's own tensors.

        Args:
            pairs: The components in training of all matrices, b (m, r) and a (r, n), whole, where they are known.
                Otherwise all ranks gather sharded ones together.

        Returns:
            `{"state": JSON-able dict, "tensors": {name: Tensor}}`. Tensors are there only where the plain adapter
            does not carry them exactly: the earlier component of `inner_criterion="update_change"`, and a pair whose
            folded form does not unfold to the same bits.
        """
        if self._stale:
            return {"state": None, "tensors": {}}
        state, tensors = self.matrices.state(
            self.rule.draw, self.matrices.pairs(self.modules) if pairs is None else pairs
        )
        return {"state": {"config": self.live.method(), **self.rule.state(), **state}, "tensors": tensors}

    @torch.no_grad()
    def load_state_dict(self, exported: dict[str, Any]) -> None:
        """Restore what `state_dict()` returned, onto the adapter loaded from the same checkpoint.

        All ranks call it; the checkpoint may be of another number of processes.

        Raises:
            ConfigError: The checkpoint has another configuration or other modules; every difference is named. Or the
                optimizer does not hold the pair of a matrix that trained then.
            CheckpointError: The components are not those that the state was saved with.
        """
        self.matrices.release_pairs()
        pairs = self.matrices.pairs(self.modules)
        state = exported["state"]
        with self.together():
            self.live.check_resumable(state["config"])
            self.matrices.refuse_other(state, pairs)
            if missing := sorted(self.rule.state().keys() - state.keys()):
                raise CheckpointError(
                    f"aroma_state.json: it lacks {missing[0]!r}, so another version wrote it; use another checkpoint"
                )
            self.rule.restore(state)
            self.matrices.restore(state, exported["tensors"], self.rule.draw, pairs)
            self._stale = False

    def invalidate(self) -> None:
        """Note that other components were loaded behind the controller's back."""
        self._stale = True
        self.matrices.release_pairs()

    # Compiled graphs and several processes ---------------------------------------------------------------------------

    def _settle_graph(self, compiled: bool) -> None:
        """Keep frozen pairs in the graph where DistributedDataParallel or a compiler needs it unchanged."""
        stays = compiled or self._sharding.needs_all_gradients(self.matrices.parameters)
        self.matrices.stay_in_graph(stays, _COMPILED_GROWTHS if compiled else None)
        if stays and not self._sharding.has_flat_optimizer:
            optimizer = self._sharding.base_optimizer(self.optimizer)
            self._hooks.append(optimizer.register_step_pre_hook(self.matrices.drop_gradients_of_frozen))

    def _join_ranks(self, model: nn.Module) -> None:
        """Refuse replicas that differ, and agree on the seed: each rank may have taken its own."""
        if not is_distributed():
            return
        require_equal_replicas(self._facts(model), self._tensors(model), self.matrices.device)
        self.live.seed = of_first_rank(self.live.seed, self.matrices.device)

    def _facts(self, model: nn.Module) -> dict[str, object]:
        return {
            "adapter_name": self.adapter_name,
            **self.config.method(),
            "component_seed": self.live.seed if self.live.chose_seed else None,
            "total_steps": self.total_steps,
            "target_modules": [(matrix.name, matrix.rank, matrix.is_frozen) for matrix in self.modules],
            "optimizer": type(unwrapped_optimizer(self.optimizer)).__name__,
            **sharding_facts(model),
        }

    def _tensors(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():
            # DDP does not keep equal what it ignores; a sharded parameter has no replicas.
            if not compat.is_ignored_by_ddp(parameter) and not is_sharded(parameter):
                yield name, parameter
        for matrix in self.modules:
            B, A = matrix.finished
            yield f"{matrix.name}: finished B", B
            yield f"{matrix.name}: finished A", A

    # Refusals --------------------------------------------------------------------------------------------------------

    def _check_optimizer_state(self) -> None:
        """Refuse an optimizer whose state cannot be reset now that it has some, not at the end of the inner loop."""
        # A rank may hold no part of a flat optimizer's state for any pair.
        with self.together() if self._sharding.has_flat_optimizer else nullcontext():
            self.matrices.require_resettable()
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

    def _require_held(self) -> None:
        if not self.matrices.pairs_are_held:
            raise CheckpointError(
                f"at optimizer step {self.global_step} the Trainer saved before AromaCallback ran, and one rank alone "
                "cannot gather sharded components; list AromaCallback behind the callbacks that set should_save"
            )


def _tell(listeners: Sequence[Callable[[Event], None]], events: Sequence[Event]) -> None:
    for event in events:
        for listener in listeners:
            listener(event)


class _Rest:
    """Keeps the gradients of batches that are asked from an optimizer: they are not those of the model that trains.

    A rate of 0 alone would let them into its averages, and those of the head as well.
    """

    def __init__(self, rule: GrowthRule) -> None:
        self._rule = rule
        self._kept: list[tuple[Tensor, Tensor | None]] = []

    def begin(
        self, optimizer: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Take the gradients away, before a step of `optimizer`.

        Returns:
            The arguments of the step, in which a closure, too, has its gradients taken away; None for no change.
        """
        self._kept = []
        if self._rule.lr_factor != 0 or makes_state_only(optimizer, keywords):
            return None
        self._take_from(optimizer)
        kept_out = {name: self._kept_out(optimizer, value) for name, value in keywords.items()}
        return tuple(self._kept_out(optimizer, value) for value in arguments), kept_out

    def _kept_out(self, optimizer: Any, value: Any) -> Any:
        if not callable(value):
            return value

        def closure() -> Any:
            loss = value()
            self._take_from(optimizer)
            return loss

        return closure

    def _take_from(self, optimizer: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._kept = [(parameter, parameter.grad) for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None

    def end(self, *_: Any) -> None:
        """Give them back: DeepSpeed goes on to use the tensors that they are in."""
        for parameter, gradient in self._kept:
            parameter.grad = gradient
        self._kept = []


def _refuse_odd_steps(optimizer: Any) -> None:
    """Refuse an optimizer that climbs, or sets its rates itself, so that none can be 0 while batches are asked.

    Raises:
        ConfigError: Naming the optimizer.
    """
    name = type(optimizer).__name__
    if not hasattr(optimizer, "register_step_pre_hook"):
        raise bad_value("optimizer", name, "it is no torch.optim.Optimizer; give the one that it wraps")
    if any(group.get("maximize") for group in optimizer.param_groups):
        remedy = "with maximize=True it climbs, and growth='evidence' keeps what lowers a loss; minimise the negative"
        raise bad_value("optimizer", name, remedy)
    if any(group.get("lr") is None for group in optimizer.param_groups):
        raise bad_value(
            "optimizer",
            name,
            "it has no learning rate (relative_step=True), and growth='evidence' takes steps at a rate of 0 while it "
            "asks batches; give it a rate, with relative_step=False",
        )


def paper_rule(config: AromaConfig, total_steps: int | None) -> RulePlan:
    """Return what makes Algorithm 1 of a configuration.

    Raises:
        ConfigError: The loops do not fit a run of `total_steps`.
    """
    settings = PaperSettings(
        inner_tolerance=config.inner_tolerance,
        inner_check_interval=config.inner_check_interval,
        max_inner_steps=config.resolve_inner_steps(total_steps),
        outer_tolerance=config.outer_tolerance,
        min_components=config.min_components,
        max_components=config.max_components,
        rewarmup_steps=config.rewarmup_steps,
    )
    return partial(PaperRule, settings)


def evidence_rule(config: AromaConfig, total_steps: int | None) -> RulePlan:
    """Return what makes growth by evidence of a configuration.

    Raises:
        ConfigError: The trial does not fit a run of `total_steps`.
    """
    trial = config.resolve_trial_steps(total_steps)
    settings = EvidenceSettings(
        significance=config.significance,
        duel_factor=config.duel_factor,
        trial_components=config.trial_components,
        trial_steps=trial,
        memory=config.probe_memory,
        last_step=((total_steps or 0) - trial) // CHECK_INTERVAL * CHECK_INTERVAL,
        max_components=config.max_components,
        total_steps=total_steps or 0,
    )
    return partial(EvidenceRule, settings)


_RULES: dict[str, Callable[[AromaConfig, int | None], RulePlan]] = {"paper": paper_rule, "evidence": evidence_rule}
