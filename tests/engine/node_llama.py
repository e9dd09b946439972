"""llama.cpp as the npm package node-llama-cpp brings it: its prebuilt program for the CPU, asked for logits."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aroma_lab.language.gguf_source import cache_folder

VERSION = "3.22.1"
_SCRIPT = Path(__file__).with_name("logits.mjs")


def library() -> Path:
    """Return the package's folder, installed by npm on first use into a cache.

    Only the program for this machine's CPU is fetched: the package's optional parts for GPUs weigh 600 MB.
    """
    home = cache_folder() / f"node-llama-cpp-{VERSION}"
    if not home.exists():
        _install(home)
    return home / "node_modules" / "node-llama-cpp"


def _install(home: Path) -> None:
    npm, node = shutil.which("npm"), shutil.which("node")
    assert None not in (npm, node), "the engine's tests need node ≥ 20 and npm: apt-get install nodejs npm"
    system = {"Linux": "linux", "Darwin": "mac"}[platform.system()]
    machine = {"x86_64": "x64", "aarch64": "arm64", "arm64": "arm64-metal"}[platform.machine()]
    packages = [f"node-llama-cpp@{VERSION}", f"@node-llama-cpp/{system}-{machine}@{VERSION}"]
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=f".{home.name}.") as staging:
        (Path(staging) / "package.json").write_text('{"private": true}')
        options = ["--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"]
        done = subprocess.run(
            ["npm", "install", *options, *packages], cwd=staging, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"npm install {' '.join(packages)} failed:\n{done.stderr}"
        shutil.copytree(staging, home)


def logits(
    model: Path, prompts: list[list[int]], vocabulary: int, folder: Path, adapters: Sequence[Path | None]
) -> list[Tensor]:
    """Return llama.cpp's logits after every token of every prompt, (all tokens, vocabulary), under each adapter.

    Args:
        model: GGUF file of the base model.
        prompts: Token ids.
        vocabulary: Number of tokens that the model knows.
        folder: For the files that go to and fro.
        adapters: GGUF files of LoRA adapters; None: the base model alone.
    """
    request, out = folder / "request.json", folder / "logits.bin"
    content = {
        "library": str(library()),
        "model": str(model),
        "adapters": [adapter and str(adapter) for adapter in adapters],
        "prompts": prompts,
        "out": str(out),
    }
    request.write_text(json.dumps(content))
    done = subprocess.run(["node", str(_SCRIPT), str(request)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"the engine failed:\n{done.stdout}\n{done.stderr}"
    answers = np.fromfile(out, "<f4").reshape(len(adapters), -1, vocabulary)
    out.unlink()
    return list(torch.from_numpy(answers))
