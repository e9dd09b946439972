"""The demo: both doors beside LoRA of two ranks and a head alone, on real news articles, offline."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from aroma.errors import CheckpointError
from aroma.files import write_json
from aroma.outputs import new_folder
from aroma.pictures import MatrixRank, draw_ranks, save_picture

from .run.run import run_trial
from .run.trial import Trial
from .specs import TaskSpec, TrainSpec, check_training
from .tasks.articles import BBC_NEWS, SOURCE
from .tasks.data import checked_examples, source_of
from .tasks.model import ENCODER_SOURCE, packaged_encoder
from .tasks.saved import open_classifier

TASK = TaskSpec(name="bbc-news", source=BBC_NEWS, max_length=16)
"""The first 16 tokens of an article, hardly more than its headline: with more of them a head alone does as well."""
TRAINING = TrainSpec(
    max_steps=150,  # each article once and a half
    batch_size=16,
    head_learning_rate=2e-3,
    warmup_steps=15,
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


def run_demo(
    out: str | os.PathLike[str],
    training: TrainSpec = TRAINING,
    on_run: Callable[[str], None] = lambda title: None,
    progress: bool = False,
) -> dict[str, Any]:
    """Train every row of the demo, and leave adapters, a picture and the result in a folder.

    Args:
        out: The folder; must be new or empty.
        training: The loop; rows have learning rates of their own.
        on_run: Called with the title of each run before it begins.
        progress: Whether a run shows a bar.

    Returns:
        The content of `result.json`.

    Raises:
        AromaError: A number of the loop is out of range, `out` cannot be used, a package of the demo is missing, or
            an adapter does not predict the same in plain PEFT.
    """
    began = time.monotonic()
    check_training(training)
    packaged_encoder()  # says what is missing
    folder = new_folder("--out", out, "give another folder with --out")
    results = {}
    for name, (title, kind, options, rate) in ROWS.items():
        on_run(title)
        trial = Trial(name, "minilm", TASK, name, kind, options, replace(training, learning_rate=rate))
        results[name] = run_trial(trial, folder / name, progress=progress)
    for name in ("evidence", "aroma"):
        on_run(f"{ROWS[name][0]}, in plain PEFT")
        require_same_answers(folder / name / "adapter", results[name]["score"])
    panels = {
        ROWS[name][0]: [MatrixRank(matrix, rank, one["effective_ranks"][matrix]) for matrix, rank in ranks.items()]
        for name, one, ranks in ((name, results[name], results[name]["ranks"]) for name in ("evidence", "aroma"))
    }
    save_picture(draw_ranks(panels), folder / PICTURE)
    record = {
        "rows": [row_of(name, one) for name, one in results.items()],
        "test_articles": results["head"]["examples"]["test"],
        "wall_seconds": time.monotonic() - began,
        "source": {"model": ENCODER_SOURCE, "data": SOURCE},
    }
    write_json(folder / "result.json", record)
    return record


def row_of(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """Return what the table shows of a run's result: score, seconds, sizes, and memory of the optimizer in MB."""
    ranks = [*result["ranks"].values()]
    parameters = result["parameters"]
    return {
        "name": name,
        "method": ROWS[name][0],
        "accuracy": result["score"],
        "total_rank": sum(ranks),
        "largest_rank": max(ranks, default=0),
        "adapter_parameters": parameters["final"],
        "optimizer_mb": 8 * (parameters["initial"] + parameters["head"]) / 1e6,  # two moments in float32
        "seconds": result["train_seconds"],
    }


def require_same_answers(adapter: Path, accuracy: float) -> None:
    """Raise CheckpointError unless plain PEFT loads the adapter and gets as many test articles right."""
    saved = open_classifier(adapter)
    articles = checked_examples(source_of(TASK).read("reported.test", "test"), saved.task)
    right = sum(saved.answer(articles).argmax(-1) == [article["labels"] for article in articles])
    if right != round(accuracy * len(articles)):
        said = f"plain PEFT gets {right} of {len(articles)} articles right, and the trained model {accuracy:.2%}"
        raise CheckpointError(f"adapter={str(adapter)!r}: {said}; this is a defect of AROMA, please report it")
