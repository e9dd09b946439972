"""The house stays small: lines of Python by part, comments included, the longest file, and the pages."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lines_of(part: str) -> dict[str, int]:
    files = sorted((ROOT / part).rglob("*.py"))
    return {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in files}


@pytest.mark.parametrize(("part", "limit"), [("src/aroma", 7_450), ("src/aroma_lab", 8_500), ("tests", 20_000)])
def test_a_part_is_no_longer_than_its_limit(part: str, limit: int) -> None:
    lines = lines_of(part)
    assert lines
    assert sum(lines.values()) <= limit, "before something is added, something else goes; the limits only fall"


def test_a_file_can_be_read_in_one_sitting() -> None:
    longest = {name: count for part in ("src", "tests") for name, count in lines_of(part).items() if count > 500}
    assert longest == {}


def test_the_pages_can_be_read_in_an_hour() -> None:
    # The reference is made of docstrings; changes and security are pages of the repository's root.
    pages = [page for page in [*(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"] if page.name != "api.md"]
    assert 5 < len(pages) <= 14
    assert sum(len(page.read_text(encoding="utf-8").splitlines()) for page in pages) <= 2_200


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110


def test_code_on_the_first_page_is_not_cut() -> None:
    blocks = (ROOT / "docs" / "index.md").read_text(encoding="utf-8").split("```")[1::2]
    assert max(len(line) for block in blocks for line in block.splitlines()) <= 80
