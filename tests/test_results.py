"""What is committed in results/: tables are what their runs say, and any reader takes the files."""

from __future__ import annotations

import io
import json
import runpy
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
from transformers import AutoTokenizer, BertConfig, BertModel

from aroma_lab.report.runs import Runs, read_runs
from aroma_lab.report.tables import make_table
from aroma_lab.study.selection import edges
from aroma_lab.tasks.model import packaged_encoder

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "lab"
GRIDS = sorted(path.parent.name for path in RESULTS.glob("*/runs.parquet"))
TABLES = sorted(RESULTS.glob("*/tables/*.csv"))


@cache
def runs_of(folder: Path) -> Runs:
    return read_runs(folder)


def name_of(path: Path) -> str:
    return str(path.relative_to(RESULTS))


def test_every_grid_has_runs_and_tables() -> None:
    assert len(GRIDS) == 10
    assert {path.parents[1].name for path in TABLES} == {*GRIDS}


@pytest.mark.parametrize("path", TABLES, ids=name_of)
def test_a_table_has_the_numbers_of_its_runs(path: Path) -> None:
    table = make_table(runs_of(path.parents[1]), path.stem)
    found = pd.read_csv(io.StringIO(table.written(".csv")))
    pd.testing.assert_frame_equal(found, pd.read_csv(path), rtol=1e-12, atol=1e-14, check_dtype=False)
    assert table.written(".md") == path.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.parametrize("grid", GRIDS)
def test_every_run_says_what_it_was_made_with(grid: str) -> None:
    rows = runs_of(RESULTS / grid).rows
    for row in rows:
        assert row["git_revision"], row["name"]
        assert {"python", "torch", "transformers", "peft", "aroma-peft"} <= row["result"]["versions"].keys()
        assert row["trial"]["training"]["max_steps"] > 0
    assert {row["state"] for row in rows} == {"finished"}


@pytest.mark.parametrize("name", [name for name in GRIDS if (RESULTS / name / "selection.json").exists()])
def test_what_was_chosen_was_compared_with_all_next_to_it(name: str) -> None:
    selection = json.loads((RESULTS / name / "selection.json").read_text(encoding="utf-8"))
    entries = {(name, task, method): entry for task, of_task in selection.items() for method, entry in of_task.items()}
    entries = {where: entry for where, entry in entries.items() if entry["chosen"] and where[2] != "pretrained"}
    assert entries
    for where, entry in entries.items():
        points = [values for values, _ in entry["tried"]]
        assert not edges(points, entry["chosen"]), where
        for key, value in entry["chosen"].items():
            numbers = sorted({point[key] for point in points})
            place = numbers.index(value)
            for other in (*numbers[max(place - 1, 0) : place], *numbers[place + 1 : place + 2]):
                assert {**entry["chosen"], key: other} in points, (entry["chosen"], key, other)


@pytest.mark.shared
def test_the_example_of_tasks_gives_each_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = runpy.run_path(str(ROOT / "examples" / "tasks_in_a_row.py"))["main"]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(**sizes, max_position_embeddings=64)).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(packaged_encoder()).save_pretrained(tmp_path / "model")
    words = [str(tmp_path / "out"), "--data", str(ROOT.parent / "shared" / "data"), "--steps", "40"]
    monkeypatch.setattr("sys.argv", ["tasks_in_a_row.py", *words, "--model", str(tmp_path / "model")])
    main()
    tasks = ("trec", "sst2", "banking77")
    assert {folder.name for folder in (tmp_path / "out" / "adapters").iterdir() if folder.is_dir()} == {*tasks}
    assert all(task in (tmp_path / "out" / "table.md").read_text() for task in tasks)


def test_the_page_has_the_tables_of_the_runs() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "results.py"))
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert all(tool["table"](*which) in page for which in tool["TABLES"].values())
    languages = runpy.run_path(str(ROOT / "tools" / "languages.py"))
    assert all(languages["table"](task) in page for task in languages["MEASURES"])
