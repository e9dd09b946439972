"""The tables and the figure of language models: a new language, translation, news.

python tools/languages.py          # writes them: into docs/results.md, and as results/lab/verses/figures/languages.png
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

ROOT = Path(__file__).parents[1]
METHODS = {
    "pretrained": "before training",
    **{f"lora-r{r}": f"LoRA r = {r}" for r in (1, 2, 4, 8, 16, 32, 64)},
    "aroma-paper": "AROMA as published",
    "full": "full fine-tuning",
}
GRIDS = {"spanish": "verses", "translation": "verses", "news": "smollm2-news"}
MEASURES = {
    "spanish": {"Spanish": ("test", "bits_per_byte"), "English": ("english", "bits_per_byte")},
    "translation": {"loss": ("test", "loss"), "chrF": ("test", "chrf")},
    "news": {"loss": ("test", "loss"), "perplexity": ("test", "perplexity")},
}
"""What a task is measured by: column of its table, then reported split and metric."""
SIZES = {
    "verses": {"self_attn": 256 + 256, "mlp": 256 + 704},
    "smollm2-news": {"k_proj": 576 + 192, "v_proj": 576 + 192, "self_attn": 576 + 576, "mlp": 576 + 1536},
}
"""Inputs and outputs of a grid's matrices: the parameters of one direction."""


def read(task: str) -> pd.DataFrame:
    """Return a row for each reported run of a task: method, seed, mean rank, parameters, and what it is measured by.

    `spanish-again` is `spanish` on a model that was pretrained again, on another machine.
    """
    runs = pd.read_parquet(ROOT / "results" / "lab" / GRIDS[task] / "runs.parquet")
    is_selecting = ~runs["selects"].isna() & runs["selects"].astype(bool)
    runs = runs[runs["task"].isin([task, f"{task}-again"]) & ~is_selecting]
    results = [json.loads(result) for result in runs["result"]]
    rows = runs[["task", "method", "seed", "average_rank"]].assign(
        parameters=[parameters(one, SIZES[GRIDS[task]]) for one in results]
    )
    for name, (split, key) in MEASURES[task].items():
        rows[name] = [one["reported"][split][key] for one in results]
    return rows


def parameters(result: dict[str, Any], sizes: dict[str, int]) -> int:
    """Return the parameters that a run saves: of its adapter, or of the whole model."""
    if not result["ranks"]:
        return int(result["parameters"]["final"])
    of = {name: next(size for part, size in sizes.items() if part in name) for name in result["ranks"]}
    return sum(rank * of[name] for name, rank in result["ranks"].items())


def table(task: str) -> str:
    """Return a row for each method: mean ± standard deviation over its runs."""
    rows, names = read(task), [*MEASURES[task]]
    head = [task, "rank", "parameters", *names, "runs"]
    lines = [f"| {' | '.join(head)} |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for method, title in METHODS.items():
        some = rows[rows["method"] == method]
        if len(some):
            rank, size = some["average_rank"].mean(), some["parameters"].mean()
            cells = ["" if pd.isna(rank) else f"{rank:.1f}", f"{size / 1000:,.0f} K"]
            cells += [*(_mean(some[name]) for name in names), str(len(some))]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: pd.Series) -> str:
    return f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 else "")


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Draw the loss of the new language against the parameters that are saved, and that of the old one against it."""
    means = rows.groupby("method")[["parameters", "Spanish", "English"]].mean()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    fixed = means[means.index.str.startswith("lora-r")].sort_values("parameters")
    for axes, x, y in ((left, "parameters", "Spanish"), (right, "Spanish", "English")):
        axes.plot(fixed[x], fixed[y], color="#767676", marker="o", label="LoRA, one r for all")
        for method, one in fixed.iterrows():
            axes.annotate(method.removeprefix("lora-r"), (one[x], one[y]), (-6, -14), textcoords="offset points")
        for index, method in enumerate(name for name in METHODS if name in means.index.difference(fixed.index)):
            if x == "Spanish" or method != "pretrained":
                look = {"marker": "XsD^vP*p"[index], "color": f"C{index}", "s": 60, "alpha": 0.8, "zorder": 3}
                axes.scatter(means.loc[method, x], means.loc[method, y], label=METHODS[method].strip("*"), **look)
    left.axhline(means.loc["pretrained", "Spanish"], color="#767676", linewidth=0.8, linestyle=":")
    left.set_xscale("log")
    left.set(xlabel="parameters that are saved", ylabel="bits per byte of unseen Spanish")
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
        put(ROOT / "docs" / "results.md", table(task))
    draw(read("spanish"), ROOT / "results" / "lab" / "verses" / "figures" / "languages.png")
