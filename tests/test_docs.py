"""Numbers in the docs are those of the committed measurements."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "results" / "bench"
SPEED = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")


def rows_of(file):
    """Return the cells of the table that follows the mark of a file, by row."""
    table = SPEED.split(f"<!-- {file} -->")[1].strip().split("\n\n")[0]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table.splitlines()]


@pytest.mark.parametrize("file", ["roberta-base-targets.json", "roberta-base-1-thread.json"])
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
                f"{case['footprint']['kept_bytes'] / 2**20:.1f}",
            ]
        )
    assert [row[:5] for row in rows_of(file)[2:]] == expected


def test_the_profile():
    milliseconds = json.loads((BENCH / "roberta-base-profile.json").read_text())["milliseconds"]
    head, _, *rows = rows_of("roberta-base-profile.json")
    assert head[1:] == list(milliseconds)
    assert rows == [
        [kind, *(f"{found[kind]:.0f}" for found in milliseconds.values())] for kind in milliseconds["floor"]
    ]


def test_the_whole_run():
    run = json.loads((BENCH / "run-minilm-mrpc" / "result.json").read_text())
    found = run["mean_epoch"]
    text = SPEED.split("<!-- run-minilm-mrpc -->")[1]
    assert run["steps"] == 75
    for label, name in (("LoRA r = 8", "lora"), ("AdaLoRA 12 → 8", "adalora")):
        share, paper = found["aroma_over"][name], run["paper"]["aroma_over"][name]
        assert f"| {label} | {found['seconds'][name]:.1f} | {share:.3f} | {paper:g} |" in text
    assert f"| AROMA | {found['seconds']['aroma']:.1f} | | |" in text
    assert round(found["share_of_finished"], 1) == 0.3


def test_the_readme_rounds_the_same_numbers():
    cases = {case["key"]: case for case in json.loads((BENCH / "roberta-base-targets.json").read_text())["cases"]}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for label, key in (("LoRA r = 8", "lora-r8"), ("AROMA, 8 finished components", "aroma-8")):
        found = [cases[key], cases[f"{key}-dropout"]]
        times = [f"{case['forward_backward_ratio']['median']:.2f}" for case in found]
        kept = [f"{case['footprint']['kept_bytes'] / 2**20:.0f} MiB" for case in found]
        assert f"| {' | '.join([label, *times, *kept])} |" in readme
    finished = {case["key"]: case for case in json.loads((BENCH / "roberta-base.json").read_text())["cases"]}[
        "aroma-all"
    ]
    assert round(finished["forward_backward_ratio"]["median"], 1) == 0.5


def test_files_that_are_named_exist():
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
