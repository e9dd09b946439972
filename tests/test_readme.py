"""The README tells the truth of today: its example is a script that runs, its commands exist."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from aroma import AromaCallback
from aroma.cli import make_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "examples" / "trainer.py"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_trainer_example_is_the_one_that_runs() -> None:
    script = EXAMPLE.read_text(encoding="utf-8")
    shown = script.split("# README: begin\n")[1].split("# README: end")[0]
    assert blocks("python")[0].strip() == shown.replace("  # noqa: E402", "").strip()


def test_the_output_shown_is_what_the_script_printed() -> None:
    printed = (ROOT / "examples" / "trainer.out.txt").read_text(encoding="utf-8")
    assert blocks("text")[0] in printed


def test_the_commands_exist() -> None:
    commands = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    ours = [command[1:] for command in commands if command and command[0] == "aroma"]
    assert {command[0] for command in ours} == {
        *("demo", "train", "eval", "predict", "generate", "inspect", "export", "push", "bench", "estimate", "lab")
    }
    for command in ours:
        make_parser().parse_args(command)


def test_the_two_commands_of_a_newcomer_are_there_as_written() -> None:
    assert "python3 -m venv .venv && .venv/bin/pip install -e '.[demo]' && .venv/bin/aroma demo" in README
    assert ".venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest" in README


def test_the_links_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if not target.startswith("http")]
    assert targets
    assert all((ROOT / target).exists() for target in targets)


@pytest.mark.slow
def test_the_example_runs_and_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    end = runpy.run_path(str(EXAMPLE))
    assert end["trainer"].evaluate()["eval_accuracy"] > 0.85
    callback = next(one for one in end["trainer"].callback_handler.callbacks if isinstance(one, AromaCallback))
    assert callback.controller is not None
    ranks = {module.rank for module in callback.controller.summary()}
    assert len(ranks) > 1, "matrices are meant to end with ranks of their own"
    assert (tmp_path / "out/adapter/adapter_model.safetensors").exists()
