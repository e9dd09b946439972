"""What a selection tries, in which rounds, and what it chooses."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from aroma_lab.study.grid import expand, make_grid
from aroma_lab.study.selection import beyond, select
from aroma_lab.study.trials import Ended
from study_files import HEAD_RATE, RATE, whole_grid


def selected(grid, outcomes=None, method="lora"):
    """Return the selection of a method on mrpc, given score and loss by trial; None: it failed."""
    made = {name: Ended(failure="bad") if one is None else Ended(*one) for name, one in (outcomes or {}).items()}
    return select(grid, "mrpc", method, made.get)


def test_a_selection_tries_the_product_and_what_is_tried_wins_over_its_overrides_and_these_over_the_grids():
    rule = {
        "over": {RATE: [1e-4, 1e-3], "options.r": [1, 2]},
        "seed": 100,
        "training": {"max_steps": 4},
        "overrides": [{"method": "lora", "options.dropout": 0.5, RATE: 9.0}],
    }
    grid = whole_grid(select=rule, overrides=[{"training.max_steps": 7, "options.r": 5}])
    tried = selected(grid).tried
    assert [trial.name for trial, _ in tried] == [
        f"select/mrpc/lora/learning_rate={rate},r={r}" for rate in (0.0001, 0.001) for r in (1, 2)
    ]
    for trial, values in tried + selected(grid, method="head").tried:
        assert (trial.purpose, trial.training.seed, trial.training.max_steps) == ("select", 100, 4)
        assert (trial.training.learning_rate, trial.options["r"]) == tuple(values.values())
        assert trial.options.get("dropout") == (0.5 if trial.method == "lora" else None)
    assert expand(grid)[0].options == {"r": 5}, "reported trials have none of it"
    odd = {"options.target": ["a/b", "a:b"], "task.label": ["x"]}
    names = [trial.name for trial, _ in selected(whole_grid(select={"over": odd})).tried]
    assert names == [f"select/mrpc/lora/{number}-target=a_b,label=x" for number in (0, 1)]


@pytest.mark.parametrize(
    ("by", "outcomes", "chosen"),
    [
        ("score", [(0.5, 0.7), (0.4, 0.1), (0.5, 0.6)], 3.0),
        ("score", [(0.5, 0.7), None, (0.5, 0.7)], 1.0),
        ("score", [None, None, None], None),
        ("loss", [(0.9, 0.7), (0.5, 0.3), (0.6, 0.3)], 3.0),
        ("loss", [(0.9, 0.7), (0.5, 0.3), (0.6, 0.31)], 2.0),
    ],
)
def test_the_best_is_chosen_of_equal_ones_by_the_other_measure_and_never_a_failed_one(by, outcomes, chosen):
    grid = whole_grid(select={"over": {RATE: [1, 2, 3]}, "by": by})
    names = [f"select/mrpc/lora/learning_rate={n}" for n in (1, 2, 3)]
    found = selected(grid, dict(zip(names, outcomes, strict=True)))
    assert found.is_final
    assert found.chosen == (None if chosen is None else {RATE: chosen})
    numbers = [one and one[by == "loss"] for one in outcomes]
    tried = [[{RATE: rate}, number] for rate, number in zip((1.0, 2.0, 3.0), numbers, strict=True)]
    assert found.entry == {"chosen": found.chosen, "tried": tried}


@pytest.mark.parametrize(
    ("values", "value", "further"),
    [
        ([1e-3, 3e-3, 1e-2], 3e-3, None),
        ([1e-3, 3e-3, 1e-2], 1e-2, 0.0333),
        ([1e-3, 3e-3, 1e-2], 1e-3, 3.33e-4),
        ([1e-3], 1e-3, None),
        ([0.0, 0.1], 0.1, 0.2),
        ([0.0, 0.1], 0.0, None),
        ([-2.0, 0.5], -2.0, -4.5),
        ([1, 4, 16], 16, 64),
        ([1, 2], 1, None),
    ],
    ids=str,
)
def test_beyond_an_edge_the_values_go_on_as_they_came(values, value, further):
    assert beyond(values, value) == further
    assert type(beyond(values, value)) in (type(None), *map(type, values))


def rounds(grid, outcome_of):
    """Return what a selection tries, round by round, and the end of it."""
    outcomes, found = {}, []
    while not (now := selected(grid, outcomes)).is_final:
        due = [one for one in now.tried if one.trial.name not in outcomes]
        found.append([tuple(values.values()) for _, values in due])
        outcomes |= {trial.name: outcome_of(trial, values) for trial, values in due}
    return found, now


@pytest.mark.parametrize(
    ("rates", "widen", "losses", "way", "chosen"),
    [
        ([1e-3, 2e-3], 0, {}, [], (2e-3, 2e-3)),
        ([1e-3, 2e-3], 1, {(4e-3, 2e-3): None}, [[(4e-3, 2e-3), (2e-3, 4e-3)]], (2e-3, 2e-3)),
        (
            [1e-3, 2e-3],
            1,
            {(4e-3, 2e-3): 0.5},
            [[(4e-3, 2e-3), (2e-3, 4e-3)], [(4e-3, 1e-3), (4e-3, 4e-3)]],
            (4e-3, 2e-3),
        ),
        (
            [1e-3, 2e-3, 4e-3],
            1,
            {(2e-3, 4e-3): 0.5, (4e-3, 4e-3): 0.4, (1e-3, 4e-3): 0.7},
            [[(2e-3, 4e-3)], [(1e-3, 4e-3), (4e-3, 4e-3)], [(8e-3, 4e-3)]],
            (4e-3, 4e-3),
        ),
    ],
)
def test_a_selection_is_widened_to_the_best_and_around_it_and_never_beyond_its_bound(
    rates, widen, losses, way, chosen
):
    rule = {"over": {RATE: rates, HEAD_RATE: [1e-3, 2e-3]}, "by": "loss", "widen": widen}
    losses = {(2e-3, 2e-3): 0.6, **losses}

    def outcome_of(_, values):
        loss = losses.get(tuple(values.values()), 1.0)
        return None if loss is None else (0.5, loss)

    found, end = rounds(whole_grid(select=rule), outcome_of)
    assert found[1:] == way
    assert end.chosen == dict(zip((RATE, HEAD_RATE), chosen, strict=True))


def test_the_two_best_are_run_with_further_seeds_and_the_mean_decides_between_them():
    rule = {"over": {RATE: [1, 2, 3]}, "by": "loss", "seed": 100, "again": [101, 102]}
    grid = whole_grid(select=rule)
    assert make_grid(asdict(grid)) == grid
    losses = {1.0: [0.1, 1.0], 2.0: [0.3, 0.6], 3.0: [0.2, 0.4]}  # with seed 100, and with the others: 1 collapses
    seen = []

    def outcome_of(trial, values):
        seen.append(trial)
        return 0.5, losses[values[RATE]][trial.training.seed > 100]

    found, end = rounds(grid, outcome_of)
    assert found == [[(1.0,), (2.0,), (3.0,)], [(1.0,), (3.0,)] * 2, [(2.0,)] * 2]
    assert [trial.training.seed for trial in seen[3:]] == [101, 101, 102, 102, 101, 102]
    assert seen[3].name == "select/mrpc/lora/learning_rate=1,seed=101"
    means = [[{RATE: 1.0}, pytest.approx(0.7)], [{RATE: 2.0}, pytest.approx(0.5)], [{RATE: 3.0}, pytest.approx(1 / 3)]]
    assert end.entry == {"chosen": {RATE: 3.0}, "tried": means}
    alone, end = rounds(grid, lambda _, values: (0.5, 0.1) if values[RATE] == 1 else None)
    assert (len(alone), end.chosen) == (1, {RATE: 1.0}), "there is nothing to decide"
