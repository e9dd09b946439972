"""The demo: a real encoder learns to sort real news articles, offline, in about two minutes on two cores."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModel, set_seed

from aroma.errors import CheckpointError, bad_value
from aroma.files import write_json, write_text
from aroma.pictures import rank_picture
from aroma.tuner import aroma_layers

from ..methods import Aroma
from ..progress import Phase, silent_phase
from ..run.run_folder import EventLog, require_empty
from ..specs import AdapterSpec, TrainSpec, check_training
from ..tasks.data import Examples
from ..tasks.encode import encode, load_tokenizer
from ..tasks.evaluate import predict_logits
from ..tasks.metrics import classification_metrics
from ..tasks.model import adapter_config, count_trainable, grow, load_classifier
from ..tasks.task import Task, save_trained
from ..training.objective import classifier_objective
from ..training.trainer import Fit, make_trainer
from .baseline import LinearHead, features_of, fit_head
from .bbc import TOPICS, as_examples, load_articles, model_folder, split_articles
from .reload import Agreement, compare_logits, reloaded_logits
from .report import DemoResult, HeadOnly, Parameters, demo_record, demo_report

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_LENGTH = 64
"""Tokens of an article that are read: headline and first sentences."""
LORA_RANK = 8
"""Rank of the LoRA whose parameters are counted beside."""

ADAPTER = AdapterSpec(
    inner_check_interval=5,
    max_inner_steps=60,
    outer_tolerance=0.01,
    rewarmup_steps=5,
)
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
    """Return the demo's loop with the given differences.

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
    train: Examples
    held_out: Examples


def run_demo(
    out: str | os.PathLike[str],
    training: TrainSpec = TRAINING,
    phase: Phase = silent_phase,
    progress: bool = False,
) -> DemoResult:
    """Run the demo, and leave adapter, picture, report and result in a folder.

    Args:
        out: The folder; must be new or empty.
        training: The loop.
        phase: Announces phases.
        progress: Whether the training shows a progress bar.

    Raises:
        ConfigError: `out` is not empty.
        DataError: A package of the demo is missing, or not the one it was made for.
        CheckpointError: The saved adapter does not predict the same in plain PEFT.
    """
    began = time.monotonic()
    folder = Path(out)
    require_empty("--out", folder, "give another folder with --out")
    material = load_material()
    if training.threads is not None:
        torch.set_num_threads(training.threads)
    folder.mkdir(parents=True, exist_ok=True)
    head, head_only = train_head_only(material, training, phase)
    fit, parameters = train_adapters(material, head, training, folder, progress)
    model = fit.trainer.model.cpu()  # where the fresh process will predict, too
    logits = predict(model, material, training, phase)
    task = Task("classification", TOPICS, "text", None, "label", MAX_LENGTH)
    save_trained(model, material.tokenizer, task, folder / "adapter")
    agreement = check_reload(logits, folder / "adapter", material, training, phase)
    result = DemoResult(
        metrics=classification_metrics(logits.argmax(axis=-1), np.array(material.held_out.labels)),
        head_only=head_only,
        train_articles=len(material.train),
        held_out_articles=len(material.held_out),
        modules=fit.controller.summary(),
        parameters=parameters,
        agreement=agreement,
        adapter=ADAPTER,
        training=training,
        max_length=MAX_LENGTH,
        steps=fit.trainer.state.global_step,
        outer_steps=fit.controller.outer_number - 1,
        wall_seconds=time.monotonic() - began,
    )
    leave_result(result, folder)
    return result


def load_material() -> Material:
    """Return model and data of the demo.

    Raises:
        DataError: A package is missing, or not the one that the demo was made for.
    """
    base = str(model_folder())
    train, held_out = split_articles(load_articles())
    return Material(base, load_tokenizer(base, MAX_LENGTH), as_examples(train), as_examples(held_out))


def train_head_only(material: Material, training: TrainSpec, phase: Phase) -> tuple[LinearHead, HeadOnly]:
    """Train linear heads on the frozen model; return the one on its own pooling, and the held-out accuracies."""
    encoder = AutoModel.from_pretrained(material.base, dtype=torch.float32)
    with phase("head only", len(material.train) + len(material.held_out)) as advance:
        train, held_out = (
            features_of(encoder, material.tokenizer, examples, MAX_LENGTH, training.batch_size, advance)
            for examples in (material.train, material.held_out)
        )
    pooled, mean = fit_head(train.pooled, material.train.labels), fit_head(train.mean, material.train.labels)
    labels = material.held_out.labels
    return pooled, HeadOnly(pooled.accuracy(held_out.pooled, labels), mean.accuracy(held_out.mean, labels))


def train_adapters(
    material: Material, head: LinearHead, training: TrainSpec, folder: Path, progress: bool
) -> tuple[Fit, Parameters]:
    """Train growing adapters, and `head` on with them; the events go to `folder`."""
    set_seed(training.seed)
    classifier = load_classifier(material.base, TOPICS, material.tokenizer.pad_token_id)
    head.copy_to(classifier.classifier)
    model = grow(classifier, adapter_config(ADAPTER, training))
    parameters = count_parameters(model)
    with tempfile.TemporaryDirectory() as scratch:
        fit = make_trainer(
            Aroma(),
            model,
            classifier_objective("classification", material.tokenizer),
            training,
            scratch,
            train=encode(material.train, material.tokenizer, MAX_LENGTH),
            on_event=EventLog(folder / "events.jsonl", upto=0),
            progress=progress,
        )
        fit.train()
    return fit, parameters


def count_parameters(model: Any) -> Parameters:
    """Count what trains at any one time, and what would in a LoRA of rank 8 on the same matrices."""
    trainable = count_trainable(model)
    sizes = [layer.in_features + layer.out_features for layer in aroma_layers(model).values()]
    return Parameters(trainable["adapter"], trainable["head"], LORA_RANK * sum(sizes))


def predict(model: Any, material: Material, training: TrainSpec, phase: Phase) -> NDArray[Any]:
    """Return the logits, (articles, topics), of all held-out articles."""
    data = encode(material.held_out, material.tokenizer, MAX_LENGTH)
    with phase("evaluate", len(data)) as advance:
        return predict_logits(model, data, material.tokenizer, training.batch_size, advance)


def check_reload(
    logits: NDArray[Any], adapter: Path, material: Material, training: TrainSpec, phase: Phase
) -> Agreement:
    """Predict all held-out articles anew, in plain PEFT in a process without AROMA, and compare.

    Raises:
        CheckpointError: They are not equal.
    """
    with phase("reload in plain PEFT", 1) as advance:
        reloaded = reloaded_logits(
            material.base,
            str(adapter),
            material.held_out.texts,
            num_labels=len(TOPICS),
            max_length=MAX_LENGTH,
            batch_size=training.batch_size,
            threads=torch.get_num_threads(),
        )
        advance(1)
    agreement = compare_logits(logits, reloaded)
    if not agreement.equal:
        raise bad_value(
            "max |Δlogit|",
            agreement.largest_difference,
            f"plain PEFT predicts {agreement.different_predictions} of {agreement.examples} articles otherwise; this "
            "is a defect of AROMA, please report it with the output folder",
            CheckpointError,
        )
    return agreement


def leave_result(result: DemoResult, folder: Path) -> None:
    """Write picture, report, and, last, the result."""
    rank_picture(result.modules, folder / "ranks.png", title="Ranks grown on BBC News")
    record = demo_record(result)
    write_text(folder / "report.md", demo_report(result, record))
    write_json(folder / "result.json", record)
