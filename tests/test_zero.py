"""DeepSpeed's ZeRO: several processes do what DistributedDataParallel does, and go on exactly where they stopped.

DeepSpeed is looked for by the fixture `deepspeed`, in conftest.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import ranks
from aroma import verify_adapter
from aroma.errors import ConfigError, ResetError
from aroma.integrations.rewarmup import was_skipped
from aroma.reset import check_resettable, forget_moments, reset_state
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
    "zero 2, momentum",
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
    jobs += [[1, OTHERS, "alone", str(out)], [2, OTHERS, "several", str(out)]]
    jobs += [[4, RUNS, "loops of four", str(out / "four")], [1, RUNS, "checkpoints of one", str(out / "one")]]
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
    for what in ("weights", "controller", "events", "stopped"):
        assert_same(first[what], second[what], what)
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


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_frozen_pairs_stay_at_zero(told: Path, name: str) -> None:
    """Though the flat optimizer steps them too, and had moments of them."""
    for rank in (0, 1):
        assert load(told / f"loop-{name}-{rank}.pt")["frozen pairs that moved"] == []


# Several adapters ---------------------------------------------------------------------------------------------------

OTHERS = str(Path(__file__).parent / "zero_others.py")
ORDERS = {"zero 1": "one after another", "zero 2": "in turns", "zero 3": "in turns"}
"""As in zero_others.py, which only DeepSpeed's processes import."""


def assert_did_what_one_does(folder: Path, name: str, alone: dict[str, Any]) -> None:
    """In float32: the events of one process, and its updates up to rounding."""
    first, second = (load(folder / f"{name}-{rank}.pt") for rank in (0, 1))
    assert_same(first, second)
    for key in [None] if "events" in alone else [*alone]:
        found, one = (first, alone) if key is None else (first[key], alone[key])
        assert found["events"] == one["events"]
        most = max(float(update.abs().max()) for update in one["updates"].values())
        assert most > 0
        for matrix, update in one["updates"].items():
            torch.testing.assert_close(found["updates"][matrix], update, rtol=0, atol=1e-4 * most)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "order"), ORDERS.items())
def test_two_adapters_grow_as_in_one_process(told: Path, stage: str, order: str) -> None:
    assert_did_what_one_does(told, f"adapters-{stage}", load(told / f"adapters-{order}-alone.pt"))
    for name in ("default", "other"):
        verify_adapter(told / f"adapters-{stage}-{name}")


OTHERS_SAY = {
    "one_engine_for_both": "optimizer='DeepSpeedZeroOptimizer': it holds the pairs of the adapter 'other', too",
    "one_engine_for_both_under_zero_3": "optimizer='DeepSpeedZeroOptimizer_Stage3': it holds the pairs of the adapter",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS_SAY)
def test_what_cannot_grow_under_zero_is_refused_on_every_rank(told: Path, name: str) -> None:
    assert_refused(told / "others", name, "ConfigError", OTHERS_SAY[name])


# Checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [*STAGES, "3, autocast, nothing stays"])
def test_a_resumed_run_ends_as_the_uninterrupted_one(told: Path, name: str) -> None:
    for rank in (0, 1):
        uninterrupted, resumed = (load(told / f"{kind}-{name}-{rank}.pt") for kind in ("uninterrupted", "resumed"))
        assert uninterrupted["events"]
        assert_same(resumed, uninterrupted)


@pytest.mark.slow
def test_one_process_under_zero_resumes_too(told: Path) -> None:
    for name in ("2", "3"):
        assert_same(*(load(told / "one" / f"{kind}-{name}-0.pt") for kind in ("resumed", "uninterrupted")))


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
    "merged": ("ConfigError", "is quantised or sharded: merging in place"),
    "in_16_bits": ("ConfigError", "leave bf16 and fp16 out of DeepSpeed's configuration"),
    "other_tolerances": ("ConfigError", "outer_tolerance"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAYS)
def test_a_clear_error_on_every_rank(told: Path, name: str) -> None:
    assert_refused(told, name, *SAYS[name])


@pytest.mark.parametrize("option", ["round_robin_gradients", "zenflow", "params_in_nvme_and_cpu", "swap_optimizer"])
def test_options_that_move_flat_copies_are_refused(option: str) -> None:
    known = type("ZeROOptimizer", (), {"optimizer": None})
    with pytest.raises(ConfigError, match=rf"^{option}=True: .*leave it out"):
        refuse_sharding(torch.nn.Linear(2, 2), type("DeepSpeedZeroOptimizer_Stage3", (known,), {option: True})())


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


# One process ---------------------------------------------------------------------------------------------------------


def flat_optimizer(parameter: Any, start: int, count: int, **state: Tensor) -> Any:
    """What ZeRO-2 makes of an optimizer with one parameter, of which this rank has `count` entries from `start` on."""
    flat, base = torch.zeros(20), SimpleNamespace(state={})
    base.state[flat] = state
    parameter._hp_mapping = SimpleNamespace(
        lp_fragment_address=SimpleNamespace(start=start, numel=count),
        hp_fragment_address=SimpleNamespace(start=4),
        param_group_index=0,
    )
    known = type("ZeROOptimizer", (), {"optimizer": base, "single_partition_of_fp32_groups": [flat]})
    return type("DeepSpeedZeroOptimizer", (known,), {})()


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_a_range_of_flat_moments_is_pruned_as_the_whole_would_be(ratio: float) -> None:
    whole, shared = (torch.nn.Parameter(torch.ones(3, 5)) for _ in range(2))
    plain = torch.optim.AdamW([whole])
    plain.state[whole] = {name: torch.ones(3, 5) for name in ("exp_avg", "exp_avg_sq")}
    reset_state(plain, whole, "prune", ratio, torch.Generator().manual_seed(3))
    moments = {name: torch.ones(20) for name in ("exp_avg", "exp_avg_sq")}
    optimizer = flat_optimizer(shared, 6, 8, **moments)
    reset_state(optimizer, shared, "prune", ratio, torch.Generator().manual_seed(3))
    for name, found in moments.items():
        assert torch.equal(found[4:12], plain.state[whole][name].reshape(-1)[6:14])
        assert found[:4].all(), "what is of other parameters stays"
        assert found[12:].all(), "what is of other parameters stays"
    forget_moments(optimizer, shared)
    assert moments["exp_avg"].nonzero().flatten().tolist() == [*range(4), *range(12, 20)]


@pytest.mark.parametrize("kind", ["prune", "none"])
@pytest.mark.parametrize("state", [{"exp_avg_sq_row": torch.ones(5)}])
def test_flat_state_that_cannot_be_reset_is_refused(kind: str, state: dict[str, Tensor]) -> None:
    """With `none` too, as what a frozen component leaves is zeroed all the same."""
    parameter = torch.nn.Parameter(torch.ones(3, 5))
    optimizer = flat_optimizer(parameter, 0, 15, **state)
    with pytest.raises(ResetError, match=r"^optimizer=DeepSpeedZeroOptimizer: .*; use another optimizer, e\.g\."):
        check_resettable(optimizer, parameter, kind)


def test_a_step_that_overflowed_is_known() -> None:
    assert was_skipped(SimpleNamespace(overflow=True))
