"""Tables in results/ are what their runs say, and docs/results.md shows them as they are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from aroma_lab.report.kinds import make_table
from aroma_lab.report.records import load_records
from aroma_lab.report.render import render

ROOT = Path(__file__).parents[1]
TABLES = sorted((ROOT / "results" / "lab").glob("*/tables/*.md"))
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "results" / "lab"))


def rows_of(table: str) -> str:
    return table.partition("\n\n")[0]


def test_there_are_results() -> None:
    kinds = ("main", "paired", "reset", "time", "inner")
    expected = {"smollm2-commonsense/tables/sets.md", *(f"minilm-mrpc-rte/tables/{kind}.md" for kind in kinds)}
    assert expected <= set(map(name_of, TABLES))


def test_the_nine_methods_ran_with_three_seeds_on_both_tasks() -> None:
    runs = ROOT / "results" / "lab" / "minilm-mrpc-rte" / "runs"
    finished = [path.parts[-4:-1] for path in runs.glob("*/*/seed-*/result.json")]
    assert len(finished) == 9 * 3 * 2
    assert {seed for _, _, seed in finished} == {"seed-0", "seed-1", "seed-2"}


@pytest.mark.parametrize("path", TABLES, ids=name_of)
def test_a_table_is_what_its_runs_say(path: Path) -> None:
    folder = path.parents[1]
    assert render(make_table(load_records(folder), path.stem), "markdown") == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", TABLES, ids=name_of)
def test_the_page_shows_a_table_as_it_is(path: Path) -> None:
    assert rows_of(path.read_text(encoding="utf-8")) in PAGE
    assert f"(../results/lab/{name_of(path)})" in PAGE


def test_what_the_page_links_to_is_there() -> None:
    targets = re.findall(r"\]\((\.\./[^)#]+)\)", PAGE)
    assert targets
    assert all((ROOT / "docs" / target).exists() for target in targets)


def test_every_run_says_what_it_was_made_with() -> None:
    for path in (ROOT / "results" / "lab").glob("*/runs/*/*/*/result.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["git_revision"], path
        assert {"python", "torch", "transformers", "peft", "aroma-peft"} <= result["versions"].keys()
        assert (path.parent / "trial.json").exists()


def test_generated_answers_are_counted_as_their_files_say() -> None:
    files = sorted((ROOT / "results" / "lab" / "smollm2-commonsense" / "generation").glob("*.json"))
    assert len(files) == 4
    for file in files:
        sets = json.loads(file.read_text(encoding="utf-8"))["sets"].values()
        right = sum(round(one["metrics"]["generated"] * one["examples"]) for one in sets)
        assert f"| {file.stem} | {right} | {sum(one['unparseable'] for one in sets)} |" in PAGE
