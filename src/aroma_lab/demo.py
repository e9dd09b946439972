"""The demo: evidence and AROMA beside LoRA of two ranks and a head alone, on real news articles, offline."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from aroma.errors import CheckpointError
from aroma.files import write_json
from aroma.outputs import new_folder
from aroma.pictures import MatrixRank, draw_ranks, save_picture
from aroma.ranks import rank_table

from .run.run import run_trial
from .run.trial import Trial
from .specs import TaskSpec, TrainSpec
from .tasks.articles import BBC_NEWS, SOURCE
from .tasks.data import source_of
from .tasks.model import ENCODER_SOURCE, packaged_encoder
from .tasks.saved import open_classifier

TASK = TaskSpec(name="bbc-news", source=BBC_NEWS, max_length=16)
"""The first 16 tokens of an article, hardly more than its headline: with more of them a head alone does as well."""
TRAINING = TrainSpec(
    max_steps=120,  # two minutes; the command's default, too
    batch_size=8,
    head_learning_rate=2e-3,
    save_steps=None,
    early_stop=False,
)
PICTURE = "ranks.png"

ROWS: dict[str, tuple[str, str, dict[str, Any], float]] = {
    "head": ("head only", "head_only", {}, 1e-3),
    "lora-r8": ("LoRA r=8", "lora", {"r": 8}, 1e-3),
    "lora-r16": ("LoRA r=16", "lora", {"r": 16}, 1e-3),
    "evidence": ("evidence, from r=16", "evidence", {"r": 16}, 1e-3),
    "aroma": ("AROMA as published", "aroma", {}, 3e-3),
}
"""Title, kind, options and adapter's learning rate of each run, by the name of its folder. Head, pooler and their rate
are the same. Rates are those that results/lab/minilm-six chose on more tokens, or next to them."""


def run_demo(out: str, training: TrainSpec) -> None:
    """Train every row of the demo, and leave adapters, a picture and `result.json` in a new or empty folder.

    Raises:
        AromaError: `out` cannot be used, a package of the demo is missing, or an adapter does not predict the same in
            plain PEFT.
    """
    began, console = time.monotonic(), Console()
    packaged_encoder()  # names a missing package
    folder = new_folder("--out", out, "give another folder with --out")
    console.print(f"Five short trainings in {out}, about two minutes on two idle cores.")
    results: dict[str, dict[str, Any]] = {}
    for name, (title, kind, options, rate) in ROWS.items():
        console.print(f"· {title}", highlight=False)
        trial = Trial(name, "minilm", TASK, name, kind, options, replace(training, learning_rate=rate))
        results[name] = run_trial(trial, folder / name, progress=True)
    panels = {}
    for name in ("evidence", "aroma"):
        console.print(f"· {ROWS[name][0]}, in plain PEFT", highlight=False)
        require_same_answers(folder / name / "adapter", results[name]["score"])
        ranks, effective = results[name]["ranks"], results[name]["effective_ranks"]
        panels[ROWS[name][0]] = [MatrixRank(matrix, rank, effective[matrix]) for matrix, rank in ranks.items()]
    save_picture(draw_ranks(panels), folder / PICTURE)
    rows = [row_of(name, one, folder / name / "adapter") for name, one in results.items()]
    seconds, source = time.monotonic() - began, {"model": ENCODER_SOURCE, "data": SOURCE}
    articles = results["head"]["examples"]["test"]
    record = {"rows": rows, "test_articles": articles, "wall_seconds": seconds, "source": source}
    write_json(folder / "result.json", record)
    took = f"{seconds:.0f} s" + (", as this machine is busy or slow" if seconds > 180 else "")
    console.print(f"\n{articles} test articles, first 16 tokens of each; rank: of all matrices together")
    table = Table("method", box=None, pad_edge=False)
    for title in ("accuracy", "rank", "largest", "parameters", "optimizer", "training"):
        table.add_column(title, justify="right")
    for row in rows:
        sizes = [str(row["total_rank"]), str(row["largest_rank"]), f"{row['adapter_parameters']:,}"]
        cost = [f"{row['optimizer_mb']:.1f} MB", f"{row['seconds']:.0f} s"]
        table.add_row(row["method"], f"{row['accuracy']:.1%}", *sizes, *cost)
    console.print(table)
    for line in (
        "All rows train the same head and pooler. One seed: a demonstration, not a comparison of methods.",
        "Plain PEFT loads both adapters and gives the same answers.",
        f"Left in {out}: {'/, '.join(ROWS)}/, {PICTURE}, result.json ({took}).",
        f"To look at: aroma report {out}/evidence",
        f"Data: {SOURCE}.",
    ):
        console.print(line, highlight=False)


def row_of(name: str, result: dict[str, Any], adapter: Path) -> dict[str, Any]:
    """Return what the table shows of a run: score, seconds, sizes, and memory of the optimizer in MB."""
    ranks, parameters = [*result["ranks"].values()], result["parameters"]
    return {
        "name": name,
        "method": ROWS[name][0],
        "accuracy": result["score"],
        "total_rank": sum(ranks),
        "largest_rank": max(ranks, default=0),
        "adapter_parameters": sum(row.rank * sum(row.shape) for row in rank_table(adapter)) if ranks else 0,
        "optimizer_mb": 8 * (parameters["initial"] + parameters["head"]) / 1e6,  # two moments in float32
        "seconds": result["train_seconds"],
    }


def require_same_answers(adapter: Path, accuracy: float) -> None:
    """Raise CheckpointError unless plain PEFT loads the adapter and gets as many test articles right."""
    saved = open_classifier(adapter, source_of(TASK).read("reported.test", "test"))
    right = sum(saved.answer().argmax(-1) == [article["labels"] for article in saved.examples])
    if right != round(accuracy * len(saved.examples)):
        said = f"plain PEFT gets {right} of {len(saved.examples)} articles right, and the trained model {accuracy:.2%}"
        raise CheckpointError(f"adapter={str(adapter)!r}: {said}; this is a defect of AROMA, please report it")
