"""The docs tell the truth: numbers are those of the committed measurements, and the scripts of usage.md run."""

import json
import re
from itertools import product
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import TrainingArguments
from trl import SFTConfig

from aroma import AromaConfig
from aroma.algorithm import budget, duels, evidence, questions
from aroma.tuner.config import SLOTS, TRIAL_COMPONENTS
from models import base
from quick import slow_but
from test_sft import tokenizer
from trainer_runs import examples, growth, tiny_bert

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "results" / "bench"
SPEED = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")


def cases_of(file):
    """Return the cases of a result of `aroma bench` by key."""
    return {case["key"]: case for case in json.loads((BENCH / file).read_text())["cases"]}


def rows_of(file):
    """Return the cells of the table that follows the mark of a file, by row."""
    table = SPEED.split(f"<!-- {file} -->")[1].strip().split("\n\n")[0]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table.splitlines()]


@pytest.mark.parametrize(
    "file", ["roberta-base-targets.json", "roberta-base-1-thread.json", "roberta-base-evidence.json"]
)
def test_ratios_and_bytes(file):
    result = json.loads((BENCH / file).read_text())
    over = {one["key"]: one["forward_backward_ratio"]["median"] for one in result["comparisons"]}
    expected = []
    for case in result["cases"][1:]:
        ratio, key = case["forward_backward_ratio"], case["key"]
        expected.append(
            [
                key,
                f"{ratio['median']:.3f}",
                f"{ratio['lower']:.3f}–{ratio['upper']:.3f}",
                f"{over[key]:.3f}" if key in over else "",
                f"{case['kept_bytes'] / 2**20:.1f}",
            ]
        )
    assert [row[:5] for row in rows_of(file)[2:]] == expected


def test_what_growth_by_evidence_costs():
    cases, said = cases_of("roberta-base-evidence.json"), " ".join(SPEED.split())
    keys = ("evidence-1", "evidence-8", "lora-r8")
    one, eight, lora = (cases[key]["forward_backward_ratio"]["median"] for key in keys)
    assert "Both aims are met." in said
    assert one <= 1.10
    assert eight <= lora
    result = json.loads((BENCH / "roberta-base-evidence.json").read_text())
    over = {one["key"]: f"{one['forward_backward_ratio']['median']:.2f}" for one in result["comparisons"]}
    share = f"{over['evidence-1']} of the time of LoRA r = 8 with one component in training"
    assert f"takes {share}, {over['evidence-8']} with eight" in (ROOT / "README.md").read_text(encoding="utf-8")
    one, eight, lora = (f"{cases[key]['step_ratio']['median']:.3f}" for key in keys)
    assert f"ratios of {one} and {eight} with one and with eight components, {lora} with LoRA r = 8." in said
    assert "With eight it keeps as many bytes as LoRA r = 8" in said
    assert cases["evidence-8"]["kept_bytes"] == cases["lora-r8"]["kept_bytes"]
    peaks = [f"{cases[key]['peak_bytes'] / 2**20:,.0f}" for key in ("evidence-8", "lora-r8")]
    assert f"At its peak a process has {peaks[0]} MiB, {peaks[1]} with LoRA r = 8" in said


def test_what_the_rule_itself_costs_between_steps():
    own = json.loads((BENCH / "roberta-base-evidence.json").read_text())["controller_by_evidence"]
    said = f"takes {own['amortised_ms']:.1f} ms a step on average, {100 * own['amortised_fraction']:.2f} % of it"
    assert said in " ".join(SPEED.split())
    assert own["amortised_fraction"] <= 0.005


def test_what_a_disturbed_run_says():
    ratio = cases_of("roberta-base-evidence-9-rounds.json")["evidence-1"]["forward_backward_ratio"]
    said = f"{ratio['median']:.3f} of the floor, with quartiles of {ratio['lower']:.3f} and {ratio['upper']:.3f}"
    assert said in " ".join(SPEED.split())


def test_the_profile():
    milliseconds = json.loads((BENCH / "roberta-base-profile.json").read_text())["milliseconds"]
    head, _, *rows = rows_of("roberta-base-profile.json")
    assert head[1:] == list(milliseconds)
    assert rows == [
        [kind, *(f"{found[kind]:.0f}" for found in milliseconds.values())] for kind in milliseconds["floor"]
    ]


def test_the_readme_rounds_the_same_numbers():
    cases = cases_of("roberta-base-targets.json")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for label, key in (("LoRA r = 8", "lora-r8"), ("AROMA, 8 finished components", "aroma-8")):
        found = [cases[key], cases[f"{key}-dropout"]]
        times = [f"{case['forward_backward_ratio']['median']:.2f}" for case in found]
        kept = [f"{case['kept_bytes'] / 2**20:.0f} MiB" for case in found]
        assert f"| {' | '.join([label, *times, *kept])} |" in readme
    finished = cases_of("roberta-base.json")["aroma-all"]
    assert round(finished["forward_backward_ratio"]["median"], 1) == 0.5


def test_the_page_on_the_method_has_the_constants_of_the_rule():
    page = " ".join((ROOT / "docs" / "method.md").read_text(encoding="utf-8").split())
    for name in ("significance", "trial_share", "duel_factor"):
        assert re.search(rf"\| `{name}` \| (?:\S+ = )?{getattr(AromaConfig, name)} \|", page), name
    for text in (
        f"The first {evidence.FIRST_STEP} optimizer steps give",
        f"and up to {budget.QUESTIONS[1]} batches are asked",
        "Half as many batches end the trial as it has steps, at least {} and at most {}.".format(*budget.QUESTIONS),
        f"a share of {questions.LEAST_OF_AVERAGE} of the average",
        "| `probe_memory` | none |",
        f"| `slots` | none | S, components that a matrix trains at once, at most; without it {SLOTS}, ",
        f"in a matrix of fewer than {SLOTS + evidence.UNUSED} rows or columns four fewer than these, "
        f"but {TRIAL_COMPONENTS} at least.",
        f"in which {TRIAL_COMPONENTS} components train, or S if that is less",
        f"of which at most one duels in {budget.HELD_OUT_INTERVAL} steps, β = α^(1 / {budget.HELD_OUT_INTERVAL}H)",
        f"every matrix has {('no', 'one', 'two', 'three', 'four')[evidence.UNUSED]} unused directions",
        f"one batch every {budget.HELD_OUT_INTERVAL} optimizer steps, or more rarely",
        f"{100 * budget.HELD_OUT_SHARE:.0f} % of the steps at most",
        f"{('six', 'seven', 'eight')[duels.flips_to_birth(AromaConfig.significance) - 6]} of all four",
    ):
        assert text in page, text
    said = f"every {evidence.TOLD_INTERVAL} steps from then on, in runs of 900 or fewer some twenty times in all"
    assert f"| `checked` | {said} |" in USAGE
    assert f"| `born` | step {evidence.FIRST_STEP}," in USAGE


# Scripts -------------------------------------------------------------------------------------------------------------

USAGE = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", USAGE, flags=re.DOTALL | re.MULTILINE))
LOOP = {"max_steps": 72, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no"}
QUIET = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
WORDS = [("the", "a"), ("big", "small"), ("cat", "dog", "bird"), ("sees", "likes"), ("the", "a"), ("red", "blue")]


def names_for(section):
    """Return what the page takes as given: 280 examples or so, of which 28 are held out, and 63 steps a pass."""
    rows = examples(280)
    columns = {name: [row[name].tolist() for row in rows] for name in rows[0]}
    text = ["words that no model reads"] * len(rows)
    if section != "TRL":
        args = TrainingArguments("out", **LOOP, **QUIET)
        return {
            "base": tiny_bert(),
            "rows": rows,
            "dataset": Dataset.from_dict({**columns, "text": text}),
            "args": args,
        }
    sentences = [" ".join(words) for words in product(*WORDS, WORDS[2])]
    args = SFTConfig("out", max_length=16, bf16=False, gradient_checkpointing=False, **LOOP, **QUIET)
    dataset = Dataset.from_dict({"text": sentences, "number": range(len(sentences))})
    return {"base": base("llama"), "dataset": dataset, "args": args, "tokenizer": tokenizer()}


@pytest.mark.parametrize("section", slow_but(["The Trainer", "A loop of your own"], SECTIONS))
def test_the_scripts_of_the_usage_page_run(section, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = names_for(section)
    first = next(iter(SECTIONS))
    blocks = re.findall(r"```python\n(.*?)```", SECTIONS[section], flags=re.DOTALL)
    if section != first:  # the page is read from the top: a section goes on from what the first one has made
        blocks.insert(0, re.findall(r"```python\n(.*?)trainer = ", SECTIONS[first], flags=re.DOTALL)[0])
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, f"usage.md, {section}", "exec"), names)
    printed = capsys.readouterr().out
    if section in (first, "A loop of your own"):
        assert "no evidence for another component in" in printed
    else:
        assert growth(names["trainer"]).controller.rule.phase not in ("start", "trial", "questions")
    if section == "What a run tells":
        assert {event.kind for event in names["events"]} >= {"born", "settled", "checked"}
        assert Path("births.png").stat().st_size > 5000
        assert printed.count("bert.encoder.layer.") >= 12


def test_files_that_are_named_exist():
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_what_the_docs_name_of_the_package_is_exported():
    import aroma

    root = Path(__file__).parent.parent
    text = "".join(page.read_text(encoding="utf-8") for page in [root / "README.md", *(root / "docs").glob("*.md")])
    named = {name for line in re.findall(r"from aroma import ([\w, ]+)", text) for name in line.split(", ")}
    named |= set(re.findall(r"\baroma\.([A-Z]\w+)", text)) | {"RichProgress"}
    assert len(named) >= 5
    assert named <= set(aroma.__all__)
    assert all(getattr(aroma, name).__name__ == name for name in named)
