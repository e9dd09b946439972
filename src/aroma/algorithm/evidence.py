"""Growth by evidence: a direction stays if it saves loss on unseen examples, and comes if it promises more.

W0 + s Σ_k b_k a_k is trained, G = ∂L/∂W. Every batch is asked before it is trained on, or is never trained on, so what
it says is out of sample. `docs/method.md` derives all of this; `budget.py` says how many batches are asked, and
`questions.py` and `duels.py` decide by the answers.

**The trial.** Every matrix trains eight components, or as many as it has slots. Then batches say what the singular
directions σ_k u_k v_kᵀ of its update save, with all updates at half strength:

    credit_k = −s σ_k u_kᵀ G_½ v_k    the midpoint rule for the loss that the direction saves

Where the updates swing, the trial goes on, or half of every update is judged; where nothing is known, what is
undecided stays. What was dropped is asked about again at strength 0, and begins anew from b = 0 where the loss falls
along it.

**Growth.** From then on every matrix has a few unused directions u vᵀ, made of earlier gradients. On every batch each
of them duels with what trains, by how fast the loss falls along them:

    z    = −uᵀ G v
    own  = mean over the matrix's components k of −⟨G, Δ_k⟩ / ‖Δ_k‖_F     Δ_k: how the component moved lately
    heads, if z > 0 and z > κ max(own, its mean over all matrices); tails otherwise
    E    = mean over the matrix's unused directions, and over θ in (½, 1), of (2θ)^heads (2(1 − θ))^tails
    E ≥ 1/α   → one more component, along the u vᵀ that won most; its heads = tails = 0

**The squeeze.** Where growth ends, the smallest directions go, as many as together save next to nothing at half
strength. In a long run what is undecided stays, too. If all updates cost loss early in growth, as noise does that was
learnt by heart, only what saves some stays then; else very small ones go, if these do. If the large ones do in the
end, what trains is shortened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Generic

import numpy as np

from ..errors import ConfigError
from ..events import Event, EventKind
from .budget import HELD_OUT_INTERVAL, Budget, Stage
from .duels import Reading, directions_that_convince, duel, log_evidence, log_mean
from .questions import (
    SMALL_SHARE,
    SMALL_SHARE_EARLY,
    candidates,
    directions_to_drop,
    directions_to_keep,
    keep_one_if_undecided,
    saves_loss,
    saves_together,
    smallest_directions,
    strength_of_least_loss,
    undecided_directions,
)
from .rule import E, EvidenceMatrices, EvidenceMatrix, not_finite, require_finite

CHECK_INTERVAL = 4
"""Optimizer steps between looks at the evidence. The evidence of every batch in between counts."""

FIRST_STEP = 8
"""Optimizer steps of which the gradients make the directions of the first components."""

UNUSED = 4
"""Unused directions of a matrix that duel at once."""

DOUBLINGS = 2
"""How often the trial is doubled at most, up to half of the run, while its updates point downhill and cost loss."""

TOLD_INTERVAL = 40
"""Optimizer steps between checks that what trains is finite; at most so many between events that tell of the evidence
where nothing was decided."""

TOLD_TIMES = 20
"""How often the evidence is told of in a short run, so that a picture shows how it went."""

EARLY = Fraction(2, 5)
"""Share of growth after which a long run is asked whether all updates cost loss."""


def is_in_trial(phase: str) -> bool:
    """Return whether it is not decided yet in a phase of `EvidenceRule` which components of the trial stay."""
    return phase in ("start", "trial", "questions")


@dataclass(frozen=True)
class EvidenceSettings:
    """The fields of `AromaConfig` that growth by evidence reads.

    Args:
        significance: α, in (0, 1).
        duel_factor: κ > 0.
        trial_components: Components of a matrix in the trial.
        trial_steps: Optimizer steps of the trial, those of the first directions included.
        memory: β, in [0, 1): what an average of gradients keeps of itself at each step; None: see `memory_with`.
        last_step: Optimizer step after which nothing is born, and at which nothing is where small components are asked
            about; one at which the evidence is looked at. What comes later hardly learns.
        max_components: Number of components at which a matrix gets no more; None for no limit.
        total_steps: Planned optimizer steps.
    """

    significance: float
    duel_factor: float
    trial_components: int
    trial_steps: int
    memory: float | None
    last_step: int
    max_components: int | None
    total_steps: int

    @property
    def told_interval(self) -> int:
        """Optimizer steps between events that tell of the evidence, a multiple of those between looks at it."""
        looks = self.last_step // (TOLD_TIMES * CHECK_INTERVAL)
        return min(max(looks, 1) * CHECK_INTERVAL, TOLD_INTERVAL)

    def memory_with(self, held_out_batches: int | None) -> float:
        """Return β: a direction averages as many gradients as the trial has steps, or fewer where little is held out.

        When the same examples duel again, on average at most α of it is to be left. Else they would vote on one
        direction several times, and a direction that suits them by chance would convince.

        Args:
            held_out_batches: How many batches of held-out examples have no example in common; None if nothing is held
                out, or it is not known.
        """
        if self.memory is not None:
            return self.memory
        longest = 1 - 1 / self.trial_steps
        if held_out_batches is None:
            return longest
        steps_to_next_time = HELD_OUT_INTERVAL * held_out_batches
        return min(longest, math.exp(math.log(self.significance) / steps_to_next_time))


class EvidenceRule(Generic[E]):
    """Growth by evidence; a `GrowthRule`.

    Args:
        settings: α, κ and the lengths.
        matrices: The growing matrices.

    Attributes:
        global_step: Optimizer steps taken so far.
        phase: `"start"`, `"trial"`, `"questions"`, `"growth"`, `"squeeze"` or `"rest"`.
        inner_step: Always 0: there are no inner loops.
        outer_number: Always 1.
        max_inner_steps: Always 0.
        doublings: How often the trial was doubled so far.
        births: Components started by evidence so far.
        last_birth: Optimizer step of the last one; None before the first.
        squeezed: Components that went in squeezes.
        strength: Share of what trains that is left when the run ends; 1 if nothing overshoots.
        is_anything_known: Whether all updates together save loss or cost some, for all that the trial's questions say.
        tell: Called with events as they happen.
    """

    inner_step = 0
    outer_number = 1
    max_inner_steps = 0
    draw = 1

    def __init__(self, settings: EvidenceSettings, matrices: EvidenceMatrices[E]) -> None:
        self._settings = settings
        self._matrices = matrices
        self._stage: Stage = "opening"
        self._share = 1.0  # of the updates that is judged
        self._credits: list[np.ndarray] = []
        self._base_credits: list[np.ndarray] = []
        self._overflows = 0
        self._skipped = 0
        self._is_shortened = False
        self._budget = Budget(settings.trial_steps, settings.last_step)
        self._sizes, self._of_large = np.empty((0, 0)), np.empty((0, 0, 0))  # at full strength
        self._small = self._dropped = np.empty((0, 0), dtype=bool)
        self._lost: list[float] = []  # by matrix, with what is dropped
        self._saved: list[float] = []  # by what stays of every matrix
        self.tell: Callable[[Sequence[Event]], None] = lambda events: None
        self.global_step = 0
        self.phase = "start"
        self.doublings = 0
        self.births = 0
        self.last_birth: int | None = None
        self.squeezed = 0
        self.strength = 1.0
        self.is_anything_known = True
        self.hold_out(None, decide=False)

    def hold_out(self, batches: int | None, *, decide: bool) -> None:
        """Note what is held out; see `GrowthRule`."""
        self._budget.held_out_batches, self._budget.holds_out = batches, decide
        self._matrices.memory = self._settings.memory_with(batches)

    @property
    def questions(self) -> int:
        """Batches that are asked at the end of the trial, without those that open it."""
        return self._budget.questions

    @property
    def finished(self) -> bool:
        """Whether no matrix trains any more."""
        return not self._matrices.active()

    @property
    def is_in_trial(self) -> bool:
        """Whether it is not decided yet which components of the trial stay."""
        return is_in_trial(self.phase)

    @property
    def lr_factor(self) -> float:
        """0 while batches are asked, which are not trained on; else 1."""
        return 0.0 if self.phase == "questions" else 1.0

    @property
    def status(self) -> list[str]:
        """Where the run stands, for one line of progress; what matters less comes last, where a terminal cuts it."""
        components = f"{self._matrices.known_rank} components"
        if self.phase in ("start", "trial"):
            return [f"trial {self.global_step}/{self._trial_steps}", components]
        if self.phase == "questions":
            stage = "whole" if self._stage == "opening" else self._stage  # what opens them counts among all
            return [f"asking {len(self._answers)}/{self._budget.count(stage)}", components]
        last = "" if self.last_birth is None else f", last at step {self.last_birth}"
        return [components, f"births {self.births}{last}"]

    @property
    def explanation(self) -> str:
        """Why the matrices grow no more, or what is open, in one sentence without a full stop."""
        if self.is_in_trial:
            return f"the trial is not over at step {self.global_step}: which components stay is not decided"
        most = self._settings.max_components
        matrices = self._matrices.active()
        full = [matrix for matrix in matrices if most is not None and matrix.component_count >= most]
        hopeful = [matrix for matrix in matrices if matrix.log_evidence > 0 and matrix not in full]
        none = len(matrices) - len(full) - len(hopeful)
        parts = [f"no evidence for another component in {none} of {len(matrices)} matrices"]
        if hopeful:
            nearest = max(hopeful, key=lambda matrix: matrix.log_evidence)
            needed = f"{math.exp(nearest.log_evidence):.1f} of {1 / self._settings.significance:.1f}"
            parts.append(f"some in {len(hopeful)}, the most in {nearest.name} (E = {needed})")
        if full:
            parts.append(f"max_components={most} is reached in {len(full)}")
        if not self._matrices.known_rank:
            nothing = "no matrix has a component, as none saves loss on unseen examples"
            parts = [f"{nothing}: there is nothing to learn, or the learning rate is too high", *parts]
        last = "no birth since the trial" if self.last_birth is None else f"last birth at step {self.last_birth}"
        parts.append(last)
        if not self.is_anything_known:
            parts.append("nothing was known yet when the trial ended, so what cost no loss stayed")
        if self.squeezed:
            what = "component" if self.squeezed == 1 else "components"
            parts.append(f"{self.squeezed} {what}, which saved no loss for sure, or next to none, went")
        if self.strength < 1:
            parts.append(f"what trains overshoots, so the last planned step leaves {self.strength:.2f} of it")
        if self.phase == "rest":
            parts.append(f"nothing is born after step {self._settings.last_step}")
        return "; ".join(parts)

    # The rule --------------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Count one optimizer step, and weigh the evidence where that is due.

        Raises:
            NonFiniteError: A component is NaN or infinite, or the gradient along directions is, batch after batch.
        """
        self.global_step += 1
        if self._is_shortened:  # a run that had ended goes on
            self.strength, self._is_shortened = 1.0, False
        if self.global_step % TOLD_INTERVAL == 0:
            self._check_components("regular")
        if self.phase == "questions":
            events = self._answered()
        elif self.phase == "start":
            events = self._start_trial() if self.global_step == FIRST_STEP else []
        elif self.phase == "trial":
            events = self._end_trial() if self.global_step >= self._trial_steps else []
        elif self.phase == "growth" and self.global_step % CHECK_INTERVAL == 0:
            events = self._weigh(self._matrices.take_readings())
            if self._is_squeezed_early:
                self._begin_squeeze("overshoot")
            else:
                self._matrices.note_moves()
                if self.global_step >= self._settings.last_step:
                    self._end_growth()
        elif self.phase == "rest" and self.global_step < self._settings.last_step:
            # It was resumed with more steps than were planned.
            self.phase, self.strength, events = "growth", 1.0, []
            for matrix in self._matrices.all():
                matrix.heads, matrix.flips = [0] * len(matrix.heads), [0] * len(matrix.flips)
                matrix.log_evidence = 0.0
            self._matrices.follow_anew()
            self._matrices.note_moves()
        else:
            events = []
        self._shorten_if_over()
        self.tell(events)
        return events

    def skip_step(self) -> None:
        """Note that a planned optimizer step was not taken."""
        self._skipped += 1
        self._shorten_if_over()

    def _shorten_if_over(self) -> None:
        if self.global_step + self._skipped == self._settings.total_steps and self.strength < 1:
            self._matrices.shorten(self.strength)
            self._is_shortened = True

    def held_out_duels(self, step: int) -> Sequence[int]:
        """Return the numbers of the held-out batches that let duel, `step` optimizer steps after the first pass."""
        if self.phase != "growth":
            return ()
        return self._budget.duels_at(self.global_step - step, step, self._trial_steps)

    def duels(self, first_pass: int | None, *, held_out: bool) -> int:
        """Return how many batches let duel in the whole run; see `GrowthRule`."""
        return self._budget.duels(first_pass, self._trial_steps, held_out=held_out)

    def held_out_questions(self) -> Sequence[int]:
        """Return the numbers of the held-out batches that answer what is open where the trial, or growth, ends."""
        if self.phase not in ("questions", "squeeze"):
            return ()
        if self.phase == "questions" and not self._budget.asked:
            # If the run is resumed with held-out examples, others have answered, and do not count.
            self._credits, self._base_credits, self._budget.answered = [], [], 0
            if self._stage not in ("opening", "dropped"):
                self._open_questions()
        return self._budget.take(self._missing)  # later others are asked, in place of those that overflowed

    def answer(self) -> list[Event]:
        """Take what held-out batches answered; see `GrowthRule`."""
        events = self._answered()
        self.tell(events)
        return events

    def outer_step(self) -> list[Event]:
        """There are no inner loops that could end.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("outer_step: growth='evidence' has no inner loops; a component is born by evidence alone")

    def _start_trial(self) -> list[Event]:
        self._check_components("first directions'")
        self.phase = "trial"
        first = range(self._settings.trial_components)
        births = self._within_limit([(matrix, direction) for matrix in self._matrices.active() for direction in first])
        self._matrices.bear(births)
        self._matrices.stop_following()
        return [self._event("born", matrix) for matrix, direction in births if direction == 0]

    def _end_trial(self) -> list[Event]:
        self._check_components("trial's last")
        self.phase = "questions"
        self._matrices.take_apart()
        self._open_questions()
        return []

    def _open_questions(self) -> None:
        self._stage, self._share = "opening", 1.0
        self._matrices.ask_at(0.5)

    @property
    def _may_go_on(self) -> bool:
        return self.doublings < DOUBLINGS and 2 * self._trial_steps <= self._budget.run / 2

    @property
    def _trial_steps(self) -> int:
        return self._settings.trial_steps << self.doublings

    @property
    def _answers(self) -> list[np.ndarray]:
        """What was answered in this stage of the questions."""
        return self._base_credits if self._stage in ("base", "doubt") else self._credits

    @property
    def _missing(self) -> int:
        """Answers that the stage of the questions still waits for."""
        return self._budget.count(self._stage) - len(self._answers)

    def _answered(self) -> list[Event]:
        """Note what the batches said; after the last one, drop what does not save loss, or hardly any."""
        for credits in self._matrices.take_credits():
            if not self._overflowed(np.isinf(credits).any(1)):  # else another batch is asked
                self._answers.append(credits)
                self._budget.answered += 1
        if self._missing > 0:
            return []
        if self.phase == "squeeze":
            return self._read_squeeze()
        if self._stage == "opening":
            self._read_opening()
        elif self._stage == "base":
            self._read_base()
        elif self._stage == "dropped":
            return self._take_back()
        elif self._stage == "doubt":
            self.is_anything_known = self._save_loss(self._base_credits)
            return self._settle()
        elif self._budget.may_doubt and not (self._save_loss(self._credits) or self._cost_loss(self._credits)):
            self._doubt()
        else:
            return self._settle()
        return []

    def _save_loss(self, answers: Sequence[np.ndarray] | np.ndarray) -> bool:
        return saves_together(np.asarray(answers), self._settings.significance)

    def _cost_loss(self, answers: Sequence[np.ndarray] | np.ndarray) -> bool:
        return saves_together(-np.asarray(answers), self._settings.significance)

    def _read_opening(self) -> None:
        """Judge all updates where they save loss together; else ask whether they point downhill at least."""
        if self._save_loss(self._credits):
            self._stage = "whole"
        elif self.doublings == DOUBLINGS:
            self._judge_half()  # they pointed downhill twice
        else:
            self._stage = "base"
            self._matrices.ask_at(0.0)

    def _read_base(self) -> None:
        """Let the trial go on, or judge half of the updates, or all of them."""
        points_downhill = self._save_loss(self._base_credits)
        if points_downhill and self._cost_loss(self._credits) and self._may_go_on:
            self._forget_answers()
            self.doublings += 1
            self.phase = "trial"
            self._matrices.stop_following()
        elif points_downhill:
            self._judge_half()
        else:
            self._stage = "whole"
            self._matrices.ask_at(0.5)

    def _judge_half(self) -> None:
        """Ask about half of the updates, in its middle: the whole of them lies beyond the least loss."""
        self._forget_answers()
        self._stage, self._share = "half", 0.5
        self._matrices.ask_at(0.25)

    def _doubt(self) -> None:
        """Ask whether all updates point downhill at least, where it is not known whether they save loss."""
        self._base_credits, self._stage = [], "doubt"
        self._budget.begin_an_order()
        self._matrices.ask_at(0.0)

    def _forget_answers(self) -> None:
        self._credits, self._base_credits = [], []
        self._budget.begin_an_order()

    def _settle(self) -> list[Event]:
        """Drop what does not surely save loss, and what saves little; if nothing is known, only what costs some."""
        credits = np.stack(self._credits)
        self._budget.plan_reach()
        kept = directions_to_keep(credits, self._settings.significance)
        if self._budget.reach or not self.is_anything_known:
            kept |= undecided_directions(credits, self._settings.significance if self.is_anything_known else None)
        kept = keep_one_if_undecided(kept, credits)
        self._matrices.keep(kept, self._share)
        self._budget.share_out(is_any_dropped=bool(kept.sum() < np.isfinite(credits[0]).sum()))
        self._saved = np.where(kept, self._share * np.nan_to_num(credits).mean(0), 0.0).sum(1).tolist()
        if not self._budget.again:
            return self._grow([])
        self._forget_answers()
        self._stage = "dropped"
        return []

    def _take_back(self) -> list[Event]:
        """Let what was dropped begin anew where the loss falls along it, with what stays in place."""
        falls = saves_loss(np.nan_to_num(np.stack(self._credits)), self._settings.significance / 2)
        matrices = self._matrices.all()
        return self._grow([(matrices[place], int(k)) for place, k in np.argwhere(falls)])

    def _grow(self, again: Sequence[tuple[E, int]]) -> list[Event]:
        """End the questions; what begins `again`, matrix and direction, was dropped."""
        allowed = self._within_limit(again)
        if allowed:
            self._matrices.bear(allowed)
        self._matrices.follow_unused(allowed)
        self._matrices.note_moves()
        self._credits, self._base_credits = [], []
        self.phase = "growth"
        return [
            self._event("settled", matrix, value=saved)
            for matrix, saved in zip(self._matrices.all(), self._saved, strict=True)
            if not matrix.is_frozen
        ]

    @property
    def _is_before_end(self) -> bool:
        return self.global_step < self._settings.last_step

    @property
    def _is_squeezed_early(self) -> bool:
        """Whether it is time to ask if all updates overshoot."""
        growth = self._settings.last_step - self._trial_steps
        is_late = self.global_step - self._trial_steps >= EARLY * growth
        return self._budget.may_ask_early and self._is_before_end and is_late

    def _end_growth(self) -> None:
        """Ask the held-out examples, if any, what the small components are worth; follow no direction any more."""
        if self._budget.may_squeeze:
            self._begin_squeeze("small")
        else:
            self._rest()

    def _rest(self) -> None:
        self.phase = "rest"
        self._matrices.stop_following()

    def _begin_squeeze(self, stage: Stage) -> None:
        """Ask about all singular directions, the small ones at half strength where it is about these."""
        self._check_components("squeeze's" if self._is_before_end else "growth's last")
        self._matrices.set_aside()
        self.phase, self._stage = "squeeze", stage
        try:
            self._sizes = self._matrices.take_apart()
            self._dropped, self._lost = np.zeros(self._sizes.shape, dtype=bool), [0.0] * len(self._sizes)
            self._budget.pass_over_duels()
            share = SMALL_SHARE_EARLY if stage == "overshoot" else SMALL_SHARE
            self._small = smallest_directions(self._sizes, share)
            if stage == "overshoot":
                self._forget_answers()
                self._matrices.ask_at(1.0)
            elif self._small.any():
                self._ask_at_half("small", self._small)
            else:
                self._end_squeeze()
        except BaseException:
            self.give_up()
            raise

    def _ask_at_half(self, stage: Stage, directions: np.ndarray) -> None:
        self._forget_answers()
        self._stage = stage
        self._matrices.halve(directions)

    def give_up(self) -> None:
        """Put back what is halved, after an error or Ctrl-C: it is squeezed at the next look, if the run goes on."""
        if self.phase == "squeeze":
            self._matrices.put_back()
            self._credits, self.phase = [], "growth"

    def _read_squeeze(self) -> list[Event]:
        """Ask what comes next in a squeeze, or end it."""
        credits, self._credits = np.stack(self._credits), []
        if self._stage == "overshoot":
            if self._cost_loss(credits):
                self._ask_at_half("all", np.isfinite(self._sizes))
                return []
            if self._cost_loss(np.where(self._small, credits, 0.0)):
                self._drop_small(credits)
        elif self._stage == "all":
            saves = candidates(np.nan_to_num(credits), self._settings.significance)
            self._choose_to_drop(np.isfinite(self._sizes) & ~keep_one_if_undecided(saves, credits), credits)
        elif self._stage == "small":
            self._drop_small(credits)
            self._of_large = self._without_small(credits)
            if self._budget.reach and self._cost_loss(self._of_large):
                self._forget_answers()
                self._stage = "strength"
                self._matrices.ask_at(0.5)
                return []
        else:
            self.strength = strength_of_least_loss(self._of_large, self._without_small(credits))
        return self._end_squeeze()

    def _without_small(self, credits: np.ndarray) -> np.ndarray:
        return np.where(self._small, 0.0, np.nan_to_num(credits))

    def _drop_small(self, credits: np.ndarray) -> None:
        self._choose_to_drop(directions_to_drop(credits, self._sizes, self._small, sum(self._saved)), credits)

    def _choose_to_drop(self, dropped: np.ndarray, credits: np.ndarray) -> None:
        self._dropped = dropped
        self._lost = np.where(dropped, np.nan_to_num(credits).mean(0), 0.0).sum(1).tolist()

    def _end_squeeze(self) -> list[Event]:
        """Take away what is chosen to go, and go on, or rest."""
        before = self._matrices.known_rank
        self._matrices.drop(self._dropped)
        if self._is_before_end:
            self.phase, self._budget.is_asked_early = "growth", True
            self._matrices.note_moves()
        else:
            self._rest()
        self.squeezed += before - self._matrices.known_rank
        return [
            self._event("squeezed", matrix, value=saved)
            for matrix, saved, gone in zip(self._matrices.all(), self._lost, self._dropped, strict=True)
            if gone.any()
        ]

    def _weigh(self, readings: Sequence[Reading]) -> list[Event]:
        """Let the batches decide for every matrix; return the births."""
        matrices = self._matrices.all()
        for reading in readings:
            self._overflowed(np.isnan(reading.unused[:, 0]))
            heads, judged = duel(reading, self._settings.duel_factor)
            for index, matrix in enumerate(matrices):
                if math.isfinite(reading.unused[index].max()):
                    matrix.steepness = float(reading.unused[index].max())
                for direction, won in enumerate(heads[index]):
                    matrix.heads[direction] += int(won)
                    matrix.flips[direction] += int(judged[index, direction])
        threshold = -math.log(self._settings.significance)
        births = []
        for matrix in self._matrices.active():
            found = _money(matrix)
            matrix.log_evidence = log_mean(found)
            # With fewer slots than directions a component would be merged before it has ever trained.
            ready = directions_that_convince(found, threshold)
            births += [(matrix, direction) for direction in ready[: self._settings.trial_components]]
        is_last = self.global_step >= self._settings.last_step
        is_told = is_last or self.global_step % self._settings.told_interval == 0
        checked = [self._event("checked", matrix) for matrix in self._matrices.active()] if is_told else []
        # What is born right before a squeeze would be small.
        is_squeezed = self._is_squeezed_early or (is_last and self._budget.may_squeeze)
        return checked + self._bear([] if is_squeezed else self._within_limit(births))

    def _bear(self, births: Sequence[tuple[E, int]]) -> list[Event]:
        """Start components along unused directions, and tell of them; the events carry the evidence that decided."""
        if not births:
            return []
        merged = self._matrices.bear(births)
        events = [self._event("merged", matrix) for matrix in merged]
        events += [self._event("born", matrix) for matrix, _ in births]
        for matrix, direction in births:
            matrix.heads[direction] = matrix.flips[direction] = 0
            matrix.log_evidence = log_mean(_money(matrix))
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
        for matrix, direction in births:
            room[matrix.name] -= 1
            if room[matrix.name] >= 0:
                kept.append((matrix, direction))
        return kept

    # Errors, events, state -------------------------------------------------------------------------------------------

    def _overflowed(self, broken: np.ndarray) -> bool:
        """Return whether a batch overflowed, as one may in 16 bits, which then says nothing.

        Args:
            broken: For every matrix whether what the batch said of it is not finite, (matrices,).

        Raises:
            NonFiniteError: So did those before it, `CHECK_INTERVAL` in a row.
        """
        self._overflows = self._overflows + 1 if broken.any() else 0
        if self._overflows >= CHECK_INTERVAL:
            name = self._matrices.all()[int(broken.argmax())].name
            raise not_finite(
                f"{name}: the gradient along its directions is not finite on {self._overflows} batches in a row, the "
                f"last near optimizer step {self.global_step}",
                "those batches: held-out ones where they decide, else the last ones of the training set",
            )
        return self._overflows > 0

    def _check_components(self, check: str) -> None:
        active = self._matrices.active()
        self.require_finite(active, self._matrices.norms(active), check)

    def require_finite(self, matrices: Sequence[Any], norms: Sequence[float], check: str) -> None:
        """Raise for the first matrix whose components are not finite; see `GrowthRule`."""
        when = f"{check} check of optimizer step {self.global_step}"
        what = "its components in training, or what its unused directions follow, are"
        require_finite(matrices, norms, what, when, TOLD_INTERVAL)

    def _event(self, kind: EventKind, matrix: E, value: float | None = None) -> Event:
        return Event(
            kind=kind,
            step=self.global_step,
            outer_step=self.outer_number,
            inner_step=self.inner_step,
            module=matrix.name,
            value=value,
            rank=matrix.component_count,
            converged=False,
            log_evidence=matrix.log_evidence,
            steepness=matrix.steepness,
        )

    def state(self) -> dict[str, Any]:
        """Return where the rule stands, JSON-able."""
        return {
            "global_step": self.global_step,
            "phase": self.phase,
            "overflows": self._overflows,
            "skipped": self._skipped,
            "is_shortened": self._is_shortened,
            "strength_at_end": self.strength,
            "saved": self._saved,
            "doublings": self.doublings,
            "stage": self._stage,
            "judged_share": self._share,
            "births": self.births,
            "last_birth": self.last_birth,
            "squeezed": self.squeezed,
            "is_anything_known": self.is_anything_known,
            "credits": _as_lists(self._credits),
            "base_credits": _as_lists(self._base_credits),
            **self._budget.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state()` returned.

        Warns:
            AromaWarning: Another number of batches is held out, or none, so the run will decide otherwise.
        """
        self._budget.restore(state)
        self.global_step, self.phase = state["global_step"], state["phase"]
        self.doublings, self._stage = state["doublings"], state["stage"]
        self._share = state["judged_share"]
        self.births, self.last_birth = state["births"], state["last_birth"]
        self._overflows, self._skipped = state["overflows"], state["skipped"]
        self._saved, self.squeezed = [*state["saved"]], state["squeezed"]
        self.is_anything_known = state["is_anything_known"]
        self.strength, self._is_shortened = state["strength_at_end"], state["is_shortened"]
        self._credits, self._base_credits = (
            [np.array(credits, dtype=float) for credits in state[name]] for name in ("credits", "base_credits")
        )


def _money(matrix: EvidenceMatrix) -> list[float]:
    # log E of every unused direction alone.
    return [*map(log_evidence, matrix.heads, matrix.flips)]


def _as_lists(answers: Sequence[np.ndarray]) -> list[list[list[float | None]]]:
    # JSON has no NaN; numpy reads None as NaN.
    return [[[None if math.isnan(x) else float(x) for x in row] for row in credits] for credits in answers]
