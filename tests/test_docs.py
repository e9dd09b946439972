"""Numbers in the docs are those of the committed measurements."""

import json
import re
from pathlib import Path

import pytest

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
                f"{case['kept_bytes'] / 2**20:.1f}",
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


def test_files_that_are_named_exist():
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
