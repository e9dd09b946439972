"""The result as tables for a terminal, made by pandas."""

from __future__ import annotations

import pandas as pd

from .measure import Result


def tables(result: Result) -> str:
    """Return the table of times, ratios and sizes, that of AROMA over LoRA r=8, and notes, as text.

    Times in milliseconds, sizes in MiB, ratios to forward and backward of the floor.
    """
    cases, others = pd.json_normalize(result["cases"]), pd.json_normalize(result["comparisons"])
    columns = {
        "key": "case",
        "forward_backward.median": "fwd+bwd ms",
        "forward_backward_ratio.median": "× floor",
        "forward_backward_ratio.lower": "lower",
        "forward_backward_ratio.upper": "upper",
        "step.median": "step ms",
        "step_ratio.median": "step × floor",
        "kept_bytes": "kept MiB",
        "optimizer_bytes": "optimizer MiB",
        "trainable_parameters": "trainable",
    }
    cases[["forward_backward.median", "step.median"]] *= 1000
    cases[["kept_bytes", "optimizer_bytes"]] /= 2**20
    settings = result["settings"]
    size = f"{settings['batch_size']}×{settings['length']}"
    lines = [
        f"{settings['model']}, batch {size}, {settings['dtype']}, rounds in turns: {settings['rounds']}",
        _text(cases[[*columns]].rename(columns=columns)),
    ]
    if len(others):
        ratios = {name: name.replace("_ratio", "").replace(".median", "") for name in others.columns}
        lines += ["AROMA over LoRA r=8", _text(others.rename(columns=ratios))]
    return "\n".join([*lines, *notes(result)])


def notes(result: Result) -> list[str]:
    """Return in sentences with what it was measured."""
    found = result["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    processor = found["device"] if result["settings"]["device"] == "cuda" else found["cpu_model"]
    return [
        f"{processor}; {found['threads']} of {found['cpu_count']} threads, OMP_WAIT_POLICY "
        f"{found['wait_policy'] or 'not set'}.",
        f"{versions}; revision {found['git_revision'] or 'unknown'}.",
        "The backbone's own dropouts are 0; a dropout in a case's name is the adapter's.",
    ]


def _text(frame: pd.DataFrame) -> str:
    text: str = frame.to_string(index=False, float_format="{:.3f}".format)
    return text
