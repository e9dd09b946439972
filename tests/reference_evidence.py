"""Growth by evidence in the notation of ../docs/method.md: slow, dense, one loop. The library is held equal to it.

Every G is formed, m×n. Shared with the library are the random first directions alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from aroma.reset import component_generator


@dataclass
class Settings:
    s: float = 4.0
    alpha: float = 0.05
    kappa: float = 1.0
    S: int = 8
    first: int = 8
    trial: int = 20
    questions: int = 10  # half of the trial's steps
    least: float = 0.25  # of the average credit
    interval: int = 4
    unused: int = 4
    last: int = 10**9  # step after which nothing is born
    steps: int = 10**9  # of the run
    first_pass: int | None = None
    holds_out: bool = False
    held_out_batches: int | None = None  # how many have no example in common
    seed: int = 0

    @property
    def K(self) -> int:
        """Components of a matrix in the trial."""
        return min(8, self.S)

    @property
    def beta(self) -> float:
        return min(1 - 1 / self.trial, self.alpha ** (1 / (9 * self.held_out_batches)) if self.held_out_batches else 1)


@dataclass
class Component:
    """One b a: its Adam averages, and where it was at the last look."""

    b: Tensor
    a: Tensor
    born: int
    m_b: Tensor
    v_b: Tensor
    m_a: Tensor
    v_a: Tensor
    before: tuple[Tensor, Tensor] | None = None
    move: tuple[Tensor, Tensor] | None = None  # Δb, Δa
    at: tuple[Tensor, Tensor] | None = None  # b, a at the last look


@dataclass
class Matrix:
    name: str
    index: int
    W0: Tensor
    slots: list[Component | None]
    u: list[Tensor]
    v: list[Tensor]
    p: list[Tensor]
    q: list[Tensor]
    count: int = 0
    singular: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)  # places among them
    heads: list[int] = field(default_factory=list)
    flips: list[int] = field(default_factory=list)
    merged: list[Tensor] = field(default_factory=list)
    idle: list[Tensor] = field(default_factory=list)  # averages of squares of slots that are not in use

    @property
    def live(self) -> list[Component]:
        return [c for c in self.slots if c is not None]

    def W(self, s: float) -> Tensor:
        """The weight, its live components scaled by s."""
        return (
            self.W0
            + s * sum((torch.outer(c.b, c.a) for c in self.live), torch.zeros_like(self.W0))
            + sum(self.merged, torch.zeros_like(self.W0))
        )


class Reference:
    """The rule, driven by `step(G of a training batch, G of a held-out batch where one is due)`.

    `strength` says what the updates are scaled by when a G is taken.
    """

    def __init__(self, weights: dict[str, Tensor], settings: Settings) -> None:
        self.settings, self.t, self.phase, self.strength = settings, 0, "start", 1.0
        self.trained = 0  # optimizer steps that change something
        self.births: list[tuple[int, str]] = []
        self.matrices = []
        for index, (name, W0) in enumerate(weights.items()):
            m, n = W0.shape
            slots: list[Component | None] = [None] * settings.S
            u, v = (_random(settings.seed, index, purpose, settings.K, size) for purpose, size in (("u", m), ("v", n)))
            zeros = [[W0.new_zeros(size) for _ in range(settings.K)] for size in (m, n)]
            self.matrices.append(Matrix(name, index, W0, slots, u, v, *zeros))
        self.pending: list[list[tuple[list[float], list[float]]]] = []
        self.newborn: list[list[bool]] = []
        self.credits: list[list[list[float]]] = []
        self.at_base: list[list[list[float]]] = []  # the same at strength 0
        self.doubt: list[list[list[float]]] = []  # at strength 0 once more, where those say nothing
        self.doubts = False
        self.known = True  # whether anything is known of all updates together
        self.of_dropped: list[list[list[float]]] = []  # at strength 1, what was dropped at 0
        self.answers = 0  # to questions before those
        self.again = False  # whether it is asked about what was dropped
        self.opens = False  # whether it is open still how much of the updates is judged, and when
        self.squeezed = [0] * len(self.matrices)  # how many small directions every matrix lost
        self.early = False  # whether it was asked, before growth ended, if all updates cost loss
        self.left = 1.0  # of what trains, when the run ends
        self.share = 1.0  # of the updates, which is judged and stays
        self.doubled = 0
        self.asked = 0  # held-out questions so far
        self.next = 0  # number of the next one

    # One optimizer step: Adam on the live components, then the rule.
    def step(self, G: Sequence[Tensor], lr: float, held_out: Callable[[int], Sequence[Tensor]]) -> None:
        o = self.settings
        if self.phase != "questions":
            self.trained += 1
            for matrix, g in zip(self.matrices, G, strict=True):
                for c in matrix.live:
                    self._adam(c, o.s * g @ c.a, o.s * g.T @ c.b, lr, self.trained)
                matrix.idle = [0.999 * v for v in matrix.idle]
        decides = not o.holds_out or o.first_pass is None or self.t < o.first_pass
        if self.phase == "questions":
            self._credit(G)
            self._look_at_the_opening()
        elif self.phase == "growth" and not decides:
            number = self._that_duels()
            if number is not None:
                self._read(held_out(number), before=False)
        elif self.phase == "growth" and decides:
            self._read(G, before=True)
        if self.phase in ("start", "growth"):
            for matrix, g in zip(self.matrices, G, strict=True):
                matrix.p = [o.beta * p - (1 - o.beta) * g @ v for p, v in zip(matrix.p, matrix.v, strict=True)]
                matrix.q = [o.beta * q - (1 - o.beta) * g.T @ u for q, u in zip(matrix.q, matrix.u, strict=True)]
                self._aim(matrix)
        self.t += 1
        if self.phase == "start" and self.t == o.first:
            for matrix in self.matrices:
                for v in matrix.v:
                    self._birth(matrix, v, [], o.K)
            self.births, self.phase = [], "trial"
        elif self.phase == "trial" and self.t == o.trial * 2**self.doubled:
            self._singular_directions()
            self.phase, self.strength = "questions", 0.5
            self.opens, self.share = True, 1.0
            while o.holds_out and self.phase == "questions" and len(self.credits) < o.questions:
                self._credit(self._next(held_out))
                self._look_at_the_opening()
        elif self.phase == "growth" and self.t % o.interval == 0:
            self._weigh()
            if self._is_squeezed_early():
                self._squeeze_early(held_out)
                self.early = True
            self._look()
            if self.t >= o.last:
                self._squeeze(held_out)
                self.phase = "rest"
        if self.t == o.steps:
            for matrix in self.matrices:
                for c in matrix.live:
                    c.b.mul_(self.left)
        judged = self.phase == "questions" and len(self.credits) == o.questions and not self.again
        if judged and o.holds_out and not self.doubts and self._says_nothing() and self._left() >= 8:
            self.doubts, self.strength = True, 0.0
            self._next_order()
        while self.doubts and len(self.doubt) < 8:
            self._credit(self._next(held_out))
        if judged and len(self.doubt) == 8 * self.doubts:
            self.known = not self.doubts or self._together(self.doubt, "greater")
            self._settle()
            self.strength, self.again = 1.0, True
            if self._questions_again():
                self._next_order()
            while o.holds_out and len(self.of_dropped) < self._questions_again():
                self._credit(self._next(held_out))
        if self.phase == "questions" and self.again and len(self.of_dropped) == self._questions_again():
            self._take_back()
            self._look()
            self.phase = "growth"

    def _next(self, held_out: Callable[[int], Sequence[Tensor]]) -> Sequence[Tensor]:
        self.asked, self.next = self.asked + 1, self.next + 1
        return held_out(self.next - 1)

    def _next_order(self) -> None:
        """Pass over the rest of the held-out batches, so that the next questions ask none twice."""
        while self.settings.held_out_batches and self.next % self.settings.held_out_batches:
            self.next += 1

    def _questions_again(self) -> int:
        return self._shares()[0]

    def _shares(self) -> tuple[int, int, int]:
        """How many are asked about what was dropped, about what is small, and twice about how far all updates reach.

        All are 12 % of the run at most. A long run has as many left as decide, for an early squeeze.
        """
        o = self.settings
        room = self._left()
        again = min(o.questions, room - 8) if room >= 16 else min(o.questions, room) if room >= 8 else 0
        reach = max(4, o.questions // 4)
        long = o.holds_out and room - o.questions - 2 * reach >= 24
        if long:
            room -= o.questions + 2 * reach
            again = min(o.questions, room // 3)
        again *= any(matrix.dropped for matrix in self.matrices)
        left = room - again
        last = min(o.questions, max(left // 2, 8)) if left >= 8 and o.holds_out else 0
        return again, last, reach * long

    def _left(self) -> int:
        """Held-out batches that are left when it is known what stays."""
        return math.floor(0.12 * (self.settings.last + self.settings.trial)) - self.answers - self.settings.holds_out

    def _says_nothing(self) -> bool:
        return not any(self._together(self.credits, way) for way in ("greater", "less"))

    def _room(self) -> int:
        """For held-out batches that duel, in the whole run."""
        o, (_, last, reach) = self.settings, self._shares()
        reserved = last + reach + (reach + o.questions) * (reach > 0 and not self.early)
        return math.floor(0.12 * (o.last + o.trial)) - max(self.asked, o.questions) - reserved - 1

    def _is_squeezed_early(self) -> bool:
        """Two fifths of growth are over."""
        o, trial = self.settings, self.settings.trial * 2**self.doubled
        return bool(self._shares()[2]) and not self.early and trial + 0.4 * (o.last - trial) <= self.t < o.last

    def _interval(self) -> int | None:
        """Steps between held-out batches that duel, if any: with all that are asked they are 12 % of the run."""
        o = self.settings
        left = self._room()
        if left < 1 and self._shares()[1]:
            return None
        return max(9, math.ceil((o.last - max(o.first_pass or 0, o.trial * 2**self.doubled)) / max(left, 1)))

    def _that_duels(self) -> int | None:
        """Number of the held-out batch that duels at this step."""
        interval, later = self._interval(), self.t - (self.settings.first_pass or 0)
        if interval is None or later % interval:
            return None
        return max(self.next, self.settings.questions) + later // interval

    def _look_at_the_opening(self) -> None:
        """A quarter of the batches at half strength; if they do not say that loss is saved, as many at strength 0."""
        o, quarter = self.settings, max(4, self.settings.questions // 4)
        costs = downhill = False
        if self.opens and self.strength == 0.5 and len(self.credits) == quarter:
            if self._together(self.credits, "greater"):
                self.opens = False
            elif self.doubled < 2:
                self.strength = 0.0
            else:  # it was said before
                downhill = True
        elif self.strength == 0 and len(self.at_base) == quarter:
            downhill, costs = self._together(self.at_base, "greater"), self._together(self.credits, "less")
            self.opens, self.strength, self.at_base = False, 0.5, []
        if downhill:
            self.opens, self.share, self.strength, self.credits = False, 0.5, 0.25, []
            self._next_order()
        if costs and downhill and self.doubled < 2 and 4 * o.trial * 2**self.doubled <= o.last + o.trial:
            self.doubled += 1
            self.phase, self.strength = "trial", 1.0

    def _together(self, credits: list[Any], alternative: str) -> bool:
        saved = torch.tensor([sum(map(sum, _rows(one))) for one in credits], dtype=torch.float64)
        return bool(stats.ttest_1samp(saved, 0, alternative=alternative).pvalue < self.settings.alpha)

    def _look(self) -> None:
        for matrix in self.matrices:
            for c in matrix.live:
                c.move = None if c.at is None else (c.b - c.at[0], c.a - c.at[1])
                c.at = (c.b.clone(), c.a.clone())

    def _singular_directions(self) -> None:
        for matrix in self.matrices:
            U, S, Vh = torch.linalg.svd(sum(torch.outer(c.b, c.a) for c in matrix.live))
            matrix.singular = [(U[:, k], S[k], Vh[k]) for k in range(self.settings.K)]

    def _credit(self, G: Sequence[Tensor]) -> None:
        s = self.settings.s
        self.answers += not self.again
        at_zero = self.doubt if self.doubts else self.at_base
        (at_zero if self.strength == 0 else self.of_dropped if self.again else self.credits).append(
            [
                [float(-(s * size * g * torch.outer(u, v)).sum()) for u, size, v in matrix.singular]
                for matrix, g in zip(self.matrices, G, strict=True)
            ]
        )

    def _settle(self) -> None:
        o = self.settings
        every = torch.tensor(self.credits, dtype=torch.float64)  # (batches, matrices, directions)
        candidates, undecided = self._candidates(every)
        self.saved = [0.0] * len(self.matrices)
        average = sum(credit for credit, _, _ in candidates) / (len(self.matrices) * o.K)
        chosen = {(i, k) for credit, i, k in candidates if credit >= o.least * average}
        if self._shares()[2]:
            chosen |= undecided
        if not self.known:
            tests = stats.ttest_1samp(every, 0).statistic
            chosen |= {(i, k) for i in range(len(self.matrices)) for k in range(o.K) if tests[i, k] > -1}
        for i, matrix in enumerate(self.matrices):
            stay = [k for k in range(o.K) if (i, k) in chosen]
            if not stay and stats.ttest_1samp(every[:, i].sum(1), 0).statistic > -1:
                stay = [max(range(o.K), key=lambda k: float(every[:, i, k].mean()))]
            self.saved[i] = self.share * sum(float(every[:, i, k].mean()) for k in stay)
            self._fill(matrix, [matrix.singular[k] for k in stay], [self.share] * len(stay))
            matrix.count += len(stay)
            matrix.dropped = [k for k in range(o.K) if k not in stay]

    def _candidates(self, every: Tensor) -> tuple[list[tuple[float, int, int]], set[tuple[int, int]]]:
        """What may stay, with its credit, and what else may, where the questions come again."""
        alpha, (_, matrices, K) = self.settings.alpha, every.shape
        candidates, undecided = [], set()
        for i in range(matrices):
            here = [k for k in range(K) if every[:, i, k].any()]
            tests = {k: stats.ttest_1samp(every[:, i, k], 0, alternative="greater") for k in here}
            whole = bool(here) and stats.ttest_1samp(every[:, i].sum(1), 0, alternative="greater").pvalue < alpha / 2
            alone = True
            for place, k in enumerate(sorted(here, key=lambda k: float(tests[k].pvalue))):
                alone = alone and tests[k].pvalue < alpha / 2 / (K - place)
                if alone or (whole and tests[k].statistic > 1):
                    candidates.append((float(every[:, i, k].mean()), i, k))
                if whole and tests[k].statistic > -1:
                    undecided.add((i, k))
        return candidates, undecided

    def _take_back(self) -> None:
        """Components along what was dropped, where the loss falls that way by Holm's procedure at α/2."""
        o = self.settings
        every = torch.tensor(self.of_dropped, dtype=torch.float64)
        for i, matrix in enumerate(self.matrices):
            asked = matrix.dropped if self.of_dropped else []
            chances = {k: stats.ttest_1samp(every[:, i, k], 0, alternative="greater").pvalue for k in asked}
            back = []
            for place, k in enumerate(sorted(chances, key=lambda k: chances[k])):
                if len(back) == place and chances[k] < o.alpha / 2 / (o.K - place):
                    back.append(k)
            before = matrix.live
            for k in sorted(back):
                self._birth(matrix, matrix.singular[k][2], before, len(before) + len(back))
                self.births.pop()  # it is no birth
            dropped = [matrix.singular[k] for k in matrix.dropped if k not in back][: o.unused]
            for side, sizes in ((0, len(matrix.u[0])), (2, len(matrix.v[0]))):
                random = _random(o.seed, matrix.index, "next u" if side == 0 else "next v", o.unused, sizes)
                found = [direction[side] for direction in dropped] + random[len(dropped) :]
                matrix.u, matrix.v = (found, matrix.v) if side == 0 else (matrix.u, found)
            matrix.p = [torch.zeros_like(u) for u in matrix.u]
            matrix.q = [torch.zeros_like(v) for v in matrix.v]
            matrix.heads, matrix.flips = [0] * o.unused, [0] * o.unused

    def _squeeze(self, held_out: Callable[[int], Sequence[Tensor]]) -> None:
        """Take the smallest directions away that save no more than a thousandth together, where growth ends.

        If the others cost loss, it is worked out how much of them the run ends with.
        """
        _, questions, reach = self._shares()
        parts = self._parts()
        sizes = [(float(size), i, k) for i, found in enumerate(parts) for k, (_, size, _) in enumerate(found)]
        small = self._smallest(sizes, 0.05)
        if not (questions and small):
            return
        halved = {*small}
        before, answers = self._answers_at_half(halved, sizes, parts, questions, held_out)
        of_large = [{at: credit for at, credit in one.items() if at not in halved} for one in answers]
        if reach and self._together(of_large, "less"):
            self.strength = 0.5
            self._next_order()
            large = [one for one in sizes if one[1:] not in halved]
            at_half = [self._saved_along(large, parts, held_out) for _ in range(reach)]
            missing, over = (sum(sum(one.values()) for one in every) / len(every) for every in (at_half, of_large))
            self.strength, self.left = 1.0, 0.5 if missing <= 0 else 0.5 + 0.5 * missing / (missing - over)
        self._take_away(self._needless(small, answers), parts, before)

    def _smallest(self, sizes: Sequence[tuple[float, int, int]], share: float) -> list[tuple[int, int]]:
        """The smallest directions, with this share of Σ σ² together, the smallest first."""
        total, small, together = sum(size**2 for size, _, _ in sizes), [], 0.0
        for size, i, k in sorted(sizes):
            together += size**2
            if together <= share * total:
                small.append((i, k))
        return small

    def _needless(
        self, small: Sequence[tuple[int, int]], answers: Sequence[dict[tuple[int, int], float]]
    ) -> set[tuple[int, int]]:
        gone: list[tuple[int, int]] = []
        least = 0.0
        for direction in small:
            together = sum(one[place] for place in [*gone, direction] for one in answers) / len(answers)
            if together <= least + 0.001 * max(sum(self.saved), 0.0):
                gone.append(direction)
                least = min(least, together)
        return {*gone}

    def _squeeze_early(self, held_out: Callable[[int], Sequence[Tensor]]) -> None:
        """Take away all that does not save loss, if all updates together cost some; else small ones, if they do."""
        o, (_, _, reach) = self.settings, self._shares()
        parts = self._parts()
        sizes = [(float(size), i, k) for i, found in enumerate(parts) for k, (_, size, _) in enumerate(found)]
        self._next_order()
        whole = [self._saved_along(sizes, parts, held_out) for _ in range(reach)]
        if not self._together(whole, "less"):
            small = self._smallest(sizes, 0.01)
            of_small = [{at: one[at] for at in small} for one in whole]
            if small and self._together(of_small, "less"):
                before = [matrix.slots for matrix in self.matrices]
                self._take_away(self._needless(small, whole), parts, before)
            return
        all_of_them = {(i, k) for _, i, k in sizes}
        before, answers = self._answers_at_half(all_of_them, sizes, parts, o.questions, held_out)
        slots = max(o.K, *(k + 1 for matrix in self.matrices for k, c in enumerate(before[matrix.index]) if c))
        every = torch.zeros(len(answers), len(parts), slots, dtype=torch.float64)
        for batch, one in enumerate(answers):
            for (i, k), credit in one.items():
                every[batch, i, k] = credit
        stay = {(i, k) for _, i, k in self._candidates(every)[0]}
        for i, found in enumerate(parts):
            best = max(range(len(found)), key=lambda k, i=i: float(every[:, i, k].mean()), default=None)
            is_empty = not any((i, k) in stay for k in range(len(found)))
            if best is not None and is_empty and stats.ttest_1samp(every[:, i].sum(1), 0).statistic > -1:
                stay.add((i, best))
        self._take_away(all_of_them - stay, parts, before)

    def _parts(self) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
        """Singular directions of every matrix."""
        parts = []
        for matrix in self.matrices:
            U, S, Vh = torch.linalg.svd(sum((torch.outer(c.b, c.a) for c in matrix.live), 0 * matrix.W0))
            found = [k for k in range(len(matrix.live)) if S[k] > 1e-12]  # what is just born has no length yet
            parts.append([(U[:, k], S[k], Vh[k]) for k in found])
        return parts

    def _answers_at_half(
        self,
        halved: set[tuple[int, int]],
        sizes: Sequence[tuple[float, int, int]],
        parts: Sequence[Sequence[tuple[Tensor, Tensor, Tensor]]],
        questions: int,
        held_out: Callable[[int], Sequence[Tensor]],
    ) -> tuple[list[Any], list[dict[tuple[int, int], float]]]:
        """The slots of before, and what batches say of all directions, with these at half strength."""
        before = [matrix.slots for matrix in self.matrices]
        self._next_order()
        for i, matrix in enumerate(self.matrices):
            self._fill(matrix, parts[i], [0.5 if (i, k) in halved else 1.0 for k in range(len(parts[i]))])
        return before, [self._saved_along(sizes, parts, held_out) for _ in range(questions)]

    def _take_away(
        self,
        gone: set[tuple[int, int]],
        parts: Sequence[Sequence[tuple[Tensor, Tensor, Tensor]]],
        before: Sequence[Any],
    ) -> None:
        """Let what stays begin anew in matrices that lose something; the others are as before."""
        for i, matrix in enumerate(self.matrices):
            stay = [part for k, part in enumerate(parts[i]) if (i, k) not in gone]
            matrix.slots = before[i]
            self.squeezed[i] += len(parts[i]) - len(stay)
            if len(stay) < len(parts[i]):
                self._fill(matrix, stay, [1.0] * len(stay))
                matrix.count += len(stay)

    def _saved_along(
        self,
        sizes: Sequence[tuple[float, int, int]],
        parts: Sequence[Sequence[tuple[Tensor, Tensor, Tensor]]],
        held_out: Callable[[int], Sequence[Tensor]],
    ) -> dict[tuple[int, int], float]:
        """What each of these directions saves on the next held-out batch, by matrix and place."""
        G = self._next(held_out)
        s = self.settings.s
        return {(i, k): -s * size * float(parts[i][k][0] @ G[i] @ parts[i][k][2]) for size, i, k in sizes}

    def _fill(self, matrix: Matrix, parts: Sequence[tuple[Tensor, Tensor, Tensor]], shares: Sequence[float]) -> None:
        """Make components of `shares` of these directions; their averages of squares are the mean of those before."""
        live = matrix.live
        v_b, v_a = (
            (sum(getattr(c, name) for c in live) / len(live) for name in ("v_b", "v_a")) if live else matrix.idle
        )
        matrix.slots = [
            Component(
                b=math.sqrt(1.5 * len(parts)) * share * size * u,
                a=v / math.sqrt(1.5 * len(parts)),
                born=matrix.count + k,
                m_b=torch.zeros_like(u),
                v_b=v_b.clone(),
                m_a=torch.zeros_like(v),
                v_a=v_a.clone(),
            )
            for k, ((u, size, v), share) in enumerate(zip(parts, shares, strict=True))
        ] + [None] * (self.settings.S - len(parts))
        matrix.idle = [v_b.clone(), v_a.clone()]

    def _adam(self, c: Component, g_b: Tensor, g_a: Tensor, lr: float, t: int) -> None:
        c.before = (c.b.clone(), c.a.clone())
        for p, m, v, g in ((c.b, c.m_b, c.v_b, g_b), (c.a, c.m_a, c.v_a, g_a)):
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            p.sub_(lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))

    def _read(self, G: Sequence[Tensor], *, before: bool) -> None:
        """z of every matrix, and −⟨G, Δ⟩/‖Δ‖ of every component.

        A training batch saw the components before the optimizer step. The norm is that of the last look.
        """
        s, row, newborn = self.settings.s, [], []
        for matrix, g in zip(self.matrices, G, strict=True):
            own = []
            for c in matrix.live:
                if c.move is None or c.at is None:
                    continue
                b, a = c.before if before else (c.b, c.a)
                D = s * (torch.outer(c.move[0], a) + torch.outer(b, c.move[1]))
                norm = (s * (torch.outer(c.move[0], c.at[1]) + torch.outer(c.at[0], c.move[1]))).norm()
                if norm > 0:
                    own.append(float(-(g * D).sum() / norm))
            row.append(([float(-u @ g @ v) for u, v in zip(matrix.u, matrix.v, strict=True)], own))
            newborn.append(any(c.move is None for c in matrix.live))
        self.pending.append(row)
        self.newborn.append(newborn)

    def _weigh(self) -> None:
        o = self.settings
        for row, newborn in zip(self.pending, self.newborn, strict=True):
            for matrix, (z, _) in zip(self.matrices, row, strict=True):
                matrix.steepness = max(z)
            every = [x for _, own in row for x in own]
            if not every and any(newborn):
                continue
            everywhere = sum(every) / len(every) if every else 0.0
            for matrix, (z, own), new in zip(self.matrices, row, newborn, strict=True):
                if new:
                    continue
                rival = max(sum(own) / len(own) if own else everywhere, everywhere)
                for k, steepness in enumerate(z):
                    matrix.flips[k] += 1
                    matrix.heads[k] += steepness > 0 and steepness > o.kappa * rival
        self.pending, self.newborn = [], []
        for matrix in self.matrices:
            before, money = matrix.live, [evidence(*won) for won in zip(matrix.heads, matrix.flips, strict=True)]
            found = []
            is_squeezed = self._is_squeezed_early() or (self.t >= o.last and self._shares()[1])
            for _ in range(0 if is_squeezed else min(o.S, o.unused)):
                k = max(range(o.unused), key=lambda k: money[k])
                if sum(money) / o.unused >= 1 / o.alpha:
                    money[k] = 1.0
                    found.append(k)
            for k in found:
                self._birth(matrix, matrix.v[k], before, min(len(before) + len(found), o.S))
                matrix.p[k], matrix.q[k] = torch.zeros_like(matrix.p[k]), torch.zeros_like(matrix.q[k])
                matrix.heads[k] = matrix.flips[k] = 0

    def _birth(self, matrix: Matrix, v: Tensor, others: list[Component], together: int) -> None:
        """A component along v, of `together` that the matrix then trains."""
        o = self.settings
        if None in matrix.slots:
            slot = matrix.slots.index(None)
        else:
            slot = min(range(o.S), key=lambda k: matrix.slots[k].born)
            old = matrix.slots[slot]
            matrix.merged.append(o.s * torch.outer(old.b, old.a))
            matrix.slots[slot] = None
        idle_b, idle_a = matrix.idle or (torch.zeros_like(matrix.u[0]), torch.zeros_like(v))
        matrix.slots[slot] = Component(
            b=torch.zeros_like(matrix.u[0]),
            a=v / math.sqrt(1.5 * together),
            born=matrix.count,
            m_b=torch.zeros_like(matrix.u[0]),
            v_b=torch.stack([c.v_b for c in others] or [idle_b]).mean(0),
            m_a=torch.zeros_like(v),
            v_a=torch.stack([c.v_a for c in others] or [idle_a]).mean(0),
        )
        matrix.count += 1
        self.births.append((self.t, matrix.name))

    def _aim(self, matrix: Matrix) -> None:
        """u and v: the averages, outside of the spans that the components had at the last look, and of one another."""
        looked = [c.at for c in matrix.live if c.at is not None]
        spans = [b for b, _ in looked if b.any()], [a for _, a in looked]
        for directions, averages, span in ((matrix.u, matrix.p, spans[0]), (matrix.v, matrix.q, spans[1])):
            for k, average in enumerate(averages):
                directions[k] = _outside(average, [*span], directions[:k], directions[k])


def _rows(credits: Any) -> list[list[float]]:
    return [[*credits.values()]] if isinstance(credits, dict) else credits


def _random(seed: int, index: int, purpose: str, count: int, size: int) -> list[Tensor]:
    drawn = torch.randn(count, size, generator=component_generator(seed, 1, index, purpose)).double()
    found: list[Tensor] = []
    for row in drawn:
        found.append(_outside(row, [], found, row))
    return found


def _outside(direction: Tensor, span: list[Tensor], earlier: list[Tensor], otherwise: Tensor) -> Tensor:
    if span:
        basis = torch.linalg.qr(torch.stack([x / x.norm() for x in span], 1))[0]
        direction = direction - basis @ (basis.T @ direction)
    for other in earlier:
        direction = direction - (other @ direction) * other
    return direction / direction.norm() if direction.norm() > 0 else otherwise


def evidence(heads: int, flips: int) -> float:
    """E, the mean over θ of (2θ)^heads (2(1 − θ))^tails, on the library's grid."""
    thetas = [0.5 + k / 400 for k in range(1, 200)]
    return sum((2 * x) ** heads * (2 - 2 * x) ** (flips - heads) for x in thetas) / len(thetas)
