"""Growth by evidence: a matrix gets one more component when its best unused direction keeps beating what it trains.

The steepness of a direction D, an m×n matrix, is how fast the loss falls along it on a batch: −⟨G, D⟩ / ‖D‖_F with
G = ∂L/∂W. Every matrix has a few unused directions u vᵀ, made of earlier gradients, and up to S components that train.
The batch at hand has made neither, so what it says of them is out of sample. Of every unused direction:

.. code-block:: text

    z    = −uᵀ G v                                                    its steepness
    own  = mean over its components k of −⟨G, Δ_k⟩ / ‖Δ_k‖_F            Δ_k: how the component moved lately
    all  = the mean of −⟨G, Δ_k⟩ / ‖Δ_k‖_F over the components of all matrices
    heads, if z > 0 and z > κ max(own, all); tails otherwise
    E    = mean over θ in (½, 1) of (2θ)^heads (2(1 − θ))^tails
    E ≥ 1/α   → one more component, along u vᵀ; its heads = tails = 0

While heads are no likelier than tails, the probability that E ever reaches 1/α is at most α, however often one looks
(Ville's inequality for the mixture). So α is the chance of a component that is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from ..errors import ConfigError, NonFiniteError
from ..events import Event, EventKind
from .rule import Matrix

CHECK_INTERVAL = 4
"""Optimizer steps between looks at the evidence. The evidence of every batch in between counts."""

PROBES = 1
"""Unused directions of a matrix that are followed at once."""

FIRST_STEP = 8
"""Optimizer steps of which the gradients make the direction of the first component."""

HELD_OUT_INTERVAL = 9
"""Optimizer steps between batches of held-out examples, once the training examples have all been seen."""

_THETAS = (np.arange(1, 200) / 200) / 2 + 0.5
"""Grid of the mixture: probabilities of heads above one half."""


@dataclass(frozen=True)
class EvidenceSettings:
    """The fields of `AromaConfig` that growth by evidence reads.

    Args:
        significance: α, in (0, 1).
        duel_factor: κ > 0.
        max_components: Number of components at which a matrix gets no more; None for no limit.
    """

    significance: float
    duel_factor: float
    max_components: int | None


class Reading(NamedTuple):
    """What one batch says of all matrices, in module order.

    Args:
        unused: z, the steepness of the unused directions, (matrices, probes); NaN where the batch overflowed.
        moves: Steepness along the moves of the components, (matrices, S); NaN where there is none, or none known.
        pending: Whether a matrix has a component of which no move is known yet, (matrices,).
    """

    unused: np.ndarray
    moves: np.ndarray
    pending: np.ndarray


class EvidenceMatrix(Matrix, Protocol):
    """One growing matrix as the rule sees it, with what the rule notes about it.

    Attributes:
        heads: Batches since its start on which an unused direction won, by direction.
        flips: Batches since its start on which it was judged, likewise.
        log_evidence: The largest log E among its directions.
        steepness: The largest z of the last batch; None before the first.
    """

    heads: list[int]
    flips: list[int]
    log_evidence: float
    steepness: float | None


E = TypeVar("E", bound=EvidenceMatrix)


class EvidenceMatrices(Protocol[E]):
    """All growing matrices of a run, with their unused directions."""

    @property
    def total_rank(self) -> int:
        """Sum of the ranks of all components, those that train included."""

    def active(self) -> list[E]:
        """Return the matrices that still train or may grow, in module order."""

    def all(self) -> Sequence[E]:
        """Return all matrices, in module order."""

    def take_readings(self) -> list[Reading]:
        """Return what the batches since the last call said, in their order."""

    def bear(self, births: Sequence[tuple[E, int]]) -> list[E]:
        """Start a component of each matrix along an unused direction, given by its number.

        Returns:
            The matrices whose oldest component was merged to make room, once for each.
        """

    def note_moves(self) -> None:
        """Note how every component has moved since the last call: that is Δ_k from now on."""


class EvidenceRule(Generic[E]):
    """Growth by evidence; a `GrowthRule`.

    Args:
        settings: α, κ and the limit.
        matrices: The growing matrices.

    Attributes:
        global_step: Optimizer steps taken so far.
        inner_step: Always 0: there are no inner loops.
        outer_number: Always 1.
        max_inner_steps: Always 0.
        births: Components started so far, the first ones included.
        last_birth: Optimizer step of the last one; None before the first.
        tell: Called with events as they happen.
    """

    inner_step = 0
    outer_number = 1
    max_inner_steps = 0
    lr_factor = 1.0
    draw = 1

    def __init__(self, settings: EvidenceSettings, matrices: EvidenceMatrices[E]) -> None:
        self._settings = settings
        self._matrices = matrices
        self.tell: Callable[[Sequence[Event]], None] = lambda events: None
        self.global_step = 0
        self.births = 0
        self.last_birth: int | None = None

    @property
    def finished(self) -> bool:
        """Whether no matrix trains any more."""
        return not self._matrices.active()

    @property
    def status(self) -> list[str]:
        """Where the run stands, for one line of progress."""
        if not self.births:
            return ["no component yet"]
        return [f"{self.births} births, last at step {self.last_birth}"]

    # The rule --------------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Count one optimizer step, and weigh the evidence where that is due.

        Raises:
            NonFiniteError: The steepness of a matrix is NaN or infinite.
        """
        self.global_step += 1
        if self.global_step < FIRST_STEP or self.global_step % CHECK_INTERVAL:
            return []
        readings = self._matrices.take_readings()
        if self.global_step == FIRST_STEP:
            events = self._bear([(matrix, 0) for matrix in self._matrices.active()])
        else:
            events = self._weigh(readings)
        self._matrices.note_moves()
        self.tell(events)
        return events

    def outer_step(self) -> list[Event]:
        """There are no inner loops that could end.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("outer_step: growth='evidence' has no inner loops; a component is born by evidence alone")

    def _weigh(self, readings: Sequence[Reading]) -> list[Event]:
        """Let the batches decide for every matrix; return the births."""
        matrices = self._matrices.all()
        self._require_finite_readings(matrices, readings)
        for reading in readings:
            heads, judged = duel(reading, self._settings.duel_factor)
            for index, matrix in enumerate(matrices):
                steepness = float(reading.unused[index].max())
                matrix.steepness = steepness if math.isfinite(steepness) else matrix.steepness
                for probe, won in enumerate(heads[index]):
                    matrix.heads[probe] += int(won)
                    matrix.flips[probe] += int(judged[index])
        births = []
        threshold = -math.log(self._settings.significance)
        for matrix in self._matrices.active():
            found = [log_evidence(heads, flips) for heads, flips in zip(matrix.heads, matrix.flips, strict=True)]
            matrix.log_evidence = max(found)
            births += [(matrix, probe) for probe, evidence in enumerate(found) if evidence >= threshold]
        return self._bear(births)

    def _bear(self, births: Sequence[tuple[E, int]]) -> list[Event]:
        """Start components along unused directions, and tell of them; the events carry the evidence that decided."""
        births = self._within_limit(births)
        if not births:
            return []
        merged = self._matrices.bear(births)
        events = [self._event("merged", matrix) for matrix in merged]
        events += [self._event("born", matrix) for matrix, _ in births]
        for matrix, probe in births:
            matrix.heads[probe] = matrix.flips[probe] = 0
            matrix.log_evidence = 0.0
        self.births += len(births)
        self.last_birth = self.global_step
        return events

    def _within_limit(self, births: Sequence[tuple[E, int]]) -> list[tuple[E, int]]:
        """Return the births that `max_components` leaves room for."""
        most = self._settings.max_components
        if most is None:
            return [*births]
        room = {matrix.name: most - matrix.component_count for matrix, _ in births}
        kept = []
        for matrix, probe in births:
            room[matrix.name] -= 1
            if room[matrix.name] >= 0:
                kept.append((matrix, probe))
        return kept

    # Errors, events, state -------------------------------------------------------------------------------------------

    def _require_finite_readings(self, matrices: Sequence[E], readings: Sequence[Reading]) -> None:
        """Raise for a matrix of which no batch says anything finite; a single one may overflow in 16 bits."""
        if not readings:
            return
        broken = ~np.array([np.isfinite(reading.unused).all(1) for reading in readings]).any(0)
        if broken.any():
            name = matrices[int(broken.argmax())].name
            raise NonFiniteError(
                f"{name}: the gradient along its unused direction is not finite near optimizer step "
                f"{self.global_step}. Training stopped, and earlier checkpoints are untouched: resume from the last "
                "one with a lower learning rate, or look at the data of the last steps"
            )

    def require_finite(self, matrices: Sequence[Any], norms: Sequence[float], check: str) -> None:
        """Raise for the first matrix whose components are not finite; see `GrowthRule`."""
        for matrix, norm in zip(matrices, norms, strict=True):
            if not math.isfinite(norm):
                raise NonFiniteError(
                    f"{matrix.name}: its components in training are not finite (their norm is {norm}) at the {check} "
                    f"check of optimizer step {self.global_step}. Training stopped, and earlier checkpoints are "
                    "untouched: resume from the last one with a lower learning rate, or look at the data"
                )

    def _event(self, kind: EventKind, matrix: E) -> Event:
        return Event(
            kind=kind,
            step=self.global_step,
            outer_step=self.outer_number,
            inner_step=self.inner_step,
            module=matrix.name,
            value=None,
            rank=matrix.component_count,
            converged=False,
            log_evidence=matrix.log_evidence,
            steepness=matrix.steepness,
        )

    def state(self) -> dict[str, Any]:
        """Return where the rule stands, JSON-able."""
        return {"global_step": self.global_step, "births": self.births, "last_birth": self.last_birth}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state()` returned."""
        self.global_step, self.births, self.last_birth = state["global_step"], state["births"], state["last_birth"]


def duel(reading: Reading, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Return for every matrix which unused directions won the batch, and whether it was judged at all.

    A matrix is not judged while the move of one of its components is unknown, or by a batch that overflowed; none is
    judged before any move is known.

    Args:
        reading: What the batch says of all matrices.
        factor: κ.

    Returns:
        Heads, boolean, (matrices, probes), and judged, boolean, (matrices,).
    """
    known = ~np.isnan(reading.moves)
    if not known.any():
        return np.zeros(reading.unused.shape, dtype=bool), np.zeros(len(reading.unused), dtype=bool)
    values = np.where(known, reading.moves, 0.0)
    everywhere = values.sum() / known.sum()
    counts = known.sum(1)
    own = np.where(counts > 0, values.sum(1) / np.maximum(counts, 1), everywhere)
    rival = np.maximum(own, everywhere)[:, None]
    judged = ~reading.pending & np.isfinite(reading.unused).all(1)
    return judged[:, None] & (reading.unused > 0) & (reading.unused > factor * rival), judged


@lru_cache(maxsize=4096)
def log_evidence(heads: int, flips: int) -> float:
    """Return log E of `heads` among `flips`: the mean over θ in (½, 1) of (2θ)^heads (2(1 − θ))^tails."""
    exponents = heads * np.log(2 * _THETAS) + (flips - heads) * np.log(2 - 2 * _THETAS)
    top = exponents.max()
    return float(top + np.log(np.exp(exponents - top).mean()))


def flips_to_birth(significance: float) -> int:
    """Return how many batches in a row the unused direction must win for a birth at `significance`."""
    threshold = -math.log(significance)
    return next(flips for flips in range(1, 10_000) if log_evidence(flips, flips) >= threshold)
