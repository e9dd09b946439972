"""The demo: a real encoder learns to sort real news articles, offline, in about two minutes on two cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModel, DataCollatorWithPadding, set_seed

from aroma.errors import CheckpointError, bad_value
from aroma.files import read_tensors, write_json, write_text
from aroma.outputs import new_folder
from aroma.pictures import rank_picture
from aroma.report.run import LORA_RANK, run_page
from aroma.tuner import AromaConfig, aroma_layers

from ..methods import Method, make_method
from ..methods.head import pooler_of
from ..progress import Progress, no_progress
from ..run.files import REPORT, TrialFiles
from ..run.machine import provenance
from ..run.recorder import Curve, EventLog, Recorder, Usage
from ..specs import ModelSpec, TrainSpec, check_training
from ..tasks.articles import SOURCE, TOPICS, Article, columns_of, load_articles, split_articles
from ..tasks.classification import ClassifierJob, predict_logits
from ..tasks.data import make_examples
from ..tasks.metrics import metrics_of
from ..tasks.model import ENCODER_SOURCE, count_trainable, packaged_encoder
from ..tasks.spec import HELD_OUT, Layout
from ..tasks.task import Task
from ..training.trainer import Fit, make_trainer
from .page import demo_facts

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

TASK = Task("classification", TOPICS, "text", None, "label", max_length=64)
"""64 tokens of an article are read: headline and first sentences."""
TOLERANCE = 1e-4
"""Largest difference of two logits that count as equal: float32 sums in another order differ by less."""

PICTURE = "ranks.png"
"""File of the picture of the ranks."""

ADAPTER: dict[str, Any] = {"target_modules": "all-linear"}
TRAINING = TrainSpec(
    max_steps=110,  # little more than each article once
    batch_size=16,
    learning_rate=3e-3,
    warmup_steps=10,
    logging_steps=5,
    save_steps=None,
)


def run_demo(
    out: str | os.PathLike[str],
    training: TrainSpec = TRAINING,
    progress: Progress = no_progress,
    training_bar: bool = False,
) -> dict[str, Any]:
    """Run the demo, and leave adapter, picture, report and result in a folder.

    Args:
        out: The folder; must be new or empty.
        progress: Shows how far the work before and after the training is.
        training_bar: Whether the training shows a progress bar.

    Returns:
        The content of `result.json`.

    Raises:
        ConfigError: A number of the loop is out of range, or its steps are too few for an inner loop.
        OutputError: `out` is not empty, or cannot be written to.
        DataError: A package of the demo is missing or has changed.
        CheckpointError: The saved adapter does not predict the same in plain PEFT.
    """
    began = time.monotonic()
    check_training(training)
    # Before the head alone is trained, which takes as long as the rest.
    AromaConfig(**ADAPTER).resolve_inner_steps(training.max_steps)
    folder = new_folder("--out", out, "give another folder with --out")
    train, held_out = split_articles(load_articles())
    parts = {"train": as_examples(train), HELD_OUT: as_examples(held_out)}  # held-out articles are only reported on
    job = ClassifierJob.make(ModelSpec(str(packaged_encoder())), TASK, parts, training.train_pooler)
    if training.threads is not None:
        torch.set_num_threads(training.threads)
    folder.mkdir(parents=True, exist_ok=True)
    head_only_parameters, head_only = train_heads(job, training, progress)
    method = make_method("aroma", {**ADAPTER, "component_seed": training.seed})
    fit, curve = train_adapters(job, method, training, folder, training_bar)
    model, encoded = fit.trainer.model.cpu(), job.eval_sets[HELD_OUT]  # on the CPU, as in the fresh process
    with progress("evaluate", len(encoded)) as advance:
        logits = predict_logits(model, encoded, job.tokenizer, training.batch_size, advance)
    method.save(model, folder / "adapter")
    job.describe(model, folder / "adapter")
    modules, updates = fit.controller.summary(), fit.controller.relative_updates()
    rank_picture(modules, folder / PICTURE, title="Ranks grown on BBC News")
    record = {
        "metrics": metrics_of("classification", logits, np.array(encoded["labels"])),
        "head_only": head_only,
        "head_only_parameters": head_only_parameters,
        "pooler": pooler_of(model),
        "train_articles": len(train),
        "held_out_articles": len(held_out),
        "modules": {module.pop("name"): module for module in map(asdict, modules)},
        "parameters": count_parameters(fit.trainer.model),
        "agreement": require_agreement(logits, reload(folder / "adapter", logits.shape[1], job, training, progress)),
        "adapter": method.resolved_options(),
        "training": asdict(training),
        "max_length": TASK.max_length,
        "steps": fit.trainer.state.global_step,
        "explanation": fit.controller.explanation(),
        "wall_seconds": time.monotonic() - began,
        "source": {"model": ENCODER_SOURCE, "data": SOURCE},
        **provenance(),
    }
    facts = demo_facts(record, fit.trainer.state.log_history, curve, updates)
    write_text(folder / REPORT, run_page(facts))
    write_json(folder / "result.json", record)  # last
    return record


def as_examples(articles: list[Article]) -> Dataset:
    """Return articles as examples of a classification into `TOPICS`; see `tasks.data`."""
    return make_examples("articles", Layout("text", None, "label"), columns_of(articles), TOPICS)


# Without adapters ----------------------------------------------------------------------------------------------------


def train_heads(job: ClassifierJob, training: TrainSpec, progress: Progress) -> tuple[int, dict[str, float]]:
    """Train linear heads on two features of the frozen model: `pooled`, what its own classification head sees, and
    `mean`, its sentence embedding.

    Returns:
        The parameters of such a head, and the held-out accuracies of both.
    """
    encoder = AutoModel.from_pretrained(job.model.name, dtype=torch.float32)
    with progress("head only", sum(job.examples.values())) as advance:
        train, held_out = (
            features_of(encoder, job.tokenizer, encoded, training.batch_size, advance)
            for encoded in (job.train, job.eval_sets[HELD_OUT])
        )
    heads = {name: fit_head(features, job.parts["train"]["labels"]) for name, features in train.items()}
    labels = list(job.parts[HELD_OUT]["labels"])
    pooled = heads["pooled"]
    accuracies = {name: float(head.score(held_out[name], labels)) for name, head in heads.items()}
    return pooled.coef_.size + pooled.intercept_.size, accuracies


@torch.no_grad()
def features_of(
    encoder: Any, tokenizer: Any, encoded: Dataset, batch_size: int, on_batch: Callable[[int], None]
) -> dict[str, NDArray[Any]]:
    """Return the frozen features of tokenized examples, each (examples, hidden): `pooled`, and `mean` over tokens."""
    from torch.utils.data import DataLoader

    encoder.eval()
    data: Any = encoded.remove_columns("labels")
    pooled, mean = [], []
    for batch in DataLoader(data, batch_size=batch_size, collate_fn=DataCollatorWithPadding(tokenizer)):
        output = encoder(**batch)
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled.append(output.pooler_output)
        mean.append((output.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1))
        on_batch(len(mask))
    return {"pooled": torch.cat(pooled).numpy(), "mean": torch.cat(mean).numpy()}


def fit_head(features: NDArray[Any], labels: Sequence[int]) -> Any:
    """Return scikit-learn's logistic regression on features (examples, hidden), trained to convergence.

    Its inverse L2 strength is chosen on a fifth of the examples.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit

    part = StratifiedShuffleSplit(n_splits=1, test_size=0.2, random_state=0)
    search = GridSearchCV(LogisticRegression(max_iter=2000), {"C": (1.0, 10.0, 100.0, 1000.0)}, cv=part)
    return search.fit(features, list(labels)).best_estimator_


# With adapters -------------------------------------------------------------------------------------------------------


def train_adapters(
    job: ClassifierJob, method: Method, training: TrainSpec, folder: Path, bar: bool
) -> tuple[Fit, Curve]:
    """Train growing adapters and a new head; the events go to `folder`.

    Returns:
        The training, and how the numbers of trainable parameters changed.
    """
    set_seed(training.seed)
    model = method.build(job.load_model(), training.max_steps or 0)
    recorder = Recorder(method, Usage())
    with tempfile.TemporaryDirectory() as scratch:
        log = EventLog(TrialFiles(folder).events, upto=0)
        fit = make_trainer(
            method,
            model,
            job.objective,
            training,
            scratch,
            job.train,
            callbacks=[recorder],
            on_event=log,
            progress=bar,
        )
        fit.train()
    return fit, recorder.curve


def count_parameters(model: Any) -> dict[str, int]:
    """Return the numbers of parameters that the adapter has, that train in the head, and of a LoRA on the matrices."""
    sizes = {layer: layer.in_features + layer.out_features for layer in aroma_layers(model).values()}
    adapter = sum(layer.rank("default") * size for layer, size in sizes.items())
    return {**count_trainable(model), "adapter": adapter, "lora": LORA_RANK * sum(sizes.values())}


# Reloaded in plain PEFT ----------------------------------------------------------------------------------------------


def reload(adapter: Path, labels: int, job: ClassifierJob, training: TrainSpec, progress: Progress) -> NDArray[Any]:
    """Predict all held-out articles again, in plain PEFT in a process without AROMA.

    Args:
        adapter: Folder of the saved adapter.
        labels: Number of topics.
        job: Model and data.
        training: The loop, for its batch size.
        progress: Shows that it runs.

    Returns:
        Logits, (articles, topics).

    Raises:
        CheckpointError: The process failed.
    """
    content = {
        "base_model": job.model.name,
        "adapter": str(adapter),
        "texts": list(job.parts[HELD_OUT]["text"]),
        "num_labels": labels,
        "max_length": job.task.max_length,
        "batch_size": training.batch_size,
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as folder, progress("reload in plain PEFT", 1) as advance:
        job_file, out_file = Path(folder) / "job.json", Path(folder) / "logits.safetensors"
        job_file.write_text(json.dumps(content), encoding="utf-8")
        program = Path(__file__).with_name("plain_reload.py")
        # -P keeps this folder, with its general module names, off the program's path.
        command = [sys.executable, "-P", str(program), str(job_file), str(out_file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip() or "no error text").splitlines()[-1]
            raise CheckpointError(f"adapter={str(adapter)!r}: plain PEFT cannot load it ({reason})")
        reloaded: NDArray[Any] = read_tensors(out_file)["logits"].numpy()
        advance(1)
    return reloaded


def require_agreement(logits: NDArray[Any], reloaded: NDArray[Any]) -> dict[str, Any]:
    """Compare the predictions of the trained model with those of plain PEFT.

    Raises:
        CheckpointError: They differ.
    """
    difference = float(abs(logits - reloaded).max())
    different = int((logits.argmax(axis=-1) != reloaded.argmax(axis=-1)).sum())
    if different or difference > TOLERANCE:
        remedy = (
            f"plain PEFT predicts {different} of {len(logits)} articles otherwise; this is a defect of AROMA, please "
            "report it with the output folder"
        )
        raise bad_value("max |Δlogit|", difference, remedy, CheckpointError)
    return {"examples": len(logits), "largest_difference": difference, "different_predictions": different}
