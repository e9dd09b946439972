"""Programs that train from a configuration: Axolotl with AROMA's plugin, and TRL's options on the command line."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from aroma import verify_adapter
from models import base
from test_sft import SENTENCES, tokenizer

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.slow


def run(*command: str, path: list[str]) -> str:
    """Run a Python program with folders on its path, and return what it printed."""
    found = os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": found, "AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_axolotl_takes_the_configuration_and_its_adapter_grows(tmp_path: Path) -> None:
    folder = os.environ.get("AROMA_AXOLOTL", "")
    assert folder or importlib.util.find_spec("axolotl"), (
        "this test needs Axolotl: pip install --target FOLDER --no-deps axolotl addict posthog backoff distro, as "
        ".ci/run does, and set AROMA_AXOLOTL=FOLDER"
    )
    path = [str(EXAMPLES / "axolotl"), str(ROOT / "tests"), *filter(None, [folder])]
    config = EXAMPLES / "axolotl" / "sft.yaml"
    found = json.loads(
        run(str(ROOT / "tests" / "axolotl_run.py"), str(config), str(tmp_path), path=path).splitlines()[-1]
    )
    assert found["total_rank"] > 0
    assert max(found["difference"].values()) < 1e-4
    assert verify_adapter(tmp_path / "adapter")["config"]["inner_tolerance"] == 0.1


def test_the_page_shows_what_the_example_says() -> None:
    page = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    shown = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)[0])
    example = yaml.safe_load((EXAMPLES / "axolotl" / "sft.yaml").read_text(encoding="utf-8"))
    assert shown.items() <= example.items()


def test_options_of_trl(tmp_path: Path) -> None:
    model = tmp_path / "model"
    base("llama").save_pretrained(model)
    tokenizer().save_pretrained(model)
    (tmp_path / "data").mkdir()
    rows = "\n".join(json.dumps({"text": " ".join(pair)}) for pair in permutations(SENTENCES[:18], 2))
    (tmp_path / "data" / "train.jsonl").write_text(rows)
    options = {
        "model_name_or_path": model,
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
        "max_steps": 60,
        "max_length": 16,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "dtype": "float32",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    printed = run(str(EXAMPLES / "trl_sft.py"), *words, path=[])
    assert "of 14 matrices have finished" in printed
    assert sum(entry["rank"] for entry in verify_adapter(tmp_path / "out")["modules"].values()) > 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").peft_config["default"].peft_type == "LORA"
