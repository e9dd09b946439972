"""Algorithm 1 by itself: over matrices that are made of numbers, without tensors, optimizers or processes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from aroma.algorithm import PaperRule
from aroma.tuner import AromaConfig

CONFIG = AromaConfig(
    inner_tolerance=0.1,
    inner_check_interval=2,
    outer_tolerance=0.5,
    min_components=0,
    max_components=None,
    rewarmup_steps=3,
)
INNER_STEPS = 6


@dataclass(eq=False)
class Number:
    """A matrix: the norm of its component is `size` · t / (t + `halfway`) after t steps, and shrinks with its rank."""

    name: str
    size: float
    halfway: float
    rank: int = 0
    is_frozen: bool = False
    converged: bool = False
    inner_value: float | None = None
    outer_value: float | None = None
    steps: int = 0

    @property
    def component_count(self) -> int:
        return self.rank

    @property
    def norm(self) -> float:
        return self.size / 2**self.rank * self.steps / (self.steps + self.halfway)


class Numbers:
    """Matrices whose weight has norm 1."""

    def __init__(self, *numbers: Number) -> None:
        self.numbers = list(numbers)
        self.drawn: list[tuple[str, int]] = []
        self.earlier: list[float] = []

    def all(self):
        return self.numbers

    def active(self):
        return [number for number in self.numbers if not number.is_frozen]

    @property
    def known_rank(self):
        return sum(number.rank for number in self.numbers)

    def inner_values(self, numbers):
        norms = [number.norm for number in numbers]
        earlier, self.earlier = self.earlier or [0.0] * len(norms), norms
        return norms, [(now - then) / then if then else None for now, then in zip(norms, earlier, strict=True)]

    def outer_values(self, numbers):
        norms = [number.norm for number in numbers]
        return norms, norms

    def forget_check(self):
        self.earlier = []

    def merge(self, numbers):
        for number in numbers:
            number.rank += 1

    def renew(self, number, draw):
        self.drawn.append((number.name, draw))
        number.steps = 0

    def start_unmoved(self, draw):
        self.drawn += [(number.name, draw) for number in self.active() if not number.norm]

    def freeze(self, number, *, loaded=False):
        number.is_frozen = True

    def train(self, rule, steps):
        events = []
        for _ in range(steps):
            for number in self.active():
                number.steps += 1
            events += rule.step()
        return events


def test_a_run_by_hand():
    numbers = Numbers(Number("quick", 2.4, 0.1), Number("slow", 1.2, 9.0), Number("useless", 0.1, 0.1))
    rule = PaperRule(CONFIG, INNER_STEPS, numbers)
    events = [(e.step, e.kind, e.module, e.rank) for e in numbers.train(rule, 18) if e.kind != "checked"]
    assert events == [
        # Labels of two do not end the loop that the third still needs: it ends at T_in.
        *[(6, "merged", "quick", 1), (6, "frozen", "slow", 0), (6, "frozen", "useless", 0)],
        # 1.2 · 4 / 4.1, labelled at the second check.
        (10, "merged", "quick", 2),
        # 0.6 · 4 / 4.1
        (14, "merged", "quick", 3),
        # 0.3 · 4 / 4.1 < 0.5
        *[(18, "frozen", "quick", 3), (18, "finished", None, 3)],
    ]
    assert numbers.drawn == [("quick", 1), ("quick", 2), ("quick", 3)]
    assert rule.finished


def test_the_rate_climbs_after_every_outer_step_but_the_first():
    numbers = Numbers(Number("slow", 100.0, 1000.0))
    rule = PaperRule(CONFIG, INNER_STEPS, numbers)
    factors = []
    for _ in range(12):
        factors.append(rule.lr_factor)
        numbers.train(rule, 1)
    assert factors == pytest.approx([*[1.0] * 6, 0, 1 / 3, 2 / 3, 1, 1, 1])


def test_a_climb_of_one_step_begins_at_zero_and_one_of_none_is_none():
    for climb, first in ((0, 1.0), (1, 0.0)):
        numbers = Numbers(Number("slow", 100.0, 1000.0))
        rule = PaperRule(replace(CONFIG, rewarmup_steps=climb), INNER_STEPS, numbers)
        numbers.train(rule, 6)
        assert rule.lr_factor == first
        numbers.train(rule, 1)
        assert rule.lr_factor == 1.0


def test_a_component_of_just_the_tolerance_is_kept():
    """Equation (6) drops what is below it."""
    numbers = Numbers(Number("just", 1.0, 6.0), Number("below", 0.99, 6.0))
    numbers.train(PaperRule(replace(CONFIG, inner_tolerance=None), INNER_STEPS, numbers), 6)
    assert [number.rank for number in numbers.numbers] == [1, 0]


def test_it_says_why_matrices_finished_and_how_many_train():
    numbers = Numbers(Number("full", 100.0, 1.0, rank=2), Number("useless", 0.1, 0.1), Number("open", 100.0, 1.0))
    rule = PaperRule(replace(CONFIG, max_components=2), INNER_STEPS, numbers)
    assert rule.explanation() == "1 of 3 matrices have finished (1 have max_components=2); 2 still train"
    numbers.train(rule, 6)
    reasons = "1 found the next component too small, 1 have max_components=2"
    assert rule.explanation() == f"2 of 3 matrices have finished ({reasons}); 1 still train"
    fresh = Numbers(Number("open", 1.0, 1.0))
    assert PaperRule(CONFIG, INNER_STEPS, fresh).explanation() == "0 of 1 matrices have finished; 1 still train"


def test_a_continued_adapter_draws_new_directions_and_full_matrices_stay_as_they_are():
    numbers = Numbers(Number("full", 100.0, 1.0, rank=3), Number("open", 100.0, 1.0, rank=1))
    rule = PaperRule(replace(CONFIG, max_components=3), INNER_STEPS, numbers)
    assert [number.is_frozen for number in numbers.numbers] == [True, False]
    assert numbers.drawn == [("open", 4)]
    numbers.train(rule, 6)
    assert numbers.drawn[1:] == [("open", 4)], "renewed at the end of that very outer step"


@pytest.mark.parametrize("at", range(1, 18))
def test_restored_at_any_step_it_goes_on_as_if_uninterrupted(at):
    def fresh():
        return Numbers(Number("quick", 2.4, 0.1), Number("slow", 2.2, 9.0))

    whole, cut = fresh(), fresh()
    rule, first = PaperRule(CONFIG, INNER_STEPS, whole), PaperRule(CONFIG, INNER_STEPS, cut)
    numbers_events = whole.train(rule, at)
    assert cut.train(first, at) == numbers_events
    second = PaperRule(CONFIG, INNER_STEPS, cut)
    second.set_counters(first.counters())
    cut.drawn = list(whole.drawn)
    assert cut.train(second, 30) == whole.train(rule, 30)
    assert cut.drawn == whole.drawn
