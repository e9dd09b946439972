"""`aroma predict`, and `aroma eval` of adapters that a Trainer saved: what a person gets for every row of a file."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from aroma import AromaConfig
from aroma.cli import main
from aroma_lab.tasks.task import Task, save_task
from models import METHOD, set_ranks
from tiny_classifier import save_tiny_bert, sentences, write_json_lines
from tiny_lm import CHAT_TEMPLATE, save_tiny_lm, tiny_tokenizer

NAMES = ("low", "middle", "high, or so")
ROWS = [{**row, "id": number, "note": 'a "b"\nc'} for number, row in enumerate(sentences(11, seed=4))]
ROWS[3]["text"] = " ".join([str(row["text"]) for row in ROWS[:6]])  # longer than the model takes
ROWS[5] |= {"text": "w1", "only here": [1, None]}


def make_adapter(base: Path, folder: Path, **options: Any) -> Path:
    """An adapter as a Trainer's user saves it: no aroma_task.json, no tokenizer."""
    torch.manual_seed(3)
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(base, **options), AromaConfig(**METHOD, task_type="SEQ_CLS")
    )
    set_ranks(model, [2, 0, 1])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.copy_(torch.randn_like(parameter))
        # Centred, so that rows get different labels.
        texts = [str(row["text"]) for row in ROWS]
        batch = AutoTokenizer.from_pretrained(base)(texts, padding=True, truncation=True, return_tensors="pt")
        model.eval()
        middle = model(**batch).logits.median(0).values
        model.get_base_model().classifier.modules_to_save["default"].bias -= middle - 0.05  # no row on the edge
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    save_tiny_bert(folder / "base")
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
    make_adapter(folder / "base", folder / "named", **labels)
    make_adapter(folder / "base", folder / "nameless", num_labels=3)
    make_adapter(folder / "base", folder / "regression", num_labels=1, problem_type="regression")
    make_adapter(folder / "base", folder / "several", problem_type="multi_label_classification", **labels)
    recipe = make_adapter(folder / "base", folder / "recipe", num_labels=3)
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(recipe)
    save_task(Task("classification", NAMES, "text", None, "label", 12), recipe)
    write_json_lines(folder / "rows.jsonl", ROWS)
    with (folder / "rows.csv").open("w", newline="") as stream:
        table = csv.DictWriter(stream, ["text", "label", "id", "note"], extrasaction="ignore")
        table.writeheader()
        table.writerows(ROWS)
    return folder


def reference(home: Path, name: str, length: int = 32, **options: Any) -> torch.Tensor:
    """Logits of every row by plain PEFT, each alone."""
    base = AutoModelForSequenceClassification.from_pretrained(home / "base", **options)
    model = PeftModel.from_pretrained(base, home / name).eval()
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    with torch.no_grad():
        each = [
            model(**tokenizer(str(row["text"]), truncation=True, max_length=length, return_tensors="pt")).logits[0]
            for row in ROWS
        ]
    return torch.stack(each).double()


def predicted(home: Path, out: Path, name: str, data: str, *options: str) -> list[dict[str, Any]]:
    assert main(["predict", str(home / name), str(home / data), "--out", str(out), "--batch-size", "4", *options]) == 0
    if out.suffix == ".jsonl":
        return [json.loads(line) for line in out.read_text().splitlines()]
    with out.open(newline="") as stream:
        return [*csv.DictReader(stream)]


def test_rows_keep_their_columns_and_get_what_plain_peft_says(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = predicted(home, tmp_path / "out.jsonl", "named", "rows.jsonl", "--text", "text")
    assert f"11 predictions: {tmp_path / 'out.jsonl'}" in capsys.readouterr().out
    expected = reference(home, "named", num_labels=3).softmax(-1)
    assert len({int(index) for index in expected.argmax(-1)}) > 1, "the case tells labels apart"
    for row, given, probabilities in zip(rows, ROWS, expected.tolist(), strict=True):
        assert row.pop("probabilities") == pytest.approx(dict(zip(NAMES, probabilities, strict=True)), abs=1e-6)
        assert row.pop("prediction") == NAMES[probabilities.index(max(probabilities))]
        assert row == given

    rows = predicted(home, tmp_path / "out.csv", "named", "rows.jsonl", "--text", "text")
    columns = ["text", "label", "score", "id", "note", "only here", "prediction"]
    assert [*rows[0]] == columns + [f"probability_{name}" for name in NAMES]
    for row, given, probabilities in zip(rows, ROWS, expected.tolist(), strict=True):
        assert [float(row[f"probability_{name}"]) for name in NAMES] == pytest.approx(probabilities, abs=1e-6)
        assert row["prediction"] == NAMES[probabilities.index(max(probabilities))]
        assert (row["id"], row["note"]) == (str(given["id"]), given["note"])
        assert row["only here"] == ("[1, null]" if "only here" in given else "")


def test_a_recipe_s_adapter_needs_no_columns_and_cuts_as_in_training(home: Path, tmp_path: Path) -> None:
    rows = predicted(home, tmp_path / "out.jsonl", "recipe", "rows.csv")
    expected = reference(home, "recipe", length=12, num_labels=3).softmax(-1).tolist()
    assert [row["prediction"] for row in rows] == [NAMES[row.index(max(row))] for row in expected]
    assert [[*row["probabilities"].values()] for row in rows] == [pytest.approx(row, abs=1e-6) for row in expected]
    assert [row["note"] for row in rows] == [row["note"] for row in ROWS]


def test_numbers_indices_and_several_labels(home: Path, tmp_path: Path) -> None:
    rows = predicted(home, tmp_path / "r.csv", "regression", "rows.csv", "--text", "text")
    expected = reference(home, "regression", num_labels=1)[:, 0].tolist()
    assert [float(row["prediction"]) for row in rows] == pytest.approx(expected, abs=1e-5)
    assert "probability" not in " ".join(rows[0])

    rows = predicted(home, tmp_path / "n.jsonl", "nameless", "rows.csv", "--text", "text")
    expected = reference(home, "nameless", num_labels=3).argmax(-1).tolist()
    assert [row["prediction"] for row in rows] == [str(index) for index in expected]


def test_pairs(home: Path, tmp_path: Path) -> None:
    given = [["w1 w2", "w7"], ["w9", "w3 w4 w5"]]
    write_json_lines(home / "pairs.jsonl", [{"one": one, "other": other} for one, other in given])
    rows = predicted(home, tmp_path / "o.jsonl", "named", "pairs.jsonl", "--text", "one", "--text-pair", "other")
    base = AutoModelForSequenceClassification.from_pretrained(home / "base", num_labels=3)
    model = PeftModel.from_pretrained(base, home / "named").eval()
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    for row, (one, other) in zip(rows, given, strict=True):
        expected = model(**tokenizer(one, other, return_tensors="pt")).logits[0].softmax(-1).tolist()
        assert [*row["probabilities"].values()] == pytest.approx(expected, abs=1e-6)


def test_a_language_model_writes_what_plain_peft_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_tiny_lm(tmp_path / "base", "llama")
    config = AromaConfig(**METHOD, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "up_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    set_ranks(model, [2, 0, 1])
    model.save_pretrained(tmp_path / "adapter")
    rows = [{"question": text, "id": text[0]} for text in ("apple bird", "king", "iron a lamp", "grass house " * 9)]
    data, out = write_json_lines(tmp_path / "rows.jsonl", rows), tmp_path / "o.jsonl"
    arguments = ["predict", str(tmp_path / "adapter"), str(data), "--out", str(out), "--text", "question"]
    arguments += ["--max-new-tokens", "12", "--force"]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    tokenizer = tiny_tokenizer()

    def alone(row: dict[str, str]) -> list[int]:
        chat = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        written = plain.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        return [int(token) for token in written]

    for ending in ("<|end|>", tokenizer.convert_ids_to_tokens(alone(rows[1])[3])):
        # What ends a turn of the template ends an answer, too.
        tokenizer.add_special_tokens({"additional_special_tokens": [ending]})
        tokenizer.chat_template = CHAT_TEMPLATE.replace("<|end|>", ending)
        tokenizer.save_pretrained(tmp_path / "adapter")
        stops = (tokenizer.convert_tokens_to_ids(ending), tokenizer.eos_token_id)
        for batch_size in (1, 3):
            assert main([*arguments, "--batch-size", str(batch_size)]) == 0
            answered = [json.loads(line) for line in out.read_text().splitlines()]
            for row, given in zip(answered, rows, strict=True):
                said = alone(given)
                end = next((number for number, token in enumerate(said) if token in stops), None)
                assert row["prediction"] == tokenizer.decode(said[:end], skip_special_tokens=True).strip()
                assert {**given, "finished": end is not None}.items() <= row.items()
        assert len({row["prediction"] for row in answered}) > 1
    assert any(row["finished"] for row in answered)
    # Before the first answer, not after all those before it.
    write_json_lines(data, [*rows, {"question": " ".join(["king"] * 500), "id": 4}])
    assert main(arguments) == 2
    assert "data (row 5)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("text,label\na,b\n", [], "no aroma_task.json, as adapters that `aroma train` saves, so its columns are not"),
        ("text\na\n", ["--text", "words"], "data (row 1): it has no column 'words'; its columns are 'text'"),
        ("text,label\n", ["--text", "text"], "it has no rows; give at least one"),
        ("text,label\na,b\nc\n", ["--text", "text"], "line 3: its number of fields is not that of the"),
        ("text,label\na,b\n,b\n", ["--text", "text"], "data (row 2)=None: nothing is in column 'text'"),
        ("text,prediction\na,b\n", ["--text", "text"], "it has a column 'prediction', which a prediction would over"),
        ("text\na\n", ["--text", "text", "--batch-size", "0"], "--batch-size=0: give 1 or more"),
        ("text\na\n", ["--text", "text", "--max-length", "99"], "data.max_length=99"),
        ("text\na\n", ["--text", "text", "--base-model", "no/model"], "no/model"),
    ],
)
def test_what_cannot_be_answered_is_one_clear_error(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, options: list[str], message: str
) -> None:
    (home / "data.csv").write_text(content)
    out = tmp_path / "out.csv"
    assert main(["predict", str(home / "named"), str(home / "data.csv"), "--out", str(out), *options]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("error: ") == 1
    assert os.listdir(tmp_path) == []


# Evaluation without aroma_task.json ----------------------------------------------------------------------------------


def test_eval_of_a_trainer_s_adapter_needs_its_columns_only(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = reference(home, "named", num_labels=3).argmax(-1).tolist()
    right = [(index + (number % 3 == 0)) % 3 for number, index in enumerate(best)]
    share = sum(index == wanted for index, wanted in zip(best, right, strict=True)) / len(best)
    for kind, labels in (("names", [NAMES[index] for index in right]), ("indices", right)):
        rows = [{"sentence": row["text"], "class": label} for row, label in zip(ROWS, labels, strict=True)]
        data, told = write_json_lines(tmp_path / f"{kind}.jsonl", rows), tmp_path / f"{kind}.json"
        arguments = ["eval", str(home / "named"), "--data", str(data), "--json", str(told)]
        assert main([*arguments, "--text", "sentence"]) == 2
        assert "name them with --label" in capsys.readouterr().err
        assert main([*arguments, "--text", "sentence", "--label", "class"]) == 0
        assert json.loads(told.read_text())["metrics"]["accuracy"] == pytest.approx(share)
    numbers = reference(home, "regression", num_labels=1)[:, 0].tolist()
    rows = [{"text": row["text"], "score": 2 * number} for row, number in zip(ROWS, numbers, strict=True)]
    data = write_json_lines(tmp_path / "numbers.jsonl", rows)
    arguments = ["eval", str(home / "regression"), "--data", str(data), "--json", str(tmp_path / "n.json")]
    assert main([*arguments, "--text", "text", "--label", "score"]) == 0
    assert json.loads((tmp_path / "n.json").read_text())["metrics"]["pearson"] == pytest.approx(1.0)
    assert main(["eval", str(home / "several"), "--data", str(data), "--text", "text", "--label", "score"]) == 2
    assert "an example has several labels or numbers; ask its model in plain PEFT" in capsys.readouterr().err
