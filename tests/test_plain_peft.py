"""Saved adapters in a process that cannot import aroma: plain PEFT gives equal logits, from any moment of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aroma import attach, save_adapter
from aroma.tuner import live_adapter
from models import ARCHITECTURES, adapted, base, batch, grow, logits, ranks, saved_base, set_ranks, train, trainable

LOADER = '''
"""Load adapters in plain PEFT and write their logits; a folder each, of base model, adapter and inputs."""
import importlib.abc
import json
import sys
import warnings


class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "aroma":
            raise ImportError("aroma does not exist here")


sys.modules["aroma"] = None
sys.meta_path.insert(0, Refuse())
for name in ("aroma", "aroma.tuner", "aroma.tuner.layer"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} could be imported")

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

warnings.simplefilter("error", UserWarning)  # PEFT warns of missing and of unexpected keys
torch.set_num_threads(1)
jobs, out = json.load(open(sys.argv[1])), {}
for name, job in jobs.items():
    base = getattr(transformers, job["class"]).from_pretrained(job["base"])
    model = PeftModel.from_pretrained(base, job["adapter"]).eval()
    with torch.no_grad():
        out[name] = model(**load_file(job["inputs"])).logits
        out[name + ".merged"] = model.merge_and_unload()(**load_file(job["inputs"])).logits
    assert not any(key.split(".")[0] == "aroma" and module is not None for key, module in sys.modules.items())
save_file(out, sys.argv[2])
'''


class Case:
    """An adapter on disk, and what the growing model that was saved answers."""

    def __init__(self, folder: Path, architecture: str, model: Any) -> None:
        self.folder, self.architecture = folder, architecture
        self.inputs = batch(architecture, seed=11)
        self.expected = logits(model, self.inputs)
        self.ranks = ranks(model)
        live_adapter(model).ever_controlled = True  # components set by hand are meant
        model.save_pretrained(folder / "adapter")
        save_file(self.inputs, folder / "inputs.safetensors")

    @property
    def job(self) -> dict[str, str]:
        return {
            "class": ARCHITECTURES[self.architecture].model_class.__name__,
            "base": saved_base(self.architecture),
            "adapter": str(self.folder / "adapter"),
            "inputs": str(self.folder / "inputs.safetensors"),
        }


def make_final() -> tuple[str, Any]:
    """Every module has finished."""
    model = adapted("bert", outer_tolerance=0.052)
    growth, _ = grow(model, batch("bert"), 10)
    assert growth.finished
    return "bert", model


def make_mid_training() -> tuple[str, Any]:
    """Within the third inner loop, with a scale that is no power of two."""
    model = adapted("roberta", lora_alpha=3, r=2, lora_dropout=0.1)
    growth, _ = grow(model, batch("roberta"), 11)
    assert growth.controller.outer_number == 3
    assert growth.controller.inner_step == 3
    return "roberta", model


def make_mixed_ranks_of_conv1d() -> tuple[str, Any]:
    model = adapted("gpt2")
    set_ranks(model, [5, 2, 0, 1], pair=True)
    return "gpt2", model


def make_all_zero_with_a_head() -> tuple[str, Any]:
    """Every rank is 0, and yet the head has learned."""
    model = adapted("bert", outer_tolerance=10.0)
    growth, _ = grow(model, batch("bert"), 8)
    assert growth.finished
    return "bert", model


def make_untrained() -> tuple[str, Any]:
    return "t5", adapted("t5")


def make_picture() -> tuple[str, Any]:
    model = adapted("vit")
    grow(model, batch("vit"), 7)
    return "vit", model


MAKERS = {
    make.__name__.removeprefix("make_"): make
    for make in (
        make_final,
        make_mid_training,
        make_mixed_ranks_of_conv1d,
        make_all_zero_with_a_head,
        make_untrained,
        make_picture,
    )
}

EXPECTED_RANKS: dict[str, set[int]] = {
    "final": {0, 1},
    "mid_training": {6},
    "mixed_ranks_of_conv1d": {1, 2, 3, 6},
    "all_zero_with_a_head": {0},
    "untrained": {0},
    "picture": {2},
}

UNCHANGED = {"untrained"}
"""Cases whose answer is the base model's."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    home = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    made = {}
    for name, make in MAKERS.items():
        (home / name).mkdir()
        made[name] = Case(home / name, *make())
    return made


@pytest.fixture(scope="module")
def answers(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What plain PEFT answers, all cases in one process of their own."""
    home = tmp_path_factory.mktemp("process")
    (home / "loader.py").write_text(LOADER)
    (home / "jobs.json").write_text(json.dumps({name: case.job for name, case in cases.items()}))
    command = [sys.executable, str(home / "loader.py"), str(home / "jobs.json"), str(home / "answers.safetensors")]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(home / "answers.safetensors")


@pytest.mark.parametrize("name", MAKERS)
def test_plain_peft_gives_equal_logits(name: str, cases: dict[str, Case], answers: dict[str, torch.Tensor]) -> None:
    case = cases[name]
    assert set(case.ranks.values()) == EXPECTED_RANKS[name]
    torch.testing.assert_close(answers[name], case.expected, rtol=0, atol=1e-6 * scale_of(case.expected))
    torch.testing.assert_close(answers[f"{name}.merged"], case.expected, rtol=0, atol=1e-5 * scale_of(case.expected))
    pretrained = logits(base(case.architecture), case.inputs)
    if name in UNCHANGED:
        assert torch.equal(answers[name], pretrained)
    else:
        assert (answers[name] - pretrained).abs().max() > 0.05


def scale_of(tensor: torch.Tensor) -> float:
    return max(1.0, float(tensor.abs().max()))


def test_a_trainer_like_checkpoint_at_every_step(tmp_path: Path) -> None:
    """In this process: what `save_adapter` writes after any step is the model as it is then."""
    from peft import PeftModel

    model, inputs = adapted("bert", lora_alpha=3), batch("bert", seed=11)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    attach(model, optimizer, total_steps=20)
    seen = set()
    for step in range(1, 11):
        train(model, batch("bert"), optimizer, 1)
        save_adapter(model, tmp_path)
        loaded = PeftModel.from_pretrained(base("bert"), tmp_path)
        assert type(loaded.base_model).__name__ == "LoraModel"
        torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=0, atol=3e-6)
        seen.add(tuple(sorted(set(ranks(model).values()))))
        assert step != 1 or seen == {(1,)}
    assert len(seen) == 3
