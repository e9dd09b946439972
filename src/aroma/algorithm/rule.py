"""What a growth rule is, and what it may ask of the matrices that grow.

A rule decides when a component is born, merged or dropped, when a matrix freezes, and when the run is over. It sees
numbers and names only: no tensors, no optimizer, no processes. The controller calls it after every optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from ..errors import NonFiniteError
from ..events import Event
from .duels import Reading


class Matrix(Protocol):
    """One growing matrix as a rule sees it.

    Attributes:
        name: Its name in the base model.
        converged: Whether it bears the label "inner-converged".
        inner_value: Left side of (5) at its last inner check; None where undefined.
        outer_value: Left side of (6) at its last outer check; None before the first.
    """

    name: str
    converged: bool
    inner_value: float | None
    outer_value: float | None

    @property
    def rank(self) -> int:
        """Rank R of its finished components."""

    @property
    def component_count(self) -> int:
        """Number of its finished components."""

    @property
    def is_frozen(self) -> bool:
        """Whether it has stopped growing, for good."""


M = TypeVar("M", bound=Matrix)


class Matrices(Protocol[M]):
    """All growing matrices of a run: measured together, changed one by one.

    Measurements are the same on every process that trains.
    """

    @property
    def known_rank(self) -> int:
        """Sum of the ranks of all finished components, which no device is asked for."""

    def active(self) -> list[M]:
        """Return the matrices that still train, in module order."""

    def all(self) -> Sequence[M]:
        """Return all matrices, in module order."""

    def inner_values(self, matrices: Sequence[M]) -> tuple[list[float], list[float | None]]:
        """Return ‖b a‖_F of the components in training, and the left side of (5) since the previous call.

        The value is None where the earlier norm was 0, and at the first call since `forget_check`.
        """

    def outer_values(self, matrices: Sequence[M]) -> tuple[list[float], list[float | None]]:
        """Return ‖b a‖_F of the components in training, and the left side of (6); None where W0 + s B A is zero."""

    def forget_check(self) -> None:
        """Forget the previous inner check: the components are new."""

    def merge(self, matrices: Sequence[M]) -> None:
        """Merge: the components in training become finished ones."""

    def renew(self, matrix: M, draw: int) -> None:
        """Reset and Reinit: forget the optimizer's state of the pair, and start a fresh component.

        Args:
            matrix: The matrix, just merged.
            draw: Number of the outer step that ends. It seeds what is random, with the place of the matrix.
        """

    def start_unmoved(self, draw: int) -> None:
        """Start a fresh component of outer step `draw` wherever the one in training has not moved."""

    def freeze(self, matrix: M, *, loaded: bool = False) -> None:
        """Drop the component in training, and train this matrix no more.

        Args:
            matrix: The matrix.
            loaded: Whether it was loaded so, so that the optimizer has nothing of it to forget yet.
        """


class EvidenceMatrix(Matrix, Protocol):
    """One growing matrix as the rule sees it, with what the rule notes about it.

    Attributes:
        heads: Batches since its start on which an unused direction won, by direction.
        flips: Batches since its start on which it was judged, likewise.
        log_evidence: log E.
        steepness: The largest z of the last batch; None before the first.
    """

    heads: list[int]
    flips: list[int]
    log_evidence: float
    steepness: float | None


E = TypeVar("E", bound=EvidenceMatrix)


class EvidenceMatrices(Protocol[E]):
    """All growing matrices of a run, with their unused directions.

    Attributes:
        memory: β, with which the directions follow the gradient; the rule sets it.
    """

    memory: float

    @property
    def known_rank(self) -> int:
        """Sum of the ranks of all components, those that train included."""

    def active(self) -> list[E]:
        """Return the matrices that still train or may grow, in module order."""

    def all(self) -> Sequence[E]:
        """Return all matrices, in module order."""

    def norms(self, matrices: Sequence[E]) -> list[float]:
        """Return the norm of what trains of each of `matrices`."""

    def take_readings(self) -> list[Reading]:
        """Return what the batches since the last call said, in their order."""

    def bear(self, births: Sequence[tuple[E, int]]) -> list[E]:
        """Start a component of each matrix along an unused direction, given by its number.

        Returns:
            The matrices whose oldest component was merged to make room, once for each.
        """

    def stop_following(self) -> None:
        """Follow no unused direction for now."""

    def follow_anew(self) -> None:
        """Follow unused directions again, from random ones on."""

    def set_aside(self) -> None:
        """Keep what is followed for `put_back`."""

    def take_apart(self) -> np.ndarray:
        """Take the updates apart into singular directions; return σ_k, (matrices, S), NaN where there is none."""

    def ask_at(self, strength: float) -> None:
        """From now on ask about these directions with all updates at `strength`."""

    def take_credits(self) -> list[np.ndarray]:
        """Return credit_k by batch since the last call, (matrices, S).

        NaN where there is no direction, infinite where the batch overflowed.
        """

    def keep(self, kept: np.ndarray, share: float = 1.0) -> None:
        """Keep `share` of these singular directions, (matrices, S), and ask about the others at strength 0."""

    def halve(self, halved: np.ndarray) -> None:
        """Put these directions, (matrices, S), at half strength, and ask about all."""

    def drop(self, dropped: np.ndarray) -> None:
        """Take the `dropped` directions away, (matrices, S); matrices without any are as they were before `halve`."""

    def put_back(self) -> None:
        """Let all matrices, and what is followed, be as before `set_aside`; one process may call alone."""

    def follow_unused(self, taken: Sequence[tuple[E, int]]) -> None:
        """Follow unused directions: those that were dropped and are not among the `taken`, and random ones."""

    def note_moves(self) -> None:
        """Note how every component has moved since the last call: that is Δ_k from now on."""

    def shorten(self, share: float) -> None:
        """Multiply what trains by `share`."""


class GrowthRule(Protocol):
    """Decides how all matrices of a run grow.

    Attributes:
        global_step: Optimizer steps taken so far.
        inner_step: Optimizer steps taken since the last outer step, t.
        outer_number: Number p of the current outer step, counted from 1.
        max_inner_steps: Most optimizer steps of one inner loop, T_in.
        tell: Called with events as they happen, while matrices and counts are still those that they tell of.
    """

    global_step: int
    inner_step: int
    outer_number: int
    max_inner_steps: int
    tell: Callable[[Sequence[Event]], None]

    def hold_out(self, batches: int | None, *, decide: bool) -> None:
        """Note what is held out.

        Args:
            batches: How many batches of held-out examples have no example in common; None if nothing is held out, or
                nobody knows.
            decide: Whether held-out examples decide.
        """

    @property
    def questions(self) -> int:
        """Number of batches that are asked at the end of a trial; 0 where there is none."""

    @property
    def finished(self) -> bool:
        """Whether every matrix is frozen, so that the run may stop."""

    @property
    def lr_factor(self) -> float:
        """Factor on the scheduled learning rate for the step about to be taken, in [0, 1]."""

    @property
    def status(self) -> list[str]:
        """Where the rule stands, for one line of progress."""

    @property
    def explanation(self) -> str:
        """Why the matrices grow no more, or what is open, in one sentence without a full stop."""

    @property
    def is_in_trial(self) -> bool:
        """Whether matrices still train components of which it is not decided whether they stay."""

    @property
    def draw(self) -> int:
        """Number that seeds what the components in training drew when they began."""

    def step(self) -> list[Event]:
        """Count one optimizer step, and act on the matrices where that is due; return what happened."""

    def held_out_duels(self, step: int) -> Sequence[int]:
        """Return the numbers of the held-out batches to be asked now, `step` optimizer steps after the first pass."""

    def duels(self, first_pass: int | None, *, held_out: bool) -> int:
        """Return how many batches may bear components after the trial; 0 where there is none.

        Args:
            first_pass: Optimizer steps of the first pass; None if no example comes twice.
            held_out: Whether held-out examples decide after it.
        """

    def held_out_questions(self) -> Sequence[int]:
        """Return the numbers of the held-out batches to be asked before the next step; then call `answer`."""

    def answer(self) -> list[Event]:
        """Act on what they answered, within the optimizer step that was counted last; return what happened."""

    def give_up(self) -> None:
        """Undo what was done for held-out batches alone, after an error; one process may call alone."""

    def skip_step(self) -> None:
        """Note that a planned optimizer step was not taken."""

    def outer_step(self) -> list[Event]:
        """End the inner loop now; return what happened."""

    def require_finite(self, matrices: Sequence[Any], norms: Sequence[float], check: str) -> None:
        """Raise NonFiniteError for the first norm that is NaN or infinite, naming its matrix and the check."""

    def state(self) -> dict[str, Any]:
        """Return where the rule stands, JSON-able."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state()` returned."""


def require_finite(matrices: Sequence[Matrix], norms: Sequence[float], what: str, when: str, steps: int) -> None:
    """Raise for the first matrix of which what trains is not finite.

    Args:
        matrices: The matrices.
        norms: ‖b a‖_F of what trains of each.
        what: What that is, with its verb, for the error.
        when: Check and step, for the error.
        steps: Optimizer steps since the check before.

    Raises:
        NonFiniteError: Naming the matrix.
    """
    data = f"the data of the last {steps} steps"
    for matrix, norm in zip(matrices, norms, strict=True):
        if not math.isfinite(norm):
            raise not_finite(f"{matrix.name}: {what} not finite (the norm is {norm}) at the {when}", data)


def not_finite(what: str, data: str) -> NonFiniteError:
    """Return the error of a run that ends because `what` is so; `data` names the examples that may be the cause."""
    return NonFiniteError(
        f"{what}. Training stopped, and earlier checkpoints are untouched: resume from the last one with a lower "
        f"learning rate, or look at {data}"
    )
