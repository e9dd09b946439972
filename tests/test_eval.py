"""`aroma eval` of adapters that a Trainer saved, which say nothing of their columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from aroma import AromaConfig
from aroma.cli import main
from models import METHOD, set_ranks
from tiny_classifier import save_tiny_bert, sentences, write_json_lines

NAMES = ("low", "middle", "high, or so")
ROWS = sentences(11, seed=4)
ROWS[3]["text"] = " ".join([str(row["text"]) for row in ROWS[:6]])  # longer than the model takes


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
    folder = tmp_path_factory.mktemp("eval")
    save_tiny_bert(folder / "base")
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
    make_adapter(folder / "base", folder / "named", **labels)
    make_adapter(folder / "base", folder / "regression", num_labels=1, problem_type="regression")
    make_adapter(folder / "base", folder / "several", problem_type="multi_label_classification", **labels)
    return folder


def reference(home: Path, name: str, **options: Any) -> torch.Tensor:
    """Logits of every row by plain PEFT, each alone."""
    base = AutoModelForSequenceClassification.from_pretrained(home / "base", **options)
    model = PeftModel.from_pretrained(base, home / name).eval()
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    with torch.no_grad():
        each = [
            model(**tokenizer(str(row["text"]), truncation=True, max_length=32, return_tensors="pt")).logits[0]
            for row in ROWS
        ]
    return torch.stack(each).double()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("words,label\na,0\n", [], "row 1): it has no column 'text'; its columns are 'words', 'label'; name them by"),
        ("text,label\na,b\n", [], "row 1)='b': no training example has this label; they have low, middle, high"),
        (
            "text,label\na,0\n",
            ["--text", "words"],
            "row 1): it has no column 'words'; its columns are 'text'",
        ),
        ("text,label\n", ["--text", "text"], "it has no rows; give at least one"),
        ("text,label\na,b\nc\n", ["--text", "text"], "line 3: its number of fields is not that of the"),
        ("text,label\na,0\n,0\n", ["--text", "text"], "data.csv, row 2)=None: nothing is in column 'text'"),
        ("text,label\na,0\n", ["--text", "text", "--batch-size", "0"], "--batch-size=0: give 1 or more"),
        ("text,label\na,0\n", ["--text", "text", "--max-length", "99"], "data.max_length=99"),
        ("text,label\na,0\n", ["--text", "text", "--base-model", "no/model"], "no/model"),
    ],
)
def test_what_cannot_be_evaluated_is_one_clear_error(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, options: list[str], message: str
) -> None:
    (home / "data.csv").write_text(content)
    options = [*options, "--label", "label"] if options else []
    assert main(["eval", str(home / "named"), "--data", str(home / "data.csv"), *options]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("error: ") == 1


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
        assert "it has no column 'label'; its columns are 'sentence', 'class'; name" in capsys.readouterr().err
        assert main([*arguments, "--text", "sentence", "--label", "class"]) == 0
        assert json.loads(told.read_text())["metrics"]["accuracy"] == pytest.approx(share)
    numbers = reference(home, "regression", num_labels=1)[:, 0].tolist()
    rows = [{"text": row["text"], "score": 2 * number} for row, number in zip(ROWS, numbers, strict=True)]
    data = write_json_lines(tmp_path / "numbers.jsonl", rows)
    arguments = ["eval", str(home / "regression"), "--data", str(data), "--json", str(tmp_path / "n.json")]
    assert main(arguments) == 0, "the columns have names in common use"
    assert json.loads((tmp_path / "n.json").read_text())["metrics"]["pearson"] == pytest.approx(1.0)
    assert main(["eval", str(home / "several"), "--data", str(data), "--text", "text", "--label", "score"]) == 2
    assert "an example has several labels or numbers; ask its model in plain PEFT" in capsys.readouterr().err
