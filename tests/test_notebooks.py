"""The notebooks run from top to bottom, as they are, without a network."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_three_notebooks_are_committed_without_outputs() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["classification", "compress", "instructions"]
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        assert not any(cell.get("outputs") for cell in cells)
        assert next(cell.source for cell in cells if cell.cell_type == "code").startswith("OFFLINE = True  #")
        links = [link for cell in cells for link in re.findall(r"\]\(([^)#:]+)", cell.source)]
        assert links
        assert all((FOLDER / link).exists() for link in links)


def printed_by(name: str, folder: Path) -> str:
    """Run a notebook in a folder, and return what its cells printed and returned."""
    book = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    NotebookClient(book, timeout=500, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    outputs = [output for output in outputs if output.get("name") != "stderr"]  # of warnings, which come late
    assert not [output for output in outputs if output.output_type == "error"]
    # A kernel may send a line in two parts.
    shown = (output.get("text") or f"\n{output.get('data', {}).get('text/plain', '')}\n" for output in outputs)
    return "".join(shown)


@pytest.mark.slow
def test_classification(tmp_path: Path) -> None:
    printed = printed_by("classification", tmp_path)
    accuracy = float(re.findall(r"'eval_accuracy': ([\d.]+)", printed)[-1])
    assert accuracy > 0.8
    assert "of its effect" in printed
    assert "'sports'" in printed.splitlines()[-1]
    assert (tmp_path / "compression.png").stat().st_size > 5000
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_instructions(tmp_path: Path) -> None:
    printed = printed_by("instructions", tmp_path)
    before, after = map(float, re.search(r": ([\d.]+) before, ([\d.]+) after", printed).groups())
    assert after < before / 2
    assert "of its effect" in printed
    assert printed.splitlines()[-2:] == ["Question A: is 5 even or odd?", "It is odd ."]


@pytest.mark.slow
def test_compress(tmp_path: Path) -> None:
    printed = printed_by("compress", tmp_path)
    before, after, large, small = re.search(
        r"accuracy ([\d.]+) before, ([\d.]+) after; ([\d,]+) bytes before, ([\d,]+) after", printed
    ).groups()
    assert float(after) > float(before) - 0.03
    assert float(before) > 0.8
    assert int(small.replace(",", "")) < 0.6 * int(large.replace(",", ""))
    assert (tmp_path / "compression.png").stat().st_size > 5000
    assert "'sports'" in printed.splitlines()[-1]
