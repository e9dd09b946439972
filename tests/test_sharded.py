"""FSDP2: several processes with a share of the model each do what one process does, and save what it saves.

Processes are started as torchrun starts them and talk over gloo; see `test_distributed` for how closely several and
one agree.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import sharded_runs
from aroma import verify_adapter
from distributed_runs import CALM, Loop, assert_refused, batch_of, run_loop, stacked
from ranks import launch
from sharded_runs import LOOPS, MORE_LOOPS, OF_FOUR, REFUSALS, SAVED_AT, STEPS, Training
from test_distributed import assert_close, load
from tiny_lm import save_tiny_lm
from trainer_runs import assert_same, tiny_bert

RUNS = sharded_runs.__file__


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks told of every loop, checkpoint and refusal."""
    out = tmp_path_factory.mktemp("shards")
    launch(2, RUNS, "all", str(out))
    return out


def both(told: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = (load(told / f"loop-{name}-{rank}.pt") for rank in (0, 1))
    return first, second


# Plain loops ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_ranks_decide_alike_and_end_alike(told: Path, name: str) -> None:
    first, second = both(told, name)
    assert_same(first, second)
    assert first["finished"]
    assert first["frozen pairs that moved"] == []
    frozen = {event["step"] for event in first["events"] if event["kind"] == "frozen"}
    assert len(frozen) > 1
    assert first["stopped"] == (max(frozen) if LOOPS[name][0].early_stop else LOOPS[name][0].steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_two_processes_do_what_one_does(told: Path, name: str) -> None:
    assert_does_what_one_does(both(told, name)[0], LOOPS[name][0])


def assert_does_what_one_does(found: dict[str, Any], loop: Loop) -> None:
    alone = run_loop(loop)
    assert found["events"] == alone["events"]
    assert found["stopped"] == alone["stopped"]
    assert found["values"] == pytest.approx(alone["values"], rel=1e-7)
    assert_close(found["weights"], alone["weights"])
    for index, state in alone["optimizer"].items():
        moments = {key: value for key, value in state.items() if torch.is_tensor(value)}
        assert_close(moments, {key: found["optimizer"][index][key] for key in moments})


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "part"), [(2, "more loops"), (4, "loops of four")])
def test_more_loops_and_more_processes(tmp_path: Path, processes: int, part: str) -> None:
    launch(processes, RUNS, part, str(tmp_path))
    for name, (loop, _) in {"loops of four": OF_FOUR, "more loops": MORE_LOOPS}[part].items():
        found = [load(tmp_path / f"loop-{name}-{rank}.pt") for rank in range(processes)]
        for other in found[1:]:
            assert_same(other, found[0])
        assert found[0]["finished"]
        if not loop.unlike:
            assert_does_what_one_does(found[0], loop)


# What is sent --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_collective_a_step_and_few_a_check(told: Path) -> None:
    for name in LOOPS:
        first, _ = both(told, name)
        at_start, later = first["collectives"]  # without those that gather
        assert later == first["checks"] + 1, f"{name}: the first step also asks whether its state can be reset"
        assert at_start <= 4


# Checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_saved_adapter_gives_plain_peft_the_logits_of_the_sharded_model(told: Path) -> None:
    expected = load(told / "logits-0.pt")
    assert_same(load(told / "logits-1.pt"), expected)
    for folder in ("adapter", "by-peft", "from-full"):
        config = json.loads((told / folder / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        model = PeftModel.from_pretrained(tiny_bert(**CALM).double(), told / folder, autocast_adapter_dtype=False)
        with torch.no_grad():
            found = model.eval()(**stacked(batch_of(0))).logits
            without = model.unload().eval()(**stacked(batch_of(0))).logits
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        assert (found - without).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resumed", "resumed-late"])
def test_a_resumed_run_ends_as_the_uninterrupted_one(told: Path, name: str) -> None:
    expected = load(told / "uninterrupted-0.pt")
    assert {event["kind"] for event in expected["events"]} == {"checked", "merged", "frozen"}
    if name == "resumed-late":
        # torch reads no state of pairs that are frozen.
        frozen = expected["optimizer"].keys() - load(told / f"{name}-0.pt")["optimizer"].keys()
        assert frozen
        assert all(".lora_" in parameter for parameter in frozen)
        expected["optimizer"] = {key: expected["optimizer"][key] for key in expected["optimizer"].keys() - frozen}
    for rank in (0, 1):
        assert_same(load(told / f"{name}-{rank}.pt"), expected)
    assert_same(load(told / "uninterrupted-1.pt"), load(told / "uninterrupted-0.pt"))


@pytest.mark.slow
def test_one_process_goes_on_with_the_checkpoint_of_two(told: Path) -> None:
    assert_ends_alike(Training(told / "adapter").go_on(SAVED_AT, STEPS), told)


@pytest.mark.slow
def test_four_processes_go_on_with_the_checkpoint_of_two(told: Path) -> None:
    launch(4, RUNS, "resume", str(told), "of-four")
    for rank in range(4):
        assert_ends_alike(load(told / f"of-four-{rank}.pt"), told)


def assert_ends_alike(found: dict[str, Any], told: Path) -> None:
    expected = load(told / "uninterrupted-0.pt")
    names = [{**event, "value": None} for event in expected["events"]]
    assert [{**event, "value": None} for event in found["events"]] == names
    assert_close(found["weights"], expected["weights"])


# Refusals ------------------------------------------------------------------------------------------------------------

SAYS = {
    "without_root": ("ConfigError", "model='base_model.model.bert.pooler.dense.lora_A.default.weight': it trains"),
    "optimizer_too_early": ("ConfigError", "after get_peft_model and fully_shard"),
    "other_tolerances": ("ConfigError", "outer_tolerance="),
    "sharded_on_one": ("ConfigError", "fully_shard="),
    "broken_component": ("NonFiniteError", "query: the component in training is not finite"),
    "merged": ("ConfigError", "cannot be merged in place; save the adapter"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [refuse.__name__ for refuse in REFUSALS])
def test_a_clear_error_on_every_rank(told: Path, name: str) -> None:
    assert_refused(told, name, *SAYS[name])


# The Trainer ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks trained in the Trainer.

    With accelerate told that its CPU processes are GPUs: by itself it trains CPU processes under DDP.
    """
    out = tmp_path_factory.mktemp("trained")
    launch(2, RUNS, "train", str(out))
    return out


@pytest.mark.slow
def test_the_trainer_under_fsdp2_does_what_one_process_does(trained: Path, tmp_path: Path) -> None:
    alone = sharded_runs.trained(tmp_path, 8)
    ends = [load(trained / f"end-{rank}.pt") for rank in (0, 1)]
    assert_same(ends[0], ends[1])
    assert ends[0]["wrapped"].startswith("FSDP")
    assert ends[0]["events"] == alone["events"]
    assert ends[0]["stopped"] == alone["stopped"] < 24
    assert_close(ends[0]["weights"], alone["weights"])
    for step in (8, 16):
        one, many = (verified_tensors(folder / f"checkpoint-{step}") for folder in (tmp_path, trained))
        assert_close(many, one)


@pytest.mark.slow
def test_the_trainer_under_fsdp2_resumes_exactly(trained: Path) -> None:
    for rank in (0, 1):
        end, again = (load(trained / f"{kind}-{rank}.pt") for kind in ("end", "again"))
        assert again["events"] == [event for event in end["events"] if event["step"] > 8]
        assert_same(again["weights"], end["weights"])


@pytest.mark.slow
def test_the_trainer_under_fsdp2_goes_back_to_the_best_checkpoint(trained: Path, tmp_path: Path) -> None:
    """Of a moment when modules trained that are frozen at the end; torch loads it, and no adapter is."""
    alone = sharded_runs.trained(tmp_path, 8, **sharded_runs.BEST)
    ends = [load(trained / f"best-{rank}.pt") for rank in (0, 1)]
    assert_same(ends[0], ends[1])
    assert ends[0]["best"] == alone["best"] == "checkpoint-8"
    assert any(event["kind"] == "frozen" and event["step"] > 8 for event in ends[0]["events"])
    assert ends[0]["modules"] == alone["modules"]
    assert_close(ends[0]["weights"], alone["weights"])


def verified_tensors(checkpoint: Path) -> dict[str, Any]:
    verify_adapter(checkpoint)
    return load_file(checkpoint / "adapter_model.safetensors")


# The example ---------------------------------------------------------------------------------------------------------

EXAMPLE = str(Path(__file__).parents[1] / "examples" / "fsdp2.py")


@pytest.mark.slow
@pytest.mark.parametrize("ways", [(), ("--ddp",)])
def test_the_example_goes_on_where_it_stopped(tmp_path: Path, ways: tuple[str, ...]) -> None:
    options = ("--batch", "2", "--total-steps", "20", *ways)
    once, twice = str(tmp_path / "once"), str(tmp_path / "twice")
    assert "step 20: loss" in launch(2, EXAMPLE, *options, "--steps", "20", "--out", once)
    launch(2, EXAMPLE, *options, "--steps", "12", "--out", twice)
    launch(2, EXAMPLE, *options, "--steps", "20", "--out", twice, "--resume")
    assert_same(verified_tensors(Path(twice)), verified_tensors(Path(once)))


@pytest.mark.slow
@pytest.mark.parametrize("ways", [(), ("--four-bit",)])
def test_the_example_trains_in_one_process_without_a_launcher(
    tmp_path: Path, ways: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lines of the documentation for one GPU, here on a CPU: a folder with model and tokenizer, a text."""
    model = save_tiny_lm(tmp_path / "llama", "llama")
    (tmp_path / "text.txt").write_text("a model learns this text by heart " * 40)
    options = {"--model": model, "--text": tmp_path / "text.txt", "--out": tmp_path / "adapter", "--steps": 20}
    words = [str(part) for option in options.items() for part in option]
    monkeypatch.setattr(sys, "argv", [EXAMPLE, *words, *ways])
    runpy.run_path(EXAMPLE, run_name="__main__")
    said = capsys.readouterr().out
    (first, _), (last, rank) = re.findall(r"^step \d+: loss ([\d.]+), total rank (\d+)$", said, re.MULTILINE)
    assert float(last) < float(first)
    saved = verified_tensors(tmp_path / "adapter")
    assert 0 < int(rank) <= sum(len(tensor) for name, tensor in saved.items() if "lora_A" in name)
