"""The house can be read: no file is too long, nor are the pages."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]


def lines_of(part: str) -> dict[str, int]:
    files = sorted((ROOT / part).rglob("*.py"))
    return {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in files}


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
