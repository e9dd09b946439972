"""Damaged adapters and checkpoints: refused by one line, or equal to the whole ones; see `corruptions`."""

from __future__ import annotations

import json
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from aroma import verify_adapter, verify_checkpoint
from aroma.errors import AromaError, AromaWarning
from aroma.export import export_uniform, load_with_adapter
from aroma.files import tensors_digest
from aroma.ranks import rank_table
from corruptions import KINDS, corrupt
from models import adapted, batch, grow
from test_export import foreign, saved
from trainer_runs import Run, train

ADAPTERS = ("paper", "start", "foreign")


def make(name: str, folder: Path, seed: int) -> None:
    """Write a whole adapter: during training, with tensors of the state; before any step; or of plain PEFT."""
    if name == "paper":
        model = adapted("bert", lora_alpha=3, inner_criterion="update_change", component_seed=seed)
        grow(model, batch("bert", seed), 5, total_steps=20)
        model.save_pretrained(folder)
    elif name == "start":
        saved(folder, "bert", [0], component_seed=seed)
    else:
        foreign(folder, r=4, lora_alpha=seed, rank_pattern={"key": 2}, alpha_pattern={"value": 3})
    (folder / "README.md").unlink()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("whole")
    for name in ADAPTERS:
        make(name, home / name, 5)
        make(name, home / f"{name}-other", 6)
    train(home / "run", Run(steps=6, training={"save_steps": 3}))
    return home


def exported(folder: Path) -> Any:
    out = folder.parent / "out"
    export_uniform(folder, out)
    config = json.loads((out / "adapter_config.json").read_text())
    tensors = tensors_digest(load_file(out / "adapter_model.safetensors"))
    return tensors, config["target_modules"], config.get("task_type")


def merged(folder: Path) -> str:
    return tensors_digest(dict(load_with_adapter(folder).state_dict()))


def outcome_of(operation: Callable[[Path], Any], folder: Path, expected: Any) -> str:
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", AromaWarning)
            if operation(folder) == expected:
                return "equal"
        return "told" if any(issubclass(one.category, AromaWarning) for one in caught) else "silently another"
    except AromaError as error:
        return "refused" if "\n" not in str(error) else "refused in several lines"
    except Exception as error:
        return repr(error)


QUICK = (verify_adapter, rank_table, exported)


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::aroma.errors.AromaWarning")
@pytest.mark.parametrize(
    ("operations", "numbers"),
    [
        (QUICK, range(120)),
        pytest.param(QUICK, range(1000, 3000), marks=pytest.mark.slow),
        pytest.param((merged,), range(200), marks=pytest.mark.slow),
    ],
)
def test_damaged_adapters_are_refused_or_equal(
    whole: Path, tmp_path: Path, operations: tuple[Callable[[Path], Any], ...], numbers: range
) -> None:
    expected: dict[Any, Any] = {}
    counts: Counter[str] = Counter()
    for number in numbers:
        name = ADAPTERS[number // len(KINDS) % len(ADAPTERS)]
        for operation in operations[name == "foreign" and operations is QUICK :]:
            if (name, operation) not in expected:
                expected[name, operation] = operation(whole / name)
                shutil.rmtree(whole / "out", ignore_errors=True)
            home = tmp_path / f"{number}-{operation.__name__}"
            shutil.copytree(whole / name, home / "adapter")
            done = corrupt(number, home / "adapter", whole / f"{name}-other")
            outcome = outcome_of(operation, home / "adapter", expected[name, operation])
            # Without a manifest it is any LoRA adapter, which nothing vouches for.
            is_foreign = not (home / "adapter" / "aroma_state.json").exists()
            is_fine = outcome in ("refused", "equal", "told") or (is_foreign and outcome == "silently another")
            assert is_fine, f"{name}, {done}: {outcome}"
            counts[outcome] += 1
            shutil.rmtree(home)
    assert counts["refused"] > counts["equal"] > len(numbers) / 10


def test_damaged_checkpoints_are_refused_or_equal(whole: Path, tmp_path: Path) -> None:
    last, other, work = (whole / "run" / "checkpoint-6", whole / "run" / "checkpoint-3", tmp_path / "checkpoint-6")
    files = {name: (last / name).read_bytes() for name in verify_checkpoint(last)["files"]}
    counts: Counter[str] = Counter()
    for number in range(300):
        shutil.copytree(last, work)
        done = corrupt(number, work, other)
        try:
            assert verify_checkpoint(work)["files"].keys() == files.keys(), done
            assert {name: (work / name).read_bytes() for name in files} == files, done
            counts["equal"] += 1
        except AromaError:
            counts["refused"] += 1
        shutil.rmtree(work)
    assert counts["refused"] > counts["equal"] > 0
