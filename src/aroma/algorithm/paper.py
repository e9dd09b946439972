"""Algorithm 1 of the paper: Check & Merge & Reinit & Reset (section 3.2).

All matrices run in lock-step. An inner loop trains one component of every unfrozen matrix. When it ends, each unfrozen
matrix either keeps its component and starts the next, or drops it and freezes.

.. code-block:: text

    p ← 1, t ← 0
    after every optimizer step:
        t ← t + 1
        every ΔT_in steps, of each unfrozen matrix:                                                    (inner check)
            (‖b_t a_t‖ − ‖b_{t−ΔT} a_{t−ΔT}‖) / ‖b_{t−ΔT} a_{t−ΔT}‖ < ε_in   → label it             (5)
        if all unfrozen matrices are labelled, or t = T_in, of each unfrozen matrix:                  (outer check)
            ‖s b a‖ / ‖W0 + s B A‖ < ε_out                                     → drop (b, a), freeze    (6)
            otherwise merge (b, a) into (B, A), reset its optimizer state, start a new (b, a)
            p ← p + 1, t ← 0, no labels
    the run ends when every matrix is frozen
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from ..events import Event, EventKind
from .rule import M, Matrices, Matrix, require_finite


@dataclass(frozen=True)
class PaperSettings:
    """The fields of `AromaConfig` that Algorithm 1 reads.

    Args:
        inner_tolerance: ε_in; None for no inner checks.
        inner_check_interval: ΔT_in, in optimizer steps.
        max_inner_steps: T_in, in optimizer steps.
        outer_tolerance: ε_out; None to keep every component.
        min_components: Number of components that a matrix keeps whatever (6) says.
        max_components: Number of components at which a matrix freezes; None for no limit.
        rewarmup_steps: Optimizer steps in which the learning rate climbs back after an outer step.
    """

    inner_tolerance: float | None
    inner_check_interval: int
    max_inner_steps: int
    outer_tolerance: float | None
    min_components: int
    max_components: int | None
    rewarmup_steps: int


class PaperRule(Generic[M]):
    """Algorithm 1; a `GrowthRule`.

    Args:
        settings: The tolerances and lengths.
        matrices: The growing matrices. Those that came with components from an earlier run go on from them.

    Attributes:
        global_step: Optimizer steps taken so far.
        inner_step: t, optimizer steps taken in this inner loop.
        outer_number: p, number of the current outer step.
        max_inner_steps: T_in.
        tell: Called with events as they happen.
    """

    questions = 0
    is_in_trial = False

    def __init__(self, settings: PaperSettings, matrices: Matrices[M]) -> None:
        self._settings = settings
        self._matrices = matrices
        self.tell: Callable[[Sequence[Event]], None] = lambda events: None
        self.max_inner_steps = settings.max_inner_steps
        self.global_step = 0
        self.inner_step = 0
        self.outer_number = 1
        # A continued adapter must not draw again the directions it has.
        self._earlier_outer_steps = max(matrix.component_count for matrix in matrices.all())
        for matrix in matrices.active():
            if self._is_full(matrix):
                matrices.freeze(matrix, loaded=True)
        if self._earlier_outer_steps:
            matrices.start_unmoved(self.draw)

    @property
    def finished(self) -> bool:
        """Whether every matrix is frozen."""
        return not self._matrices.active()

    @property
    def lr_factor(self) -> float:
        """Factor of the re-warm-up for the optimizer step about to be taken (Figure 2)."""
        return (
            1.0
            if self.finished
            else rewarmup_factor(self.outer_number, self.inner_step, self._settings.rewarmup_steps)
        )

    @property
    def status(self) -> list[str]:
        """Where the inner loop stands, for one line of progress."""
        active, every = len(self._matrices.active()), len(self._matrices.all())
        return [
            f"inner {self.inner_step}/{self.max_inner_steps}",
            f"active {active}/{every}",
            f"finished rank {self._matrices.known_rank}",
        ]

    @property
    def explanation(self) -> str:
        """Why the matrices grow no more, or what is open, in one sentence without a full stop."""
        matrices = self._matrices.all()
        frozen = [matrix for matrix in matrices if matrix.is_frozen]
        full = sum(map(self._is_full, frozen))
        reasons = {
            "found the next component too small": len(frozen) - full,
            f"have max_components={self._settings.max_components}": full,
        }
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        parts = [f"{len(frozen)} of {len(matrices)} matrices have finished" + (f" ({why})" if why else "")]
        if len(frozen) < len(matrices):
            parts.append(f"{len(matrices) - len(frozen)} still train")
        return "; ".join(parts)

    @property
    def draw(self) -> int:
        """Number of the current outer step, counted over all runs of the adapter."""
        return self._earlier_outer_steps + self.outer_number

    # The algorithm ---------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Count one optimizer step; check, and end the inner loop, where that is due.

        Raises:
            NonFiniteError: A component is NaN or infinite at a check.
        """
        self.global_step += 1
        if self.finished:
            return []
        self.inner_step += 1
        events = self._inner_check() if self._check_is_due() else []
        if self.inner_step >= self.max_inner_steps or all(matrix.converged for matrix in self._matrices.active()):
            events += self.outer_step()
        return events

    def _check_is_due(self) -> bool:
        settings = self._settings
        return settings.inner_tolerance is not None and self.inner_step % settings.inner_check_interval == 0

    def _inner_check(self) -> list[Event]:
        """Label the matrices whose component has stopped growing: equation (5)."""
        tolerance = self._settings.inner_tolerance
        assert tolerance is not None, "no inner check is due without a tolerance"
        active = self._matrices.active()
        norms, values = self._matrices.inner_values(active)
        self.require_finite(active, norms, "inner")
        for matrix, value in zip(active, values, strict=True):
            matrix.inner_value = value
            matrix.converged = matrix.converged or (value is not None and value < tolerance)
        events = [self._event("checked", matrix, matrix.inner_value) for matrix in active]
        self.tell(events)
        return events

    def hold_out(self, batches: int | None, *, decide: bool) -> None:
        """Nothing is decided by examples."""

    def held_out_duels(self, step: int) -> Sequence[int]:
        """Return the numbers of the held-out batches to be asked: none."""
        return ()

    def duels(self, first_pass: int | None, *, held_out: bool) -> int:
        """Return how many batches may bear components by evidence: none."""
        return 0

    def held_out_questions(self) -> Sequence[int]:
        """Return the numbers of the held-out batches to be asked: none."""
        return ()

    def answer(self) -> list[Event]:
        """Nothing was asked."""
        return []

    def give_up(self) -> None:
        """Nothing was done."""

    def skip_step(self) -> None:
        """Nothing depends on how many steps are left."""

    def outer_step(self) -> list[Event]:
        """End the inner loop: keep or drop every component by equation (6), and start the next inner loop.

        Raises:
            NonFiniteError: A component is NaN or infinite.
        """
        active = self._matrices.active()
        if not active:
            return []
        norms, values = self._matrices.outer_values(active)
        self.require_finite(active, norms, "outer")
        for matrix, value in zip(active, values, strict=True):
            matrix.outer_value = value
        kept = [matrix for matrix in active if self._keeps_component(matrix)]
        self._matrices.merge(kept)
        events = [event for matrix in active for event in self._go_on(matrix, matrix in kept)]
        if self.finished:
            events.append(self._event("finished"))
        self.tell(events)
        self._start_inner_loop()
        return events

    def _keeps_component(self, matrix: M) -> bool:
        """Whether (6) is not met, or may not decide."""
        tolerance, value = self._settings.outer_tolerance, matrix.outer_value
        if tolerance is None or value is None or matrix.component_count < self._settings.min_components:
            return True
        return value >= tolerance

    def _go_on(self, matrix: M, kept: bool) -> list[Event]:
        """Start the next component of a matrix, or freeze it."""
        events = [self._event("merged", matrix, matrix.outer_value)] if kept else []
        if kept and not self._is_full(matrix):
            self._matrices.renew(matrix, self.draw)
            return events
        self._matrices.freeze(matrix)
        return [*events, self._event("frozen", matrix, matrix.outer_value)]

    def _is_full(self, matrix: Matrix) -> bool:
        """Whether it has `max_components` or more, as a loaded adapter may."""
        most = self._settings.max_components
        return most is not None and matrix.component_count >= most

    def _start_inner_loop(self) -> None:
        self.outer_number += 1
        self.inner_step = 0
        self._matrices.forget_check()
        for matrix in self._matrices.all():
            matrix.converged = False

    # Errors, events, state -------------------------------------------------------------------------------------------

    def require_finite(self, matrices: Sequence[Matrix], norms: Sequence[float], check: str) -> None:
        """Raise for the first component whose norm is not finite.

        Args:
            matrices: The matrices.
            norms: ‖b a‖_F of their components in training.
            check: Name of the check, for the error.

        Raises:
            NonFiniteError: Naming matrix, check and step.
        """
        when = (
            f"{check} check of optimizer step {self.global_step} (outer step {self.outer_number}, inner step "
            f"{self.inner_step})"
        )
        require_finite(matrices, norms, "the component in training is", when, self._settings.inner_check_interval)

    def state(self) -> dict[str, Any]:
        """Return where the algorithm stands, JSON-able."""
        return {
            "global_step": self.global_step,
            "inner_step": self.inner_step,
            "outer_number": self.outer_number,
            "max_inner_steps": self.max_inner_steps,
            "earlier_outer_steps": self._earlier_outer_steps,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state()` returned."""
        for name in ("global_step", "inner_step", "outer_number", "max_inner_steps"):
            setattr(self, name, state[name])
        self._earlier_outer_steps = state["earlier_outer_steps"]

    def _event(self, kind: EventKind, matrix: M | None = None, value: float | None = None) -> Event:
        return Event(
            kind=kind,
            step=self.global_step,
            outer_step=self.outer_number,
            inner_step=self.inner_step,
            module=matrix.name if matrix else None,
            value=value,
            rank=matrix.rank if matrix else self._matrices.known_rank,
            converged=matrix.converged if matrix else True,
        )


def rewarmup_factor(outer_step: int, inner_step: int, rewarmup_steps: int) -> float:
    """Return the factor on the scheduled learning rate, in [0, 1], for the step about to be taken (Figure 2).

    The first inner loop has the schedule's own warm-up and is left alone.

    Args:
        outer_step: Number p ≥ 1 of the current outer step.
        inner_step: Optimizer steps already taken in this inner loop; the first one is taken with factor 0.
        rewarmup_steps: Length of the climb in optimizer steps; 0 for none.
    """
    if outer_step == 1 or rewarmup_steps == 0:
        return 1.0
    return min(1.0, inner_step / rewarmup_steps)
