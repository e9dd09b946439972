"""The tables of docs/results.md, out of the runs in results/lab, which are written into the page.

python tools/results.py
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from aroma.files import write_text

ROOT = Path(__file__).parents[1]
LAB = ROOT / "results" / "lab"
SEEDS = 5
"""Some runs have further seeds; all rows are to have the same."""
FIXED = {f"lora-r{r}": f"LoRA r = {r}" for r in (1, 2, 4, 8, 16)}
METHODS = {
    "head-only": "head alone",
    **FIXED,
    "adalora-r8": "AdaLoRA r = 8",
    "adalora": "AdaLoRA r = 8",
    "full": "full fine-tuning",
    "aroma-paper": "AROMA as published",
}
FROM_64 = {f"lora-r{r}": f"LoRA r = {r}" for r in (1, 4, 16, 64)}
TABLES = {
    "nets": (["planted-nets"], ["graded", "graded-b4", "noisy", "noisy-b4", "uniform", "nothing"], METHODS),
    "texts": (["minilm-six", "mrpc"], ["trec", "sst2", "banking77", "bbc-news", "mrpc"], METHODS),
    "facts": (["facts"], ["n500", "n2000", "n8000"], FROM_64),
}


def reported(grids: list[str]) -> pd.DataFrame:
    """Return the finished runs of some grids that are no part of a selection."""
    runs = pd.concat([pd.read_parquet(LAB / grid / "runs.parquet") for grid in grids])
    return runs[(runs["selects"].isna() | ~runs["selects"].astype(bool)) & (runs["seed"] < SEEDS)]


def table(grids: list[str], tasks: list[str], titles: dict[str, str]) -> str:
    """Return mean ± standard deviation in points over the seeds and, in brackets, the mean rank that is saved.

    A row is a method of `titles`.
    """
    runs = reported(grids)
    lines = [f"| | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for method, title in titles.items():
        cells = [_cell(runs[(runs["method"] == method) & (runs["task"] == task)]) for task in tasks]
        if any(cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(runs: pd.DataFrame) -> str:
    if runs.empty:
        return ""
    score, rank = 100 * runs["score"], runs["average_rank"].mean()
    spread = f" ± {score.std():.1f}" if len(score) > 1 else ""
    return f"{score.mean():.1f}{spread}" + ("" if pd.isna(rank) else f" ({rank:.1f})")


def put(page: Path, new: str) -> None:
    """Replace the table of a page that has the same head by a new one."""
    text, head = page.read_text(encoding="utf-8"), new.partition("\n")[0]
    pattern = rf"^{re.escape(head)}\n(?:\|.*\n)+"
    assert len(re.findall(pattern, text, flags=re.MULTILINE)) == 1, f"{page} has no such table: {head}"
    write_text(page, re.sub(pattern, lambda _: new + "\n", text, flags=re.MULTILINE))


if __name__ == "__main__":
    for one in TABLES.values():
        put(ROOT / "docs" / "results.md", table(*one))
