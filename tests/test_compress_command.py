"""`aroma compress`: any finished LoRA adapter comes back smaller and no worse, as plain LoRA; nothing else changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import aroma_lab.compressing as compressing
from aroma.cli import main
from aroma.evidence.checkup import model_loss
from aroma.evidence.compress import compress
from aroma_lab.compressing import split_evenly
from aroma_lab.tasks.task import Task, load_task, save_task
from tiny_classifier import save_tiny_bert, sentences, write_json_lines
from tiny_lm import save_tiny_lm, tiny_tokenizer

LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
LAYERS = ["query", "value", "intermediate.dense"]
SOUNDS = {"apple": "a", "bird": "b", "door": "d", "fish": "f", "grass": "g", "house": "h"}


def train(model: Any, batches: list[Any], steps: int, rate: float = 1e-2) -> Any:
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=rate)
    model.train()
    for step in range(steps):
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def classifier(base: Path, out: Path, labels: Callable[[Any], Any], steps: int = 60, **options: Any) -> Path:
    """An adapter as plain PEFT's user saves it, trained on sentences."""
    tokenizer, rows = AutoTokenizer.from_pretrained(base), sentences(256, seed=1)
    batches = []
    for start in range(0, len(rows), 32):
        some = rows[start : start + 32]
        batch = tokenizer([str(row["text"]) for row in some], padding=True, return_tensors="pt")
        batches.append({**batch, "labels": torch.tensor([labels(row) for row in some])})
    torch.manual_seed(2)
    head = {name: options.pop(name) for name in ("num_labels", "problem_type") if name in options}
    model = AutoModelForSequenceClassification.from_pretrained(base, **head)
    config = LoraConfig(**LORA, target_modules=LAYERS, task_type="SEQ_CLS", **options)
    train(get_peft_model(model, config), batches, steps).save_pretrained(out)
    return out


def number_of(row: Any) -> int:
    return int(row["label"] == "high")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model that names its labels, adapters of it, and examples."""
    folder = tmp_path_factory.mktemp("compress")
    base = save_tiny_bert(folder / "base")
    config = AutoConfig.from_pretrained(base)
    config.id2label, config.label2id = {0: "low", 1: "high"}, {"low": 0, "high": 1}
    config.save_pretrained(base)
    classifier(base, folder / "adapter", number_of)
    (folder / "adapter" / "tokenizer_config.json").write_bytes((base / "tokenizer_config.json").read_bytes())
    (folder / "adapter" / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    write_json_lines(folder / "held-out.jsonl", sentences(120, seed=7))
    return folder


def run(adapter: Path, data: Path, out: Path, *options: str) -> dict[str, Any]:
    assert main(["compress", str(adapter), "--data", str(data), "--out", str(out), *options]) == 0
    report: dict[str, Any] = json.loads((out / "compression.json").read_text())
    return report


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_classifier_of_plain_peft_gets_smaller_and_no_worse(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, models = contents(home / "adapter"), []

    def keeping(model: Any, *arguments: Any, **options: Any) -> Any:
        models.append(model)
        return compress(model, *arguments, **options)

    monkeypatch.setattr(compressing, "compress", keeping)
    out = tmp_path / "smaller"
    report = run(home / "adapter", home / "held-out.jsonl", out)
    assert contents(home / "adapter") == before
    assert [*tmp_path.iterdir()] == [out], "no temporary folder is left"

    losses, ranks = report["held_out_loss"], report["ranks"]
    assert losses["compressed"] <= losses["adapter"] < losses["base"] - 0.1
    assert ranks["before"] == {"largest": 8, "mean": 8, "total": 48}
    assert 0 < ranks["after"]["total"] < 40
    assert report["examples"] == 120
    assert report["batches"] == 16
    assert report["against_adapter"]["saves"] == pytest.approx(losses["adapter"] - losses["compressed"])
    assert report["against_base"]["saves"] == pytest.approx(losses["base"] - losses["compressed"])
    assert min(report[f"against_{other}"]["standard_error"] for other in ("adapter", "base")) > 0
    assert report["bytes"]["before"] == (home / "adapter" / "adapter_model.safetensors").stat().st_size
    assert report["bytes"]["after"] == (out / "adapter_model.safetensors").stat().st_size < report["bytes"]["before"]
    assert {*report["versions"]} == {"aroma", "torch", "transformers", "peft"}

    said = capsys.readouterr().out
    for words in ("held-out loss", f"{losses['compressed']:.4f}", "largest rank", "standard error", str(out)):
        assert words in said
    assert (f"{report['kept_at_one_standard_error']} directions are within" in said) == (
        report["kept_at_one_standard_error"] < ranks["after"]["total"]
    )
    assert (out / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "tokenizer.json").read_bytes() == before["tokenizer.json"]
    assert load_task(out) == Task("classification", ("low", "high"), "text", None, "label", 32)

    base = AutoModelForSequenceClassification.from_pretrained(home / "base")
    reloaded, batch = PeftModel.from_pretrained(base, out).eval(), torch.arange(5, 25).view(2, 10)
    torch.testing.assert_close(reloaded(batch).logits, models[0](batch).logits, rtol=1e-5, atol=1e-5)
    kept = {name: tensor.shape[0] for name, tensor in load_file(out / "adapter_model.safetensors").items() if "lora_A" in name}
    assert sum(kept.values()) == ranks["after"]["total"]
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(home / "base")

    again = run(home / "adapter", home / "held-out.jsonl", tmp_path / "again", "--standard-errors", "1")
    assert again["ranks"]["after"]["total"] == report["kept_at_one_standard_error"]
    assert main(["inspect", str(out)]) == 0
    assert main(["eval", str(out), "--data", str(home / "held-out.jsonl")]) == 0
