"""The result as a table for a terminal, made by pandas."""

from __future__ import annotations

import pandas as pd

from .measure import Result

_COLUMNS = {
    "key": "case",
    "forward_backward.median": "fwd+bwd ms",
    "forward_backward_ratio.median": "× floor",
    "forward_backward_ratio.lower": "lower",
    "forward_backward_ratio.upper": "upper",
    "forward_backward_over_lora.median": "× LoRA r=8",
    "step.median": "step ms",
    "step_over_lora.median": "step × LoRA",
    "kept_bytes": "kept MiB",
    "optimizer_bytes": "optimizer MiB",
    "trainable_parameters": "trainable",
}


def table(result: Result) -> str:
    """Return times in milliseconds, ratios and sizes in MiB, and with what they were measured, as text."""
    cases = pd.json_normalize(result["cases"])
    cases[["forward_backward.median", "step.median"]] *= 1000
    cases[["kept_bytes", "optimizer_bytes"]] /= 2**20
    cases = cases[[name for name in _COLUMNS if name in cases]].rename(columns=_COLUMNS)
    settings, found = result["settings"], result["provenance"]
    size = f"{settings['batch_size']}×{settings['length']}"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    processor = found["device"] if settings["device"] == "cuda" else found["cpu_model"]
    return "\n".join(
        [
            f"{settings['model']}, batch {size}, {settings['dtype']}, rounds in turns: {settings['rounds']}",
            cases.to_string(index=False, float_format="{:.3f}".format, na_rep="–"),
            f"{processor}; {found['threads']} of {found['cpu_count']} threads, OMP_WAIT_POLICY "
            f"{found['wait_policy'] or 'not set'}.",
            f"{versions}; revision {found['git_revision'] or 'unknown'}.",
            "compress: all of `aroma.compress`, by 16 examples, of an adapter of r=16.",
            "The backbone's own dropouts are 0; a dropout in a case's name is the adapter's.",
        ]
    )
