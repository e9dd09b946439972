"""DeepSpeed's ZeRO: several processes do what DistributedDataParallel does, and go on exactly where they stopped.

DeepSpeed is looked for by the fixture `deepspeed`, in conftest.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import ranks
from aroma import verify_adapter
from aroma.errors import ConfigError
from aroma.sharding import refuse_sharding
from distributed_runs import CALM, assert_refused, batch_of, stacked
from test_distributed import assert_close, load
from trainer_runs import assert_same, tiny_bert

pytestmark = pytest.mark.timeout(1500)
"""The first test waits for all launches."""

RUNS = str(Path(__file__).parent / "zero_runs.py")

LOOPS = [
    "zero 1",
    "zero 2",
    "zero 3, nothing stays, transposed layers",
    "zero 3, loaded in shards, offloaded",
    "zero 2, base in 16 bits",
    "zero 2, accumulation",
    "zero 3, on after all have finished",
]
STAGES = ["2", "3, nothing stays"]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, deepspeed: dict[str, str]) -> Path:
    """The folder in which the ranks of all launches told what they came to."""
    out = tmp_path_factory.mktemp("zero")
    jobs: list[list[Any]] = [
        [2, RUNS, part, str(out)] for part in ("loops", "checkpoints", "refusals", "replicas", "train")
    ]
    jobs += [[4, RUNS, "loops of four", str(out / "four")]]
    (out / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, ranks.__file__, "zero_runs", str(out / "jobs.json")]
    done = subprocess.run(command, env={**os.environ, **deepspeed}, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return out


# Plain loops ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_a_sharded_model_trains_as_replicas_do(told: Path, name: str) -> None:
    first, second = (load(told / f"loop-{name}-{rank}.pt") for rank in (0, 1))
    replicas = load(told / f"ddp-{name}-0.pt")
    for what in ("weights", "controller", "events", "stopped", "frozen pairs that moved"):
        assert_same(first[what], second[what], what)
    assert first["frozen pairs that moved"] == []
    assert first["events"] == replicas["events"]
    assert first["stopped"] == replicas["stopped"]
    assert_close(first["weights"], replicas["weights"])
    frozen = [event for event in first["events"] if event["kind"] == "frozen"]
    assert len({event["step"] for event in frozen}) > 1 or "on after" in name


@pytest.mark.slow
def test_four_processes_do_what_four_replicas_do(told: Path) -> None:
    """Some of them hold no entry of a small parameter."""
    for name in ("zero 2", "zero 3, nothing stays, transposed layers"):
        ends = [load(told / "four" / f"loop-{name}-{rank}.pt") for rank in range(4)]
        replicas = load(told / "four" / f"ddp-{name}-0.pt")
        for what in ("weights", "controller", "events", "stopped", "frozen pairs that moved"):
            for other in ends[1:]:
                assert_same(other[what], ends[0][what], what)
        assert ends[0]["frozen pairs that moved"] == []
        assert ends[0]["events"] == replicas["events"]
        assert_close(ends[0]["weights"], replicas["weights"])


# Checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [*STAGES, "3, autocast, nothing stays"])
def test_a_resumed_run_ends_as_the_uninterrupted_one(told: Path, name: str) -> None:
    for rank in (0, 1):
        uninterrupted, resumed = (load(told / f"{kind}-{name}-{rank}.pt") for kind in ("uninterrupted", "resumed"))
        assert uninterrupted["events"]
        assert_same(resumed, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_the_saved_adapter_gives_plain_peft_the_logits_of_the_engine(told: Path, name: str) -> None:
    folder = told / f"adapter-{name}"
    verify_adapter(folder)
    model = PeftModel.from_pretrained(tiny_bert(**CALM), folder).eval()
    with torch.no_grad():
        found = model(**stacked(batch_of(0))).logits
    torch.testing.assert_close(found, load(told / f"logits-{name}-0.pt"), rtol=1e-5, atol=1e-6)


# Refusals ------------------------------------------------------------------------------------------------------------

SAYS = {
    "without_zero": ("ConfigError", "set zero_optimization.stage to 1, 2 or 3"),
    "base_optimizer": ("ConfigError", "give engine.optimizer"),
    "reset_to_zero": ("ResetError", "reset='zero': DeepSpeedZeroOptimizer: it counts the steps"),
    "in_16_bits": ("ConfigError", "leave bf16 and fp16 out of the settings of DeepSpeed"),
    "other_tolerances": ("ConfigError", "outer_tolerance"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAYS)
def test_a_clear_error_on_every_rank(told: Path, name: str) -> None:
    assert_refused(told, name, *SAYS[name])


def test_the_trainer_under_deepspeed_without_zero_is_refused() -> None:
    """It shows a model that is not the engine, and the optimizer in a wrapper that steps nothing."""
    plain = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    wrapper = type("DeepSpeedOptimizerWrapper", (), {"optimizer": plain})()
    with pytest.raises(ConfigError, match=r"^optimizer='SGD': .*stage to 1, 2 or 3"):
        refuse_sharding(torch.nn.Linear(2, 2), wrapper)


# The Trainer ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["2", "3"])
def test_the_trainer_does_what_it_does_with_replicas(told: Path, stage: str) -> None:
    ends = [load(told / f"end-{stage}-{rank}.pt") for rank in (0, 1)]
    replicas = load(told / "end-replicas-0.pt")
    assert_same(ends[0], ends[1])
    assert ends[0]["wrapped"] == "DeepSpeedEngine"
    assert ends[0]["events"] == replicas["events"]
    assert ends[0]["stopped"] == replicas["stopped"] < 24
    assert_close(ends[0]["weights"], replicas["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["2", "3"])
def test_the_trainer_resumes_exactly(told: Path, stage: str) -> None:
    for rank in (0, 1):
        end, again = (load(told / f"{kind}-{stage}-{rank}.pt") for kind in ("end", "again"))
        assert again["events"] == [event for event in end["events"] if event["step"] > 8]
        assert_same(again["weights"], end["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["2", "3"])
def test_the_trainer_goes_back_to_the_best_checkpoint(told: Path, stage: str) -> None:
    """Of a moment when modules trained that are frozen at the end; DeepSpeed loads it, and no adapter is."""
    ends = [load(told / f"best-{stage}-{rank}.pt") for rank in (0, 1)]
    replicas = load(told / "best-replicas-0.pt")
    assert_same(ends[0], ends[1])
    assert ends[0]["best"] == replicas["best"] == "checkpoint-8"
    assert any(event["kind"] == "frozen" and event["step"] > 8 for event in ends[0]["events"])
    assert ends[0]["modules"] == replicas["modules"]
    assert_close(ends[0]["weights"], replicas["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["2", "3"])
def test_the_trainer_saves_whole_adapters(told: Path, stage: str) -> None:
    for checkpoint in ("checkpoint-8", "checkpoint-16"):
        folder = told / stage / checkpoint
        verify_adapter(folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        model = PeftModel.from_pretrained(tiny_bert(**CALM), folder).eval()
        replica = PeftModel.from_pretrained(tiny_bert(**CALM), told / "replicas-end" / checkpoint).eval()
        with torch.no_grad():
            found, expected = (m(**stacked(batch_of(0))).logits for m in (model, replica))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
