"""Growth by evidence: the library against the dense reference, and what the rule promises."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats
from torch import Tensor, nn

import evidence_runs
from aroma import AromaConfig, aroma_layers, attach
from aroma.algorithm.budget import FEWEST_OPENING, Budget
from aroma.algorithm.duels import directions_that_convince, flips_to_birth, log_evidence, log_mean
from aroma.algorithm.evidence import FIRST_STEP, EvidenceRule, EvidenceSettings
from aroma.algorithm.questions import (
    SMALL_SHARE,
    candidates,
    directions_to_drop,
    directions_to_keep,
    keep_one_if_undecided,
    saves_loss,
    smallest_directions,
    strength_of_least_loss,
    undecided_directions,
    upper_tail,
)
from aroma.directions import Directions, singular_directions
from aroma.errors import ConfigError
from aroma.slots import row_length
from aroma.tuner.fused import Probe
from evidence_runs import STEPS, loss_of, net, rows, trainable
from reference_evidence import Reference, Settings, evidence
from test_controller import Watch

WIDTH, LAYERS = 16, 4


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64) for _ in range(LAYERS))
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers:
            layer.weight.data = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) / WIDTH**0.5

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.5 * torch.tanh(layer(x))
        return x


def planted(ranks: list[int], seed: int = 0, examples: int = 400, noise: float = 0.1) -> tuple[Net, Tensor, Tensor]:
    """Return a base, inputs, and what a teacher with updates of these ranks makes of them."""
    generator = torch.Generator().manual_seed(seed + 1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base, teacher = Net(seed), Net(seed)
    for layer, r in zip(teacher.layers, ranks, strict=True):
        if r:
            layer.weight.data += torch.linalg.qr(draw(WIDTH, r))[0] @ torch.linalg.qr(draw(WIDTH, r))[0].T
    x = draw(examples, WIDTH)
    with torch.no_grad():
        y = teacher(x)
    return base, x, y + noise * draw(*y.shape)


def batches(x: Tensor, y: Tensor, steps: int, size: int = 8, seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(x[i], y[i]) for i in (torch.randint(0, len(x), (size,), generator=generator) for _ in range(steps))]


def grown(base: Net, **fields: Any) -> Any:
    fields = {"growth": "evidence", "target_modules": r"layers\.\d+", "component_seed": 0, **fields}
    return get_peft_model(base, AromaConfig(**fields), autocast_adapter_dtype=False)


def adam(model: nn.Module, lr: float = 1e-2) -> torch.optim.Adam:
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)


@pytest.mark.parametrize(
    ("slots", "kappa", "noise", "holds_out", "first_pass", "lr", "way", "trial"),
    [
        pytest.param(3, 0.25, 0.6, False, None, 1e-2, (0, 1), 20, id="plain", marks=pytest.mark.slow),
        pytest.param(2, 0.1, 0.6, False, None, 1e-2, (0, 0.5), 20, id="merges"),
        pytest.param(1, 0.1, 0.1, False, None, 1e-2, (0, 1), 20, id="one slot", marks=pytest.mark.slow),
        pytest.param(3, 0.1, 0.2, True, 60, 1e-2, (0, 1), 20, id="held out later"),
        pytest.param(4, 0.02, 0.2, True, 100, 1e-2, (0, 1), 40, id="little is held out"),
        pytest.param(3, 0.1, 0.2, True, 15, 1e-2, (0, 1), 20, id="held out always", marks=pytest.mark.slow),
        pytest.param(9, 0.02, 0.02, False, None, 3e-3, (0, 1), 20, id="more slots than the trial has components"),
        pytest.param(
            3, 0.25, 0.6, True, None, 1e-2, (0, 0.5), 20, id="held out for the trial", marks=pytest.mark.slow
        ),
        pytest.param(3, 0.02, 1.5, True, 80, 1e-2, (0, 1), 20, id="not downhill", marks=pytest.mark.slow),
        pytest.param(3, 0.1, 0.1, True, 100, 6e-2, (1, 0.5), 20, id="swings", marks=pytest.mark.slow),
        pytest.param(3, 0.1, 0.2, False, None, 8e-2, (2, 0.5), 20, id="swings for long", marks=pytest.mark.slow),
        pytest.param(3, 0.1, 0.2, True, 100, 8e-2, (2, 0.5), 20, id="swings, held out"),
        pytest.param(8, 0.02, 0.7, True, 160, 1e-2, (0, 1), 20, id="learnt by heart"),
        pytest.param(8, 0.02, 0.1, True, 160, 5e-3, (0, 1), 20, id="small ones go early", marks=pytest.mark.slow),
        pytest.param(8, 0.02, 5.0, True, 80, 3e-3, (0, 1), 20, id="nothing is known"),
    ],
)
def test_a_whole_run_is_that_of_the_dense_reference(
    slots: int,
    kappa: float,
    noise: float,
    holds_out: bool,
    first_pass: int | None,
    lr: float,
    way: tuple[int, float],
    trial: int,
) -> None:
    """`way`: how often the trial is doubled, and which share of the updates is judged.

    After a trial of 40 steps the nine batches that are held out decide how long a direction remembers.
    """
    steps, few = 400 if first_pass == 15 or way == (1, 0.5) else 200, trial == 40
    steps = 800 if first_pass == 160 else steps
    base, x, y = planted([0, 4, 1, 3], noise=noise)
    held = batches(x[300:], y[300:], 9 if few else 60, seed=9)
    data = batches(x[:300], y[:300], steps)
    weights = {f"layers.{i}": layer.weight.detach().clone() for i, layer in enumerate(base.layers)}
    given = {"S": slots, "kappa": kappa, "first_pass": first_pass, "holds_out": holds_out, "last": steps - trial}
    given |= {"steps": steps}
    given |= {"trial": trial, "questions": 9 if few else 10, "held_out_batches": len(held) if holds_out else None}
    alpha = 0.2 if first_pass == 15 else 0.05  # few batches duel then
    settings = Settings(alpha=alpha, **given)
    reference = Reference(weights, settings)
    net = Net()

    def gradients(batch: tuple[Tensor, Tensor]) -> list[Tensor]:
        for layer, matrix in zip(net.layers, reference.matrices, strict=True):
            layer.weight = nn.Parameter(matrix.W(4.0 * reference.strength))
        loss = (net(batch[0]) - batch[1]).square().mean()
        return [*torch.autograd.grad(loss, [layer.weight for layer in net.layers])]

    assert few == (holds_out and alpha ** (1 / (9 * len(held))) < 1 - 1 / trial)
    model = grown(base, slots=slots, duel_factor=kappa, significance=alpha, trial_share=trial / steps)
    optimizer = adam(model, lr)
    events = []
    growth = attach(
        model,
        optimizer,
        total_steps=steps,
        on_event=events.append,
        steps_per_pass=first_pass,
        growth_batches=held if holds_out else None,
        growth_loss=(lambda model, batch: (model(batch[0]) - batch[1]).square().mean()) if holds_out else None,
    )
    for batch in data:
        optimizer.zero_grad()
        (model(batch[0]) - batch[1]).square().mean().backward()
        optimizer.step()
        reference.step(gradients(batch), lr, lambda number: gradients(held[number % len(held)]))
    births = [(event.step, event.module) for event in events if event.kind == "born" and event.step > 8]
    assert births == reference.births
    assert len(births) > 1
    assert growth.controller.rule.doublings == reference.doubled
    assert (reference.doubled, reference.share) == way
    assert reference.known == (noise < 5)
    squeezed = {event.module: event.rank for event in events if event.kind == "squeezed"}
    assert growth.controller.rule.squeezed == sum(reference.squeezed)
    assert {m.name for m, n in zip(reference.matrices, reference.squeezed, strict=True) if n} == {*squeezed}
    assert bool(squeezed) == (steps > 200), "in a shorter run there is no room for more questions"
    assert growth.controller.rule.strength == pytest.approx(reference.left)
    early = {event.step for event in events if event.kind == "squeezed" and event.step < steps - trial}
    assert early == ({324} if steps == 800 else set()), "where two fifths of growth are over, in a long run"
    assert (0.5 < reference.left < 1) == (steps == 800)
    most = [len(matrix.live) for matrix in reference.matrices]
    assert slots <= 8 or max(most) == slots, "as many train as there are slots, more than in the trial"
    settled = {event.module: event.rank for event in events if event.kind == "settled"}
    assert len(settled) == LAYERS
    assert min(settled.values()) < slots or slots == 1
    for matrix, expected in zip(growth.controller.modules, reference.matrices, strict=True):
        b, a = matrix.pair
        B, A = matrix.finished
        assert B.any(0).all(), "a component was merged before it had trained"
        update = B @ A + 4.0 * b @ a
        torch.testing.assert_close(update.detach(), expected.W(4.0) - expected.W0, rtol=1e-6, atol=1e-9)
        assert (matrix.heads, matrix.flips) == (expected.heads, expected.flips)
        assert matrix.steepness == pytest.approx(expected.steepness)
    told = [event for event in events if event.kind == "checked" and event.step > 80]
    assert told
    assert all(event.steepness for event in told)


@pytest.mark.parametrize(
    ("given", "size", "slots", "in_trial"),
    [
        (None, 64, 16, 8),
        (None, 20, 16, 8),
        (None, 19, 15, 8),
        (None, 10, 8, 8),
        (None, 8, 8, 8),
        (3, 64, 3, 3),
        (24, 64, 24, 8),
    ],
)
def test_a_matrix_has_twice_as_many_slots_as_its_trial_has_components(
    given: int | None, size: int, slots: int, in_trial: int
) -> None:
    """Unless it is small: four directions that it does not use have to find room beside them."""
    model = grown(nn.Sequential(nn.Linear(64, size, bias=False)), target_modules=["0"], slots=given)
    optimizer = adam(model)
    growth = attach(model, optimizer, total_steps=100, steps_per_pass=None)
    for _ in range(9):
        optimizer.zero_grad()
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()
    (matrix,) = growth.controller.modules
    b, a = matrix.pair
    assert (b.shape, a.shape) == ((size, slots), (slots, 64))
    assert len(matrix.slots) == matrix.component_count == in_trial


def test_evidence_is_a_bet_that_wins_only_against_chance() -> None:
    assert flips_to_birth(0.05) == 7
    assert log_evidence(6, 6) < torch.log(torch.tensor(20.0)) <= log_evidence(7, 7)
    for heads, flips in ((0, 0), (3, 9), (9, 10)):
        assert torch.tensor(log_evidence(heads, flips)).exp() == pytest.approx(evidence(heads, flips))
    # Fair coins, watched for 200 flips: no more than α of them ever convince.
    generator = torch.Generator().manual_seed(0)
    heads = torch.randint(0, 2, (2000, 200), generator=generator).cumsum(1)
    convinced = [any(log_evidence(int(h), t + 1) >= 2.996 for t, h in enumerate(row)) for row in heads]
    assert sum(convinced) / 2000 < 0.05


def places(chosen: np.ndarray) -> list[list[int]]:
    """Return which directions of every matrix are chosen, of (matrices, S)."""
    return [row.nonzero()[0].tolist() for row in chosen]


@pytest.mark.parametrize(("significance", "kept"), [(1e-20, [0]), (0.05, [0]), (0.95, [0, 1])])
def test_whatever_the_significance_what_costs_loss_never_stays(significance: float, kept: list[int]) -> None:
    # Surely useful, useful on average, harmful on average, surely harmful; as a whole they cost loss.
    noise = np.tile([1.0, -1.0], 8)
    credits = np.stack([1 + 1e-9 * noise, 0.3 + noise, -0.3 + noise, -2 + 1e-9 * noise], 1)[:, None, :]
    assert places(directions_to_keep(credits, significance)) == [kept]


def test_what_saves_less_than_a_quarter_of_the_average_goes_however_sure_it_is() -> None:
    # On average over the eight directions that there are, those that cost included, 0.5 is saved.
    saved = np.array([[2.0, 1.0, 0.126, -3.0], [0.75, 0.124, np.nan, np.nan], [-1.0, -1.0, np.nan, np.nan]])
    credits = saved + 1e-6 * np.tile([1.0, -1.0], 8)[:, None, None]
    assert candidates(np.nan_to_num(credits), 0.05).sum() == 5
    assert places(directions_to_keep(credits, 0.05)) == [[0, 1, 2], [0], []]
    assert (directions_to_keep(1e3 * credits, 0.05) == directions_to_keep(credits, 0.05)).all(), "no scale is told"


@pytest.mark.parametrize("significance", [0.05, 0.2])
@pytest.mark.parametrize(("batches_held_out", "is_short"), [(None, False), (7, True), (200, False)])
def test_a_direction_remembers_the_trial_but_not_what_will_be_asked_again(
    batches_held_out: int | None, is_short: bool, significance: float
) -> None:
    x = torch.zeros(1, WIDTH, dtype=torch.float64)

    def memory(**fields: Any) -> float:
        model = grown(Net(), significance=significance, **fields)
        held = None if batches_held_out is None else [(x, x)] * batches_held_out
        of_run: dict[str, Any] = {"total_steps": 1500, "steps_per_pass": 1500}
        if held is not None:
            of_run |= {"growth_batches": held, "growth_loss": lambda model, batch: model(batch[0]).sum()}
        growth = attach(model, adam(model), **of_run)
        matrices: Any = growth.controller.matrices
        return matrices.memory

    assert memory(probe_memory=0.5) == 0.5
    found = memory()
    assert (found < 1 - 1 / 150) == is_short
    if is_short:  # one batch of seven every nine steps
        assert found**63 == pytest.approx(significance)
    else:
        assert found == 1 - 1 / 150


def test_a_matrix_keeps_its_best_direction_unless_its_update_costs_loss() -> None:
    credits = np.random.default_rng(0).normal(size=(8, 400, 4)) + np.linspace(-0.6, 0.2, 400)[:, None]
    credits[:, ::3, 3] = np.nan  # no such direction
    credits[:, ::40] = np.nan  # none at all
    t = stats.ttest_1samp(np.nansum(credits, 2), 0).statistic
    kept = places(keep_one_if_undecided(np.zeros((400, 4), bool), credits))
    spared = [place for place, directions in enumerate(kept) if directions]
    assert spared == [place for place in range(400) if place % 40 and t[place] > -1]
    assert 0.2 < len(spared) / 400 < 0.8
    for place in spared:
        assert kept[place] == [int(np.nanargmax(credits[:, place].mean(0)))]
    two = np.tile([False, False, True, True], (400, 1))
    assert (keep_one_if_undecided(two, credits) == two).all()


@pytest.mark.parametrize("significance", [0.01, 0.05, 0.3])
def test_the_trial_tests_the_directions_of_a_matrix_by_holms_procedure(significance: float) -> None:
    credits = np.random.default_rng(0).normal(size=(16, 500, 8)) + np.linspace(0, 1, 8)
    p = stats.ttest_1samp(credits, 0, alternative="greater").pvalue
    for row, found in zip(p, saves_loss(credits, significance), strict=True):
        order = np.argsort(row)
        passed = [row[k] < significance / (8 - place) for place, k in enumerate(order)]
        expected = order[: passed.index(False) if False in passed else 8]
        assert set(found.nonzero()[0]) == set(expected)


@pytest.mark.parametrize("degrees", [1, 2, 3, 7, 15, 30])
def test_chances_are_those_of_students_t(degrees: int) -> None:
    t = np.array([-np.inf, -2.0, 0.0, 0.3, 1.7, 4.0, 9.0, np.inf])
    np.testing.assert_allclose(upper_tail(t, degrees), stats.t.sf(t, degrees), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("significance", [0.01, 0.05, 0.3])
def test_weak_directions_are_candidates_where_all_of_them_together_save_loss(significance: float) -> None:
    generator = np.random.default_rng(0)
    credits = generator.normal(size=(16, 500, 8)) + generator.uniform(0, 0.4, (500, 1))
    whole = stats.ttest_1samp(credits.sum(2), 0, alternative="greater").pvalue < significance / 2
    weak = stats.ttest_1samp(credits, 0).statistic > 1
    assert 0.1 < whole.mean() < 0.9
    expected = (weak & whole[:, None]) | saves_loss(credits, significance / 2)
    assert (candidates(credits, significance) == expected).all()
    alone = saves_loss(credits, significance)[whole].sum()
    assert candidates(credits, significance)[whole].sum() > 1.5 * alone, "few of them show it by themselves"


@pytest.mark.parametrize("significance", [0.01, 0.3])
def test_of_a_matrix_that_surely_saves_loss_all_is_undecided_but_what_costs_some(significance: float) -> None:
    generator = np.random.default_rng(0)
    credits = generator.normal(size=(16, 500, 8)) + generator.uniform(0, 0.4, (500, 1))
    whole = stats.ttest_1samp(credits.sum(2), 0, alternative="greater").pvalue < significance / 2
    expected = (stats.ttest_1samp(credits, 0).statistic > -1) & whole[:, None]
    assert (undecided_directions(credits, significance) == expected).all()
    missing = np.concatenate([credits, np.full((16, 500, 1), np.nan)], axis=2)
    assert (undecided_directions(missing, significance)[..., :8] == expected).all()
    assert not undecided_directions(missing, significance)[..., 8].any(), "there is no such direction"


def test_where_nothing_is_to_be_learnt_hardly_any_matrix_has_something_undecided() -> None:
    noise = np.random.default_rng(0).normal(size=(16, 4000, 8))
    assert 0.02 < undecided_directions(noise, 0.05).any(1).mean() < 0.03


@pytest.mark.parametrize(("steps", "is_long"), [(400, False), (2_000, True)])
def test_what_is_undecided_stays_in_a_run_that_asks_about_all_once_more(steps: int, is_long: bool) -> None:
    """The large direction of a matrix surely saves, the small one is as near to its error as it can be."""
    matrices = Unsure()
    squeezed_run(matrices, steps)
    assert matrices.kept == [[[0, 1], [0]] if is_long else [[0], [0]]]


def test_a_matrix_that_needs_nothing_keeps_something_with_probability_alpha() -> None:
    noise = np.random.default_rng(0).normal(size=(16, 4000, 8))
    assert 0.03 < saves_loss(noise, 0.05).any(1).mean() < 0.06
    assert 0.03 < candidates(noise, 0.05).any(1).mean() < 0.06
    assert (noise.mean(0) > 1.7531 * noise.std(0, ddof=1) / 4).any(1).mean() > 0.3, "each direction by itself at 5 %"


def test_the_directions_of_a_matrix_share_one_stake() -> None:
    twenty = math.log(20)
    assert log_mean([math.log(80), 0, 0, -9]) > twenty > log_mean([math.log(76), 0, 0, -9])
    assert directions_that_convince([math.log(76), 0.0, 0.0, -9.0], twenty) == []
    assert directions_that_convince([0.0, math.log(1e3), math.log(70), math.log(1e4)], twenty) == [3, 1]
    # Fair coins in four directions, watched for 100 flips: no more than α of the matrices ever convince.
    generator = torch.Generator().manual_seed(0)
    coins = torch.randint(0, 2, (1000, 100, 4), generator=generator).cumsum(1).tolist()
    convinced = [
        any(log_mean([log_evidence(heads, flips) for heads in row]) >= twenty for flips, row in enumerate(matrix, 1))
        for matrix in coins
    ]
    assert sum(convinced) / 1000 < 0.05


def test_an_update_of_a_lower_rank_has_no_further_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(2, 6, 4, generator=generator), torch.randn(2, 4, 5, generator=generator)
    b[0, :, 2:] = 0
    a[0, 2:] = 0  # as where max_components=2
    sizes = singular_directions(b.mT, a)[1]
    assert (sizes > 0).tolist() == [[True, True, False, False], [True] * 4]


def test_a_matrix_whose_slots_fill_it_is_no_rival_of_slope_zero() -> None:
    matrices = Directions([0], m=2, n=3, slots=2, like=torch.empty(0))
    known = torch.ones(1, 2, dtype=torch.bool)
    matrices.note_moves(torch.randn(1, 2, 2), torch.randn(1, 2, 3), known, scale=1.0)
    assert matrices.per_norm.isfinite().all()
    unused, moves = matrices.steepness(matrices.answers)
    assert unused.shape == (1, 0)
    assert moves.isnan().all()


@pytest.mark.parametrize("slots", [2, 8])
def test_a_matrix_moves_as_far_with_many_components_as_with_one(slots: int) -> None:
    """In its first optimizer step, with the same learning rate, where Adam's ε is next to nothing."""

    def first_moves(slots: int) -> list[Tensor]:
        base, x, y = planted([0, 4, 1, 3])
        model = grown(base, slots=slots)
        optimizer = adam(model)
        optimizer.param_groups[0]["eps"] = 1e-20
        attach(model, optimizer, total_steps=101)
        for batch in batches(x, y, FIRST_STEP + 1):
            optimizer.zero_grad()
            (model(batch[0]) - batch[1]).square().mean().backward()
            optimizer.step()
        pairs = [layer.pair("default") for layer in aroma_layers(model).values()]
        return [(b @ a).norm() for b, a in pairs]

    torch.testing.assert_close(first_moves(slots), first_moves(1), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("passes", [1.5, 3, 10])
@pytest.mark.parametrize(
    ("steps", "doublings", "quarters"),
    [
        *((steps, 0, 0) for steps in (75, *range(80, 200, 10), 320, 640, 1_000, 100_000)),
        *(
            (steps, *way)
            for steps in (300, 320, 640, 1_000, 100_000)
            for way in ((0, 2), (1, 2), (1, 4), (2, 4), (2, 5))
        ),
    ],
)
@pytest.mark.parametrize("doubts", [False, True])
def test_held_out_batches_are_a_small_share_of_a_run(
    steps: int, doublings: int, quarters: int, passes: float, doubts: bool
) -> None:
    """`quarters` of the questions are asked before those that decide what stays, where the updates swing."""
    trial = max(steps // 10, 16)
    first_pass, last_step = int(steps / passes), (steps - trial) // 4 * 4
    budget = Budget(trial, last_step)
    budget.asked = budget.questions + quarters * max(FEWEST_OPENING, budget.questions // 4)
    budget.holds_out = doubts
    if budget.may_doubt:
        budget.asked += budget.count("doubt")
    asked = budget.asked
    interval = budget.interval(first_pass, trial << doublings)
    assert interval is not None
    duelling = last_step - max(first_pass, trial << doublings)
    duels = math.ceil(duelling / interval)
    assert asked + duels <= 0.12 * steps
    assert interval >= 9
    if steps >= 200 and not quarters and not doubts:
        assert duels >= min(12, duelling // 9), "a birth takes seven"


class Answers:
    """Matrices, one of them, whose batches say the same whenever they are asked at the same strength."""

    def __init__(self, answers: dict[float, float]) -> None:
        self.answers, self.strength, self.judged, self.due = answers, 0.5, 0.0, 1
        self.matrices = [
            SimpleNamespace(
                name="a", component_count=1, is_frozen=False, log_evidence=0.0, steepness=None, heads=[0], flips=[0]
            )
        ]
        self.random = np.random.default_rng(0)

    def active(self) -> list[Any]:
        return self.matrices

    all = active

    @property
    def known_rank(self) -> int:
        return sum(matrix.component_count for matrix in self.matrices)

    def take_apart(self) -> np.ndarray:
        return np.ones((1, 1))

    def ask_at(self, strength: float) -> None:
        self.strength = strength

    def take_readings(self) -> list[Any]:
        return []

    def take_credits(self) -> list[np.ndarray]:
        return [self.random.normal(self.answers.get(self.strength, 0.0), 1.0, (1, 1)) for _ in range(self.due)]

    def keep(self, kept: Any, share: float) -> None:
        self.judged, self.strength = self.strength, 1.0

    def follow_unused(self, taken: Any) -> None: ...

    def bear(self, births: Any) -> list[Any]:
        return []

    def norms(self, matrices: Any) -> list[float]:
        return [1.0] * len(matrices)

    def stop_following(self) -> None: ...

    def note_moves(self) -> None: ...


@pytest.mark.parametrize("first", [-99.0, 0.0, 99.0], ids=["costs", "says nothing", "saves"])
@pytest.mark.parametrize("base", [-99.0, 99.0], ids=["uphill", "downhill"])
def test_the_questions_of_a_run_that_is_long_enough_come_to_their_end(first: float, base: float) -> None:
    config = AromaConfig(growth="evidence")
    for total in [*range(33, 80), *range(80, 2000, 13)]:
        trial = config.resolve_trial_steps(total)
        matrices = Answers({0.5: first, 0.25: 99.0, 0.0: base})
        last_step = (total - trial) // 4 * 4
        rule: Any = EvidenceRule(EvidenceSettings(0.05, 0.5, 8, trial, 0.97, last_step, None, total), matrices)
        while rule.phase != "growth":
            rule.step()
        assert rule.global_step <= total
        if first:
            half = base > 0 and first < 0
            assert matrices.judged == (0.25 if half else 0.5)
            assert (rule.doublings > 0) == (half and 4 * trial <= last_step + trial)
    with pytest.raises(ConfigError, match="total_steps=32: the trial and its questions take up to 32 optimizer steps"):
        config.resolve_trial_steps(32)


@pytest.mark.parametrize(("steps", "held_out"), [(1_100, 50), (3_000, 100)])
@pytest.mark.parametrize("swings", [False, True])
def test_what_the_trial_has_not_asked_is_left_for_the_duels(steps: int, held_out: int, swings: bool) -> None:
    """Where updates swing, questions come from another order of the examples: what is passed over costs nothing."""
    matrices = Answers({0.5: -99.0 if swings else 99.0, 0.0: 99.0})
    settings = EvidenceSettings(0.05, 0.5, 8, steps // 10, 0.97, steps * 9 // 10, None, steps)
    rule: Any = EvidenceRule(settings, matrices)
    rule.hold_out(held_out, decide=False)
    first_pass = steps // 10
    asked: list[int] = []
    duels: list[int] = []
    for step in range(steps):
        if step >= first_pass:
            duels += rule.held_out_duels(step - first_pass)
        rule.step()
        while numbers := rule.held_out_questions():
            asked += numbers
            matrices.due = len(numbers)
            rule.answer()
    assert len({*asked, *duels}) == len(asked) + len(duels), "no batch is asked twice in one order"
    assert 1 + len(asked) + len(duels) <= 0.12 * steps
    assert len(duels) >= 10
    assert abs(len(duels) - rule.duels(first_pass, held_out=True)) <= 1, "what a warning would say"
    assert rule.doublings == 2 * swings


DOCS = Path(__file__).parents[1] / "docs"


class Dropped(Answers):
    """Two matrices of a few directions; what these say at half strength, and at 0 once it is cut, is given."""

    def __init__(self, falls: list[list[float]], saves: Sequence[float] = (30.0, -9.0, -9.0)) -> None:
        super().__init__({})
        first = self.matrices[0]
        self.matrices = [SimpleNamespace(**{**vars(first), "name": name}) for name in "ab"]
        self.falls, self.saves = np.array(falls), np.array([saves] * 2)
        self.asked, self.born = 0, []

    def take_credits(self) -> list[np.ndarray]:
        again = self.strength == 1.0
        self.asked += again
        means = self.falls if again else self.saves
        return [means + self.random.normal(0, 0.1, means.shape)]

    def bear(self, births: Any) -> list[Any]:
        self.born += [(matrix.name, direction) for matrix, direction in births]
        return []


def after_the_questions(
    matrices: Any, steps: int = 400, most: int | None = None, *, holds_out: bool = False, until: int = 10_000
) -> Any:
    """Return a rule whose trial has ended, or that has taken `until` steps."""
    trial = AromaConfig(growth="evidence").resolve_trial_steps(steps)
    last_step = (steps - trial) // 4 * 4
    rule: Any = EvidenceRule(EvidenceSettings(0.05, 0.5, 3, trial, 0.97, last_step, most, steps), matrices)
    rule.hold_out(None, decide=holds_out)
    while rule.phase != "growth" and rule.global_step < until:
        matrices.born = [] if rule.phase != "questions" else matrices.born
        rule.step()
    return rule


def test_what_was_dropped_begins_anew_where_the_loss_surely_falls_along_it() -> None:
    nan = math.nan  # what stays is not asked about
    matrices = Dropped([[nan, 9.0, -9.0], [nan, 0.0, 8.0]])
    rule = after_the_questions(matrices)
    assert matrices.born == [("a", 1), ("b", 2)]
    assert (rule.births, rule.last_birth) == (0, None), "evidence has borne none"
    assert matrices.asked == 20, "as many batches as decided"
    full = Dropped([[nan, 9.0, -9.0], [nan, 0.0, 8.0]])
    after_the_questions(full, most=1)
    assert full.born == []


class Doubtful(Answers):
    """Two matrices of three directions: one saves loss, one costs as much, one says nothing; at 0 all say alike."""

    def __init__(self, at_zero: float) -> None:
        super().__init__({})
        first = self.matrices[0]
        self.matrices = [SimpleNamespace(**{**vars(first), "name": name}) for name in "ab"]
        self.at_zero, self.batches = at_zero, 0
        self.asked: list[float] = []
        self.kept: Any = None

    def take_credits(self) -> list[np.ndarray]:
        self.batches += 1
        self.asked.append(self.strength)
        means = [self.at_zero] * 3 if self.strength == 0 else [3.0, -3.0, 0.0]
        return [np.array([means] * 2) + (-1.0) ** self.batches]

    def keep(self, kept: Any, share: float) -> None:
        super().keep(kept, share)
        self.kept, self.share = kept, share


@pytest.mark.parametrize(
    ("at_zero", "known", "is_half"),
    [(-9.0, False, False), (0.0, False, False), (0.75, True, False), (9.0, True, True)],
)
@pytest.mark.parametrize(("steps", "holds_out"), [(150, True), (400, True), (400, False)])
def test_where_nothing_is_known_what_costs_no_loss_stays(
    at_zero: float, known: bool, is_half: bool, steps: int, holds_out: bool
) -> None:
    """At 0 updates that point downhill say that something is known; only a long run that holds out asks that.

    At 0.75 eight batches say so, and four or five do not; at 9 they do, so that half of the updates is judged.
    """
    matrices = Doubtful(at_zero)
    rule = after_the_questions(matrices, steps, holds_out=holds_out)
    asks, (questions, opening) = holds_out and steps == 400, (20, 5) if steps == 400 else (8, 4)
    assert matrices.kept.tolist() == [[True, False, asks and not known]] * 2
    said = "; nothing was known yet when the trial ended, so what cost no loss stayed"
    for one in (rule, resumed(rule, matrices, holds_out=holds_out)):
        assert (said in one.explanation) == (asks and not known)
    assert matrices.share == (0.5 if is_half else 1.0)
    judged = [0.25] * questions if is_half else [0.5] * (questions - opening)
    before = [0.5] * opening + [0.0] * opening + judged
    assert matrices.asked[: len(before)] == before
    assert [strength for strength in matrices.asked[len(before) :] if strength == 0] == [0.0] * 8 * asks


def test_the_line_of_progress_counts_the_answers_to_what_is_asked_now() -> None:
    """Five open the twenty at ½, five say at 0 how they point, fifteen more judge, and eight doubt."""
    lines = [after_the_questions(Doubtful(0.0), 400, holds_out=True, until=40 + at).status[0] for at in range(33)]
    opening, base = [f"asking {n}/20" for n in range(5)], [f"asking {n}/5" for n in range(5)]
    assert lines == opening + base + [f"asking {n}/20" for n in range(5, 20)] + [f"asking {n}/8" for n in range(8)]


def asked_of_all(rule: Any) -> None:
    """Let held-out batches answer until it is decided what stays and what comes back."""
    while numbers := rule.held_out_questions():
        for _ in numbers:
            rule.answer()


def resumed(rule: Any, matrices: Any, *, holds_out: bool) -> Any:
    """Return another rule that goes on where `rule` stands."""
    other: Any = EvidenceRule(rule._settings, matrices)
    other.hold_out(None, decide=holds_out)
    other.restore(json.loads(json.dumps(rule.state())))
    return other


@pytest.mark.parametrize("at_zero", [0.0, 0.75, 9.0])
def test_a_run_that_is_resumed_amid_its_questions_ends_them_as_the_uninterrupted_one(at_zero: float) -> None:
    whole = Doubtful(at_zero)
    last = after_the_questions(whole, 400, holds_out=True).global_step
    for cut in range(40, last):
        matrices = Doubtful(at_zero)
        rule = after_the_questions(matrices, 400, holds_out=True, until=cut)
        assert rule.phase == "questions"
        rule = resumed(rule, matrices, holds_out=True)
        while rule.phase != "growth":
            rule.step()
        assert (rule.global_step, matrices.asked) == (last, whole.asked)
        assert (matrices.kept == whole.kept).all()
        assert matrices.share == whole.share


@pytest.mark.parametrize(("before", "at_zero"), [(0.0, 0.0), (9.0, 9.0), (9.0, 0.0)])
def test_answers_of_training_batches_do_not_count_where_held_out_ones_decide_later(
    before: float, at_zero: float
) -> None:
    """Whatever was asked before, held-out batches are asked all questions, with all their share of the run."""
    fresh = Doubtful(at_zero)
    rule = after_the_questions(fresh, 400, holds_out=True, until=40)
    asked_of_all(rule)
    for cut in range(40, 60):
        matrices = Doubtful(before)
        rule = after_the_questions(matrices, 400, holds_out=False, until=cut)
        assert (rule.phase, rule.state()["asked"]) == ("questions", 0)
        matrices.asked, matrices.batches, matrices.at_zero = [], 0, at_zero
        asked_of_all(resumed(rule, matrices, holds_out=True))
        assert matrices.asked == fresh.asked
        assert (matrices.kept == fresh.kept).all()
        assert matrices.share == fresh.share


def test_the_smallest_directions_are_those_of_all_matrices_with_a_twentieth_of_the_energy() -> None:
    nan = math.nan
    sizes = np.array([[9.0, 1.5, 0.5], [3.0, 1.0, nan], [1.6, nan, nan]])
    # Σ σ² is 96.06; 0.25 + 1 + 2.25 = 3.5, and 2.56 more are 6.06, above a twentieth, 4.803.
    small = smallest_directions(sizes, SMALL_SHARE)
    assert small.tolist() == [[False, True, True], [False, True, False], [False] * 3]
    assert (smallest_directions(1e-9 * sizes, SMALL_SHARE) == small).all(), "no scale is told"
    assert not smallest_directions(np.full((2, 2), nan), SMALL_SHARE).any()
    assert not smallest_directions(np.ones((3, 2)), SMALL_SHARE).any(), "each has a sixth"


def test_small_directions_go_while_all_that_go_save_next_to_nothing() -> None:
    alternating = np.tile([1.0, -1.0], 8)[:, None, None]
    sizes = np.array([[5.0, 0.1, 0.2], [0.3, 0.4, math.nan]])
    small = np.array([[False, True, True], [True, True, False]])

    def dropped(first: float, second: float, third: float, fourth: float, saved: float = 0.0) -> list[int]:
        """Return which of the four small directions go, the smallest first; `saved` is what the trial saved."""
        credits = np.array([[9.0, first, second], [third, fourth, math.nan]]) + 0.01 * alternating
        found = directions_to_drop(credits, sizes, small, saved)
        assert not found[~small].any()
        return [*found[small].nonzero()[0]]

    assert dropped(1.0, 1.0, 1.0, 1.0) == []
    assert dropped(-1.0, -1.0, -1.0, -1.0) == [0, 1, 2, 3]
    assert dropped(0.002, -1.0, 0.002, -0.5) == [1, 3], "what costs makes no room for what saves"
    assert dropped(-1.0, 0.5, -0.6, 0.4) == [0, 2]
    assert dropped(0.4, 0.5, 0.4, 0.4, saved=1_000.0) == [0, 1], "they count together"
    assert dropped(0.5, 0.4, 0.3, 0.4, saved=1_000.0) == [0, 1], "up to a thousandth of what the trial saved"
    assert dropped(0.5, 0.4, 0.3, 0.4, saved=-1_000.0) == []


class Squeezed(Answers):
    """Two matrices of a large and two small directions, which are asked about in squeezes.

    Args:
        large: What the large direction saves at full strength, and at half of it.
        smallest: σ of the small one that costs loss; that of the large one is 5.
        other: What the other small one saves.
    """

    def __init__(self, *large: float, smallest: float = 0.1, other: float = 9.0) -> None:
        super().__init__({0.5: 99.0})
        first = self.matrices[0]
        self.matrices = [SimpleNamespace(**{**vars(first), "name": name, "component_count": 2}) for name in "ab"]
        self.large = dict(zip((1.0, 0.5), large or (9.0, 9.0), strict=True))
        self.smallest, self.other = smallest, other
        self.is_squeezing = False
        self.halved: np.ndarray | None = None
        self.lost: list[np.ndarray] = []
        self.shares: list[float] = []

    def take_apart(self) -> np.ndarray:
        return np.array([[5.0, self.smallest], [0.2, math.nan]])

    def take_credits(self) -> list[np.ndarray]:
        if self.is_squeezing:
            is_half = self.halved is not None and self.halved[0, 0]
            means = np.array([[self.large[0.5 if is_half else self.strength], -1.0], [self.other, np.nan]])
        else:  # one is dropped after the trial, and does not come back
            first = -9.0 if self.strength == 1 else 9.0
            means = np.array([[first, -9.0], [first, np.nan]])
        return [means + self.random.normal(0, 0.1, (2, 2)) for _ in range(self.due)]

    def halve(self, small: np.ndarray) -> None:
        self.halved, self.strength = small, 1.0

    def drop(self, dropped: np.ndarray) -> None:
        self.lost.append(dropped)
        self.is_squeezing = False
        self.matrices[0].component_count -= int(dropped[0].sum())

    def set_aside(self) -> None:
        self.is_squeezing = True

    def shorten(self, share: float) -> None:
        self.shares.append(share)


def squeezed_run(matrices: Squeezed, steps: int, *, holds_out: bool = True) -> tuple[Any, list[Any], int]:
    """Return the rule after a run, its events, and how many held-out batches were asked in all."""
    trial = AromaConfig(growth="evidence").resolve_trial_steps(steps)
    settings = EvidenceSettings(0.05, 0.5, 8, trial, 0.97, (steps - trial) // 4 * 4, None, steps)
    rule: Any = EvidenceRule(settings, matrices)
    rule.hold_out(40 if holds_out else None, decide=holds_out)
    events, asked = [], 0
    for step in range(steps):
        asked += len(rule.held_out_duels(step - 1)) if holds_out and step >= 1 else 0
        events += rule.step()
        while holds_out and (numbers := rule.held_out_questions()):
            orders, stage = {number // 40 for number in numbers}, rule.state()["stage"]
            assert stage not in ("overshoot", "all", "small", "strength") or len(orders) == 1, "none twice"
            matrices.due, asked = len(numbers), asked + len(numbers)
            events += rule.answer()
            matrices.due = 1
    return rule, events, asked


def test_where_growth_ends_held_out_examples_say_which_small_components_go() -> None:
    matrices = Squeezed()
    rule, events, asked = squeezed_run(matrices, 400)
    assert matrices.halved is not None
    assert matrices.halved.tolist() == [[False, True], [True, False]]
    assert [one.tolist() for one in matrices.lost] == [[[False, True], [False, False]]]
    (told,) = [event for event in events if event.kind == "squeezed"]
    assert (told.module, told.step, told.rank) == ("a", 360, 1)
    assert told.value == pytest.approx(-1.0, abs=0.1), "what it saved"
    assert (rule.phase, rule.squeezed) == ("rest", 1)
    assert "; 1 component, which saved no loss for sure, or next to none, went; " in rule.explanation
    assert asked <= 0.12 * 400


@pytest.mark.parametrize("large", [(9.0, 9.0), (-20.0, 9.0)])
@pytest.mark.parametrize("steps", [60, 100, 235, 243, 244, 320, 400, 700, 1_000, 1_500, 5_000])
def test_all_held_out_batches_of_a_run_are_twelve_percent_of_it_with_those_of_the_squeeze(
    steps: int, large: tuple[float, float]
) -> None:
    matrices = Squeezed(*large)
    _, _, asked = squeezed_run(matrices, steps)
    assert 1 + asked <= max(0.12 * steps, 10), "one is tried before the first step"
    assert bool(matrices.lost) == (steps >= 244)
    assert "nothing is squeezed, as in most runs of fewer than 240." in " ".join(
        (DOCS / "method.md").read_text(encoding="utf-8").split()
    )


SMALL = [[False, True], [False, False]]


def test_a_long_run_squeezes_early_where_all_updates_cost_loss() -> None:
    matrices = Squeezed(-20.0, 9.0)
    rule, events, asked = squeezed_run(matrices, 2_000)
    assert [event.step for event in events if event.kind == "squeezed"] == [840, 1800]
    assert 200 + 0.4 * (1_800 - 200) == 840, "two fifths of growth"
    assert [lost.tolist() for lost in matrices.lost] == [SMALL, SMALL]
    assert (rule.phase, rule.squeezed) == ("rest", 2)
    assert 1 + asked <= 0.12 * 2_000


@pytest.mark.parametrize(
    ("smallest", "other", "goes"),
    [(0.1, 0.5, True), (0.45, 0.5, True), (0.55, 0.5, False), (0.1, 0.97, False), (0.1, 9.0, False)],
)
def test_where_updates_save_loss_small_ones_go_early_that_cost_some(smallest: float, other: float, goes: bool) -> None:
    """By the answers at full strength, so that no more are asked; 0.2² + 0.5² are a hundredth of the whole."""
    matrices = Squeezed(smallest=smallest, other=other)
    _, events, _ = squeezed_run(matrices, 2_000)
    assert [event.step for event in events if event.kind == "squeezed"] == [840] * goes + [1_800]
    assert [lost.tolist() for lost in matrices.lost] == [SMALL if goes else [[False] * 2] * 2, SMALL]
    assert not matrices.shares


def test_nothing_goes_early_where_few_batches_are_left() -> None:
    matrices = Squeezed(-20.0, 9.0)
    _, events, _ = squeezed_run(matrices, 400)
    assert [event.step for event in events if event.kind == "squeezed"] == [360]
    assert [lost.any() for lost in matrices.lost] == [True]
    assert not matrices.shares


def test_a_run_ends_at_the_strength_at_which_the_loss_is_least() -> None:
    """The large direction saves 10 at ½ and −10 at 1, so its loss is least at ¾; the small ones do not count."""
    matrices = Squeezed(-10.0, 10.0)
    rule, _, _ = squeezed_run(matrices, 2_000)
    assert matrices.shares == [rule.strength]
    assert rule.strength == pytest.approx(0.75, abs=0.01)
    assert "; what trains overshoots, so the last planned step leaves 0.75 of it; " in rule.explanation


def test_what_trains_is_shortened_after_the_last_planned_step_alone() -> None:
    matrices = Squeezed(-10.0, 10.0)
    rule, _, _ = squeezed_run(matrices, 2_000)
    longer: Any = EvidenceRule(rule._settings, matrices)
    longer.hold_out(40, decide=True)
    longer.restore({**rule.state(), "global_step": 1_998, "is_shortened": False})
    longer.step()
    assert len(matrices.shares) == 1
    longer.step()
    longer.step()
    assert matrices.shares == [rule.strength] * 2


def test_a_run_that_had_ended_and_goes_on_is_not_shortened_twice() -> None:
    """By less than a ninth, so that its new last stretch has begun already."""
    matrices = Squeezed(-10.0, 10.0)
    rule, _, _ = squeezed_run(matrices, 2_000)
    settings = replace(rule._settings, total_steps=2_200, last_step=1_980)
    longer: Any = EvidenceRule(settings, matrices)
    longer.hold_out(40, decide=True)
    longer.restore(rule.state())
    assert longer.strength == rule.strength < 1
    for _ in range(200):
        longer.step()
    assert matrices.shares == [rule.strength]
    assert longer.strength == 1


def test_planned_steps_that_were_not_taken_count_for_what_a_run_ends_with() -> None:
    """As in 16 bits, where a gradient may overflow, in the last step, too."""
    matrices = Squeezed(-10.0, 10.0)
    rule, _, _ = squeezed_run(matrices, 2_000)
    for taken in (1_997, 1_998):
        again: Any = EvidenceRule(rule._settings, matrices)
        again.hold_out(40, decide=True)
        again.restore({**rule.state(), "global_step": taken, "skipped": 1, "is_shortened": False})
        matrices.shares = []
        again.step() if taken == 1_998 else again.skip_step()
        assert bool(matrices.shares) == (taken == 1_998)
        again.skip_step()
        assert matrices.shares == [rule.strength]


@pytest.mark.parametrize("least", [0.55, 0.8, 0.99])
def test_the_strength_of_least_loss_is_exact_for_a_quadratic_loss(least: float) -> None:
    directions = np.array([[[3.0, 1.0], [0.5, 2.0]]] * 4)
    whole, half = (directions * (least - strength) for strength in (1.0, 0.5))
    assert strength_of_least_loss(whole, half) == pytest.approx(least)


def test_half_of_the_updates_is_left_at_least() -> None:
    assert strength_of_least_loss(np.full((4, 2, 2), -2.0), np.full((4, 2, 2), -1.0)) == 0.5


class Unsure(Squeezed):
    """What is small says nothing in the trial."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[list[list[int]]] = []

    def keep(self, kept: Any, share: float = 1.0) -> None:
        self.kept.append(places(kept))
        super().keep(kept, share)

    def take_credits(self) -> list[np.ndarray]:
        credits = super().take_credits()
        if not self.is_squeezing and self.strength:
            for place, one in enumerate(credits):
                one[0, 1] = (-1) ** place
        return credits


class Level(Squeezed):
    """Nothing is left that could be small."""

    def __init__(self) -> None:
        super().__init__()
        self.stops = 0

    def take_apart(self) -> np.ndarray:
        return np.full((2, 2), math.nan)

    def stop_following(self) -> None:
        self.stops += 1


def test_nothing_is_asked_any_more_where_nothing_is_small() -> None:
    matrices = Level()
    rule, _, _ = squeezed_run(matrices, 400)
    assert matrices.halved is None
    assert (rule.phase, matrices.stops) == ("rest", 2), "where the trial begins, and where growth ends"


def test_nothing_is_squeezed_by_examples_that_were_trained_on() -> None:
    matrices = Squeezed()
    rule, events, _ = squeezed_run(matrices, 400, holds_out=False)
    assert matrices.halved is None
    assert rule.phase == "rest"
    assert not [event for event in events if event.kind == "squeezed"]


@pytest.mark.parametrize(
    ("steps", "holds_out", "asked"),
    [(135, False, 0), (136, False, 8), (143, True, 0), (144, True, 8), (400, False, 20), (2_000, False, 64)],
)
def test_a_short_run_has_no_batches_left_for_what_was_dropped(steps: int, holds_out: bool, asked: int) -> None:
    matrices = Dropped([[math.nan, 0.0, 0.0]] * 2)
    after_the_questions(matrices, steps, holds_out=holds_out)
    assert matrices.asked == asked
    assert "as in runs of fewer than 136 steps, or 144 with held-out examples" in " ".join(
        (DOCS / "method.md").read_text(encoding="utf-8").split()
    )


def test_nothing_is_asked_again_where_nothing_was_dropped() -> None:
    matrices = Dropped([[0.0]] * 2, saves=[9.0])
    assert after_the_questions(matrices).global_step == 40 + 20
    assert matrices.asked == 0


def test_the_first_components_lie_along_the_top_directions_of_the_gradient() -> None:
    """Of a gradient that stays as it is, with singular values each half of the one before."""
    torch.manual_seed(0)
    m, n = 10, 12
    U, V = torch.linalg.qr(torch.randn(m, m)).Q, torch.linalg.qr(torch.randn(n, m)).Q
    G = U * 2.0 ** -torch.arange(m) @ V.T
    base = nn.Sequential(nn.Linear(n, m, bias=False))
    model = get_peft_model(base, AromaConfig(growth="evidence", target_modules=["0"], slots=3))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    attach(model, optimizer, total_steps=400, steps_per_pass=400)
    for _ in range(FIRST_STEP):
        optimizer.zero_grad()
        (model(torch.eye(n)) * G.T).sum().backward()
        optimizer.step()
    b, a = aroma_layers(model)["0"].pair("default")
    assert not b.any()
    along = (nn.functional.normalize(a.detach()) @ V).abs()
    assert min(along[0, 0], along[1, 1]) > 0.99


@pytest.mark.parametrize("fused", [True, False])
def test_a_run_makes_no_matrix(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    """From the first gradient to the last birth no tensor is a sixteenth of a weight."""
    width = 1024
    x, y = rows(8 * STEPS, width=width)
    model = net(evidence_runs.Net(width, layers=2), slots=1)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    kinds: list[str] = []
    if fused:  # the layer takes the watch for a tracer
        monkeypatch.setattr("aroma.tuner.layer.is_traced", lambda x: False)
    with Watch(monkeypatch) as watch:
        attach(model, optimizer, total_steps=STEPS, on_event=lambda event: kinds.append(event.kind))
        for batch in zip(x.split(8), y.split(8), strict=True):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
    assert {"born", "merged"} <= {*kinds}
    assert 0 < watch.largest <= width * width / 16


def test_nothing_is_born_after_the_step_that_is_named() -> None:
    base, x, y = planted([0, 4, 1, 3])
    model = grown(base, slots=3)
    optimizer = adam(model)
    growth = attach(model, optimizer, total_steps=101)
    for step, batch in enumerate(batches(x, y, 85), start=1):
        optimizer.zero_grad()
        (model(batch[0]) - batch[1]).square().mean().backward()
        optimizer.step()
        assert (growth.controller.rule.phase == "rest") == (step >= 84)
    assert growth.controller.explanation().endswith("; nothing is born after step 84")


def test_slots_not_in_use_are_not_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs are multiplied by as many rows as there are components, and by those of the four unused directions."""
    linear, rows = nn.functional.linear, []

    def counting(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows.append(weight.shape[0])
        return linear(x, weight, bias)

    base, x, y = planted([0, 4, 1, 3])
    model = grown(base, slots=8)
    growth = attach(model, adam(model), total_steps=101)
    monkeypatch.setattr("torch.nn.functional.linear", counting)
    for used, asked in ((1, False), (2, False), (2, True), (8, False)):
        for matrix in growth.controller.matrices.all():
            matrix.occupy_first(used)
            m, n = matrix.layer.out_features, matrix.layer.in_features
            if not asked:
                matrix.layer.probes.clear()
                continue
            leaves = [torch.randn(m, 4), torch.randn(4, n), torch.zeros(used)]
            leaves = [leaf.double().requires_grad_() for leaf in leaves]
            moves = torch.zeros(m, used).double(), torch.zeros(used, n).double()
            matrix.layer.probes["default"] = Probe(*leaves, *moves, 1.0)
        rows.clear()
        (model(x[:5]) - y[:5]).square().mean().backward()
        assert min(rows) == used + 4 * asked


def test_a_step_moves_a_matrix_as_far_as_one_of_lora_with_r_8_and_lora_alpha_16() -> None:
    torch.manual_seed(0)
    x, target = torch.randn(64, 512), torch.randn(64, 512)

    def moved(config: LoraConfig | AromaConfig, steps: int) -> float:
        model = get_peft_model(nn.Sequential(nn.Linear(512, 512, bias=False)), config)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=1e-3, betas=(0.0, 0.0))  # every entry moves by the rate
        if isinstance(config, AromaConfig):
            attach(model, optimizer, total_steps=200)
        unit, before = torch.eye(512), None
        for _ in range(steps):
            before = model(unit).detach()
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
        return float((model(unit) - before).norm())

    lora = moved(LoraConfig(r=8, lora_alpha=16, target_modules=["0"]), 1)
    trial = moved(AromaConfig(growth="evidence", target_modules=["0"]), FIRST_STEP + 1)
    assert trial == pytest.approx(lora, rel=0.02)
    assert [math.sqrt(k) * row_length(k) for k in range(1, 9)] == pytest.approx([math.sqrt(2 / 3)] * 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_component_in_the_span_of_others_is_no_direction(dtype: torch.dtype) -> None:
    b, a = torch.randn(1, 2, 16, dtype=dtype), torch.randn(1, 2, 12, dtype=dtype)
    mixed = torch.tensor([[0.3, 0.7]], dtype=dtype)

    _, sizes, _ = singular_directions(torch.cat([b, mixed @ b], 1), torch.cat([a, mixed @ a], 1))

    assert [bool(size) for size in sizes[0]] == [True, True, False]


def test_a_slot_without_a_component_is_not_counted_as_trained() -> None:
    """A matrix that is asked nothing evaluates one slot; if it is empty, it gets gradients of zero."""
    base, x, y = planted([0, 0, 0, 3])
    model = grown(base, slots=3)
    optimizer = adam(model)
    rule = attach(model, optimizer, total_steps=101).controller.rule
    layers = [*aroma_layers(model).values()]
    was_empty = []
    for batch in batches(x, y, 101):
        optimizer.zero_grad()
        (model(batch[0]) - batch[1]).square().mean().backward()
        moving = [int((layer.pair("default")[0].grad != 0).any(0).sum()) for layer in layers]
        trained = [layer.slots_in_training("default") for layer in layers]
        asked = rule.phase == "questions"  # gradients that are answers, and that nothing follows
        assert asked or all(count <= most for count, most in zip(moving, trained, strict=True))
        optimizer.step()
        was_empty += [layer.slots_in_use["default"] > layer.slots_in_training("default") for layer in layers]
    assert any(was_empty), "an empty slot is evaluated in the rest"
    in_slots = [min(layer.rank("default"), 3) for layer in layers]  # a birth beyond three merges the oldest
    assert [layer.slots_in_training("default") for layer in layers] == in_slots
