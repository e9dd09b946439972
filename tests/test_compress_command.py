"""`aroma compress`: any finished LoRA adapter comes back smaller with the same answers, as plain LoRA."""

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
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

import aroma
import aroma_lab.compressing as compressing
from aroma.cli import main
from aroma_lab.tasks.task import Task, save_task
from compress_commands import answers, classifier, contents, loaded, number_of, ranks_of, run, train
from tiny_classifier import save_tiny_bert, sentences, write_json_lines
from tiny_lm import save_tiny_lm, tiny_tokenizer

LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
LAYERS = ["query", "value", "intermediate.dense"]
LETTERS = ["a", "b", "d", "f", "g", "h"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model that names its labels, an adapter of it, and examples."""
    folder = tmp_path_factory.mktemp("compress")
    base = save_tiny_bert(folder / "base")
    config = AutoConfig.from_pretrained(base)
    config.id2label, config.label2id = {0: "low", 1: "high"}, {"low": 0, "high": 1}
    config.save_pretrained(base)
    classifier(base, folder / "adapter", number_of)
    for name in ("tokenizer_config.json", "tokenizer.json"):
        shutil.copy(base / name, folder / "adapter" / name)
    write_json_lines(folder / "texts.jsonl", sentences(120, seed=7))
    return folder


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Model and batches of each compression; the model is what was saved."""
    calls: list[Any] = []

    def keeping(model: Any, batches: Any, **options: Any) -> Any:
        calls.append((model, batches))
        return aroma.compress(model, batches, **options)

    monkeypatch.setattr(compressing, "compress", keeping)
    return calls


# Classifiers, regressions, encoders ----------------------------------------------------------------------------------


def test_a_classifier_gets_smaller_and_says_what_a_plain_script_finds(
    home: Path, tmp_path: Path, given: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before, out = contents(home / "adapter"), tmp_path / "smaller"
    report = run(home / "adapter", out, data=home / "texts.jsonl")
    assert contents(home / "adapter") == before
    assert [*tmp_path.iterdir()] == [out], "no temporary folder is left"
    none, chosen, whole = (report["curve"][place] for place in (0, report["chosen"], -1))
    assert (report["examples"], report["outputs"], report["left_alone"]) == (120, "classes", [])
    assert chosen["share"] < 0.8
    assert report["curve"][report["chosen"] - 1]["effect"] < 0.998 <= chosen["effect"]

    # What the saved files do, measured without any of this project.
    model, batches = given[0]
    adapters = {"whole": home / "adapter", "kept": out}
    found = {
        name: answers(loaded(AutoModelForSequenceClassification, home / "base", adapter), batches)
        for name, adapter in adapters.items()
    }
    bare = loaded(AutoModelForSequenceClassification, home / "base", home / "adapter")
    for name, parameter in bare.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    found["none"] = answers(bare, batches)
    apart = {name: float((found["whole"].exp() * (found["whole"] - found[name])).sum()) for name in ("kept", "none")}
    assert chosen["effect"] == pytest.approx(1 - apart["kept"] / apart["none"], abs=1e-5)
    labels = torch.cat([batch["labels"] for batch in batches])
    for size, name in ((none, "none"), (chosen, "kept"), (whole, "whole")):
        assert size["score"] == pytest.approx(float((found[name].argmax(-1) == labels).double().mean()))
        assert size["loss"] == pytest.approx(float(-found[name][range(120), labels].mean()), abs=1e-5)
    torch.testing.assert_close(answers(model, batches), found["kept"], rtol=1e-5, atol=1e-5)
    assert max(map(len, (batch["labels"] for batch in batches))) == 8

    kept = {name: after for name, (_, after) in report["ranks"].items() if after}
    assert {name.removeprefix("base_model.model."): rank for name, rank in ranks_of(out).items()} == kept
    assert sum(kept.values()) == chosen["directions"]
    stored = [tensor for name, tensor in load_file(out / "adapter_model.safetensors").items() if "lora_" in name]
    assert sum(tensor.numel() * 4 for tensor in stored) == chosen["bytes"] < whole["bytes"]
    assert (out / "tokenizer.json").read_bytes() == before["tokenizer.json"]
    assert (out / "compression.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert report["says"] in said
    for one in report["curve"]:
        assert f"{one['effect']:.2%} ± {one['standard_error']:.2%}" in said
        assert f"{one['score']:.1%}" in said
    (marked,) = [line for line in said.splitlines() if line.startswith("→ ")]
    assert f"{chosen['bytes']:,}" in marked
    assert main(["inspect", str(out)]) == 0
    assert main(["eval", str(out), "--data", str(home / "texts.jsonl")]) == 0


def unlabelled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"text": row["text"]} for row in rows]


def relabelled(*labels: Any) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    return lambda rows: [{**row, "label": labels[place % len(labels)]} for place, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (unlabelled, ""),
        (relabelled(None), ""),
        (relabelled("low", None), "nothing is in column 'label'"),
        (relabelled("low", "medium"), "have low, high"),
    ],
    ids=["no column", "empty", "some empty", "other names"],
)
def test_labels_are_not_missed_and_change_nothing(
    home: Path, tmp_path: Path, change: Any, note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(home / "adapter", tmp_path / "labelled", data=home / "texts.jsonl")
    data = write_json_lines(tmp_path / "rows.jsonl", change(sentences(120, seed=7)))
    capsys.readouterr()
    found = run(home / "adapter", tmp_path / "out", data=data)
    assert note in found["note"]
    assert found["note"] in capsys.readouterr().out
    assert (found["ranks"], found["chosen"]) == (whole["ranks"], whole["chosen"])
    assert [one["effect"] for one in found["curve"]] == [one["effect"] for one in whole["curve"]]
    assert {one["score"] for one in found["curve"]} == {None}
    if not note.startswith("nothing"):
        options = ["compress", str(home / "adapter"), "--data", str(data), "--out", str(tmp_path / "no")]
        assert main([*options, "--label", "label"]) == 2, "a label that was asked for is missed"
        assert not (tmp_path / "no").exists()


def test_a_regression_has_a_loss_and_no_score_and_others_have_neither(home: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    adapter = classifier(home / "base", tmp_path / "adapter", lambda row: float(row["score"]), **options)
    data = tmp_path / "rows.csv"
    rows = [f"{row['text']},{row['score']}" for row in sentences(80, seed=7)]
    data.write_text("\n".join(["sentence,score", *rows]) + "\n")
    report = run(adapter, tmp_path / "out", data=data)
    none, kept, whole = (report["curve"][place] for place in (0, report["chosen"], -1))
    assert report["outputs"] == "values"
    assert abs(kept["loss"] - whole["loss"]) < 0.1 * abs(none["loss"] - whole["loss"])
    assert kept["score"] is None

    base = shutil.copytree(home / "base", tmp_path / "base")
    config = AutoConfig.from_pretrained(base)
    config.problem_type = "multi_label_classification"
    config.save_pretrained(base)
    labels = [[0.0, 1.0], [1.0, 1.0]]
    adapter = classifier(base, tmp_path / "labels", lambda row: labels[number_of(row)])
    report = run(adapter, tmp_path / "labelled", data=data)
    assert (report["outputs"], report["curve"][-1]["loss"]) == ("labels", None)
    assert (
        main(["compress", str(adapter), "--data", str(data), "--out", str(tmp_path / "no"), "--label", "score"]) == 2
    )

    torch.manual_seed(0)
    lora = LoraConfig(**LORA, target_modules=LAYERS, task_type="FEATURE_EXTRACTION", init_lora_weights=False)
    get_peft_model(AutoModel.from_pretrained(home / "base"), lora).save_pretrained(tmp_path / "encoder")
    report = run(tmp_path / "encoder", tmp_path / "small", "--size", "0.5", data=data)
    kept = report["curve"][report["chosen"]]
    assert (report["outputs"], report["examples"], kept["loss"]) == ("values", 80, None)
    assert 0.4 < kept["share"] <= 0.5
    tokens = torch.arange(5, 25).view(2, 10)
    states = [
        loaded(AutoModel, home / "base", tmp_path / name)(tokens).last_hidden_state for name in ("encoder", "small")
    ]
    bare = AutoModel.from_pretrained(home / "base").eval()(tokens).last_hidden_state
    assert (states[0] - states[1]).norm() < 0.7 * (states[0] - bare).norm()


def test_a_saved_task_names_the_columns_and_dora_is_lora_too(home: Path, tmp_path: Path) -> None:
    adapter = classifier(home / "base", tmp_path / "adapter", number_of, use_dora=True, use_rslora=True)
    save_task(Task("classification", ("low", "high"), "said", "also", "kind", 12), adapter)
    rows: list[dict[str, object]] = [
        {"said": row["text"], "kind": row["label"], "also": "w1"} for row in sentences(24, seed=7)
    ]
    data = write_json_lines(tmp_path / "rows.jsonl", rows)
    report = run(adapter, tmp_path / "out", "--batch-size", "1", data=data)
    assert (report["examples"], report["inputs"]["batch_size"]) == (24, 1)
    assert report["curve"][-1]["score"] is not None
    assert (tmp_path / "out" / "aroma_task.json").read_bytes() == (adapter / "aroma_task.json").read_bytes()
    config = loaded(AutoModelForSequenceClassification, home / "base", tmp_path / "out").peft_config["default"]
    assert config.use_dora
    assert not config.use_rslora


def test_an_adapter_in_few_bits_stays_in_few_bits(home: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    base = AutoModelForSequenceClassification.from_pretrained(home / "base")
    PeftModel.from_pretrained(base, home / "adapter", autocast_adapter_dtype=False).bfloat16().save_pretrained(adapter)
    report = run(adapter, tmp_path / "out", "--base", str(home / "base"), data=home / "texts.jsonl")
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    stored = sum(2 * tensor.numel() for name, tensor in saved.items() if "lora_" in name)
    assert report["curve"][report["chosen"]]["bytes"] == stored


def test_examples_are_drawn_and_the_same_ones_again(home: Path, tmp_path: Path, given: list[Any]) -> None:
    data = write_json_lines(tmp_path / "many.jsonl", sentences(300, seed=7))
    reports = [run(home / "adapter", tmp_path / name, "--examples", "40", data=data) for name in ("one", "two")]
    assert reports[0]["examples"] == 40
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    assert run(home / "adapter", tmp_path / "all", data=data)["examples"] == 256
    drawn = [torch.cat([batch["labels"] for batch in batches]).tolist() for _, batches in given]
    assert drawn[0] == drawn[1]
    assert drawn[0] != [number_of(row) for row in sentences(300, seed=7)][:40], "not the first ones"


# What stays is said --------------------------------------------------------------------------------------------------


def test_without_examples_the_largest_directions_stay_and_no_base_is_read(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = shutil.copytree(home / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/gone/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    for options, wanted in ((["--size", "0.3"], {"size": 0.3}), (["--rank", "2"], {"rank": 2})):
        model = loaded(AutoModelForSequenceClassification, home / "base", home / "adapter")
        expected = aroma.compress(model, None, **wanted)  # type: ignore[arg-type]
        out = tmp_path / options[0]
        report = run(adapter, out, *options)
        assert {name: tuple(pair) for name, pair in report["ranks"].items()} == expected.ranks
        tokens = torch.arange(5, 25).view(2, 10)
        saved = loaded(AutoModelForSequenceClassification, home / "base", out)
        torch.testing.assert_close(saved(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
        assert report["inputs"] == {"adapter": str(adapter), "data": None, "size": None, "rank": None} | wanted
        assert (out / "tokenizer.json").exists()
        assert (out / "compression.png").exists()
    said = capsys.readouterr()
    assert "effect kept" not in said.out
    assert "base model" not in said.err


@pytest.mark.parametrize(
    ("options", "holds"),
    [
        (["--keep", "0.9"], lambda one: one["effect"] >= 0.9),
        (["--size", "0.1"], lambda one: 0.05 < one["share"] <= 0.1),
        (["--rank", "1"], lambda one: one["largest_rank"] == 1),
        (
            ["--rank", "2", "--size", "0.15", "--keep", "0.5"],
            lambda one: one["effect"] >= 0.5 and one["share"] <= 0.15,
        ),
    ],
)
def test_what_is_asked_for_holds(home: Path, tmp_path: Path, options: list[str], holds: Any) -> None:
    usual = run(home / "adapter", tmp_path / "usual", data=home / "texts.jsonl")
    report = run(home / "adapter", tmp_path / "out", *options, data=home / "texts.jsonl")
    assert holds(report["curve"][report["chosen"]])
    assert report["curve"][report["chosen"]]["directions"] < usual["curve"][usual["chosen"]]["directions"]


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


def test_a_language_model_is_compared_where_it_learns(speaker: Path, tmp_path: Path, given: list[Any]) -> None:
    before = contents(speaker / "adapter")
    data, out = write_json_lines(tmp_path / "chats.jsonl", chats()), tmp_path / "out"
    report = run(speaker / "adapter", out, data=data)
    assert contents(speaker / "adapter") == before
    none, kept, whole = (report["curve"][place] for place in (0, report["chosen"], -1))
    assert kept["effect"] >= 0.998
    assert kept["loss"] < none["loss"] - 1
    assert kept["directions"] < whole["directions"]
    assert "72 examples make 72 rows" in report["note"]

    model, batches = given[0]
    tokenizer = tiny_tokenizer()
    learned = [row[row != -100] for batch in batches for row in batch["labels"]]
    assert {tokenizer.decode(row[:1]) for row in learned} == {"apple"}, "responses alone count, as in training"
    assert {len(row) for row in learned} == {2}, "and their end"
    reloaded = loaded(AutoModelForCausalLM, speaker / "base", out)
    with torch.no_grad():
        losses = [[float(one(**batch).loss) * len(batch["labels"]) for batch in batches] for one in (model, reloaded)]
    assert sum(losses[1]) == pytest.approx(sum(losses[0]), rel=1e-4)
    assert sum(losses[1]) / 72 == pytest.approx(kept["loss"], rel=1e-4)


def test_long_texts_are_split_and_drawn_from(speaker: Path, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"body": "a word that begins with apple bird cloud ? " * 20} for _ in range(3)]
    data = write_json_lines(tmp_path / "texts.jsonl", rows)
    options = ["--text", "body", "--max-length", "16", "--examples", "20", "--size", "0.5"]
    report = run(speaker / "adapter", tmp_path / "out", *options, data=data)
    assert report["examples"] == 20, "of more rows than three"
    assert "3 texts split" in report["note"]


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "rows", "options", "words"),
    [
        ({}, sentences(15, seed=7), [], ("--data=", "15 examples", "16 or more")),
        ({}, sentences(20, seed=7), ["--text", "body"], ("no column 'body'", "'text', 'label'")),
        ({}, sentences(20, seed=7), ["--label", "lable"], ("no column 'lable'", "did you mean 'label'")),
        ({}, [{"text": None, "label": "low"}] * 20, [], ("row", "nothing is in column 'text'")),
        ({"peft_type": "IA3"}, sentences(20, seed=7), [], ("LoRA",)),
        ({"task_type": "TOKEN_CLS"}, sentences(20, seed=7), [], ("task_type='TOKEN_CLS'", "SEQ_CLS", "CAUSAL_LM")),
        (
            {"base_model_name_or_path": "/gone/base"},
            sentences(20, seed=7),
            [],
            ("--base='/gone/base'", "no such folder"),
        ),
        (
            {"base_model_name_or_path": None},
            sentences(20, seed=7),
            [],
            ("--base=None", "does not name its base model"),
        ),
    ],
)
def test_what_cannot_be_compressed_is_named(
    home: Path,
    tmp_path: Path,
    fields: dict[str, str],
    rows: list[dict[str, object]],
    options: list[str],
    words: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = shutil.copytree(home / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text()) | fields
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    before, data = contents(adapter), write_json_lines(tmp_path / "rows.jsonl", rows)
    assert main(["compress", str(adapter), "--data", str(data), "--out", str(tmp_path / "out"), *options]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("error:") == 1
    for word in words:
        assert word in said
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "rows.jsonl"}
    assert contents(adapter) == before


REFUSED = [
    ("--data D --keep 0", "--keep=0.0: give a share above 0 and at most 1"),
    ("--data D --keep 1.01", "--keep=1.01: "),
    ("--data D --keep nan", "--keep=nan: "),
    ("--data D --size -0.1", "--size=-0.1: "),
    ("--size 1.5", "--size=1.5: "),
    ("--rank 0", "--rank=0: give 1 or more"),
    ("--data D --examples 15", "--examples=15: give 16 or more"),
    ("--data D --batch-size 0", "--batch-size=0: give 1 or more"),
    ("--data D --max-length 2", "--max-length=2: give 3 or more"),
    ("", "--data=None: give examples, or say how much stays with --size or --rank"),
    ("--keep 0.99", "--keep=0.99: it is about examples; give --data, too"),
    ("--size 0.2 --base B", "--base='B': it is about examples"),
    ("--size 0.2 --max-length 64", "--max-length=64: it is about examples"),
    ("--data /no/such.jsonl", "--data='/no/such.jsonl': no such file"),
]
CHECKS = """
import json, sys
from aroma.cli import main
adapter, data, out, lines = sys.argv[1:]
codes = [
    main(["compress", adapter, "--out", out, *(data if word == "D" else word for word in line.split())])
    for line in json.loads(lines)
]
print(set(codes), "torch" in sys.modules)
"""


def test_options_are_checked_before_anything_is_loaded(home: Path, tmp_path: Path) -> None:
    lines = json.dumps([line for line, _ in REFUSED])
    places = [home / "adapter", home / "texts.jsonl", tmp_path / "out"]
    command = [sys.executable, "-c", CHECKS, *map(str, places), lines]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.stdout == "{2} False\n", found.stderr
    errors = found.stderr.strip().splitlines()
    assert len(errors) == len(REFUSED)
    for error, (_, words) in zip(errors, REFUSED, strict=True):
        assert words in error
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, taken = contents(home), tmp_path / "taken"
    taken.mkdir()
    (taken / "note.txt").write_text("mine")
    (tmp_path / "link").symlink_to(home / "adapter")
    for place in [home / "adapter", home / "adapter" / "inner", tmp_path / "link" / "inner", taken]:
        for options in (["--data", str(home / "texts.jsonl")], ["--size", "0.5"]):
            assert main(["compress", str(home / "adapter"), *options, "--out", str(place)]) == 2
            assert f"--out={str(place)!r}" in "".join(capsys.readouterr().err.split("\n"))
    assert contents(home) == before
    assert contents(taken) == {"note.txt": b"mine"}


# What is not installed -----------------------------------------------------------------------------------------------


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
    sys.exit(max(main(["compress", *words]) for words in kinds))
"""


def test_it_needs_no_extra(home: Path, speaker: Path, tmp_path: Path) -> None:
    talk = write_json_lines(tmp_path / "chats.jsonl", chats())
    kinds = [
        f"{home / 'adapter'} --data {home / 'texts.jsonl'} --out {tmp_path / 'one'}",
        f"{speaker / 'adapter'} --data {talk} --out {tmp_path / 'two'}",
        f"{home / 'adapter'} --size 0.5 --out {tmp_path / 'three'}",
    ]
    found = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS, *kinds], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("pip install 'aroma-peft[plot]'") == 3
    assert "effect of each size" in found.stderr, "a bar says what is being done"
    for name in ("one", "two", "three"):
        assert (tmp_path / name / "adapter_model.safetensors").exists()
        assert not (tmp_path / name / "compression.png").exists()
