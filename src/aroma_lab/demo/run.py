"""The demo: a real encoder learns to sort real news articles, offline, in about two minutes on two cores."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from ..specs import TrainSpec, check_training
from ..tasks.classification import classifier_objective, encode, load_tokenizer, predict_logits
from ..tasks.metrics import metrics_of
from ..tasks.model import count_trainable, load_classifier, packaged_encoder
from ..tasks.task import Task, save_task
from ..training.trainer import Fit, make_trainer
from .articles import TOPICS, as_examples, load_articles, split_articles
from .reload import Agreement, reloaded_logits
from .report import DemoResult, demo_report

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

MAX_LENGTH = 64
"""Tokens of an article that are read: headline and first sentences."""
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


@dataclass(frozen=True)
class Material:
    """Model and data, checked.

    Args:
        base: Folder of the pretrained model.
        tokenizer: Its tokenizer.
        train: Articles to train on.
        held_out: Articles to report on, and for nothing else.
    """

    base: str
    tokenizer: Any
    train: Dataset
    held_out: Dataset


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
    material = load_material()
    if training.threads is not None:
        torch.set_num_threads(training.threads)
    folder.mkdir(parents=True, exist_ok=True)
    head, head_only = train_heads(material, training, progress)
    method = make_method("aroma", {**ADAPTER, "component_seed": training.seed})
    fit, parameters = train_adapters(material, method, head, training, folder, training_bar)
    model = fit.trainer.model.cpu()  # as in the fresh process
    encoded = encode(material.held_out, material.tokenizer, MAX_LENGTH)
    with progress("evaluate", len(encoded)) as advance:
        logits = predict_logits(model, encoded, material.tokenizer, training.batch_size, advance)
    method.save(model, folder / "adapter")
    material.tokenizer.save_pretrained(folder / "adapter")
    save_task(Task("classification", TOPICS, "text", None, "label", MAX_LENGTH), folder / "adapter")
    result = DemoResult(
        metrics=metrics_of("classification", logits, np.array(material.held_out["labels"])),
        head_only=head_only,
        train_articles=len(material.train),
        held_out_articles=len(material.held_out),
        modules=fit.controller.summary(),
        parameters=parameters,
        agreement=check_reload(logits, folder / "adapter", material, training, progress),
        adapter=method.resolved_options(),
        training=training,
        max_length=MAX_LENGTH,
        steps=fit.trainer.state.global_step,
        outer_steps=fit.controller.outer_number - 1,
        wall_seconds=time.monotonic() - began,
    )
    rank_picture(result.modules, folder / "ranks.png", title="Ranks grown on BBC News")
    record = result.as_record()
    write_text(folder / "report.md", demo_report(result, record))
    write_json(folder / "result.json", record)  # last
    return result


def load_material() -> Material:
    """Return model and data of the demo.

    Raises:
        DataError: A package of the demo is missing or has changed.
    """
    base = str(packaged_encoder())
    train, held_out = split_articles(load_articles())
    return Material(base, load_tokenizer(base, MAX_LENGTH), as_examples(train), as_examples(held_out))


# Without adapters ----------------------------------------------------------------------------------------------------


def train_heads(material: Material, training: TrainSpec, progress: Progress) -> tuple[Any, dict[str, float]]:
    """Train linear heads on the frozen model.

    Returns:
        The head on the model's own pooling, and the held-out accuracies of both; see `DemoResult.head_only`.
    """
    encoder = AutoModel.from_pretrained(material.base, dtype=torch.float32)
    with progress("head only", len(material.train) + len(material.held_out)) as advance:
        train, held_out = (
            features_of(encoder, material.tokenizer, examples, training.batch_size, advance)
            for examples in (material.train, material.held_out)
        )
    heads = {name: fit_head(features, material.train["labels"]) for name, features in train.items()}
    labels = list(material.held_out["labels"])
    return heads["pooled"], {name: float(head.score(held_out[name], labels)) for name, head in heads.items()}


@torch.no_grad()
def features_of(
    encoder: Any, tokenizer: Any, examples: Dataset, batch_size: int, on_batch: Callable[[int], None]
) -> dict[str, NDArray[Any]]:
    """Return the frozen features of examples, each (examples, hidden): `pooled`, and `mean` over tokens.

    Args:
        encoder: An encoder with a pooler, as `AutoModel` loads it.
        tokenizer: Its tokenizer.
        examples: The examples.
        batch_size: Examples of one forward pass.
        on_batch: Called after each batch with its number of examples.
    """
    from torch.utils.data import DataLoader

    encoder.eval()
    data: Any = encode(examples, tokenizer, MAX_LENGTH).remove_columns("labels")
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
    material: Material, method: Method, head: Any, training: TrainSpec, folder: Path, bar: bool
) -> tuple[Fit, dict[str, int]]:
    """Train growing adapters, and `head` with them; the events go to `folder`.

    Returns:
        The training, and the numbers of trainable parameters; see `DemoResult.parameters`.
    """
    set_seed(training.seed)
    classifier = load_classifier(material.base, TOPICS, material.tokenizer.pad_token_id)
    copy_head(head, classifier.classifier)
    model = method.build(classifier, training.max_steps or 0)
    parameters = count_parameters(model)
    with tempfile.TemporaryDirectory() as scratch:
        fit = make_trainer(
            method,
            model,
            classifier_objective("classification", material.tokenizer),
            training,
            scratch,
            train=encode(material.train, material.tokenizer, MAX_LENGTH),
            on_event=EventLog(folder / "events.jsonl", upto=0),
            progress=bar,
        )
        fit.train()
    return fit, parameters


def count_parameters(model: Any) -> dict[str, int]:
    """Return the numbers of parameters that train at any one time, and those of a LoRA on the same matrices."""
    sizes = [layer.in_features + layer.out_features for layer in aroma_layers(model).values()]
    return {**count_trainable(model), "lora": LORA_RANK * sum(sizes)}


def check_reload(
    logits: NDArray[Any], adapter: Path, material: Material, training: TrainSpec, progress: Progress
) -> Agreement:
    """Predict all held-out articles again, in plain PEFT in a process without AROMA, and compare.

    Args:
        logits: Predictions of the trained model, (articles, topics).
        adapter: Folder of the saved adapter.
        material: Model and data.
        training: The loop, for its batch size.
        progress: Shows that it runs.

    Raises:
        CheckpointError: The predictions differ.
    """
    with progress("reload in plain PEFT", 1) as advance:
        reloaded = reloaded_logits(
            material.base,
            str(adapter),
            list(material.held_out["text"]),
            num_labels=len(TOPICS),
            max_length=MAX_LENGTH,
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
