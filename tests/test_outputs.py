"""Nothing is overwritten unasked, and a place that cannot be written to gives one line, before or after the work."""

from __future__ import annotations

import argparse
import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from aroma.cli import main
from aroma.errors import OutputError, bad_value
from aroma.export import export_merged, export_uniform
from aroma.gguf import export_gguf
from full_disk import room_for
from models import saved_base

ROOT = Path(__file__).parent.parent
LAB = str(ROOT / "examples" / "lab" / "minilm-tiny.yaml")
RECIPE = str(ROOT / "examples" / "recipes" / "own-files.yaml")

FILES: dict[str, tuple[list[str], str]] = {
    "inspect --plot": (["inspect", "a", "--plot", "OUT"], ".png"),
    "export OUT": (["export", "a", "OUT", "--gguf"], ".gguf"),
    "eval --json": (["eval", "a", "--data", "x.csv", "--json", "OUT"], ".json"),
    "eval --predictions": (["eval", "a", "--data", "x.csv", "--predictions", "OUT"], ".jsonl"),
    "report --out": (["report", "r", "--out", "OUT"], ".html"),
    "bench --out": (["bench", "--out", "OUT"], ".json"),
    "lab table --out": (["lab", "table", "r", "--out", "OUT"], ".csv"),
    "lab figure --out": (["lab", "figure", "ranks", "r", "--out", "OUT"], ".png"),
    "lab collect --out": (["lab", "collect", "r", "--out", "OUT"], ".parquet"),
}
"""Every file that a command writes: the command, and the suffix of the file."""

FOLDERS: dict[str, list[str]] = {
    "compress --out": ["compress", "a", "--data", "x.jsonl", "--out", "OUT"],
    "export OUT": ["export", "a", "OUT", "--merged"],
    "demo --out": ["demo", "--out", "OUT"],
    "train output": ["train", RECIPE, "output=OUT"],
    "lab run output": ["lab", "run", LAB, "output=OUT"],
}
"""Every folder that a command fills."""

OPEN_FOLDERS = ("lab run output",)
"""Those that may hold something: what is there is not overwritten, but added to."""


# Places that cannot be written ---------------------------------------------------------------------------------------


def _file(root: Path, suffix: str) -> Path:
    (root / f"there{suffix}").write_text("mine")
    return root / f"there{suffix}"


def _full_folder(root: Path, suffix: str) -> Path:
    (root / f"there{suffix}").mkdir()
    (root / f"there{suffix}" / "mine.txt").write_text("mine")
    return root / f"there{suffix}"


def _under_a_file(root: Path, suffix: str) -> Path:
    return _file(root, ".txt") / "deeper" / f"out{suffix}"


def _no_place(root: Path, suffix: str) -> Path:
    return Path(f"/sys/aroma-test{suffix}")  # where root, too, can make no file; else a folder that is not there in /


def _long(root: Path, suffix: str) -> Path:
    return root / ("x" * 300 + suffix)


PLACES: dict[str, tuple[Callable[[Path, str], Path], str]] = {
    "file": (_file, "exists|is a file"),
    "folder": (_full_folder, "is no file|not an empty folder"),
    "under a file": (_under_a_file, r"there\.txt cannot be written to \(Not a directory\)"),
    "no place": (_no_place, "cannot be written to .*give another place"),
    "long name": (_long, r"cannot be written to \(File name too long\)"),
}


def snapshot(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): os.readlink(path) if path.is_symlink() else path.read_text()
        for path in root.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("what", [*FILES, *(f"{name} (folder)" for name in FOLDERS)])
def test_a_place_that_cannot_be_written(
    what: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = what.removesuffix(" (folder)")
    command, suffix = (FOLDERS[name], "") if what != name else FILES[what]
    if place == "folder" and what != name and name in OPEN_FOLDERS:
        return
    monkeypatch.chdir(tmp_path)
    make, message = PLACES[place]
    out = make(tmp_path, suffix)
    before, entries = snapshot(tmp_path), sorted(os.listdir(tmp_path))
    assert main([part.replace("OUT", str(out)) for part in command]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("error: ")
    assert str(bad_value("", str(out), "")) in said
    assert "Traceback" not in said
    assert re.search(message, said), said
    assert snapshot(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == entries


# Places that can -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain LoRA adapter, which every export takes."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model = AutoModelForCausalLM.from_pretrained(saved_base("llama"))
    config = LoraConfig(r=3, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    wrapped.save_pretrained(folder)
    return folder


EXPORTS: dict[str, Callable[[Path, Path], Any]] = {
    "uniform": export_uniform,
    "merged": export_merged,
    "gguf": lambda adapter, out: export_gguf(adapter, out.with_suffix(".gguf")),
}


def test_force_replaces_a_file(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ranks.svg"
    out.write_text("mine")
    command = ["inspect", str(llama), "--plot", str(out)]
    assert main(command) == 2
    assert "it exists, and nothing is overwritten; give another name, or --force to replace it" in (
        capsys.readouterr().err
    )
    assert out.read_text() == "mine"
    assert main([*command, "--force"]) == 0
    assert out.read_bytes()[:5] == b"<?xml"


# A full disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EXPORTS)
def test_an_export_to_a_full_disk_leaves_nothing(kind: str, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with room_for(1_000), pytest.raises(OutputError) as caught:
        EXPORTS[kind](llama, tmp_path / "out")
    out = tmp_path / ("out.gguf" if kind == "gguf" else "out")
    reason = "No space left on device" if kind == "gguf" else "File too large"
    assert str(caught.value).startswith(f"{out}: cannot be written (")
    assert reason in str(caught.value)
    assert snapshot(tmp_path) == {"mine.txt": "mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# What the operating system says of anything else ---------------------------------------------------------------------


def test_an_error_of_the_operating_system_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(arguments: argparse.Namespace) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "events.jsonl")

    monkeypatch.setattr("aroma_lab.cli.train.run", full)
    assert main(["train", "recipe.yaml"]) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'events.jsonl'\n"
    monkeypatch.setenv("AROMA_DEBUG", "1")
    with pytest.raises(OSError, match="No space left"):
        main(["train", "recipe.yaml"])


def test_a_reader_that_has_gone_ends_a_command_in_silence() -> None:
    import subprocess
    import sys

    program = (
        "import sys, aroma_lab.cli.train as train\nfrom aroma.cli import main\n"
        "train.run = lambda arguments: [print('x' * 1000, flush=True) for _ in range(1000)]\n"
        "sys.exit(main(['train', 'recipe.yaml']))"
    )
    writer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stderr is not None
    writer.stdout.readline()
    writer.stdout.close()
    assert writer.stderr.read() == b""
    assert writer.wait() == 141
