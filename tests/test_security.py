"""What must never come out of a file: code."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from aroma.cli import main
from aroma.errors import AromaError
from aroma.export import load_with_adapter
from models import base
from trainer_runs import Run, adapted, tiny_bert, train

ROOT = Path(__file__).parent.parent


def test_no_source_lets_a_file_bring_code() -> None:
    """What ruff's rules S (pyproject.toml) do not know."""
    unsafe = re.compile(
        r"trust_remote_code|allow_pickle|weights_only=(?!True)|(import|from) (pickle|dill|marshal|joblib)"
    )
    sources = [path for folder in ("src", "examples") for path in (ROOT / folder).rglob("*.py")]
    assert not [path for path in sources if unsafe.search(path.read_text(encoding="utf-8"))]


# Payloads ------------------------------------------------------------------------------------------------------------


class Payload:
    """Unpickled without restriction, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


SHORT = Run(training={"max_steps": 4, "save_steps": 2})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(out, SHORT)
    return out


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_payload_in_a_checkpoint_is_not_run(name: str, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert (checkpoint / name).is_file()
    torch.save(Payload(tmp_path / "mark"), checkpoint / name)
    with pytest.raises(Exception, match=r"(?i)weights.?only|sha256|digest|whole|edited"):
        train(tmp_path / "run", SHORT, resume=str(checkpoint))
    assert not (tmp_path / "mark").exists()


def test_a_payload_in_place_of_weights_is_not_run(tmp_path: Path) -> None:
    model = adapted(tiny_bert())
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({**tensors, "payload": Payload(tmp_path / "mark")}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.?only"):
        PeftModel.from_pretrained(base("bert"), tmp_path / "adapter")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir ['MARK']", "!!python/name:os.system"])
def test_a_payload_in_a_recipe_is_not_run(tag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tag.replace('MARK', str(tmp_path / 'mark'))}\n")
    assert main(["train", str(recipe)]) == 2
    assert "not YAML" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()


def test_a_base_model_with_code_of_its_own_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers asks for trust_remote_code, and AROMA does not answer."""
    code = f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\n"
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mine.py").write_text(code)
    config = {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.C", "AutoModelForSequenceClassification": "mine.M"},
    }
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    adapted(tiny_bert()).save_pretrained(tmp_path / "adapter")
    with pytest.raises((AromaError, ValueError), match="trust_remote_code"):
        load_with_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    assert not (tmp_path / "mark").exists()
