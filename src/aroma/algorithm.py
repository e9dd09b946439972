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

The rule sees numbers and names only: no tensors, no optimizer, no processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .errors import NonFiniteError
from .events import Event, EventKind

if TYPE_CHECKING:
    from .matrices import GrowingMatrices, GrowingMatrix
    from .tuner import AromaConfig


class PaperRule:
    """Algorithm 1.

    Attributes:
        config: The tolerances and lengths.
        matrices: The growing matrices. Those that came with components from an earlier run go on from them.
        global_step: Optimizer steps taken so far.
        inner_step: t, optimizer steps taken in this inner loop.
        outer_number: p, number of the current outer step.
        max_inner_steps: T_in.
        earlier_outer_steps: Outer steps of earlier runs of a loaded adapter.
    """

    _COUNTERS = ("global_step", "inner_step", "outer_number", "max_inner_steps", "earlier_outer_steps")

    def __init__(self, config: AromaConfig, max_inner_steps: int, matrices: GrowingMatrices) -> None:
        self.config = config
        self.matrices = matrices
        self._listeners: list[Callable[[Event], None]] = []
        self.max_inner_steps = max_inner_steps
        self.global_step = 0
        self.inner_step = 0
        self.outer_number = 1
        # A continued adapter must not draw again the directions it has.
        self.earlier_outer_steps = max(matrix.component_count for matrix in matrices.all())
        for matrix in matrices.active():
            if self._is_full(matrix):
                matrices.freeze(matrix, loaded=True)
        if self.earlier_outer_steps:
            matrices.start_unmoved(self.draw)

    @property
    def finished(self) -> bool:
        """Whether every matrix is frozen."""
        return not self.matrices.active()

    @property
    def lr_factor(self) -> float:
        """Factor on the scheduled learning rate, in [0, 1], for the optimizer step about to be taken (Figure 2).

        The first inner loop has the schedule's own warm-up and is left alone. Of a later one the first step is taken
        with factor 0.
        """
        climb = self.config.rewarmup_steps
        if self.finished or self.outer_number == 1 or climb == 0:
            return 1.0
        return min(1.0, self.inner_step / climb)

    def explanation(self) -> str:
        """Return in one sentence why the matrices grow no more, or how many still train; the device is not read."""
        matrices = self.matrices.all()
        frozen = [matrix for matrix in matrices if matrix.is_frozen]
        full = sum(map(self._is_full, frozen))
        reasons = {
            "found the next component too small": len(frozen) - full,
            f"have max_components={self.config.max_components}": full,
        }
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        parts = [f"{len(frozen)} of {len(matrices)} matrices have finished" + (f" ({why})" if why else "")]
        if len(frozen) < len(matrices):
            parts.append(f"{len(matrices) - len(frozen)} still train")
        return "; ".join(parts)

    @property
    def draw(self) -> int:
        """Number of the current outer step, counted over all runs of the adapter."""
        return self.earlier_outer_steps + self.outer_number

    def subscribe(self, listener: Callable[[Event], None]) -> None:
        """Call `listener` with every event from now on, before the next inner loop begins."""
        self._listeners.append(listener)

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
        if self.inner_step >= self.max_inner_steps or all(matrix.converged for matrix in self.matrices.active()):
            events += self.outer_step()
        return events

    def _check_is_due(self) -> bool:
        config = self.config
        return config.inner_tolerance is not None and self.inner_step % config.inner_check_interval == 0

    def _inner_check(self) -> list[Event]:
        """Label the matrices whose component has stopped growing: equation (5)."""
        tolerance = self.config.inner_tolerance
        assert tolerance is not None, "no inner check is due without a tolerance"
        active = self.matrices.active()
        norms, values = self.matrices.inner_values(active)
        self._require_finite(active, norms, "inner")
        for matrix, value in zip(active, values, strict=True):
            matrix.inner_value = value
            matrix.converged = matrix.converged or (value is not None and value < tolerance)
        events = [self._event("checked", matrix, matrix.inner_value) for matrix in active]
        self._tell(events)
        return events

    def outer_step(self) -> list[Event]:
        """End the inner loop now: keep or drop every component by equation (6), and start the next inner loop.

        Returns:
            The events of this outer step.

        Raises:
            NonFiniteError: A component is NaN or infinite.
        """
        active = self.matrices.active()
        if not active:
            return []
        norms, values = self.matrices.outer_values(active)
        self._require_finite(active, norms, "outer")
        for matrix, value in zip(active, values, strict=True):
            matrix.outer_value = value
        kept = [matrix for matrix in active if self._keeps_component(matrix)]
        self.matrices.merge(kept)
        events = [event for matrix in active for event in self._go_on(matrix, matrix in kept)]
        if self.finished:
            events.append(self._event("finished"))
        self._tell(events)
        self._start_inner_loop()
        return events

    def _keeps_component(self, matrix: GrowingMatrix) -> bool:
        """Whether (6) is not met, or may not decide."""
        tolerance, value = self.config.outer_tolerance, matrix.outer_value
        if tolerance is None or value is None or matrix.component_count < self.config.min_components:
            return True
        return value >= tolerance

    def _go_on(self, matrix: GrowingMatrix, kept: bool) -> list[Event]:
        """Start the next component of a matrix, or freeze it."""
        events = [self._event("merged", matrix, matrix.outer_value)] if kept else []
        if kept and not self._is_full(matrix):
            self.matrices.renew(matrix, self.draw)
            return events
        self.matrices.freeze(matrix)
        return [*events, self._event("frozen", matrix, matrix.outer_value)]

    def _is_full(self, matrix: GrowingMatrix) -> bool:
        """Whether it has `max_components` or more, as a loaded adapter may."""
        most = self.config.max_components
        return most is not None and matrix.component_count >= most

    def _start_inner_loop(self) -> None:
        self.outer_number += 1
        self.inner_step = 0
        self.matrices.forget_check()
        for matrix in self.matrices.all():
            matrix.converged = False

    # Errors, events, state -------------------------------------------------------------------------------------------

    def require_finite(self) -> None:
        """Check every component in training, as a check would; all ranks call this before a checkpoint is written.

        Raises:
            NonFiniteError: A component is NaN or infinite.
        """
        active = self.matrices.active()
        self._require_finite(active, self.matrices.norms(active), "save")

    def _require_finite(self, matrices: Sequence[GrowingMatrix], norms: Sequence[float], check: str) -> None:
        """Raise for the first component whose norm is not finite, naming matrix, check and step."""
        for matrix, norm in zip(matrices, norms, strict=True):
            if not math.isfinite(norm):
                raise NonFiniteError(
                    f"{matrix.name}: the component in training is not finite (the norm is {norm}) at the {check} "
                    f"check of optimizer step {self.global_step} (outer step {self.outer_number}, inner step "
                    f"{self.inner_step}). Training stopped, and earlier checkpoints are untouched: resume from the "
                    "last one with a lower learning rate, or look at the data of the last "
                    f"{self.config.inner_check_interval} steps"
                )

    def counters(self) -> dict[str, Any]:
        """Return where the algorithm stands, JSON-able."""
        return {name: getattr(self, name) for name in self._COUNTERS}

    def set_counters(self, state: dict[str, Any]) -> None:
        """Go on from what `counters()` returned."""
        for name in self._COUNTERS:
            setattr(self, name, state[name])

    def _tell(self, events: Sequence[Event]) -> None:
        for event in events:
            for listener in self._listeners:
                listener(event)

    def _event(self, kind: EventKind, matrix: GrowingMatrix | None = None, value: float | None = None) -> Event:
        return Event(
            kind=kind,
            step=self.global_step,
            outer_step=self.outer_number,
            inner_step=self.inner_step,
            module=matrix.name if matrix else None,
            value=value,
            rank=matrix.rank if matrix else self.matrices.known_rank,
            converged=matrix.converged if matrix else True,
        )
