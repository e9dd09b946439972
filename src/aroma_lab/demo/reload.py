"""The proof that an adapter needs no AROMA: its predictions from a fresh process that cannot import it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aroma.errors import CheckpointError
from aroma.files import read_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

PROGRAM = Path(__file__).with_name("plain_reload.py")
TOLERANCE = 1e-4
"""Largest difference of two logits that count as equal: float32 sums in another order differ by less."""


@dataclass(frozen=True)
class Agreement:
    """How two sets of logits for the same examples compare.

    Args:
        examples: Number of examples.
        largest_difference: max |Δlogit|.
        different_predictions: Examples whose predicted class differs.
    """

    examples: int
    largest_difference: float
    different_predictions: int

    @property
    def equal(self) -> bool:
        """Whether all predictions are the same and no logit differs by more than `TOLERANCE`."""
        return self.different_predictions == 0 and self.largest_difference <= TOLERANCE

    @classmethod
    def between(cls, one: NDArray[Any], other: NDArray[Any]) -> Agreement:
        """Compare two sets of logits, each of shape (examples, labels)."""
        return cls(
            examples=len(one),
            largest_difference=float(abs(one - other).max()),
            different_predictions=int((one.argmax(axis=-1) != other.argmax(axis=-1)).sum()),
        )


def reloaded_logits(
    base_model: str, adapter: str, texts: list[str], num_labels: int, max_length: int, batch_size: int, threads: int
) -> NDArray[Any]:
    """Return the logits, shape (texts, num_labels), of base model and adapter in plain PEFT, in a fresh process.

    Raises:
        CheckpointError: The process failed; the error has its last line.
    """
    job = {
        "base_model": base_model,
        "adapter": adapter,
        "texts": texts,
        "num_labels": num_labels,
        "max_length": max_length,
        "batch_size": batch_size,
        "threads": threads,
    }
    with tempfile.TemporaryDirectory() as folder:
        job_file, out_file = Path(folder) / "job.json", Path(folder) / "logits.safetensors"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        # -P keeps this folder, with its general module names, off the program's path.
        command = [sys.executable, "-P", str(PROGRAM), str(job_file), str(out_file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip() or "no error text").splitlines()[-1]
            raise CheckpointError(f"adapter={adapter!r}: plain PEFT cannot load it ({reason})")
        return read_tensors(out_file)["logits"].numpy()
