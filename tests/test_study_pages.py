"""The README's table of real adapters is that of the committed study."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
TASKS = ("trec", "sst2", "banking77", "bbc-news", "mrpc")


def rows(file: Path) -> list[list[str]]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


def test_the_table_is_the_one_that_the_study_wrote() -> None:
    measured = [
        row[:6] for row in rows(ROOT / "results" / "compress" / "README.md") if row[0] in TASKS and len(row) == 8
    ]
    assert [row[0] for row in measured] == [*TASKS]
    assert [row for row in rows(ROOT / "README.md") if row[0] in TASKS] == measured
