"""The figure and the tables of a new language (examples/lab/verses.yaml), out of results/lab/verses.

python tools/verses.py             # writes them: into docs/results.md, and as figures/languages.png
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

FOLDER = Path(__file__).parents[1] / "results" / "lab" / "verses"
METHODS = {
    "pretrained": "before training",
    **{f"lora-r{r}": f"LoRA r = {r}" for r in (1, 2, 4, 8, 16, 32, 64)},
    "evidence": "**evidence, from r = 64**",
    "evidence-r16": "evidence, from r = 16",
    "evidence-10": "LoRA r = 64, compressed",
    "para": "LoRA r = 64, PARA at evidence's size",
    "squeeze": "LoRA r = 64, LoRA-Squeeze at evidence's size",
    "aroma-paper": "AROMA as published",
    "full": "full fine-tuning",
}


MEASURES = {
    "spanish": {"Spanish": ("test", "bits_per_byte"), "English": ("english", "bits_per_byte")},
    "translation": {"chrF": ("test", "chrf"), "loss": ("test", "loss")},
}
"""What a task is measured by: column of its table, then reported split and metric."""


def read(task: str) -> pd.DataFrame:
    """Return a row for each reported run of a task: method, seed, mean rank, and what it is measured by.

    `spanish-again` is `spanish` on a model that was pretrained again, on another machine.
    """
    runs = pd.read_parquet(FOLDER / "runs.parquet")
    is_selecting = ~runs["selects"].isna() & runs["selects"].astype(bool)
    runs = runs[runs["task"].isin([task, f"{task}-again"]) & ~is_selecting]
    reported = [json.loads(result)["reported"] for result in runs["result"]]
    measured = {name: [one[split][key] for one in reported] for name, (split, key) in MEASURES[task].items()}
    return runs[["method", "seed", "average_rank"]].assign(**measured)


def table(task: str) -> str:
    """Return mean ± standard deviation over the runs, by method."""
    rows, names = read(task), [*MEASURES[task]]
    lines = [f"| {task} | rank | {' | '.join(names)} | runs |", "|---|--:|--:|--:|--:|"]
    for method, title in METHODS.items():
        some = rows[rows["method"] == method]
        if len(some):
            cells = [_mean(some[name]) for name in names]
            rank = some["average_rank"].mean()
            lines.append(f"| {title} | {'' if pd.isna(rank) else f'{rank:.1f}'} | {' | '.join(cells)} | {len(some)} |")
    return "\n".join(lines)


def _mean(values: pd.Series) -> str:
    return f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 else "")


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Draw the loss of the new language against the rank that is saved, and that of the old one against it."""
    means = rows.groupby("method")[["average_rank", "Spanish", "English"]].mean()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    fixed = means[means.index.str.startswith("lora-r")].sort_values("average_rank")
    left.plot(fixed["average_rank"], fixed["Spanish"], color="#767676", linewidth=1.2, zorder=1)
    right.plot(fixed["Spanish"], fixed["English"], color="#767676", linewidth=1.2, zorder=1)
    for index, method in enumerate(name for name in METHODS if name in means.index):
        look = {"marker": "osD^vP*X<>hd8pH"[index], "color": f"C{index % 10}", "s": 60}
        one = means.loc[method]
        left.scatter(one["average_rank"], one["Spanish"], **look)
        right.scatter(one["Spanish"], one["English"], label=METHODS[method].strip("*"), **look)
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter("{x:.3g}")
    left.set(xlabel="mean rank of the saved adapter", ylabel="bits per byte of unseen Spanish")
    right.set(xlabel="bits per byte of unseen Spanish", ylabel="bits per byte of unseen English")
    for axes in (left, right):
        axes.grid(color="#E4E4E4", linewidth=0.8)
        axes.set_axisbelow(True)
    right.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    from results import put

    for task in MEASURES:
        put(Path(__file__).parents[1] / "docs" / "results.md", table(task))
    draw(read("spanish"), FOLDER / "figures" / "languages.png")
