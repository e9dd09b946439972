"""How many batches growth by evidence asks, and which of those that are held out.

The held-out batches of a run are 12 % of its optimizer steps at most: those that are tried first, that end the trial,
that are asked about what it drops and about what is squeezed, and those that duel. `evidence.py` says what they are
asked, and `questions.py` decides by the answers.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

from ..errors import AromaWarning

QUESTIONS = (8, 64)
"""Fewest and most batches that are asked at the end of the trial: half as many as it has steps, but none twice unless
there are fewer than eight. None is trained on."""

FEWEST_OPENING = 4
"""Fewest batches that say how far the updates swing: a quarter of the questions."""

HELD_OUT_SHARE = 0.12
"""Held-out batches of a run, at most, as a share of its optimizer steps; the questions are asked anyhow."""

HELD_OUT_INTERVAL = 9
"""Fewest optimizer steps between batches of held-out examples, once the training examples have all been seen."""

TRIED = 1
"""Held-out batches that are evaluated before the first step, so that what fails does so early."""

Stage = Literal["opening", "base", "whole", "half", "doubt", "dropped", "overshoot", "all", "small", "strength"]
"""Which questions are asked. At the end of the trial: the first, at ½; as many at 0; those that decide what stays, of
the whole or of half; a few at 0, if these say nothing; what comes back. In a squeeze: whether all updates overshoot;
all of them at ½, if they do; what is small, at ½; how far they overshoot, at ½."""


def question_count(trial_steps: int) -> int:
    """Return how many batches are asked after a trial of so many optimizer steps."""
    fewest, most = QUESTIONS
    return min(max(trial_steps // 2, fewest), most)


def opening_count(questions: int) -> int:
    """Return how many of so many questions say how far the updates swing."""
    return max(FEWEST_OPENING, questions // 4)


def most_asked(trial_steps: int) -> int:
    """Return the most batches that are asked after a trial: before those that decide, twice as many as open."""
    questions = question_count(trial_steps)
    return questions + 2 * opening_count(questions)


class Budget:
    """How many batches of a run are asked about what, and the number of the held-out batch that is next.

    Args:
        trial_steps: Optimizer steps of the trial, before it goes on.
        last_step: The one after which nothing is born.

    Attributes:
        holds_out: Whether held-out examples decide.
        held_out_batches: How many batches of them have no example in common; None if nothing is held out, or nobody
            knows.
        asked: Held-out batches asked so far; those that duel do not count.
        answered: Batches, held out or not, that have answered so far.
        again: How many are asked about what the trial drops.
        reach: How many say whether all updates overshoot, early, and how far, in the end; 0 in a short run.
        last: How many are asked about what is small.
        is_asked_early: Whether all updates have been asked about early.
    """

    def __init__(self, trial_steps: int, last_step: int) -> None:
        self._trial_steps, self._last_step = trial_steps, last_step
        self._next = 0  # some are passed over
        self._after_duels = 0  # the number that follows on that of the last duel
        self.holds_out = False
        self.held_out_batches: int | None = None
        self.asked = self.answered = self.again = self.reach = self.last = 0
        self.is_asked_early = False

    @property
    def run(self) -> int:
        """Planned optimizer steps, all but the last few."""
        return self._last_step + self._trial_steps

    @property
    def questions(self) -> int:
        """Batches that are asked: an example that is asked twice would count for two."""
        most = question_count(self._trial_steps)
        return most if self.held_out_batches is None else min(most, max(QUESTIONS[0], self.held_out_batches))

    @property
    def opening(self) -> int:
        """Batches that say how far the updates swing, once at strength ½, and once at 0."""
        return opening_count(self.questions)

    def count(self, stage: Stage) -> int:
        """Return how many batches answer a stage of the questions."""
        counts = {
            "opening": self.opening,
            "base": self.opening,
            "doubt": QUESTIONS[0],
            "dropped": self.again,
            "overshoot": self.reach,
            "small": self.last,
            "strength": self.reach,
        }
        return min(counts.get(stage, self.questions), self.questions)

    # What is planned where the trial ends ----------------------------------------------------------------------------

    def _left_after(self, asked: int) -> int:
        """Return how many held-out batches the run has left after those asked; may be below 0."""
        return math.floor(HELD_OUT_SHARE * self.run - asked)

    @property
    def _left(self) -> int:
        """How many held-out batches the run has left when it is decided what stays; may be below 0."""
        asked = max(self.asked, self.answered)  # those that overflowed have been asked, too
        return self._left_after(asked + TRIED if self.holds_out else asked)

    @property
    def may_doubt(self) -> bool:
        """Whether there are held-out batches left to doubt with."""
        return self.holds_out and self._left >= QUESTIONS[0]

    def plan_reach(self) -> None:
        """Plan how many batches say how far all updates reach.

        A long run can ask about all directions once more, and has the fewest left for each of the other questions.
        """
        is_long = self.holds_out and self._left - self.questions - 2 * self.opening >= 3 * QUESTIONS[0]
        self.reach = self.opening if is_long else 0

    def share_out(self, *, is_any_dropped: bool) -> None:
        """Plan how many batches are asked about what was dropped, and about what is small; duels take the others."""
        room, fewest = self._left, QUESTIONS[0]
        if self.reach:
            room -= self.questions + 2 * self.reach
            again = room // 3
        else:
            again = room - (fewest if room >= 2 * fewest else 0)
        self.again = min(self.questions, again) if room >= fewest and is_any_dropped else 0
        room -= self.again
        # Without held-out examples what was learnt by heart would seem to save loss.
        may_ask = self.holds_out and room >= fewest
        self.last = min(self.questions, max(room // 2, fewest)) if may_ask else 0

    @property
    def may_squeeze(self) -> bool:
        """Whether there are held-out batches for it: a run may be resumed without those that it was planned with."""
        return self.holds_out and self.last > 0

    @property
    def may_ask_early(self) -> bool:
        """Whether it is still to be asked early if all updates overshoot."""
        return self.holds_out and self.reach > 0 and not self.is_asked_early

    # Which are next --------------------------------------------------------------------------------------------------

    def take(self, count: int) -> range:
        """Return the numbers of so many held-out batches that are asked now."""
        first = self._next
        self._next += count
        self.asked += count
        return range(first, self._next)

    def begin_an_order(self) -> None:
        """Let the next questions come from another order of the examples, so that none is asked twice among them."""
        if self.held_out_batches:
            self._next += -self._next % self.held_out_batches

    def pass_over_duels(self) -> None:
        """Let the next questions come after the batches that have duelled."""
        self._next = max(self._next, self._after_duels)

    def interval(self, first_pass: int, trial_steps: int) -> int | None:
        """Return the optimizer steps between held-out batches that duel; None if those of the squeeze leave none.

        A run of few steps has room for one.

        Args:
            first_pass: Optimizer steps of the first pass over the data; before its end no held-out batch duels.
            trial_steps: Its length in the end.
        """
        reserved = self.last + self.reach
        if self.reach and not self.is_asked_early:
            reserved += self.reach + self.questions
        room = self._left_after(TRIED + max(self.asked, self.questions)) - reserved
        if self.last and room < 1:
            return None
        duelling = self._last_step - max(first_pass, trial_steps)
        return max(HELD_OUT_INTERVAL, math.ceil(duelling / max(room, 1)))

    def duels_at(self, first_pass: int, step: int, trial_steps: int) -> tuple[int, ...]:
        """Return the numbers of the held-out batches that let duel, `step` optimizer steps after the first pass."""
        interval = self.interval(first_pass, trial_steps)
        if interval is None or step % interval:
            return ()
        number = max(self._next, self.questions) + step // interval
        self._after_duels = number + 1
        return (number,)

    def duels(self, first_pass: int | None, trial_steps: int, *, held_out: bool) -> int:
        """Return how many batches let duel in the whole run; see `GrowthRule`."""
        first, last = trial_steps + (0 if held_out else self.questions), self._last_step
        if first_pass is None or not held_out:
            return max(last - first, 0)
        later, interval = last - max(first_pass, first), self.interval(first_pass, trial_steps)
        return max(min(first_pass, last) - first, 0) + (max(later, 0) // interval if interval else 0)

    def state(self) -> dict[str, Any]:
        """Return what is planned and was asked, JSON-able."""
        return {
            "asked": self.asked,
            "answered": self.answered,
            "questions_again": self.again,
            "last_questions": self.last,
            "reach_questions": self.reach,
            "is_asked_early": self.is_asked_early,
            "next_number": self._next,
            "after_duels": self._after_duels,
            "held_out_batches": self.held_out_batches,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state()` returned.

        Warns:
            AromaWarning: Another number of batches is held out, or none, so the run will decide otherwise.
        """
        then = state["held_out_batches"]
        if then != self.held_out_batches:
            now, before = ("no" if count is None else count for count in (self.held_out_batches, then))
            warnings.warn(
                f"{now} held-out batches decide from here on, and {before} did in the run that is resumed, so it will "
                "not grow as it would have; give it the same held-out examples",
                AromaWarning,
                stacklevel=3,
            )
        self.asked, self._next, self.answered = state["asked"], state["next_number"], state["answered"]
        self.again, self.last = state["questions_again"], state["last_questions"]
        self.reach, self.is_asked_early = state["reach_questions"], state["is_asked_early"]
        self._after_duels = state["after_duels"]
