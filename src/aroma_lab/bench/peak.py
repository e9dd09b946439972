"""Peak resident memory of one case, measured in a process of its own: `python -m aroma_lab.bench.peak`."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

from aroma.errors import ConfigError

from ..run.memory import peak_bytes
from .settings import BenchSettings

_STEPS = 2
"""The second step has the optimizer's state from its beginning."""


def peak_resident_bytes(settings: BenchSettings, key: str) -> int:
    """Return the peak resident memory of a fresh process that trains one case for two steps.

    Args:
        settings: Settings of the benchmark.
        key: Key of the case, not a compiled one.

    Raises:
        ConfigError: The process failed, as it does for want of memory.
    """
    order = json.dumps({"settings": dataclasses.asdict(settings), "key": key})
    done = subprocess.run([sys.executable, "-m", __name__], input=order, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(
            f"{key}: the process that measures its peak memory ended with code {done.returncode} ({reason}); "
            "leave the case out, or leave peaks out with --no-peak"
        )
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    """Train the case ordered on standard input, and print the peak in bytes."""
    import torch

    from .cases import select_cases
    from .contestant import Contestant
    from .shapes import make_batch, make_model

    order = json.load(sys.stdin)
    settings = _settings_from(order["settings"])
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    case = next(case for case in select_cases([order["key"]], compiled=False) if case.key == order["key"])
    model = make_model(settings)
    contestant = Contestant(case, model, make_batch(model, settings), settings.seed)
    for _ in range(_STEPS):
        contestant.step()
    print(peak_bytes())


def _settings_from(values: dict[str, Any]) -> BenchSettings:
    only = values["only"]
    return BenchSettings(**{**values, "only": None if only is None else tuple(only)})


if __name__ == "__main__":
    main()
