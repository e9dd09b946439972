"""Model cards and label names: what a person finds beside an adapter, and what a pipeline answers with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model
from transformers import pipeline

from aroma import AromaCallback, AromaConfig, save_adapter, verify_adapter
from aroma.card import CARD_FILE
from aroma.export import export_merged, export_uniform, load_with_adapter
from aroma.tuner import live_adapter
from models import METHOD, adapted, base, batch, grow, logits, set_ranks
from tiny_classifier import save_tokenizer
from trainer_runs import adapted as trainer_model
from trainer_runs import trainer_for

NAMES = ["negative", "neutral", "very | `good`"]


def named(model: Any, names: list[str] = NAMES) -> Any:
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    return model


def classifier(folder: Path, model: Any = None) -> Any:
    """A BERT with an adapter, its head moved, saved as a plain loop or Trainer saves it, with a tokenizer."""
    model = adapted("bert", named(base("bert")) if model is None else model)
    set_ranks(model, [2, 0, 1])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter.add_(torch.randn_like(parameter))
    live_adapter(model).ever_controlled = True
    folder.mkdir(exist_ok=True)
    save_tokenizer(folder)
    model.save_pretrained(folder)
    return model


def said(model: Any, folder: Path) -> dict[str, float]:
    """Scores of a sentence by label."""
    answers = pipeline("text-classification", model=model, tokenizer=str(folder), top_k=None)(["w1 w7 w3"])[0]
    return {answer["label"]: answer["score"] for answer in answers}


def expected(model: Any, folder: Path, names: list[str] = NAMES) -> dict[str, float]:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(["w1 w7 w3"], return_tensors="pt")
    return dict(zip(names, logits(model, tokens).softmax(-1)[0].tolist(), strict=True))


# Labels --------------------------------------------------------------------------------------------------------------


def test_every_output_of_a_plain_run_says_the_labels_of_the_model(tmp_path: Path) -> None:
    model = classifier(tmp_path / "adapter")
    save_adapter(model, tmp_path / "adapter")  # as one act, over the first
    right = pytest.approx(expected(model, tmp_path / "adapter"), rel=1e-4, abs=1e-5)
    export_uniform(tmp_path / "adapter", tmp_path / "uniform")
    export_merged(tmp_path / "adapter", tmp_path / "merged")
    assert said(str(tmp_path / "merged"), tmp_path / "merged") == right
    for folder in (tmp_path / "adapter", tmp_path / "uniform"):
        assert said(load_with_adapter(folder), folder) == right
        assert verify_adapter(folder)["about"]["labels"] == NAMES


def test_an_encoder_on_disk_and_a_head_of_another_size(tmp_path: Path) -> None:
    """The labels and their number are known although the base model on disk has neither."""
    from transformers import BertForSequenceClassification

    base("bert").base_model.save_pretrained(tmp_path / "encoder")
    names = [f"a long topic, number {number}" for number in range(30)]
    model = BertForSequenceClassification.from_pretrained(
        tmp_path / "encoder", id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )
    model = classifier(tmp_path / "adapter", model)
    right = pytest.approx(expected(model, tmp_path / "adapter", names), rel=1e-4, abs=1e-5)
    assert said(load_with_adapter(tmp_path / "adapter"), tmp_path / "adapter") == right


def test_a_merged_regression_answers_with_its_number(tmp_path: Path) -> None:
    """A pipeline squeezes a single output into 0 to 1 unless the model says that it is a regression."""
    from transformers import BertForSequenceClassification

    base("bert").base_model.save_pretrained(tmp_path / "encoder")
    options = {"num_labels": 1, "problem_type": "regression"}
    model = classifier(
        tmp_path / "adapter", BertForSequenceClassification.from_pretrained(tmp_path / "encoder", **options)
    )
    model.get_base_model().classifier.modules_to_save["default"].bias.data += 30
    model.save_pretrained(tmp_path / "adapter")
    export_merged(tmp_path / "adapter", tmp_path / "merged")
    (answer,) = said(str(tmp_path / "merged"), tmp_path / "merged").values()
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(tmp_path / "adapter")(["w1 w7 w3"], return_tensors="pt")
    assert answer == pytest.approx(float(logits(model, tokens)), rel=1e-5)
    assert answer > 10


# Cards ---------------------------------------------------------------------------------------------------------------


def row_of(folder: Path, kind: str) -> str:
    """The line that a card should have of a kind of matrix."""
    modules = json.loads((folder / "aroma_state.json").read_text())["modules"]
    ranks = [entry["rank"] for name, entry in modules.items() if name.endswith(kind)]
    return f"| `{kind}` | {' '.join(map(str, ranks))} | {sum(ranks)} |"


@pytest.mark.parametrize("save", [lambda model, folder: model.save_pretrained(folder), save_adapter])
def test_pefts_card_has_one_section_of_ours(tmp_path: Path, save: Any) -> None:
    model = adapted("bert")
    grow(model, batch("bert"), 3)
    save(model, tmp_path)
    card = ModelCard.load(tmp_path / CARD_FILE)
    assert card.data.library_name == "peft"
    assert "## Ranks" in card.text
    assert "inner_tolerance=0.5" in card.text
    # What a person wrote before and behind it stays, and it is written anew.
    mine = (tmp_path / CARD_FILE).read_text().replace("# Model Card for Model ID", "# My adapter") + "\nMy diary.\n"
    (tmp_path / CARD_FILE).write_text(mine)
    set_ranks(model, [2, 0, 1])
    save(model, tmp_path)
    text = (tmp_path / CARD_FILE).read_text()
    assert row_of(tmp_path, "attention.self.query") in text
    assert text.count("## Ranks") == 1
    assert "# My adapter" in text
    assert "My diary." in text
    export_uniform(tmp_path, tmp_path / "served")
    assert (tmp_path / "served" / CARD_FILE).read_text() == text


def test_a_checkpoint_and_a_named_adapter(tmp_path: Path) -> None:
    trainer = trainer_for(trainer_model(), tmp_path, AromaCallback(), max_steps=6, save_steps=3)
    trainer.train()
    text = (tmp_path / "checkpoint-6" / CARD_FILE).read_text()
    assert row_of(tmp_path / "checkpoint-6", "attention.self.query") in text
    model = get_peft_model(base("bert"), AromaConfig(**METHOD, task_type="SEQ_CLS"), adapter_name="mine")
    model.save_pretrained(tmp_path / "named")
    assert (tmp_path / "named" / CARD_FILE).exists()
    assert verify_adapter(tmp_path / "named" / "mine")
