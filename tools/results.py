"""The tables of docs/results.md, out of the runs in results/lab: a row for each method, a column for each task.

python tools/results.py            # prints them
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

LAB = Path(__file__).parents[1] / "results" / "lab"
TABLES = {
    "nets": (["planted-nets"], ["graded", "graded-b4", "noisy", "noisy-b4", "uniform", "nothing"]),
    "texts": (["minilm-six", "mrpc"], ["trec", "sst2", "banking77", "bbc-news", "mrpc"]),
}
METHODS = {
    "head-only": "head alone",
    **{f"lora-r{r}": f"LoRA r = {r}" for r in (1, 2, 4, 8, 16)},
    "adalora-r8": "AdaLoRA r = 8",
    "adalora": "AdaLoRA r = 8",
    "full": "full fine-tuning",
    "evidence": "**evidence, from r = 16**",
    "evidence-r8": "evidence, from r = 8",
    "evidence-r32": "evidence, from r = 32",
    "evidence-10": "LoRA r = 16, compressed",
    "para": "LoRA r = 16, PARA at evidence's size",
    "squeeze": "LoRA r = 16, LoRA-Squeeze at evidence's size",
    "aroma-paper": "AROMA as published",
}


def table(grids: list[str], tasks: list[str]) -> str:
    """Return mean ± standard deviation in points over the seeds and, in brackets, the mean rank that is saved."""
    runs = pd.concat([pd.read_parquet(LAB / grid / "runs.parquet") for grid in grids])
    runs = runs[runs["selects"].isna() | ~runs["selects"].astype(bool)]
    lines = [f"| | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for method, title in METHODS.items():
        cells = [_cell(runs[(runs["method"] == method) & (runs["task"] == task)]) for task in tasks]
        if any(cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(runs: pd.DataFrame) -> str:
    if runs.empty:
        return ""
    score, rank = 100 * runs["score"], runs["average_rank"].mean()
    return f"{score.mean():.1f} ± {score.std():.1f}" + ("" if pd.isna(rank) else f" ({rank:.1f})")


if __name__ == "__main__":
    for grids, tasks in TABLES.values():
        print(table(grids, tasks), end="\n\n")
