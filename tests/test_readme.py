"""The README: its example is a script that runs, its links lead somewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "examples" / "trainer.py"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_trainer_example_is_the_one_that_runs() -> None:
    script = EXAMPLE.read_text(encoding="utf-8")
    shown = script.split("# README: begin\n")[1].split("# README: end")[0]
    assert blocks("python")[0].strip() == shown.replace("  # noqa: E402", "").strip()


@pytest.mark.parametrize(("place", "file"), [(0, "results/readme/compress.txt"), (1, "examples/trainer.out.txt")])
def test_the_output_shown_is_what_was_printed(place: int, file: str) -> None:
    printed = (ROOT / file).read_text(encoding="utf-8").splitlines()
    assert {*blocks("text")[place].splitlines()} <= {*printed}


def test_the_curve_shown_is_what_was_printed() -> None:
    page = (ROOT / "docs" / "compress.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```text\n(.*?)```", page, flags=re.DOTALL)
    printed = (ROOT / "results" / "readme" / "compress.txt").read_text(encoding="utf-8")
    assert shown in "\n".join(line.rstrip() for line in printed.splitlines()) + "\n"


def test_the_first_command_is_the_one_that_was_run() -> None:
    run = (ROOT / "results" / "readme" / "compress.txt").read_text(encoding="utf-8")
    assert f"$ {blocks('bash')[0]}" in run


def test_the_two_commands_of_a_newcomer_are_there_as_written() -> None:
    assert "python3 -m venv .venv && .venv/bin/pip install -e '.[demo]' && .venv/bin/aroma demo" in README
    assert ".venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest" in README


def test_the_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert len(targets) > 20
    assert all((ROOT / target).exists() for target in targets)


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    end = runpy.run_path(str(EXAMPLE))
    assert end["trainer"].state.log_history[-1]["eval_accuracy"] > 0.87
    found = end["compress"].compression
    assert found.size.effect >= 0.998
    assert found.size.share < 0.5
    assert len({after for _, after in found.ranks.values()}) > 1, "matrices are meant to end with ranks of their own"
    assert (tmp_path / "out/adapter/adapter_model.safetensors").exists()
