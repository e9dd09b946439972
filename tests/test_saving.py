"""Saved adapters: plain LoRA at any moment, whole or refused, and a plain loop that resumes bit for bit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from aroma import AromaConfig, AromaController, Attachment, aroma_layers, attach, save_adapter
from aroma.checkpoint import verify_adapter
from aroma.errors import CheckpointError
from aroma.state import read_controller_state
from aroma.tuner import live_adapter
from models import METHOD, adapted, base, batch, deltas, grow, logits, ranks, set_ranks, train, trainable
from quick import slow_but
from trainer_runs import assert_same

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
STATE, STATE_TENSORS = "aroma_state.json", "aroma_state.safetensors"


def reloaded(folder: Path, name: str = "bert", **changes: Any) -> Any:
    """The adapter of `folder` in a fresh growing model, whose own start is another."""
    model = adapted(name, **{"component_seed": 77, **changes})
    model.load_adapter(str(folder), "default", is_trainable=True)
    return model.eval()


def trained(tmp_path: Path, steps: int = 10, **changes: Any) -> tuple[Any, Attachment, Path]:
    """A model within an inner loop, and the folder of its adapter."""
    model = adapted("bert", **changes)
    growth, _ = grow(model, batch("bert"), steps, total_steps=20)
    model.save_pretrained(tmp_path / "adapter")
    return model, growth, tmp_path / "adapter"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# There and back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [False, True], ids=["after an outer step", "during an inner loop"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_a_loaded_adapter_is_the_saved_one(tmp_path: Path, name: str, pair: bool) -> None:
    model = adapted(name, r=2, lora_alpha=3)
    expected_ranks = set_ranks(model, [0, 2, 6, 12], pair=pair)
    save_silently(model, tmp_path)
    loaded = reloaded(tmp_path, name, r=2, lora_alpha=3)
    assert ranks(loaded) == expected_ranks
    assert set(expected_ranks.values()) == ({2, 4, 8, 14} if pair else {0, 2, 6, 12})
    changes = deltas(loaded)
    for module, change in deltas(model).items():
        torch.testing.assert_close(changes[module], change, rtol=1e-6, atol=1e-7)
        assert change.any() or not expected_ranks[module]
    inputs = batch(name)
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(loaded, inputs), logits(base(name), inputs), atol=0.1)


def save_silently(model: Any, folder: Path) -> None:
    """Save components that no controller has made."""
    live_adapter(model).ever_controlled = True
    model.save_pretrained(folder)


def test_loading_forgets_what_was_there(tmp_path: Path) -> None:
    model, _, folder = trained(tmp_path)
    other = adapted("bert")
    set_ranks(other, [9], pair=True, seed=1)
    for layer in aroma_layers(other).values():
        layer.freeze("default")
    other.load_adapter(str(folder), "default", is_trainable=True)
    assert ranks(other) == ranks(model)
    assert torch.equal(logits(other, batch("bert")), logits(reloaded(folder), batch("bert")))
    assert not any(layer.is_frozen("default") for layer in aroma_layers(other).values())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_saved_adapter_can_be_opened_to_grow_on(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    model, _, folder = trained(tmp_path)
    config = AromaConfig(**METHOD, task_type="SEQ_CLS")
    opened = PeftModel.from_pretrained(
        base("bert"), str(folder), config=config, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert not any(tensor.is_meta for tensor in opened.state_dict().values())
    torch.testing.assert_close(logits(opened, batch("bert")), logits(model, batch("bert")), rtol=1e-5, atol=1e-6)
    before = ranks(opened)
    assert before == ranks(model)
    start = [layer.pair("default")[1].detach() for layer in aroma_layers(adapted("bert")).values()]
    assert all(map(torch.equal, [layer.pair("default")[1] for layer in aroma_layers(opened).values()], start))
    grow(opened, batch("bert"), 5, total_steps=20)
    assert all(rank > before[name] for name, rank in ranks(opened).items())


# The plain form ------------------------------------------------------------------------------------------------------


def test_the_configuration_on_disk_is_plain_lora(tmp_path: Path) -> None:
    model = adapted("bert", r=2, lora_alpha=3, lora_dropout=0.25)
    expected = {name: rank for name, rank in set_ranks(model, [0, 2, 6], pair=False).items() if rank}
    save_silently(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 2, "the smallest rank above 0"
    assert sorted(config["target_modules"]) == sorted(expected)
    others = {"^" + re.escape(name): rank for name, rank in expected.items() if rank != 2}
    assert config["rank_pattern"] == config["alpha_pattern"] == others
    assert len(others) == 4
    assert config["use_rslora"] is False
    assert config["inference_mode"] is True
    assert config["lora_dropout"] == 0.25
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["classifier", "score"]
    assert "inner_tolerance" not in config
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / WEIGHTS).items() if "lora_" in name}
    layers = aroma_layers(model)
    assert shapes == {
        f"base_model.model.{name}.lora_{factor}.weight": shape
        for name, rank in expected.items()
        for factor, shape in (("A", (rank, layers[name].in_features)), ("B", (layers[name].out_features, rank)))
    }


# Atomic --------------------------------------------------------------------------------------------------------------


def test_the_configuration_is_plain_as_long_as_the_plain_tensors_are_held(tmp_path: Path) -> None:
    model = adapted("bert")
    config = model.peft_config["default"]

    def kind_on_disk() -> str:
        config.save_pretrained(tmp_path)
        return str(json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"])

    tensors = get_peft_model_state_dict(model)
    assert [kind_on_disk(), kind_on_disk()] == ["LORA", "LORA"]
    get_peft_model_state_dict(model)  # as a rank that writes nothing: those that go do not take these along, or stay
    newer = get_peft_model_state_dict(model)
    del tensors
    assert kind_on_disk() == "LORA"
    del newer
    assert config.collected is None
    assert kind_on_disk() == "AROMA"


class SimulatedCrash(Exception):
    """Stands for the death of the process."""


def crash(*_: Any, **__: Any) -> None:
    raise SimulatedCrash


def test_a_save_that_dies_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every operation on a file: `test_kills`."""
    model, growth, folder = trained(tmp_path, lora_alpha=3)
    before = contents(folder)
    train(model, batch("bert"), growth.controller.optimizer, 1)
    for where in ("aroma.files.os.fsync", "aroma.files.write_tensors", "aroma.checkpoint.verify_adapter"):
        with monkeypatch.context() as patch:
            patch.setattr(where, crash)
            with pytest.raises(SimulatedCrash):
                save_adapter(model, folder)
        assert contents(folder) == before
    save_adapter(model, folder)
    assert verify_adapter(folder)["controller"]["global_step"] == 11
    changed = {name for name, data in contents(folder).items() if data != before[name]}
    assert {WEIGHTS, STATE, STATE_TENSORS} <= changed


# Broken files --------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def newer_format(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of which every file exists."""
    return trained(tmp_path_factory.mktemp("whole"), lora_alpha=3)[2]


@pytest.mark.parametrize(
    ("file", "harm", "reason"),
    [
        (WEIGHTS, truncate, "truncated, edited"),
        (WEIGHTS, flip_a_bit, "truncated, edited"),
        (WEIGHTS, Path.unlink, "missing"),
        (STATE, truncate, "truncated or edited"),
        (STATE, newer_format, "upgrade aroma-peft"),
        (STATE, Path.unlink, "missing"),
        (STATE_TENSORS, flip_a_bit, "truncated, edited"),
        (STATE_TENSORS, Path.unlink, "missing"),
        (CONFIG, truncate, "truncated or edited"),
    ],
)
def test_a_broken_adapter_is_refused_by_name_and_not_resumed_from(
    whole: Path, tmp_path: Path, file: str, harm: Callable[[Path], None], reason: str
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "adapter"))
    model = reloaded(folder, component_seed=5, lora_alpha=3)
    harm(folder / file)
    with pytest.raises(CheckpointError) as caught:
        verify_adapter(folder)
    message = str(caught.value)
    assert str(folder / file) in message
    assert reason in message
    assert any(remedy in message for remedy in ("use another checkpoint", "upgrade"))
    if file != CONFIG:
        with pytest.raises(CheckpointError, match=r"aroma_state|adapter_model"):
            attach(model, torch.optim.AdamW(trainable(model)), total_steps=10, resume_from=str(folder))


# Resuming a plain loop -----------------------------------------------------------------------------------------------


def assert_resumes_to(model: Any, controller: AromaController, folder: Path, **method: Any) -> Attachment:
    """The adapter of `folder`, resumed, is `model` with `controller` bit for bit."""
    loaded = reloaded(folder, component_seed=5, **method)
    optimizer = torch.optim.AdamW(trainable(loaded), lr=1e-2)
    growth = attach(loaded, optimizer, total_steps=controller.total_steps, resume_from=str(folder))
    assert_same_adapter(loaded, model)
    found, expected = growth.controller.state_dict(), controller.state_dict()
    assert found["state"] == expected["state"]
    assert_same(found["tensors"], expected["tensors"])
    assert growth.controller.summary() == controller.summary()
    assert growth.controller.lr_factor == controller.lr_factor
    return growth


def assert_same_adapter(one: nn.Module, other: nn.Module) -> None:
    assert_same(dict(one.state_dict()), dict(other.state_dict()))
    for layer, twin in zip(aroma_layers(one).values(), aroma_layers(other).values(), strict=True):
        assert layer.is_frozen("default") == twin.is_frozen("default")
        assert layer.finished("default").storage_A.shape == twin.finished("default").storage_A.shape
        assert [p.requires_grad for p in layer.pair("default")] == [p.requires_grad for p in twin.pair("default")]


METHODS: dict[str, dict[str, Any]] = {
    "scale 4": {},
    "scale 3": {"lora_alpha": 3},
    "rank 2, scale 5/2": {"r": 2, "lora_alpha": 5},
    "update_change": {"inner_criterion": "update_change", "lora_alpha": 3},
    "modules freeze": {"outer_tolerance": 0.052},
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("steps", slow_but([3, 4], [1, 3, 4, 5, 10]))
def test_the_state_is_restored_bit_for_bit(tmp_path: Path, method: dict[str, Any], steps: int) -> None:
    model, growth, folder = trained(tmp_path, steps, **method)
    if "outer_tolerance" in method:
        assert (0 < growth.controller.active_modules < 13) == (steps in (4, 5))
        assert growth.finished == (steps == 10)
    verify_adapter(folder)
    assert_resumes_to(model, growth.controller, folder, **method)


@pytest.mark.parametrize("stop", slow_but([7], [1, 4, 7, 10]))
def test_a_resumed_loop_is_the_uninterrupted_one(tmp_path: Path, stop: int) -> None:
    method = {"lora_alpha": 3, "outer_tolerance": 0.02, "inner_criterion": "update_change"}
    total = 16

    def loop(model: Any, first: int, last: int, folder: Path | None = None) -> tuple[Any, ...]:
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
        events: list[Any] = []
        if folder is not None:
            saved = torch.load(folder / "loop.pt", weights_only=True)
            optimizer.load_state_dict(saved["optimizer"])
            scheduler.load_state_dict(saved["scheduler"])
            torch.set_rng_state(saved["random"])
        resume_from = str(folder) if folder else None
        growth = attach(
            model, optimizer, scheduler, total_steps=total, resume_from=resume_from, on_event=events.append
        )
        losses, rates = [], []
        for step in range(first, last):
            losses += train(model, batch("bert", seed=step), optimizer, 1)
            rates += scheduler.get_last_lr()
            scheduler.step()
        return growth, optimizer, scheduler, events, losses, rates

    torch.manual_seed(3)
    model = adapted("bert", **method)
    growth, optimizer, _, events, losses, rates = loop(model, 0, total)
    assert growth.controller.total_rank > 0
    assert {event.kind for event in events} >= {"checked", "merged", "frozen"}

    torch.manual_seed(3)
    broken_off = adapted("bert", **method)
    kept = loop(broken_off, 0, stop)
    save_adapter(broken_off, tmp_path)
    saved = {"optimizer": kept[1].state_dict(), "scheduler": kept[2].state_dict(), "random": torch.get_rng_state()}
    torch.save(saved, tmp_path / "loop.pt")
    torch.manual_seed(55)
    resumed = reloaded(tmp_path, component_seed=None, **method)
    rest = loop(resumed, stop, total, tmp_path)
    assert kept[4] + rest[4] == losses
    assert kept[5] + rest[5] == rates
    assert kept[3] + rest[3] == events
    assert_same_adapter(resumed, model)
    assert rest[0].controller.summary() == growth.controller.summary()
    assert_same(rest[1].state_dict()["state"], optimizer.state_dict()["state"])


def resume(folder: Path, model: Any) -> Attachment:
    return attach(model, torch.optim.AdamW(trainable(model)), total_steps=10, resume_from=str(folder))


def test_a_resume_of_another_adapter_is_refused(whole: Path) -> None:
    model = reloaded(whole, component_seed=5, lora_alpha=3)
    with torch.no_grad():
        aroma_layers(model)["bert.pooler.dense"].finished("default").B[0, 0] += 1e-4
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: .*edited.*another checkpoint"):
        resume(whole, model)


def test_a_resume_from_an_adapter_without_a_run_is_refused(tmp_path: Path) -> None:
    adapted("bert").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="saved without a controller"):
        resume(tmp_path, reloaded(tmp_path, component_seed=5))


def test_loading_under_a_running_controller_is_noticed(tmp_path: Path) -> None:
    model, growth, folder = trained(tmp_path)
    model.load_adapter(str(folder), "default", is_trainable=True)
    with pytest.raises(CheckpointError, match=r"load_adapter.*new controller.*load_state_dict"):
        growth.controller.step()
    growth.controller.load_state_dict(read_controller_state(folder))
    growth.controller.step()
    assert growth.controller.global_step == 11
