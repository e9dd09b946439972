"""Growth by evidence in the notation of ../docs/method.md: slow, dense, one loop. The library is held equal to it.

Every G is formed, m×n. Shared with the library are the random first directions alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import normalize

from aroma.reset import component_generator


@dataclass
class Settings:
    s: float = 4.0
    alpha: float = 0.05
    kappa: float = 1.0
    beta: float = 0.97
    S: int = 8
    first: int = 8
    interval: int = 4
    held_out_interval: int = 9
    first_pass: int | None = None
    seed: int = 0


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
    W0: Tensor
    slots: list[Component | None]
    u: Tensor
    v: Tensor
    p: Tensor
    q: Tensor
    heads: int = 0
    flips: int = 0
    merged: list[Tensor] = field(default_factory=list)

    @property
    def live(self) -> list[Component]:
        return [c for c in self.slots if c is not None]

    def W(self, s: float) -> Tensor:
        return (
            self.W0
            + s * sum((torch.outer(c.b, c.a) for c in self.live), torch.zeros_like(self.W0))
            + sum(self.merged, torch.zeros_like(self.W0))
        )


class Reference:
    """The rule, driven by `step(G of a training batch, G of a held-out batch where one is due)`."""

    def __init__(self, weights: dict[str, Tensor], settings: Settings) -> None:
        self.settings, self.t = settings, 0
        self.births: list[tuple[int, str]] = []
        self.matrices = []
        for index, (name, W0) in enumerate(weights.items()):
            m, n = W0.shape
            slots: list[Component | None] = [None] * settings.S
            u, v = (_random(settings.seed, index, purpose, size).to(W0) for purpose, size in (("u", m), ("v", n)))
            self.matrices.append(
                Matrix(name, W0, slots, normalize(u, dim=0), normalize(v, dim=0), W0.new_zeros(m), W0.new_zeros(n))
            )
        self.pending: list[list[tuple[float, list[float]]]] = []
        self.newborn: list[list[bool]] = []

    # One optimizer step: Adam on the live components, then the rule.
    def step(self, G: Sequence[Tensor], lr: float, held_out: Callable[[], Sequence[Tensor]]) -> None:
        o = self.settings
        for matrix, g in zip(self.matrices, G, strict=True):
            for c in matrix.live:
                self._adam(c, o.s * g @ c.a, o.s * g.T @ c.b, lr, self.t + 1)
        decides = o.first_pass is None or self.t < o.first_pass
        if not decides and (self.t - o.first_pass) % o.held_out_interval == 0:
            self._read(held_out(), before=False)
        if decides:
            self._read(G, before=True)
        for matrix, g in zip(self.matrices, G, strict=True):
            matrix.p = o.beta * matrix.p - (1 - o.beta) * g @ matrix.v
            matrix.q = o.beta * matrix.q - (1 - o.beta) * g.T @ matrix.u
            self._aim(matrix)
        self.t += 1
        if self.t < o.first or self.t % o.interval:
            return
        if self.t == o.first:
            self.pending, self.newborn = [], []
            for matrix in self.matrices:
                self._birth(matrix)
        else:
            self._weigh()
        for matrix in self.matrices:
            for c in matrix.live:
                c.move = None if c.at is None else (c.b - c.at[0], c.a - c.at[1])
                c.at = (c.b.clone(), c.a.clone())

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
            row.append((float(-matrix.u @ g @ matrix.v), own))
            newborn.append(any(c.move is None for c in matrix.live))
        self.pending.append(row)
        self.newborn.append(newborn)

    def _weigh(self) -> None:
        o = self.settings
        for row, newborn in zip(self.pending, self.newborn, strict=True):
            every = [x for _, own in row for x in own]
            if not every:
                continue
            everywhere = sum(every) / len(every)
            for matrix, (z, own), new in zip(self.matrices, row, newborn, strict=True):
                if new:
                    continue
                rival = max(sum(own) / len(own) if own else everywhere, everywhere)
                matrix.flips += 1
                matrix.heads += z > 0 and z > o.kappa * rival
        self.pending, self.newborn = [], []
        for matrix in self.matrices:
            if evidence(matrix.heads, matrix.flips) >= 1 / o.alpha:
                self._birth(matrix)

    def _birth(self, matrix: Matrix) -> None:
        o = self.settings
        if None in matrix.slots:
            slot = matrix.slots.index(None)
        else:
            slot = min(range(o.S), key=lambda k: matrix.slots[k].born)
            old = matrix.slots[slot]
            matrix.merged.append(o.s * torch.outer(old.b, old.a))
            matrix.slots[slot] = None
        others = matrix.live
        mean = lambda values, like: sum(values) / len(values) if values else torch.zeros_like(like)  # noqa: E731
        matrix.slots[slot] = Component(
            b=torch.zeros_like(matrix.u),
            a=matrix.v / math.sqrt(3),
            born=len(self.births),
            m_b=torch.zeros_like(matrix.u),
            v_b=mean([c.v_b for c in others], matrix.u).clone(),
            m_a=torch.zeros_like(matrix.v),
            v_a=mean([c.v_a for c in others], matrix.v).clone(),
        )
        matrix.p, matrix.q = torch.zeros_like(matrix.p), torch.zeros_like(matrix.q)
        matrix.heads = matrix.flips = 0
        self.births.append((self.t, matrix.name))

    def _aim(self, matrix: Matrix) -> None:
        """u and v: the averages, outside of the spans that the components had at the last look."""
        looked = [c.at for c in matrix.live if c.at is not None]
        matrix.u = _outside(matrix.p, [b for b, _ in looked if b.any()], matrix.u)
        matrix.v = _outside(matrix.q, [a for _, a in looked], matrix.v)


def _random(seed: int, index: int, purpose: str, size: int) -> Tensor:
    return torch.randn(1, size, generator=component_generator(seed, 1, index, purpose))[0]


def _outside(direction: Tensor, span: list[Tensor], otherwise: Tensor) -> Tensor:
    if span:
        basis = torch.linalg.qr(torch.stack([x / x.norm() for x in span], 1))[0]
        direction = direction - basis @ (basis.T @ direction)
    return direction / direction.norm() if direction.norm() > 0 else otherwise


def evidence(heads: int, flips: int) -> float:
    """E, the mean over θ of (2θ)^heads (2(1 − θ))^tails, on the library's grid."""
    thetas = [0.5 + k / 400 for k in range(1, 200)]
    return sum((2 * x) ** heads * (2 - 2 * x) ** (flips - heads) for x in thetas) / len(thetas)
