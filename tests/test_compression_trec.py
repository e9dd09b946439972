"""Compressing a real adapter: questions of TREC, plain PEFT, no labels; against the cut by size at every size."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import aroma
from aroma_lab.tasks.model import packaged_encoder

FOLDER = Path(__file__).parents[2] / "shared" / "data" / "trec"


@pytest.mark.shared
def test_a_fifth_of_the_size_keeps_998_of_1000_and_every_size_keeps_more_than_by_size() -> None:
    torch.manual_seed(0)
    name, generator = str(packaged_encoder()), random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(name)
    rows = [json.loads(line) for line in (FOLDER / "train.jsonl").read_text().splitlines()]
    classes = sorted({row["label"] for row in rows})
    base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(classes))
    targets = {"target_modules": ["query", "key", "value", "dense"], "exclude_modules": r".*pooler.*"}
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=16, modules_to_save=["pooler", "classifier"], **targets))

    def batch(some: list[dict[str, Any]]) -> dict[str, Tensor]:
        texts = [row["text"] for row in some]
        return {**tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")}

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(160):
        some = generator.sample(rows, 16)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 20) * (1 - step / 160)
        labels = torch.tensor([classes.index(row["label"]) for row in some])
        nn.functional.cross_entropy(model(**batch(some)).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    few = generator.sample(rows, 256)
    calibration = [batch(few[start : start + 8]) for start in range(0, 256, 8)]
    model.eval()

    @torch.no_grad()
    def logs(one: Any) -> Tensor:
        return torch.cat([one(**inputs).logits.log_softmax(-1) for inputs in calibration])

    none = copy.deepcopy(model)
    for key, parameter in none.named_parameters():
        if "lora_B" in key:
            parameter.data.zero_()
    whole, base_logs = logs(model), logs(none)

    def kept(one: Any) -> float:
        apart = [float((whole.exp() * (whole - other)).sum()) for other in (logs(one), base_logs)]
        return 1 - apart[0] / apart[1]

    for share in (0.05, 0.1, 0.2, 0.3, 0.5):
        by_effect, by_size = copy.deepcopy(model), copy.deepcopy(model)
        found = aroma.compress(by_effect, calibration, size=share)
        aroma.compress(by_size, None, size=share)
        assert found.size.share <= share
        assert found.size.effect == pytest.approx(kept(by_effect), abs=1e-4)
        assert kept(by_effect) > kept(by_size)
        if share == 0.2:
            assert kept(by_effect) >= 0.998
    assert aroma.compress(model, calibration).size.share <= 0.3
