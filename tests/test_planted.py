"""Planted ranks: the net is that of shared/research/planted.py, the same seed makes the same, metrics count right."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aroma.errors import ConfigError, DataError
from aroma_lab.run.run import job_of, run_trial
from aroma_lab.run.trial import Trial
from aroma_lab.specs import TaskSpec, TrainSpec
from aroma_lab.tasks.planted import GRADED, compare_ranks, make_net
from tiny_classifier import save_tiny_bert, write_json_lines
from trial_runs import sentences

LOOP = TrainSpec(
    max_steps=6, batch_size=4, learning_rate=1e-2, warmup_steps=1, save_steps=3, logging_steps=2, max_grad_norm=0
)
SMALL: dict[str, Any] = {"layers": 4, "width": 8, "examples": 24, "ranks": [0, 2, 0, 1]}
AROMA = {"inner_check_interval": 1, "max_inner_steps": 2, "rewarmup_steps": 0}


def net_trial(kind: str = "lora", options: dict[str, Any] | None = None, **task: Any) -> Trial:
    spec = TaskSpec(name="net", kind="planted_net", **{**SMALL, **task})
    return Trial(f"net/{kind}/seed-0", "made", spec, kind, kind, options or {}, LOOP)


def encoder_trial(material: Path, **task: Any) -> Trial:
    given = {"source": str(material), "train": "texts.jsonl", "held_out": 0.2, "max_length": 16, "ranks": [0, 2]}
    spec = TaskSpec(name="encoder", kind="planted_encoder", **{**given, **task})
    return Trial("encoder/lora/seed-0", str(material / "model"), spec, "lora", "lora", {"r": 2}, LOOP)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    save_tiny_bert(folder / "model")
    write_json_lines(folder / "texts.jsonl", sentences(30, seed=1))
    return folder


# The net -------------------------------------------------------------------------------------------------------------


def reference(seed: int, noise: float, planted: list[int]) -> tuple[Any, ...]:
    """Research/planted.py's `make` and `net`, 12 layers of 64, as they stand there."""

    def net(weights: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        for w in weights:
            h = h + 0.5 * torch.tanh(h @ w.t())
        return h

    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    base = torch.stack([draw(64, 64) / math.sqrt(64) for _ in range(12)])
    ranks = [planted[i] for i in torch.randperm(12, generator=g).tolist()]
    teacher = base.clone()
    for layer, r in enumerate(ranks):
        if r:
            U, V = torch.linalg.qr(draw(64, r))[0], torch.linalg.qr(draw(64, r))[0]
            teacher[layer] += (U * (0.7 + 0.6 * torch.rand(r, generator=g))) @ V.t()
    X, fresh = draw(1500, 64), draw(2000, 64)
    return base, teacher, ranks, X, net(teacher, X) + noise * draw(1500, 64), fresh, net(teacher, fresh)


@pytest.mark.parametrize(
    ("seed", "noise", "planted"), [(0, 0.1, list(GRADED)), (3, 0.5, [2] * 12), (1, 0.1, [0] * 12)]
)
def test_the_net_is_that_of_the_trials(seed: int, noise: float, planted: list[int]) -> None:
    base, teacher, ranks, X, Y, fresh, truth = reference(seed, noise, planted)
    given = None if planted == list(GRADED) else planted[:1]  # dealt out in turn, one rank is that of all
    made = make_net(TaskSpec(name="net", kind="planted_net", noise=noise, ranks=given), seed)
    assert torch.equal(made.base, base)
    assert torch.equal(made.teacher, teacher)
    assert list(made.ranks.values()) == ranks
    assert torch.equal(made.inputs[0], X)
    assert torch.equal(made.inputs[1], fresh)
    torch.testing.assert_close(made.targets[0], Y)
    torch.testing.assert_close(made.targets[1], truth)


def test_the_task_s_own_seed_wins_else_the_training_s() -> None:
    other = make_net(net_trial().task, 2).base[0]
    for trial in (net_trial(seed=2), replace(net_trial(), training=replace(LOOP, seed=2))):
        assert torch.equal(job_of(trial).load_model().layers[0]["dense"].weight, other)


# Metrics -------------------------------------------------------------------------------------------------------------


def test_found_ranks_against_planted_ones() -> None:
    planted, began = {"a": 0, "b": 1, "c": 4}, {"a": 1, "b": 1, "c": 1}
    found = compare_ranks(planted, {"a": 1, "b": 2, "c": 9}, began)
    assert found["ranks"] == planted
    assert (found["mean_planted"], found["mean_found"]) == (5 / 3, 4.0)
    assert found["spearman"] == pytest.approx(1.0)
    x, y = [-5 / 3, -2 / 3, 7 / 3], [-3.0, -2.0, 5.0]
    assert found["pearson"] == pytest.approx(
        sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
    )
    assert (found["grew"], found["nonzero"]) == (2 / 3, 1.0)
    reversed_ = compare_ranks(planted, {"a": 3, "b": 1}, began)  # c is not adapted: rank 0
    assert reversed_["spearman"] == pytest.approx(-1.0)
    assert reversed_["nonzero"] == 2 / 3
    constant = compare_ranks(planted, {"a": 2, "b": 2, "c": 2}, began)
    assert constant["spearman"] is constant["pearson"] is None
    without = compare_ranks(planted, {}, {})
    assert without["mean_found"] is without["grew"] is None


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [("lora", {"r": 2}), ("adalora", {"init_r": 3, "target_r": 2}), ("full", {}), ("aroma", AROMA)],
)
def test_methods_train_on_a_net_through_the_one_runner(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    result = run_trial(net_trial(kind, options), tmp_path / "run")
    planted = make_net(net_trial().task, 0).ranks
    assert result["planted"]["ranks"] == planted
    assert result["metric"] == "explained"
    assert result["score"] == pytest.approx(1 - result["reported"]["fresh"]["error"])
    assert set(result["ranks"]) == (set() if kind == "full" else set(planted))
    if kind == "lora":
        assert (result["planted"]["mean_found"], result["trained_rank"]) == (2.0, 2.0)
        assert result["planted"]["grew"] == 0
    if kind == "aroma":
        curve = json.loads((tmp_path / "run/curve.json").read_text())
        assert 0 < result["trained_rank"] <= 1.0, "one pair a matrix trains at a time"
        grew = [result["ranks"][name] > curve["ranks"][name][0][1] for name in planted]
        assert result["planted"]["grew"] == sum(grew) / len(grew)


# The encoder ---------------------------------------------------------------------------------------------------------


def test_an_encoder_learns_the_hidden_states_of_its_teacher(material: Path, tmp_path: Path) -> None:
    trial = encoder_trial(material)
    job = job_of(trial)
    assert job.planted is not None
    assert sorted(set(job.planted.values())) == [0, 2]
    result = run_trial(trial, tmp_path / "run")
    assert result["examples"] == {"train": 18, "held_out": 6, "fresh": 6}
    assert result["planted"]["ranks"] == job.planted
    assert set(result["ranks"]) == set(job.planted)
    assert 0 < result["reported"]["fresh"]["error"] < 1, "it has learnt something"


def test_planted_models_are_compared_by_their_hidden_states(material: Path, tmp_path: Path) -> None:
    options = {"r": 2, "examples": 16, "size": 0.5}
    for trial in (
        net_trial("compressed", options),
        replace(encoder_trial(material), kind="compressed", options=options),
    ):
        result = run_trial(trial, tmp_path / trial.task.name)
        assert 0 < result["total_rank"] < 2 * len(result["ranks"])


def test_the_loss_of_an_encoder_leaves_padding_out(material: Path) -> None:
    job: Any = job_of(encoder_trial(material))
    rows = [job.rows["fresh"][place] for place in range(6)]
    lengths = [len(row["input_ids"]) for row in rows]
    assert len(set(lengths)) > 1, "there is padding"
    model = job.load_model().train()  # no dropout either
    batch = job.collator(rows)
    with torch.no_grad():
        squares = [
            (model(**job.collator([row])).last_hidden_state - job.collator([row])["labels"]).square().sum()
            for row in rows
        ]
        loss = model(**batch).loss
    torch.testing.assert_close(loss * model.unit, sum(squares) / (sum(lengths) * batch["labels"].shape[-1]))
    base_error = sum(row["base_error"] for row in rows)
    assert base_error == pytest.approx(float(sum(squares)), rel=1e-4)


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": {"ranks": [9]}}, r"data\.ranks=\[9\]: no update of a matrix 8 wide has a rank of more than 8"),
        ({"model": "minilm"}, r"model='minilm': a task of kind planted_net makes its own; give made"),
        ({"quantization": "nf4"}, r"quantization='nf4': a task of kind planted_net is made for weights in float32"),
        ({"kind": "head_only"}, r"kind='head_only': PlantedNet has no head to train; leave the method out"),
    ],
)
def test_a_trial_of_a_net_that_cannot_work_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    trial = net_trial(**change.pop("task", {}))
    with pytest.raises(ConfigError, match=message):
        run_trial(replace(trial, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_encoder_without_enough_texts_or_room_is_refused(material: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.ranks=\[99\]: no update of a matrix \d+ wide"):
        job_of(encoder_trial(material, ranks=[99]))
    with pytest.raises(DataError, match=r"data\.held_out=0\.6: 30 different texts cannot be split that way"):
        job_of(encoder_trial(material, held_out=0.6))
    with pytest.raises(DataError, match=r"data\.train=.*no such file"):
        job_of(encoder_trial(material, train="other.jsonl"))
