"""Algorithm 1 in the paper's notation: slow, dense, one loop. The controller is held equal to it.

Every decision is taken from m×n matrices. Only the random draws are shared with the library: `fresh_component`,
`component_generator` and `reset_state`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aroma.reset import component_generator, fresh_component, reset_state

Weights = dict[str, Tensor]


@dataclass
class Settings:
    """Facts of the method, named as in `AromaConfig`; `max_inner_steps` is T_in and must be given."""

    max_inner_steps: int
    r: int = 1
    lora_alpha: float = 4
    inner_tolerance: float | None = 0.1
    inner_check_interval: int = 10
    outer_tolerance: float | None = 5e-3
    min_components: int = 0
    max_components: int | None = None
    inner_criterion: str = "norm_change"
    reset: str = "prune"
    prune_ratio: float = 0.999
    rewarmup_steps: int = 50
    component_seed: int = 0

    @property
    def s(self) -> float:
        return self.lora_alpha / self.r


class ReferenceModule:
    """One weight matrix: W0 (m×n), the component in training b (m×r), a (r×n), the finished ones B (m×R), A (R×n)."""

    def __init__(self, name: str, index: int, W0: Tensor, settings: Settings) -> None:
        self.name, self.index, self.settings = name, index, settings
        self.W0 = W0.detach().clone()
        m, n = W0.shape
        self.b = torch.zeros(m, settings.r, dtype=W0.dtype, requires_grad=True)
        self.a = self.fresh(outer_step=1).requires_grad_()
        self.B, self.A = W0.new_zeros(m, 0), W0.new_zeros(0, n)
        self.earlier = torch.zeros(m, n, dtype=torch.float64)  # b_{t−ΔT} a_{t−ΔT}
        self.label = False
        self.frozen = False
        self.inner_value: float | None = None
        self.outer_value: float | None = None

    def fresh(self, outer_step: int) -> Tensor:
        shape = (self.settings.r, self.W0.shape[1])
        seed = self.settings.component_seed
        return fresh_component(seed, outer_step, self.index, shape).to(self.W0.dtype)

    @property
    def components(self) -> int:
        return self.A.shape[0] // self.settings.r

    @property
    def rank(self) -> int:
        return self.components * self.settings.r

    @property
    def state(self) -> str:
        if self.frozen:
            return "frozen"
        return "converged" if self.label else "training"

    def update(self) -> Tensor:
        """ΔW = B A + s b a, differentiable in the pair; a component in training belongs to the model."""
        finished = self.B @ self.A
        return finished if self.frozen else finished + self.settings.s * (self.b @ self.a)

    def check_inner(self, tolerance: float) -> None:
        """Equation (5), or its released variant; the label stays once given."""
        now = self.b.detach().double() @ self.a.detach().double()
        norm, earlier_norm = float(torch.linalg.norm(now)), float(torch.linalg.norm(self.earlier))
        if self.settings.inner_criterion == "norm_change":
            change = norm - earlier_norm
        else:
            change = float(torch.linalg.norm(now - self.earlier))
        self.inner_value = change / earlier_norm if earlier_norm > 0 else None
        if self.inner_value is not None and self.inner_value < tolerance:
            self.label = True
        self.earlier = now

    def check_outer(self) -> bool:
        """Equation (6). Return whether the component is merged."""
        component = self.settings.s * self.b.detach().double() @ self.a.detach().double()
        merged = self.W0.double() + self.B.double() @ self.A.double()
        above, below = float(torch.linalg.norm(component)), float(torch.linalg.norm(merged))
        if below > 0:
            self.outer_value = above / below
        else:
            self.outer_value = None if above > 0 else 0.0
        if self.components < self.settings.min_components or self.settings.outer_tolerance is None:
            return True
        return self.outer_value is None or self.outer_value >= self.settings.outer_tolerance

    @torch.no_grad()
    def merge(self) -> None:
        self.B = torch.cat([self.B, self.settings.s * self.b], dim=1)
        self.A = torch.cat([self.A, self.a], dim=0)

    @torch.no_grad()
    def reinit(self, outer_step: int) -> None:
        """b ← 0, a ← Kaiming for the outer step that begins."""
        self.b.zero_()
        self.a.copy_(self.fresh(outer_step))
        self.earlier.zero_()
        self.b.grad = self.a.grad = None

    @torch.no_grad()
    def freeze(self) -> None:
        self.frozen = True
        self.b.zero_()
        self.a.zero_()
        self.b.grad = self.a.grad = None


class ReferenceAroma:
    """A whole training by Algorithm 1.

    Args:
        weights: W0 (m×n) by module name, in module order.
        settings: Facts of the method.
        make_optimizer: Makes the optimizer from the trainable tensors: a, b of the first module, then the next.
        others: Trainable tensors beside the pairs, e.g. a head; appended to the optimizer's.

    Attributes:
        events: Tuples (kind, step, outer_step, inner_step, module, value, rank, converged), as `aroma.events.Event`.
        losses: Loss of every step, before its update.
    """

    def __init__(
        self,
        weights: Weights,
        settings: Settings,
        make_optimizer: Callable[[list[Tensor]], Any] = torch.optim.AdamW,
        others: Iterable[Tensor] = (),
    ) -> None:
        self.settings = settings
        self.modules = [ReferenceModule(name, i, W0, settings) for i, (name, W0) in enumerate(weights.items())]
        pairs = [tensor for module in self.modules for tensor in (module.a, module.b)]
        self.optimizer = make_optimizer([*pairs, *others])
        self.step, self.p, self.t = 0, 1, 0
        self.events: list[tuple[Any, ...]] = []
        self.losses: list[float] = []
        self.finished = False

    def unfrozen(self) -> list[ReferenceModule]:
        return [module for module in self.modules if not module.frozen]

    def ranks(self) -> dict[str, int]:
        return {module.name: module.rank for module in self.modules}

    def labels(self) -> dict[str, bool]:
        return {module.name: module.label for module in self.modules}

    def states(self) -> dict[str, str]:
        return {module.name: module.state for module in self.modules}

    def updates(self) -> Weights:
        """ΔW of every module, dense."""
        return {module.name: module.update().detach() for module in self.modules}

    def lr_factor(self) -> float:
        """Figure 2: from 0 back to the schedule at the start of every later inner loop."""
        if self.p == 1 or self.settings.rewarmup_steps == 0:
            return 1.0
        return min(1.0, self.t / self.settings.rewarmup_steps)

    def train(
        self,
        loss: Callable[[Weights, int], Tensor],
        T: int,
        learning_rate: Callable[[int], float] = lambda steps_done: 1e-2,
    ) -> ReferenceAroma:
        """Take up to T optimizer steps; fewer when every module freezes.

        Args:
            loss: Scalar loss of the weights W0 + ΔW by module name, and of the number of steps done before.
            T: Most optimizer steps.
            learning_rate: The schedule: learning rate after so many steps done, before the re-warm-up.
        """
        while self.step < T and not self.finished:
            self.train_step(loss, learning_rate(self.step) * self.lr_factor())
            self.step += 1
            self.t += 1
            tolerance = self.settings.inner_tolerance
            if tolerance is not None and self.t % self.settings.inner_check_interval == 0:
                self.inner_checks(tolerance)
            if self.t == self.settings.max_inner_steps or all(module.label for module in self.unfrozen()):
                self.end_of_inner_loop()
        return self

    def train_step(self, loss: Callable[[Weights, int], Tensor], lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        value = loss({module.name: module.W0 + module.update() for module in self.modules}, self.step)
        value.backward()
        self.optimizer.step()
        self.losses.append(value.item())
        assert math.isfinite(self.losses[-1]), "the reference is for runs that stay finite"

    def inner_checks(self, tolerance: float) -> None:
        for module in self.unfrozen():
            module.check_inner(tolerance)
            self.record("checked", module, module.inner_value)

    def end_of_inner_loop(self) -> None:
        for module in self.unfrozen():
            if not module.check_outer():
                module.freeze()
                self.record("frozen", module, module.outer_value)
                continue
            module.merge()
            self.record("merged", module, module.outer_value)
            if module.components == self.settings.max_components:
                module.freeze()
                self.record("frozen", module, module.outer_value)
                continue
            self.reset(module)
            module.reinit(self.p + 1)
        self.finished = not self.unfrozen()
        if self.finished:
            self.record("finished")
        self.p, self.t = self.p + 1, 0
        for module in self.modules:
            module.label = False

    def reset(self, module: ReferenceModule) -> None:
        generator = component_generator(self.settings.component_seed, self.p, module.index, "reset")
        for tensor in (module.a, module.b):
            reset_state(self.optimizer, tensor, self.settings.reset, self.settings.prune_ratio, generator)

    def record(self, kind: str, module: ReferenceModule | None = None, value: float | None = None) -> None:
        rank = module.rank if module else sum(self.ranks().values())
        name = module.name if module else None
        self.events.append((kind, self.step, self.p, self.t, name, value, rank, module.label if module else True))
