"""`aroma compress`: any finished LoRA adapter comes back smaller and no worse, as plain LoRA; nothing else changes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import aroma_lab.compressing as compressing
from aroma.cli import main
from aroma.evidence.checkup import model_loss
from aroma.evidence.checkups import compress
from aroma_lab.tasks.task import Task, read_task, save_task
from tiny_classifier import save_tiny_bert, sentences, write_json_lines
from tiny_lm import save_tiny_lm, tiny_tokenizer

LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
LAYERS = ["query", "value", "intermediate.dense"]
LETTERS = ["a", "b", "d", "f", "g", "h"]


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
    said = capsys.readouterr().out
    for words in ("held-out loss", f"{losses['compressed']:.4f}", "largest rank", "standard error", str(out)):
        assert words in said
    assert (out / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "tokenizer.json").read_bytes() == before["tokenizer.json"]
    assert read_task(out) == Task("classification", ("low", "high"), "text", None, "label", 32)

    base = AutoModelForSequenceClassification.from_pretrained(home / "base")
    reloaded, batch = PeftModel.from_pretrained(base, out).eval(), torch.arange(5, 25).view(2, 10)
    torch.testing.assert_close(reloaded(batch).logits, models[0](batch).logits, rtol=1e-5, atol=1e-5)
    kept = {
        name: tensor.shape[0]
        for name, tensor in load_file(out / "adapter_model.safetensors").items()
        if "lora_A" in name
    }
    assert sum(kept.values()) == ranks["after"]["total"]
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(home / "base")

    again = run(home / "adapter", home / "held-out.jsonl", tmp_path / "again", "--standard-errors", "1")
    assert again["ranks"]["after"]["total"] == report["kept_at_one_standard_error"]
    assert main(["inspect", str(out)]) == 0
    assert main(["eval", str(out), "--data", str(home / "held-out.jsonl")]) == 0


def test_a_regression_of_plain_peft_with_a_tokenizer_of_its_base(home: Path, tmp_path: Path) -> None:
    adapter = classifier(
        home / "base", tmp_path / "adapter", lambda row: float(row["score"]), num_labels=1, problem_type="regression"
    )
    data = tmp_path / "held-out.csv"
    rows = [f"{row['text']},{row['score']}" for row in sentences(80, seed=7)]
    data.write_text("\n".join(["sentence,score", *rows]) + "\n")
    report = run(adapter, data, tmp_path / "out")
    assert (
        report["held_out_loss"]["compressed"] <= report["held_out_loss"]["adapter"] < report["held_out_loss"]["base"]
    )
    assert read_task(tmp_path / "out") == Task("regression", None, "sentence", None, "score", 32)


def test_a_saved_task_names_the_columns_and_dora_is_lora_too(home: Path, tmp_path: Path) -> None:
    adapter = classifier(home / "base", tmp_path / "adapter", number_of, use_dora=True, use_rslora=True)
    save_task(Task("classification", ("low", "high"), "said", "also", "kind", 12), adapter)
    names = {"text": "said", "label": "kind"}
    rows = [
        {names.get(key, key): value for key, value in row.items()} | {"also": "w1"} for row in sentences(24, seed=7)
    ]
    report = run(adapter, write_json_lines(tmp_path / "rows.jsonl", rows), tmp_path / "out", "--batch-size", "1")
    assert (report["examples"], report["batches"]) == (24, 24)
    assert (tmp_path / "out" / "aroma_task.json").read_bytes() == (adapter / "aroma_task.json").read_bytes()
    base = AutoModelForSequenceClassification.from_pretrained(home / "base")
    config = PeftModel.from_pretrained(base, tmp_path / "out").peft_config["default"]
    assert config.use_dora
    assert not config.use_rslora


def test_an_adapter_in_few_bits_stays_in_few_bits(home: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    base = AutoModelForSequenceClassification.from_pretrained(home / "base")
    PeftModel.from_pretrained(base, home / "adapter", autocast_adapter_dtype=False).bfloat16().save_pretrained(adapter)
    run(adapter, home / "held-out.jsonl", tmp_path / "out", "--base", str(home / "base"))
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


# Language models -----------------------------------------------------------------------------------------------------


def chats(wrong: int = 0) -> list[dict[str, object]]:
    """Questions whose answer is always apple; of ten answers `wrong` are bird."""
    rows: list[dict[str, object]] = []
    for number in range(72):
        answer = "bird" if number * 7 % 10 < wrong else "apple"
        question = f"a word that begins with {LETTERS[number % 6]}" + " ?" * (number // 6)
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return rows


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model and an adapter of plain PEFT that answers chats, trained by responses alone."""
    folder = tmp_path_factory.mktemp("speaker")
    base, tokenizer = save_tiny_lm(folder / "base"), tiny_tokenizer()
    turns: list[Any] = [row["messages"] for row in chats(wrong=3)]
    asked = [tokenizer.apply_chat_template(some[:1], tokenize=False, add_generation_prompt=True) for some in turns]
    whole = [tokenizer.apply_chat_template(some, tokenize=False) for some in turns]
    batch = tokenizer(whole, padding=True, return_tensors="pt", add_special_tokens=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, prompt in zip(labels, tokenizer(asked, add_special_tokens=False)["input_ids"], strict=True):
        row[: len(prompt)] = -100
    config = LoraConfig(**LORA, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    train(model, [{"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}], 25)
    model.save_pretrained(folder / "adapter")
    return folder


def test_a_language_model_learns_to_be_smaller_from_chats(
    speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, asked = contents(speaker / "adapter"), []

    def keeping(model: Any, batches: list[Any], **options: Any) -> Any:
        asked.extend(batches)
        return compress(model, batches, **options)

    monkeypatch.setattr(compressing, "compress", keeping)
    data, out = write_json_lines(tmp_path / "chats.jsonl", chats()), tmp_path / "out"
    report = run(speaker / "adapter", data, out)
    assert contents(speaker / "adapter") == before
    assert report["held_out_loss"]["compressed"] <= report["held_out_loss"]["adapter"]
    assert report["held_out_loss"]["adapter"] < report["held_out_loss"]["base"] - 1
    assert report["ranks"]["after"]["total"] < report["ranks"]["before"]["total"]
    assert "72 examples make 72 rows" in report["note"]

    tokenizer = tiny_tokenizer()
    learned = [row[row != -100] for batch in asked for row in batch["labels"]]
    assert {tokenizer.decode(row[:1]) for row in learned} == {"apple"}, (
        "the loss is of responses alone, as in training"
    )
    assert {len(row) for row in learned} == {2}, "and of their end"
    assert {len(batch["labels"]) for batch in asked} == {4, 5}

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(speaker / "base"), out).eval()
    with torch.no_grad():
        loss = torch.stack([model_loss(model, batch) for batch in asked]).mean()
    assert float(loss) == pytest.approx(report["held_out_loss"]["compressed"], abs=1e-5)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "rows", "words"),
    [
        ({}, sentences(7, seed=7), ("--data=", "7 examples", "8")),
        ({}, [{"text": "w1", "label": "medium"}] * 20, ("row 1", "medium", "low, high")),
        ({"peft_type": "IA3"}, sentences(20, seed=7), ("peft_type='IA3'", "LoRA")),
        ({"task_type": "TOKEN_CLS"}, sentences(20, seed=7), ("task_type='TOKEN_CLS'", "SEQ_CLS", "CAUSAL_LM")),
        ({"base_model_name_or_path": "/gone/base"}, sentences(20, seed=7), ("--base='/gone/base'", "no such folder")),
    ],
)
def test_what_cannot_be_compressed_is_named(
    home: Path,
    tmp_path: Path,
    fields: dict[str, str],
    rows: list[dict[str, object]],
    words: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = shutil.copytree(home / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text()) | fields
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    data = write_json_lines(tmp_path / "rows.jsonl", rows)
    assert main(["compress", str(adapter), "--data", str(data), "--out", str(tmp_path / "out")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("error:") == 1
    for word in words:
        assert word in said
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, taken = contents(home), tmp_path / "taken"
    taken.mkdir()
    (taken / "note.txt").write_text("mine")
    (tmp_path / "link").symlink_to(home / "adapter")
    places = [home / "adapter", home / "adapter" / "inner", tmp_path / "link" / "inner", taken]
    for place in places:
        options = ["--data", str(home / "held-out.jsonl"), "--out", str(place)]
        assert main(["compress", str(home / "adapter"), *options]) == 2
        assert f"--out={str(place)!r}" in "".join(capsys.readouterr().err.split("\n"))
    assert contents(home) == before
    assert contents(taken) == {"note.txt": b"mine"}


# What is not installed ----------------------------------------------------------------------------------


WITHOUT_EXTRAS = """
import importlib.machinery, sys
extras = {"datasets", "jsonargparse", "matplotlib", "pandas", "PIL", "pyarrow", "scipy", "seaborn",
          "sklearn", "tabulate", "threadpoolctl", "trl", "gguf", "lm_eval", "bitsandbytes"}
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *others: None if name.partition(".")[0] in extras else find(name, *others)
)
try:
    import pandas
except ImportError:
    from aroma.cli import main
    kinds = [line.split() for line in sys.argv[1:]]
    sys.exit(max(main(["compress", adapter, "--data", data, "--out", out]) for adapter, data, out in kinds))
"""


def test_it_needs_no_extra(home: Path, speaker: Path, tmp_path: Path) -> None:
    talk = write_json_lines(tmp_path / "chats.jsonl", chats())
    kinds = [
        (home / "adapter", home / "held-out.jsonl", tmp_path / "one"),
        (speaker / "adapter", talk, tmp_path / "two"),
    ]
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *(" ".join(map(str, kind)) for kind in kinds)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("pip install 'aroma-peft[plot]'") == 2
    assert found.stderr.count("evaluating held-out examples") >= 2
    for *_, out in kinds:
        assert (out / "adapter_model.safetensors").exists()
        assert not (out / "ranks.png").exists()
