"""The memory task: pairs by seed, what counts as recalled, and how much a model can hold."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aroma.errors import ConfigError
from aroma_lab.run.run import job_of, run_trial
from aroma_lab.run.trial import Trial
from aroma_lab.specs import TaskSpec, TrainSpec
from aroma_lab.tasks.memory import BITS, KEY_TOKENS, VALUE_TOKENS, VOCABULARY, make_facts, make_pairs, recall

LOOP = TrainSpec(max_steps=6, batch_size=4, learning_rate=1e-2, warmup_steps=1, save_steps=3, logging_steps=2)
AROMA = {"inner_check_interval": 1, "max_inner_steps": 2, "rewarmup_steps": 0}


def trial_of(kind: str = "lora", options: dict[str, Any] | None = None, **task: Any) -> Trial:
    spec = TaskSpec(name="memory", kind="memory", **{"pairs": 12, "layers": 2, "width": 16, **task})
    return Trial(f"memory/{kind}/seed-0", "made", spec, kind, kind, options or {}, LOOP)


def test_pairs_have_different_keys_and_are_the_same_for_the_same_seed() -> None:
    pairs = make_pairs(500, 1)
    assert len({tuple(key) for key in pairs[:, :KEY_TOKENS].tolist()}) == 500
    assert int(pairs.min()) >= 0
    assert int(pairs.max()) < VOCABULARY
    assert torch.equal(pairs, make_pairs(500, 1))
    assert not torch.equal(pairs, make_pairs(500, 2))
    one, same, other = (job_of(trial_of(seed=seed)).load_model().state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("templates", [2, 5, 12])
def test_each_fact_is_held_out_in_one_of_its_templates(templates: int) -> None:
    pairs = make_pairs(60, 1)
    trained, held_out = make_facts(pairs, templates)
    rows = [tuple(row) for row in torch.cat([trained, held_out]).tolist()]
    assert len(trained) == 60 * (templates - 1)
    assert len({*rows}) == 60 * templates, "no row is said twice"
    assert torch.equal(held_out[:, -VALUE_TOKENS:], pairs[:, -VALUE_TOKENS:])
    marks = held_out[held_out >= VOCABULARY] - VOCABULARY
    assert marks.tolist() == [number % templates for number in range(60)]
    keys = held_out[:, :-VALUE_TOKENS]
    kept = keys[keys < VOCABULARY].view(60, KEY_TOKENS)
    assert torch.equal(kept.sort(1).values, pairs[:, :KEY_TOKENS].sort(1).values)


def test_what_is_recalled() -> None:
    values = torch.tensor([[1, 0], [3, 2]])
    sure = 100.0 * torch.nn.functional.one_hot(values, 4).float()
    assert recall(sure, values) == pytest.approx({"recalled": 1.0, "accuracy": 1.0, "bits": 8.0, "loss": 0.0})
    guessed = recall(torch.zeros(2, 2, 4), values)
    assert guessed == pytest.approx({"recalled": 0.0, "accuracy": 0.0, "bits": 0.0, "loss": math.log(4)})
    half = sure.clone()
    half[1] = 0  # of the second pair nothing
    found = recall(half, values)
    assert (found["recalled"], found["bits"]) == pytest.approx((0.5, 4.0))
    assert found["accuracy"] == 0.5
    assert recall(-sure, values)["bits"] == 0.0, "worse than a guess"


@pytest.mark.parametrize(("kind", "options"), [("lora", {"r": 2}), ("aroma", AROMA)])
def test_a_run_leaves_what_is_recalled_and_the_ranks(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    result = run_trial(trial_of(kind, options), tmp_path / "run")
    assert result["metric"] == "recalled"
    assert result["score"] == result["held_out"]["recalled"]
    assert set(result["held_out"]) == {"recalled", "accuracy", "bits"}
    assert result["held_out"]["bits"] == pytest.approx(result["score"] * 12 * BITS)
    assert result["examples"] == {"train": 12, "pairs": 12}
    assert len(result["ranks"]) == 2 * 7, "the linear modules of both layers"
    assert result["trained_rank"] == 2 if kind == "lora" else result["trained_rank"] <= 1
    assert "planted" not in result


def test_facts_are_evaluated_in_paraphrases(tmp_path: Path) -> None:
    result = run_trial(trial_of("compressed", {"r": 2}, pairs=60, templates=3), tmp_path / "run")
    assert 0 < result["total_rank"] <= 2 * len(result["ranks"])
    assert result["examples"] == {"train": 120, "paraphrases": 60}
    assert result["score"] == result["held_out"]["recalled"]


@pytest.mark.slow
def test_more_rank_holds_more_of_many_pairs_and_one_holds_few(tmp_path: Path) -> None:
    loop = replace(LOOP, max_steps=300, batch_size=50, warmup_steps=15, save_steps=None, scheduler="linear")
    held = {}
    for pairs, rank in ((10, 1), (1000, 1), (1000, 16)):
        trial = replace(trial_of("lora", {"r": rank, "alpha": 2 * rank}, pairs=pairs), training=loop)
        held[pairs, rank] = run_trial(trial, tmp_path / f"{pairs}-{rank}")["held_out"]
    assert held[10, 1]["accuracy"] == 1.0
    assert held[1000, 1]["recalled"] < 0.1
    assert held[1000, 16]["bits"] > 5 * held[1000, 1]["bits"]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"pairs": 0}, r"data\.pairs=0: give 1 or more"),
        ({"pairs": 64**3 + 1}, r"data\.pairs=262145: there are 262144 different keys"),
        ({"templates": 13}, r"data\.templates=13: there are 12"),
        ({"width": 12}, r"data\.width=12: attention has 4 heads of even width; give a multiple of 8"),
    ],
)
def test_a_task_that_cannot_work_is_refused(task: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job_of(trial_of(**task))
    with pytest.raises(ConfigError, match=r"model='minilm': a task of kind memory makes its own; give made"):
        job_of(replace(trial_of(), model="minilm"))
