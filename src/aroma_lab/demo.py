"""The demo: LoRA, compressed and not, and AROMA beside a head alone, on real news articles, offline."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from aroma.errors import CheckpointError
from aroma.files import write_json, write_text
from aroma.outputs import new_folder
from aroma.pictures import draw_ranks, save_picture
from aroma.ranks import rank_table

from .compressing import Wishes, compress_adapter
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
    "lora-r4": ("LoRA r=4", "lora", {"r": 4}, 1e-3),
    "lora-r16": ("LoRA r=16", "lora", {"r": 16}, 1e-3),
    "aroma": ("AROMA as published", "aroma", {}, 3e-3),
}
"""Title, kind, options and adapter's learning rate of each run, by the name of its folder. Head, pooler and their rate
are the same. Rates are those that results/lab/minilm-six chose on more tokens, or next to them."""
COMPRESSED = {"compressed": "LoRA r=16, compressed", "by-size": "LoRA r=16, cut by size"}
"""Titles of the adapters that are made from that of LoRA r=16: by its effect, and to the same size by that alone."""


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
    rows = {name: row_of(ROWS[name][0], one, folder / name / "adapter") for name, one in results.items()}
    console.print(f"· {COMPRESSED['compressed']}, with {Wishes.examples} of its training articles", highlight=False)
    data = folder / "articles.jsonl"
    articles = source_of(TASK).read("train", "train")
    write_text(data, "".join(json.dumps(article) + "\n" for _, article in articles))
    whole = folder / "lora-r16" / "adapter"
    found, _ = compress_adapter(whole, str(data), folder / "compressed", Wishes())
    console.print(str(found), highlight=False)
    compress_adapter(whole, None, folder / "by-size", Wishes(size=found.size.share))
    for name, title in COMPRESSED.items():
        score = right_answers(folder / name) / results["lora-r16"]["examples"]["test"]
        rows[name] = row_of(title, results["lora-r16"] | {"score": score}, folder / name)
    rows["aroma"] = rows.pop("aroma")  # the last
    require_same_answers(folder / "aroma" / "adapter", results["aroma"]["score"])
    shown = {COMPRESSED["compressed"]: folder / "compressed", ROWS["aroma"][0]: folder / "aroma" / "adapter"}
    save_picture(draw_ranks({title: rank_table(adapter) for title, adapter in shown.items()}), folder / PICTURE)
    seconds, source = time.monotonic() - began, {"model": ENCODER_SOURCE, "data": SOURCE}
    tested = results["head"]["examples"]["test"]
    record = {"rows": [*rows.values()], "test_articles": tested, "wall_seconds": seconds, "source": source}
    write_json(folder / "result.json", record)
    took = f"{seconds:.0f} s" + (", as this machine is busy or slow" if seconds > 180 else "")
    console.print(f"\n{tested} test articles, first 16 tokens of each; rank: of all matrices together")
    table = Table("method", box=None, pad_edge=False)
    for title in ("accuracy", "rank", "largest", "parameters", "optimizer", "training"):
        table.add_column(title, justify="right")
    for row in rows.values():
        sizes = [str(row["total_rank"]), str(row["largest_rank"]), f"{row['adapter_parameters']:,}"]
        cost = [f"{row['optimizer_mb']:.1f} MB", f"{row['seconds']:.0f} s"]
        table.add_row(row["method"], f"{row['accuracy']:.1%}", *sizes, *cost)
    console.print(table)
    for line in (
        "All rows train the same head and pooler. One seed: a demonstration, not a comparison of methods.",
        "The compressed adapters were evaluated in plain PEFT, where AROMA's gives the same answers, too.",
        f"Left in {out}: {'/, '.join(rows)}/, {data.name}, {PICTURE}, result.json ({took}).",
        f"To look at: {out}/compressed/compression.png, and aroma report {out}/aroma",
        f"Data: {SOURCE}.",
    ):
        console.print(line, highlight=False)


def row_of(title: str, result: dict[str, Any], adapter: Path) -> dict[str, Any]:
    """Return what the table shows of an adapter: score, sizes and, of its run, seconds and MB of the optimizer."""
    parameters = result["parameters"]
    matrices = rank_table(adapter) if result["ranks"] else []
    return {
        "name": adapter.parent.name if adapter.name == "adapter" else adapter.name,
        "method": title,
        "accuracy": result["score"],
        "total_rank": sum(row.rank for row in matrices),
        "largest_rank": max((row.rank for row in matrices), default=0),
        "adapter_parameters": sum(row.rank * sum(row.shape) for row in matrices),
        "optimizer_mb": 8 * (parameters["initial"] + parameters["head"]) / 1e6,  # two moments in float32
        "seconds": result["train_seconds"],
    }


def right_answers(adapter: Path) -> int:
    """Return how many test articles an adapter gets right in plain PEFT."""
    saved = open_classifier(adapter, source_of(TASK).read("reported.test", "test"))
    return int(sum(saved.answer().argmax(-1) == [article["labels"] for article in saved.examples]))


def require_same_answers(adapter: Path, accuracy: float) -> None:
    """Raise CheckpointError unless plain PEFT loads the adapter and gets as many test articles right."""
    right, tested = right_answers(adapter), len(source_of(TASK).read("reported.test", "test"))
    if right != round(accuracy * tested):
        said = f"plain PEFT gets {right} of {tested} articles right, and the trained model {accuracy:.2%}"
        raise CheckpointError(f"adapter={str(adapter)!r}: {said}; this is a defect of AROMA, please report it")
