"""What is published: the two packages, what belongs to them, and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path, PurePosixPath

import pytest
import yaml
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCES = {
    path.relative_to(ROOT / "src").as_posix()
    for path in (ROOT / "src").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = str(tmp_path_factory.mktemp("dist"))
    builders = (("wheel", WheelBuilder), ("sdist", SdistBuilder))
    return {name: Path(next(builder(str(ROOT)).build(directory=out))) for name, builder in builders}


def test_the_wheel_has_both_packages_and_nothing_else(archives: dict[str, Path]) -> None:
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        names = set(wheel.namelist())
    of_packages = {name for name in names if ".dist-info/" not in name}
    assert of_packages == SOURCES
    assert {"aroma/py.typed", "aroma_lab/language/commonsense.yaml"} <= of_packages
    assert {PurePosixPath(name).name for name in names - of_packages} == {
        *("METADATA", "WHEEL", "RECORD", "LICENSE", "entry_points.txt")
    }


def test_the_source_archive_has_what_a_wheel_is_made_of_and_no_data_of_tests(archives: dict[str, Path]) -> None:
    with tarfile.open(archives["sdist"]) as sdist:
        names = {PurePosixPath(*PurePosixPath(name).parts[1:]).as_posix() for name in sdist.getnames()}
    assert {name.removeprefix("src/") for name in names if name.startswith("src/")} == SOURCES
    assert {name for name in names if not name.startswith("src/")} <= {
        *("README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "pyproject.toml"),
        *(".gitignore", "PKG-INFO"),  # hatchling's own
    }
    assert archives["sdist"].stat().st_size < 700_000


def test_the_metadata_say_what_is_required(archives: dict[str, Path]) -> None:
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        path = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
        metadata = message_from_bytes(wheel.read(path))
    required = {Requirement(line) for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert required == {*map(Requirement, PROJECT["dependencies"])}
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"plot", "gguf", "quant", "lab", "language", "demo"} <= set(metadata.get_all("Provides-Extra", []))


def test_on_the_index_page_the_links_of_the_readme_lead_to_the_tag(tmp_path: Path) -> None:
    """The commands of the release workflow, run on a copy."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
    (step,) = [step for step in workflow["jobs"]["build"]["steps"] if "README" in step.get("name", "")]
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    names = {"GITHUB_SERVER_URL": "https://example.org", "GITHUB_REPOSITORY": "a/b", "TAG": "v1"}
    subprocess.run(["bash", "-e", "-c", step["run"]], cwd=tmp_path, env={**os.environ, **names}, check=True)
    targets = re.findall(r"\]\(([^)]+)\)", copy.read_text(encoding="utf-8"))
    assert all(target.startswith("https://") for target in targets)
    assert "https://example.org/a/b/raw/v1/docs/pictures/compression.png" in targets
    assert "https://example.org/a/b/blob/v1/CITATION.cff" in targets
