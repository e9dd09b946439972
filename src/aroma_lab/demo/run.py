"""The demo: a real encoder learns to sort real news articles, offline, in about two minutes on two cores."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModel, DataCollatorWithPadding, set_seed

from aroma.errors import CheckpointError, bad_value
from aroma.files import write_json, write_text
from aroma.pictures import rank_picture
from aroma.tuner import aroma_layers

from ..methods import Method, make_method
from ..progress import Progress, no_progress
from ..run.folder import require_empty
from ..run.recorder import EventLog
from ..specs import ModelSpec, TrainSpec, check_training
from ..tasks.classification import ClassifierJob, predict_logits
from ..tasks.metrics import metrics_of
from ..tasks.model import count_trainable, packaged_encoder
from ..tasks.spec import HELD_OUT
from ..tasks.task import Task
from ..training.trainer import Fit, make_trainer
from .articles import TOPICS, as_examples, load_articles, split_articles
from .reload import Agreement, reloaded_logits
from .report import DemoResult, demo_report

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

TASK = Task("classification", TOPICS, "text", None, "label", max_length=64)
"""64 tokens of an article are read: headline and first sentences."""
LORA_RANK = 8
"""Rank of the LoRA whose parameters are counted for comparison."""
STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
"""Inverse L2 strengths that are tried for the head-only baseline."""

ADAPTER = {
    "target_modules": "all-linear",
    "inner_check_interval": 5,
    "max_inner_steps": 60,
    "outer_tolerance": 0.01,
    "rewarmup_steps": 5,
}
TRAINING = TrainSpec(
    max_steps=240,
    batch_size=16,
    learning_rate=1e-3,
    head_learning_rate=2e-3,
    warmup_steps=10,
    logging_steps=5,
    save_steps=None,
)


def demo_training(seed: int = 0, threads: int | None = None, steps: int | None = None) -> TrainSpec:
    """Return the demo's loop with the given changes.

    Raises:
        ConfigError: A number out of range.
    """
    chosen = replace(TRAINING, seed=seed, threads=threads, max_steps=TRAINING.max_steps if steps is None else steps)
    check_training(chosen)
    return chosen


def run_demo(
    out: str | os.PathLike[str],
    training: TrainSpec = TRAINING,
    progress: Progress = no_progress,
    training_bar: bool = False,
) -> DemoResult:
    """Run the demo, and leave adapter, picture, report and result in a folder.

    Args:
        out: The folder; must be new or empty.
        training: The loop.
        progress: Shows how far the work before and after the training is.
        training_bar: Whether the training shows a progress bar.

    Raises:
        ConfigError: `out` is not empty.
        DataError: A package of the demo is missing or has changed.
        CheckpointError: The saved adapter does not predict the same in plain PEFT.
    """
    began = time.monotonic()
    folder = Path(out)
    require_empty("--out", folder, "give another folder with --out")
    job = demo_job()
    if training.threads is not None:
        torch.set_num_threads(training.threads)
    folder.mkdir(parents=True, exist_ok=True)
    head, head_only = train_heads(job, training, progress)
    method = make_method("aroma", {**ADAPTER, "component_seed": training.seed})
    fit, parameters = train_adapters(job, method, head, training, folder, training_bar)
    model, held_out = fit.trainer.model.cpu(), job.eval_sets[HELD_OUT]  # on the CPU, as in the fresh process
    with progress("evaluate", len(held_out)) as advance:
        logits = predict_logits(model, held_out, job.tokenizer, training.batch_size, advance)
    method.save(model, folder / "adapter")
    job.describe(model, folder / "adapter")
    result = DemoResult(
        metrics=metrics_of("classification", logits, np.array(held_out["labels"])),
        head_only=head_only,
        train_articles=job.examples["train"],
        held_out_articles=job.examples[HELD_OUT],
        modules=fit.controller.summary(),
        parameters=parameters,
        agreement=check_reload(logits, folder / "adapter", job, training, progress),
        adapter=method.resolved_options(),
        training=training,
        max_length=TASK.max_length,
        steps=fit.trainer.state.global_step,
        outer_steps=fit.controller.outer_number - 1,
        wall_seconds=time.monotonic() - began,
    )
    rank_picture(result.modules, folder / "ranks.png", title="Ranks grown on BBC News")
    record = result.as_record()
    write_text(folder / "report.md", demo_report(result, record))
    write_json(folder / "result.json", record)  # last
    return result


def demo_job() -> ClassifierJob:
    """Return model and data of the demo, checked; the held-out articles are reported on, and used for nothing else.

    Raises:
        DataError: A package of the demo is missing or has changed.
    """
    train, held_out = split_articles(load_articles())
    parts = {"train": as_examples(train), HELD_OUT: as_examples(held_out)}
    return ClassifierJob.make(ModelSpec(str(packaged_encoder())), TASK, parts)


# Without adapters ----------------------------------------------------------------------------------------------------


def train_heads(job: ClassifierJob, training: TrainSpec, progress: Progress) -> tuple[Any, dict[str, float]]:
    """Train linear heads on the frozen model.

    Returns:
        The head on the model's own pooling, and the held-out accuracies of both; see `DemoResult.head_only`.
    """
    encoder = AutoModel.from_pretrained(job.model.name, dtype=torch.float32)
    with progress("head only", sum(job.examples.values())) as advance:
        train, held_out = (
            features_of(encoder, job.tokenizer, encoded, training.batch_size, advance)
            for encoded in (job.train, job.eval_sets[HELD_OUT])
        )
    heads = {name: fit_head(features, job.parts["train"]["labels"]) for name, features in train.items()}
    labels = list(job.parts[HELD_OUT]["labels"])
    return heads["pooled"], {name: float(head.score(held_out[name], labels)) for name, head in heads.items()}


@torch.no_grad()
def features_of(
    encoder: Any, tokenizer: Any, encoded: Dataset, batch_size: int, on_batch: Callable[[int], None]
) -> dict[str, NDArray[Any]]:
    """Return the frozen features of examples, each (examples, hidden): `pooled`, and `mean` over tokens.

    Args:
        encoder: An encoder with a pooler, as `AutoModel` loads it.
        tokenizer: Its tokenizer.
        encoded: Tokenized examples.
        batch_size: Examples of one forward pass.
        on_batch: Called after each batch with its number of examples.
    """
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
    """Return scikit-learn's logistic regression, trained to convergence; its L2 strength is chosen on a fifth.

    Args:
        features: (examples, hidden).
        labels: Classes 0, 1, …, all of which occur.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit

    search = GridSearchCV(
        LogisticRegression(max_iter=2000),
        {"C": STRENGTHS},
        cv=StratifiedShuffleSplit(n_splits=1, test_size=0.2, random_state=0),
    )
    return search.fit(features, list(labels)).best_estimator_


@torch.no_grad()
def copy_head(head: Any, layer: torch.nn.Linear) -> None:
    """Give `layer` the weights of a logistic regression of three classes or more."""
    layer.weight.copy_(torch.from_numpy(head.coef_))
    layer.bias.copy_(torch.from_numpy(head.intercept_))


# With adapters -------------------------------------------------------------------------------------------------------


def train_adapters(
    job: ClassifierJob, method: Method, head: Any, training: TrainSpec, folder: Path, bar: bool
) -> tuple[Fit, dict[str, int]]:
    """Train growing adapters, and `head` with them; the events go to `folder`.

    Returns:
        The training, and the numbers of trainable parameters; see `DemoResult.parameters`.
    """
    set_seed(training.seed)
    classifier = job.load_model()
    copy_head(head, classifier.classifier)
    model = method.build(classifier, training.max_steps or 0)
    parameters = count_parameters(model)
    with tempfile.TemporaryDirectory() as scratch:
        log = EventLog(folder / "events.jsonl", upto=0)
        fit = make_trainer(method, model, job.objective, training, scratch, job.train, on_event=log, progress=bar)
        fit.train()
    return fit, parameters


def count_parameters(model: Any) -> dict[str, int]:
    """Return the numbers of parameters that train at any one time, and those of a LoRA on the same matrices."""
    sizes = [layer.in_features + layer.out_features for layer in aroma_layers(model).values()]
    return {**count_trainable(model), "lora": LORA_RANK * sum(sizes)}


def check_reload(
    logits: NDArray[Any], adapter: Path, job: ClassifierJob, training: TrainSpec, progress: Progress
) -> Agreement:
    """Predict all held-out articles again, in plain PEFT in a process without AROMA, and compare.

    Args:
        logits: Predictions of the trained model, (articles, topics).
        adapter: Folder of the saved adapter.
        job: Model and data.
        training: The loop, for its batch size.
        progress: Shows that it runs.

    Raises:
        CheckpointError: The predictions differ.
    """
    with progress("reload in plain PEFT", 1) as advance:
        reloaded = reloaded_logits(
            str(job.model.name),
            str(adapter),
            list(job.parts[HELD_OUT]["text"]),
            num_labels=logits.shape[1],
            max_length=job.task.max_length,
            batch_size=training.batch_size,
            threads=torch.get_num_threads(),
        )
        advance(1)
    agreement = Agreement.between(logits, reloaded)
    if not agreement.equal:
        raise bad_value(
            "max |Δlogit|",
            agreement.largest_difference,
            f"plain PEFT predicts {agreement.different_predictions} of {agreement.examples} articles otherwise; this "
            "is a defect of AROMA, please report it with the output folder",
            CheckpointError,
        )
    return agreement
