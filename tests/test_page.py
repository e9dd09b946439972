"""Reports: what a page says of made-up runs, what it may hold, where it may go, and where it comes from."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from transformers import Trainer, TrainingArguments

from aroma import AromaCallback
from aroma.report.page import measured
from aroma.report.run import MatrixFacts, Result, RunFacts, run_page
from aroma_lab.tasks.classification import constant_metrics
from made_up_facts import GROWN, KINDS, MODULES, RANKS, made_up
from models import adapted as adapted_to
from models import batch
from trainer_runs import adapted, trainer_for

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class Page(HTMLParser):
    """A page as a browser takes it apart.

    Attributes:
        elements: Tag and attributes of every element.
        rows: The texts of the cells of every row of a table.
        grid: The attributes of every cell of a grid of ranks, by matrix.
        text: All that is read.
        data: What its script is given.
    """

    def __init__(self, page):
        super().__init__()
        self.elements, self.rows, self.grid, self.text = [], [], {}, ""
        self.data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
        self._row = self._in = None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self._in = tag
        self.elements.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if dict(attributes).get("role") == "gridcell":
            self.grid[dict(attributes).get("data-matrix")] = dict(attributes)

    def handle_data(self, text):
        if self._in in ("script", "style"):
            return
        self.text += text
        if self._in in ("td", "th"):
            self.rows[-1][-1] += text.strip()

    def tags(self):
        return [tag for tag, _ in self.elements]


@pytest.fixture(scope="module")
def html():
    return run_page(made_up())


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


# A run ---------------------------------------------------------------------------------------------------------------


def test_a_page_says_what_the_run_came_to_and_how_to_repeat_it(page):
    assert ["validation", "0.8125", "0.7000"] in page.rows
    assert ["test, for guessing", "0.5500", "0.0000"] in page.rows
    text = " ".join(page.text.split())
    for said in (
        "accuracy, test 0.7900 0.5500 for guessing",
        "ranks of 9 matrices 0–3 8 in all",
        "1.02K LoRA r=8: 18.4K; head: 130",
        "3 min 20 s 240 optimizer steps",
        "6 of 9 matrices have finished; 3 still train.",
        "aroma train reviews.yaml output=reviews-again",
        "training.learning_rate 0.001",
        "torch 2.9.0",
    ):
        assert said in text.replace(" Copy", ""), said


def test_the_grid_has_every_matrix_in_its_place(page):
    ranks = {module: steps[-1][1] for module, steps in RANKS.items()}
    assert list(page.grid) == [f"encoder.layer.{layer}.{kind}" for kind in KINDS for layer in range(3)]
    labels = {name: cell["aria-label"] for name, cell in page.grid.items()}
    assert labels[GROWN] == (
        f"attention.self.value, layer 1: rank {ranks[GROWN]}; effective rank {0.75 * ranks[GROWN]:.2f}; "
        "‖ΔW‖ / ‖W0‖ 1.23%"
    )
    assert ["output.dense", *(str(ranks[f"encoder.layer.{layer}.output.dense"]) for layer in range(3))] in page.rows
    levels = {name: float(cell["style"].partition("--level: ")[2]) for name, cell in page.grid.items()}
    assert levels[GROWN] == 1.0
    assert {name for name, level in levels.items() if level == 0} == {name for name in ranks if ranks[name] == 0}
    assert dict(json.loads(page.grid[GROWN]["data-facts"]))["rank"] == "3"


def test_the_chart_of_a_matrix_shows_its_rank_over_time(page):
    assert page.data["charts"]["matrix"]["spec"] == "rank"
    grown = page.data["matrices"][GROWN]
    assert grown == {"rank": {"step": [0, 80, 160, 200, 240], "rank": [0, 1, 2, 3, 3]}, "words": "Rank 3 at the end."}
    chosen = [attributes["value"] for tag, attributes in page.elements if tag == "option" and "selected" in attributes]
    assert chosen == [GROWN], "the matrix with the largest rank is shown first"


def test_a_page_loads_nothing_and_is_small(html, page):
    policy = next(one["content"] for _, one in page.elements if one.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert "connect-src" not in policy
    assert "http" not in policy
    assert not [one for _, one in page.elements if {"src", "href"} & one.keys() and one.get("href") != "#content"]
    assert not re.search(r"url\(|@import", html)
    assert len(html) < 500e3


def test_names_do_nothing_but_stand_there():
    def titled(text):
        renamed = {name: f"{text}.layer.{place}.x" for place, name in enumerate(MODULES)}
        return made_up(
            title=text,
            about=[text],
            metric=text,
            results=[Result(text, {text: 0.5}), Result(f"{text}, {text}", {text: 0.1}, "guess")],
            matrices=[MatrixFacts(renamed[one.name], *one[1:]) for one in made_up().matrices],
            ranks={renamed[name]: steps for name, steps in RANKS.items()},
            explanation=text,
            notes=[text],
            settings={text: {text: text}},
            recipe=text,
            versions={text: text},
            command=text,
        )

    harmless, hostile = (Page(run_page(titled(text))) for text in ("plain", HOSTILE))
    assert hostile.tags() == harmless.tags()
    assert [sorted(one) for _, one in hostile.elements] == [sorted(one) for _, one in harmless.elements]
    assert f"{HOSTILE}.layer.0.x" in hostile.data["matrices"]


def test_a_page_of_nothing_says_that_much():
    page = Page(run_page(RunFacts("nothing", notes=["This run is not finished."])))
    assert "This run is not finished." in page.text
    assert page.data["charts"] == {}
    assert "select" not in page.tags()


# The Trainer ---------------------------------------------------------------------------------------------------------


def test_a_trainer_leaves_a_report_and_adds_a_later_evaluation(tmp_path):
    out = tmp_path / "report.html"
    callback = AromaCallback(report=out)
    trainer = trainer_for(adapted(), tmp_path / "run", callback, max_steps=12, save_strategy="no", eval_on_start=True)
    trainer.evaluate()
    assert not out.exists(), "nothing has been trained"
    trainer.train()
    page = Page(out.read_text())
    ranks = callback.controller.ranks()
    said = {name: dict(json.loads(cell["data-facts"]))["rank"] for name, cell in page.grid.items()}
    assert said == {name: str(rank) for name, rank in ranks.items()}
    assert any(ranks.values())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert page.data["charts"]["loss"]["data"]["loss"]["loss"] == pytest.approx(losses, rel=1e-4)
    assert {name: one["rank"]["rank"][-1] for name, one in page.data["matrices"].items()} == ranks
    metrics = trainer.evaluate()
    page = Page(out.read_text())
    before = trainer.state.log_history[0]
    assert ["before training", measured(before["eval_loss"])] in page.rows
    assert ["evaluation at step 12", measured(metrics["eval_loss"])] in page.rows


def test_the_headline_of_a_language_model_is_its_perplexity(tmp_path):
    rows = [{name: value[0] for name, value in batch("llama", seed).items()} for seed in range(8)]
    args = TrainingArguments(
        str(tmp_path), max_steps=4, eval_strategy="steps", eval_steps=4, report_to=[], use_cpu=True, disable_tqdm=True
    )
    # As TRL's SFTTrainer adds them.
    extra = {"compute_metrics": lambda prediction: {"entropy": 3.0}}
    callback = AromaCallback(report=tmp_path / "report.html")
    trainer = Trainer(adapted_to("llama"), args, train_dataset=rows, eval_dataset=rows, callbacks=[callback], **extra)
    trainer.train()
    loss = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    page = Page((tmp_path / "report.html").read_text())
    assert ["evaluation at step 4", measured(loss), measured(math.exp(loss))] in page.rows
    assert "perplexity, evaluation at step 4" in " ".join(page.text.split())
    assert "entropy" not in page.text


def test_guessing_is_answering_with_the_commonest_label():
    found = constant_metrics("classification", np.array([2, 2, 1, 0]), np.array([2, 0, 2, 1]))
    assert found == pytest.approx({"accuracy": 0.5, "macro_f1": 2 / 9, "mcc": 0.0})
    found = constant_metrics("regression", np.array([1.0, 3.0]), np.array([2.0, 4.0]))
    assert found == {"pearson": 0.0, "spearman": 0.0, "mse": 2.0}
