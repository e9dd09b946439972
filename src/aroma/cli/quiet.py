"""Keeps other libraries' notices out of a command's output."""

from __future__ import annotations

import logging
import os
import warnings


def quiet() -> None:
    """Silence bars and notices about loading; errors, and the bars of downloads, stay. Called before heavy imports."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")

    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # the hub's own bars too
    enable_progress_bars()
