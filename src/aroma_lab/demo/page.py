"""What the demo says at its end: lines for the screen, and a page to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aroma.report.run import LORA_RANK, MatrixFacts, Result, RunFacts

from ..run.recorder import Curve, history_of
from ..tasks.articles import SOURCE
from ..tasks.model import ENCODER_SOURCE


def result_table(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return method, accuracy and parameters, beside those of the base, of each line of the result table."""
    head, accuracies = f"{record['head_only_parameters']:,}", record["head_only"]
    what = "head, with pooler" if record["pooler"]["trains"] else "head"
    adapter = f"{record['parameters']['adapter']:,} + {record['parameters']['head']:,} ({what})"
    return [
        ("head only, the model's own pooling", f"{accuracies['pooled']:.2%}", head),
        ("head only, mean pooling", f"{accuracies['mean']:.2%}", head),
        ("AROMA + head", f"{record['metrics']['accuracy']:.2%}", adapter),
    ]


def result_lines(record: Mapping[str, Any]) -> dict[str, str]:
    """Return a line each on the parameters of a LoRA (`lora`), on the `ranks`, and on the `reloaded` adapter."""
    modules, agreement = record["modules"].values(), record["agreement"]
    ranks = [module["rank"] for module in modules]
    same = agreement["examples"] - agreement["different_predictions"]
    lora = f"{record['parameters']['lora']:,}"
    return {
        "lora": f"LoRA r={LORA_RANK} on the same matrices has {lora} adapter parameters.",
        "ranks": f"{len(ranks)} matrices, ranks {min(ranks)} to {max(ranks)}, in all {sum(ranks)}, after "
        f"{record['steps']} optimizer steps; {record['explanation']}",
        "reloaded": f"{same} of {agreement['examples']} predictions equal, max |Δlogit| "
        f"{agreement['largest_difference']:.1e}",
    }


def demo_facts(
    record: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
    curve: Curve,
    updates: Mapping[str, float | None],
) -> RunFacts:
    """Return what the page tells.

    Args:
        record: The content of `result.json`.
        log: The Trainer's `log_history`.
        curve: Parameters and ranks by step.
        updates: ‖ΔW‖_F / ‖W0‖_F of every matrix.
    """
    history = history_of(map(dict, log), ())
    heads = [(f"head only, {name}", record["head_only"][key]) for name, key in _POOLINGS]
    matrices = record["modules"].items()
    return RunFacts(
        title="Topics of BBC News articles",
        about=["AROMA", "model all-MiniLM-L6-v2", f"seed {record['training']['seed']}"],
        results=[
            *(Result(name, {"accuracy": value}, "other") for name, value in heads),
            Result(f"AROMA + head, {record['held_out_articles']} held-out articles", dict(record["metrics"])),
        ],
        metric="accuracy",
        steps=record["steps"],
        planned_steps=record["training"]["max_steps"],
        seconds=record["wall_seconds"],
        loss=history["loss"],
        parameters=curve.parameters[-1][1],
        head_parameters=record["parameters"]["head"],
        lora_parameters=record["parameters"]["lora"],
        matrices=[MatrixFacts(name, one["rank"], one["effective_rank"], updates[name]) for name, one in matrices],
        ranks=curve.ranks,
        explanation=record["explanation"],
        measured=_measured(record),
        settings={"AromaConfig": record["adapter"], "training": record["training"]},
        versions={**record["versions"], "source": record["git_revision"] or "installed package"},
        command="aroma demo --seed {seed} --steps {max_steps}".format_map(record["training"]),
    )


_POOLINGS = (("the model's own pooling", "pooled"), ("mean pooling", "mean"))


def _measured(record: Mapping[str, Any]) -> list[str]:
    lines, pooler = result_lines(record), record["pooler"]
    return [
        f"In a fresh process that cannot import aroma, plain PEFT loads the adapter: {lines['reloaded']}.",
        f"{record['train_articles']:,} articles to train on and {record['held_out_articles']} held out; the split is "
        "fixed, topics in proportion. An article that is in the corpus twice is on one side only.",
        f"The first {record['max_length']} tokens of an article are read.",
        "The held-out articles are evaluated once, all of them, after the last step. Results on them had been seen "
        "when settings were chosen: the accuracy is a demonstration's, not an unbiased estimate.",
        "Head only: a linear head on the frozen model's features of the same tokens, trained to convergence, its L2 "
        "strength chosen on a fifth of the training articles. The model's own pooling is what a classifier in "
        "transformers sees; mean pooling is how this model is meant to be used.",
        "AROMA trains a new head together with the adapters. The encoder's "
        f"pooler {'trains with the head' if pooler['trains'] else 'is frozen'}: {pooler['reason']}.",
        "One seed: a demonstration, not a comparison of methods.",
        f"Model: {ENCODER_SOURCE}.",
        f"Data: {SOURCE}.",
    ]
