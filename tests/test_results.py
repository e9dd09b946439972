"""Tables in results/ are what their runs say, and docs/results.md shows them as they are."""

from __future__ import annotations

import io
import json
import re
from functools import cache
from pathlib import Path

import pandas as pd
import pytest

from aroma_lab.report.formats import markdown, to_csv
from aroma_lab.report.runs import Runs, read_runs
from aroma_lab.report.tables import make_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "lab"
GROWN = ("planted-nets", "minilm-six")
TABLES = [
    *(RESULTS / "minilm-mrpc-rte" / "tables" / f"{kind}.csv" for kind in ("main", "paired", "reset", "time", "inner")),
    RESULTS / "smollm2-commonsense" / "tables" / "sets.csv",
    *(RESULTS / grid / "tables" / f"{kind}.csv" for grid in GROWN for kind in ("ranks", "regret")),
]
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


@cache
def runs_of(folder: Path) -> Runs:
    return read_runs(folder)


def name_of(path: Path) -> str:
    return str(path.relative_to(RESULTS))


@pytest.mark.parametrize("path", TABLES, ids=name_of)
def test_a_table_has_the_numbers_of_its_runs(path: Path) -> None:
    table = make_table(runs_of(path.parents[1]), path.stem)
    found = pd.read_csv(io.StringIO(to_csv(table)))
    pd.testing.assert_frame_equal(found, pd.read_csv(path), rtol=1e-12, atol=1e-14, check_dtype=False)
    assert markdown(table) == path.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", TABLES, ids=name_of)
def test_the_page_shows_a_table_as_it_is(path: Path) -> None:
    lines = path.with_suffix(".md").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    if path.stem == "inner":  # of which the page leaves out the single kinds of matrices
        lines = [line for line in lines if not re.search(r"\| \w+[.\w]*\.\w+ ", line)]
        assert len(lines) == 6
    assert "\n".join(lines) in PAGE
    assert f"(../results/lab/{name_of(path.with_suffix('.md'))})" in PAGE


def test_the_nine_methods_ran_with_three_seeds_on_both_tasks() -> None:
    reported = runs_of(RESULTS / "minilm-mrpc-rte").reported
    assert reported.groupby(["task", "method"]).seed.agg(list).map(sorted).tolist() == [[0, 1, 2]] * 18


@pytest.mark.parametrize("grid", ["minilm-mrpc-rte", "smollm2-commonsense", *GROWN])
def test_every_run_says_what_it_was_made_with(grid: str) -> None:
    rows = runs_of(RESULTS / grid).rows
    for row in rows:
        assert row["git_revision"], row["name"]
        assert {"python", "torch", "transformers", "peft", "aroma-peft"} <= row["result"]["versions"].keys()
        assert row["trial"]["training"]["max_steps"] > 0
    assert {row["state"] for row in rows} == {"finished"}


def test_what_the_page_links_to_is_there() -> None:
    targets = re.findall(r"\]\((\.\./[^)#]+)\)", PAGE)
    assert targets
    assert all((ROOT / "docs" / target).exists() for target in targets)


def test_results_are_small() -> None:
    assert sum(path.stat().st_size for path in RESULTS.rglob("*") if path.is_file()) < 500_000


def test_generated_answers_are_counted_as_their_files_say() -> None:
    files = sorted((RESULTS / "smollm2-commonsense" / "generation").glob("*.json"))
    assert len(files) == 4
    for file in files:
        sets = json.loads(file.read_text(encoding="utf-8"))["sets"].values()
        right = sum(round(one["metrics"]["generated"] * one["examples"]) for one in sets)
        assert f"| {file.stem} | {right} | {sum(one['unparseable'] for one in sets)} |" in PAGE
