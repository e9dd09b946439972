"""Model cards and label names: what a person finds beside an adapter, and what a pipeline answers with."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, pipeline

from aroma import AromaCallback, AromaConfig, save_adapter, verify_adapter
from aroma.about import About
from aroma.card import CARD_FILE, MARK, Subject, make_card, shown_base
from aroma.errors import AromaWarning, CheckpointError
from aroma.export import export_merged, export_uniform, load_with_adapter
from aroma.tuner import live_adapter
from models import METHOD, adapted, base, batch, grow, logits, saved_base, set_ranks
from tiny_classifier import save_tokenizer

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


def code_of(folder: Path, name: str = CARD_FILE) -> str:
    """The Python that a card shows, with the paths that it leaves open filled in."""
    text = (folder / name).read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return code.replace("path/to/this-folder", str(folder)).replace("path/to/bert", saved_base("bert"))


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
    # What the cards say to do, done.
    for kind in ("adapter", "uniform", "merged"):
        folder, told = tmp_path / kind, {}
        exec(code_of(folder), told)
        answers = told["run"](["w1 w7 w3"], top_k=None)[0]
        assert {answer["label"]: answer["score"] for answer in answers} == right
        assert "`very \\| 'good'`" in (folder / CARD_FILE).read_text()


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
    told: dict[str, Any] = {}
    exec(code_of(tmp_path / "adapter").replace("path/to/encoder", str(tmp_path / "encoder")), told)
    assert said(told["model"], tmp_path / "adapter") == right


def test_where_the_model_had_no_names_there_is_nothing_to_say(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model = classifier(tmp_path / "adapter", base("bert"))
    export_merged(tmp_path / "adapter", tmp_path / "merged")
    assert not [warning for warning in recwarn if issubclass(warning.category, AromaWarning)]
    right = expected(model, tmp_path / "adapter", ["LABEL_0", "LABEL_1", "LABEL_2"])
    assert said(str(tmp_path / "merged"), tmp_path / "merged") == pytest.approx(right, rel=1e-4, abs=1e-5)
    assert "3, without names" in (tmp_path / "adapter" / CARD_FILE).read_text()


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
    assert 'num_labels=1,\n    problem_type="regression",' in code_of(tmp_path / "adapter")


def test_an_adapter_of_an_older_version_is_told_of(tmp_path: Path) -> None:
    classifier(tmp_path / "adapter")
    (tmp_path / "adapter" / "aroma_state.json").unlink()
    with pytest.warns(AromaWarning, match=r"adapter: it names no labels, so the merged model calls them LABEL_0"):
        export_merged(tmp_path / "adapter", tmp_path / "merged")


def test_labels_that_were_edited_are_noticed(tmp_path: Path) -> None:
    classifier(tmp_path)
    state = json.loads((tmp_path / "aroma_state.json").read_text())
    state["about"]["labels"][0] = "positive"
    (tmp_path / "aroma_state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="checksum"):
        export_merged(tmp_path, tmp_path / "merged")


# Cards ---------------------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: tensor[index % 4] for name, tensor in batch("bert", index // 4).items()}


def train(folder: Path, count: int, accuracy: Callable[[Any], float], **training: Any) -> Trainer:
    """Train a classifier with the Trainer in `folder`/run, and save what grew to `folder`/adapter."""
    model = get_peft_model(named(base("bert")), AromaConfig(**METHOD, task_type="SEQ_CLS"))
    args = TrainingArguments(
        str(folder / "run"),
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **training,
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=Rows(count),
        eval_dataset=Rows(12),
        compute_metrics=lambda found: {"accuracy": accuracy(found)},
        callbacks=[AromaCallback(early_stop=False)],
    )
    trainer.train()
    model.save_pretrained(folder / "adapter")
    return trainer


def test_the_card_of_a_trainers_run(tmp_path: Path) -> None:
    trainer = train(
        tmp_path,
        40,
        lambda found: float((found.predictions.argmax(-1) == found.label_ids).mean()),
        max_steps=6,
        gradient_accumulation_steps=2,
        learning_rate=2e-3,
        seed=3,
        save_steps=3,
    )
    evaluated = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry][-1]
    for folder in (tmp_path / "adapter", tmp_path / "run" / "checkpoint-6"):
        text = (folder / CARD_FILE).read_text()
        card = ModelCard(text)
        assert "[More Information Needed]" not in text
        assert str(tmp_path) not in text
        assert saved_base("bert") not in text
        assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-classification")
        assert card.data.tags == ["aroma", "peft", "lora"]
        assert card.data.base_model is None, "a local folder is no name on the hub"
        for row in (
            "| base model | `bert` |",
            "| training examples | 40 |",
            "| batch size | 8 |",
            "| learning rate | 0.002 |",
            "| seed | 3 |",
            "| optimizer steps | 6 |",
            "| set | examples | loss | accuracy |",
            f"| evaluation set | 12 | {evaluated['eval_loss']:.4g} | {evaluated['eval_accuracy']:.4g} |",
        ):
            assert row in text
        assert "inner_tolerance=0.5" in text
        assert "| epochs |" not in text, "steps were given"
        assert "eprint = {2504.05343}" in text
        results = card.data.eval_results
        assert {result.metric_type: result.metric_value for result in results} == {
            "loss": evaluated["eval_loss"],
            "accuracy": evaluated["eval_accuracy"],
        }
        ranks = json.loads((folder / "aroma_state.json").read_text())["modules"]
        query = [str(ranks[f"bert.encoder.layer.{layer}.attention.self.query"]["rank"]) for layer in (0, 1)]
        assert f"| `attention.self.query` | {' '.join(query)} | {sum(map(int, query))} |" in text
    # Metrics of another step say so; what is exported has them, too.
    assert "| evaluation set, at step 2 | 12 |" in (tmp_path / "run" / "checkpoint-3" / CARD_FILE).read_text()
    export_merged(tmp_path / "adapter", tmp_path / "merged")
    merged = ModelCard.load(tmp_path / "merged" / CARD_FILE)
    assert (merged.data.library_name, merged.data.tags) == ("transformers", ["aroma", "merged", "lora"])
    assert f"| evaluation set | 12 | {evaluated['eval_loss']:.4g} |" in merged.text
    trainer.evaluate(Rows(8), metric_key_prefix="eval_late")  # after the run, so the next save tells it
    trainer.model.save_pretrained(tmp_path / "again")
    assert "| late | 8 |" in (tmp_path / "again" / CARD_FILE).read_text()


def test_metrics_are_those_of_the_model_that_is_saved(tmp_path: Path) -> None:
    """After load_best_model_at_end they are those of the best."""
    found = iter([0.9, 0.1, 0.2])
    train(
        tmp_path,
        20,
        lambda _: next(found),
        max_steps=5,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    )
    assert "| evaluation set | 12 |" in (tmp_path / "adapter" / CARD_FILE).read_text()
    assert "| 0.9 |" in (tmp_path / "adapter" / CARD_FILE).read_text()
    assert "| 0.2 |" in (tmp_path / "run" / "checkpoint-5" / CARD_FILE).read_text()


def test_a_card_that_a_person_wrote_is_never_touched(tmp_path: Path) -> None:
    mine = "---\ntags: [mine]\n---\n\n# My adapter\n"
    for save in (lambda model: model.save_pretrained(tmp_path), lambda model: save_adapter(model, tmp_path)):
        model = adapted("bert")
        grow(model, batch("bert"), 3)
        (tmp_path / CARD_FILE).write_text(mine)
        save(model)
        assert (tmp_path / CARD_FILE).read_text() == mine
    # Ours is written anew, and so is the empty one that PEFT used to leave.
    get_peft_model(base("bert"), LoraConfig(task_type="SEQ_CLS")).create_or_update_model_card(str(tmp_path / ".."))
    template = (tmp_path / ".." / CARD_FILE).read_text()
    assert "[More Information Needed]" in template, "plain LoRA keeps PEFT's card"
    for old in (template, f"# Old\n\n{MARK}\n"):
        (tmp_path / CARD_FILE).write_text(old)
        save_adapter(model, tmp_path)
        assert "LoRA adapter of bert" in (tmp_path / CARD_FILE).read_text()
    filled = template.replace("[More Information Needed]", "Trained on my diary.", 1)
    (tmp_path / CARD_FILE).write_text(filled)
    model.save_pretrained(tmp_path)
    assert (tmp_path / CARD_FILE).read_text() == filled


def test_a_named_adapter_has_its_card_beside_it(tmp_path: Path) -> None:
    model = get_peft_model(base("bert"), AromaConfig(**METHOD, task_type="SEQ_CLS"), adapter_name="mine")
    model.save_pretrained(tmp_path)
    assert MARK in (tmp_path / "mine" / CARD_FILE).read_text()
    assert not (tmp_path / CARD_FILE).exists()


def test_ways_to_load_a_language_model(tmp_path: Path) -> None:
    for name, ways in (("llama", ["PEFT", "vLLM", "llama.cpp"]), ("gpt2", ["PEFT", "vLLM"])):
        model = adapted(name)
        set_ranks(model, [0, 3])
        live_adapter(model).ever_controlled = True
        model.save_pretrained(tmp_path / name)
        text = (tmp_path / name / CARD_FILE).read_text()
        assert re.findall(r"^(PEFT|vLLM|llama\.cpp)[:,]", text, flags=re.MULTILINE) == ways
        export_uniform(tmp_path / name, tmp_path / f"{name}-uniform")
        uniform = (tmp_path / f"{name}-uniform" / CARD_FILE).read_text()
        assert "--enable-lora --max-lora-rank 8 --lora-modules adapter=path/to/this-folder" in uniform
        assert "of rank 3" in uniform
    told: dict[str, Any] = {}
    code = code_of(tmp_path / "llama").replace("path/to/llama", saved_base("llama"))
    exec(code.split("tokenizer =")[0], told)
    assert isinstance(told["model"], PeftModel)


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("distilbert-base-uncased", ("distilbert-base-uncased", True)),
        ("meta-llama/Llama-3.1-8B", ("meta-llama/Llama-3.1-8B", True)),
        ("/home/ann/models/bert/", ("bert", False)),
        ("./bert", ("bert", False)),
        (r"C:\Users\ann\bert", ("bert", False)),
        ("/home/ann/.cache/huggingface/hub/models--nyu--bert-x/snapshots/0a1b", ("nyu/bert-x", True)),
        ("~/bert", ("bert", False)),
        ("/home/ann/runs/mrpc/merged", ("mrpc/merged", False)),
        ("a/b/c", ("c", False)),
        (None, ("an unnamed model", False)),
    ],
)
def test_a_base_model_is_told_without_its_path(path: str | None, shown: tuple[str, bool]) -> None:
    assert shown_base(path) == shown


def test_names_that_a_stranger_chose_stay_text(tmp_path: Path) -> None:
    """A card is copied from: what a configuration says becomes neither code nor another row or section."""
    ranks = {"a.0.b": 1}
    nasty = '/x/`$(touch /tmp/owned)`"); import evil #\n## Owned | cell'
    config = {"base_model_name_or_path": nasty, "task_type": "CAUSAL_LM"}
    about = About(architecture="llama", data={"data set\n## Owned": "a\n## Owned\ud800"})
    text = make_card(Subject(config, ranks, about))
    assert "\n## Owned" not in text
    code = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0]
    assert not [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import)]
    for line in re.findall(r"^(?:vllm|llama-cli) .*", text, flags=re.MULTILINE):
        assert not re.search(r"\$\(", re.sub(r"'[^']*'", "", line)), "quoted for the shell"
    mapped = {"base_model_name_or_path": "a/b", "auto_mapping": {"base_model_class": "X\nimport evil"}}
    assert "evil" not in make_card(Subject(mapped, ranks))


def test_a_relative_folder_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "bert").mkdir(parents=True)
    (tmp_path / "out" / "bert" / CARD_FILE).write_text("---\nlicense: apache-2.0\n---\n")
    assert shown_base("out/bert") == ("bert", False)
    model = base("bert")
    model.name_or_path = "out/bert"
    classifier(tmp_path / "adapter", model)
    assert "| licence of the base model | apache-2.0 |" in (tmp_path / "adapter" / CARD_FILE).read_text()
