"""Tiny trials of every method that can be resumed, and killed at a chosen step."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from aroma_lab.run import recorder
from aroma_lab.run.run import join, run_trial
from aroma_lab.run.trial import Trial, load_trial
from aroma_lab.specs import TaskSpec, TrainSpec
from tiny_classifier import WORDS, save_tiny_bert, write_json_lines

STEPS, SAVE_STEPS, LAST = 18, 5, 15
"""At 96 training examples and batches of 8, an epoch has 12 steps: the last checkpoint before the end is within
the second."""

GROWING = {"max_inner_steps": 6, "inner_check_interval": 2, "rewarmup_steps": 2}

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"r": 2, "dropout": 0.1}),
    "adalora": ("adalora", {"init_r": 4, "target_r": 2}),
    "adalora, at rest": ("adalora", {"init_r": 4, "target_r": 2, "final_steps": 0.6, "interval": 2}),
    "relora": ("relora", {"max_components": 3, "rewarmup_steps": 2}),
    "aroma": ("aroma", {**GROWING, "outer_tolerance": 1e-3}),
    "houlsby": ("houlsby", {"size": 4}),
    "full": ("full", {}),
}
"""Label: kind and options. The others, too, keep nothing but parameters."""


def sentences(count: int, seed: int) -> list[dict[str, object]]:
    """Sentences of 2 to 12 low or high words, each different, with their label."""
    generator = random.Random(seed)
    rows: dict[str, dict[str, object]] = {}
    while len(rows) < count:
        label = generator.choice(["low", "high"])
        first = 20 * (label == "high")
        text = " ".join(WORDS[first + generator.randrange(20)] for _ in range(generator.randint(2, 12)))
        rows[text] = {"text": text, "label": label}
    return list(rows.values())


def save_material(folder: Path) -> Path:
    """Write model and data: 120 training examples, 24 of them held out, and 37 to report."""
    save_tiny_bert(folder / "model")
    rows = sentences(157, seed=1)
    write_json_lines(folder / "train.jsonl", rows[:120])
    write_json_lines(folder / "test.jsonl", rows[120:])
    return folder


def trial_of(material: Path, method: str = "lora", purpose: Any = "report", **training: Any) -> Trial:
    """A trial of one of METHODS."""
    kind, options = METHODS[method]
    spec = TrainSpec(
        max_steps=STEPS,
        batch_size=8,
        learning_rate=1e-2,
        warmup_steps=3,
        save_steps=SAVE_STEPS,
        logging_steps=2,
        group_by_length=True,
    )
    task = TaskSpec(
        name="words",
        source=str(material),
        train="train.jsonl",
        reported={"test": "test.jsonl"},
        held_out=0.2,
        max_length=16,
    )
    return Trial(
        name=f"words/{kind}/seed-0",
        model=str(material / "model"),
        task=task,
        method=method,
        kind=kind,
        options=options,
        training=replace(spec, **training),
        purpose=purpose,
    )


def die_at(trial: Trial, folder: Path, step: int) -> None:
    """Run a trial in this process, which kills itself after optimizer step `step`; −1: before the evaluation."""
    torch.set_num_threads(1)

    def die(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if step in (-1, state.global_step):
            os.kill(os.getpid(), signal.SIGKILL)

    if step == -1:
        recorder.Recorder.on_train_end = die  # type: ignore[method-assign]
    else:
        recorder.Recorder.on_step_begin = die  # type: ignore[method-assign]
    run_trial(trial, folder)


def begin(trial_file: str, folder: str) -> None:
    """Run the trial of a file, as one of several processes."""
    torch.set_num_threads(1)
    run_trial(load_trial(trial_file), Path(folder))
    join().destroy_process_group()


def read(path: Path) -> Any:
    return json.loads(path.read_text())


if __name__ == "__main__":
    begin(*sys.argv[1:])
