"""The study of compression measures what aroma.compress does, with code of its own."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

import study
from aroma import compress
from aroma_lab.run.run import run_trial
from aroma_lab.run.trial import Trial
from aroma_lab.specs import MADE, TaskSpec, TrainSpec

TASKS = {
    "net": TaskSpec(name="net", kind="planted_net", layers=4, width=16, examples=200, ranks=[0, 1, 2, 4]),
    "facts": TaskSpec(name="facts", kind="memory", layers=2, width=32, pairs=200),
}


@pytest.fixture(scope="module", params=TASKS)
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    training = TrainSpec(max_steps=60, batch_size=16, learning_rate=1e-2, warmup_steps=5, save_steps=None)
    options = {"r": 8, "alpha": 16}
    trial = Trial(f"{request.param}/lora-r8/seed-0", MADE, TASKS[request.param], "lora-r8", "lora", options, training)
    run_trial(trial, folder)
    return folder


def test_same_as_compress(folder):
    """The cut of a size, and the effects that the rule chooses by."""
    run = study.Finished(folder)
    model, batches = copy.deepcopy(run.model), run.batches("train", 256, 8)
    whole = compress(copy.deepcopy(model), batches, size=0.3)
    products, facts = run.cut(study.Asked(size=0.3))
    assert facts["share"] == pytest.approx(whole.size.share)
    assert facts["directions"] == whole.size.directions
    kept = run.outcomes({"it": products}, batches, "float32")
    assert 1 - kept["it"].divergence / kept["none"].divergence == pytest.approx(whole.size.effect, abs=1e-5)

    found = compress(model, batches, keep=0.995)
    ranks, effect = run.chosen(study.Asked(keep=0.995))
    assert ranks == [after for _, after in found.ranks.values()]
    assert effect == pytest.approx(found.size.effect, abs=1e-5)


def test_same_as_without_examples(folder):
    run = study.Finished(folder)
    for given in ({"size": 0.3}, {"rank": 2}):
        model = copy.deepcopy(run.model)
        compress(model, None, **given)
        products, _ = run.cut(study.Asked("size", **given))
        for weight, product in zip(run.weights, products, strict=True):
            layer = model.get_submodule(f"base_model.model.{weight.name}")
            update = (
                layer.get_delta_weight("default") if "default" in layer.lora_A else torch.zeros(layer.weight.shape)
            )
            torch.testing.assert_close(update, (product.B[0] @ product.A[0]).float(), rtol=1e-4, atol=1e-6)


def test_rows_are_measured_once(folder, tmp_path):
    parts = ["curve", "squeeze", "rule"]
    study.measure(folder, parts, (0.2, 0.5), tmp_path)
    (path,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    expected = sum(len(study.asked(part, 8, (0.2, 0.5))) for part in parts)
    assert len(rows) == expected
    assert all(0 <= row["divergence"] < 1 for row in rows)
    written = path.read_bytes()
    assert study.measure(folder, parts, (0.2, 0.5), tmp_path).endswith("nothing new")
    assert path.read_bytes() == written
