"""DistributedDataParallel: several processes decide alike, end alike, and end as one process with their global batch.

Processes are started as torchrun starts them (see `ranks`) and talk over gloo. Several processes and one add the same
gradients in another order (a mean of the ranks' means). Decisions agree exactly all the same. Weights agree to 1e-9 in
float64, so nothing but rounding differs; in float32, where Adam divides gradients by their own size, so that entries
with hardly any gradient move as the rounding of 1e-7 wants, to 1e-3 of a tensor's largest weight.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distributed_runs
from aroma import AromaController
from aroma.errors import ConfigError
from aroma.sharding import refuse_sharding
from distributed_runs import LOOPS, UNLIKE_MODULES, ManyRun, adamw, end_of, run_loop
from ranks import launch
from trainer_runs import adapted, assert_same, read_events

pytestmark = pytest.mark.slow

RUNS = distributed_runs.__file__
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Largest difference between weights of one process and several, as a share of the largest weight of the tensor."""


def launch_training(count: int, out: Path, run: ManyRun, *flags: str) -> None:
    launch(count, RUNS, "train", str(out), run.json(), *flags)


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def assert_close(some: dict[str, Any], other: dict[str, Any]) -> None:
    assert some.keys() == other.keys()
    for name, tensor in some.items():
        assert tensor.shape == other[name].shape, name
        if tensor.numel() and tensor.is_floating_point():
            difference = float((tensor - other[name]).abs().max())
            assert difference <= CLOSE[tensor.dtype] * float(tensor.abs().max()), f"{name}: {difference}"


CALM = ManyRun(steps=24, calm=True, method=UNLIKE_MODULES, training={"save_steps": 8})
ACCUMULATED = replace(
    CALM,
    training={
        **CALM.training,
        "ddp_find_unused_parameters": False,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    },
)

# Plain loops ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what two ranks told of every loop and refusal, and of a Trainer."""
    out = tmp_path_factory.mktemp("ranks")
    launch(2, RUNS, "all", str(out), ACCUMULATED.json())
    return out


def both(told: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    number = list(LOOPS).index(name)
    first, second = (load(told / f"loop-{number}-{rank}.pt") for rank in (0, 1))
    return first, second


@cache
def one_process(name: str) -> dict[str, Any]:
    """What this process alone comes to."""
    return run_loop(LOOPS[name])


@pytest.mark.parametrize("name", LOOPS)
def test_ranks_decide_alike_and_end_alike(told: Path, name: str) -> None:
    first, second = both(told, name)
    assert_same(first, second)
    assert first["finished"]
    assert first["frozen pairs that moved"] == []
    assert first["buffers that DDP sends"] == []
    frozen = {event["step"] for event in first["events"] if event["kind"] == "frozen"}
    assert len(frozen) > 1
    assert max(frozen) < LOOPS[name].steps, "all have finished before the end"
    assert first["stopped"] == (max(frozen) if LOOPS[name].early_stop else LOOPS[name].steps)


@pytest.mark.parametrize("name", [name for name, loop in LOOPS.items() if not loop.unlike])
def test_two_processes_do_what_one_does(told: Path, name: str) -> None:
    first, _ = both(told, name)
    alone = one_process(name)
    assert first["events"] == alone["events"]
    assert first["stopped"] == alone["stopped"]
    assert first["values"] == pytest.approx(alone["values"], rel=1e-7)
    assert_close(first["weights"], alone["weights"])


def test_ranks_with_other_seeds_use_that_of_the_first(told: Path) -> None:
    for result in both(told, "other random numbers"):
        assert result["seed"] == 100


def test_one_collective_a_check_and_none_a_step(told: Path) -> None:
    for name in LOOPS:
        first, _ = both(told, name)
        at_start, later = first["collectives"]
        assert later == first["checks"] + 1, f"{name}: the first step also asks whether its state can be reset"
        assert at_start <= 4


# Refusals ------------------------------------------------------------------------------------------------------------

SAYS = {
    "other_tolerances": ("ConfigError", "outer_tolerance="),
    "not_wrapped": ("ConfigError", "the replicas drift apart; wrap the model"),
    "broken_component": ("NonFiniteError", "query: the component in training is not finite"),
    "broken_checkpoint": ("CheckpointError", "aroma_state.json: the file is missing"),
    "missing_adapter": ("ConfigError", "adapter_name='other': "),
}


@pytest.mark.parametrize("name", SAYS)
def test_a_clear_error_on_every_rank(told: Path, name: str) -> None:
    distributed_runs.assert_refused(told, name, *SAYS[name])


def test_an_error_of_one_rank_that_no_one_foresaw_ends_all(told: Path) -> None:
    first, second = (json.loads((told / f"refused-{rank}.json").read_text())["unforeseen"] for rank in (0, 1))
    assert first == ["AromaError", f"rank 1: TypeError: {second[1]}"]
    assert second[0] == "TypeError"


def test_one_rank_finds_the_checkpoint_and_tells_the_other(told: Path) -> None:
    for name, said in (("trainer", str(told / "trainer" / "checkpoint-")), ("nothing", "resume_from_checkpoint=True")):
        (first, read), (second, nothing) = (
            json.loads((told / f"resumed-{name}-{rank}.json").read_text()) for rank in (0, 1)
        )
        assert said in first
        assert said in second
        assert (read, nothing) == (1, 0)


# One process ---------------------------------------------------------------------------------------------------------


def test_zero_gradients_are_at_the_output_and_nowhere_else() -> None:
    """Frozen modules are not in the graph: with all of them frozen, the encoder makes none."""
    model = adapted()
    controller = AromaController(model, adamw(model), total_steps=32)
    for module in controller.modules:
        module.layer.stay_in_graph("default", True)
        controller.matrices.freeze(module)
    seen = []
    layer = model.base_model.bert.encoder.layer[1]
    layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    rows = distributed_runs.stacked(distributed_runs.batch_of(0))
    model.train()
    model(**rows).loss.backward()
    (output,) = seen
    assert not (output[0] if isinstance(output, tuple) else output).requires_grad
    for module in controller.modules:
        for parameter in module.pair:
            assert parameter.grad is not None
            assert not parameter.grad.any()


def test_what_is_sharded_is_refused_in_one_process_too() -> None:
    class FullyShardedDataParallel(nn.Module):
        pass

    with pytest.raises(ConfigError, match=r"^model='FullyShardedDataParallel': .*DistributedDataParallel"):
        refuse_sharding(nn.Sequential(FullyShardedDataParallel()), None)


# The Trainer ---------------------------------------------------------------------------------------------------------


def alone(out: Path, run: ManyRun, processes: int) -> dict[str, Any]:
    """The same run in this process: the same global batches."""
    batch = run.training["per_device_train_batch_size"] * processes
    training = {**run.training, "per_device_train_batch_size": batch}
    training = {name: value for name, value in training.items() if not name.startswith("ddp")}
    return end_of(distributed_runs.train(out, replace(run, training=training)))


def decisions(path: Path) -> list[dict[str, Any]]:
    return [{**event, "value": None} for event in read_events(path)]


def assert_does_what_one_does(many: Path, one: Path, run: ManyRun, processes: int) -> None:
    """The `processes` that did `run` in `many` end as one that does it in `one`."""
    expected = alone(one, run, processes)
    ends = [load(many / f"end-{rank}.pt") for rank in range(processes)]
    for rank, end in enumerate(ends):
        assert end["wrapped"] == "DistributedDataParallel"
        assert end["digest"] == ends[0]["digest"]
        assert_same(end, ends[0])
        assert decisions(many / f"events-{rank}.jsonl") == decisions(one / "events-0.jsonl")
    assert ends[0]["stopped"] == expected["stopped"]
    frozen = {event["step"] for event in decisions(one / "events-0.jsonl") if event["kind"] == "frozen"}
    assert len(frozen) > 1
    assert max(frozen) == expected["stopped"] < run.steps
    assert_close(ends[0]["weights"], expected["weights"])


def test_two_processes_in_the_trainer_do_what_one_does(told: Path, tmp_path: Path) -> None:
    assert_does_what_one_does(told / "trainer", tmp_path, ACCUMULATED, 2)
    written = sorted(path.name for path in (told / "trainer" / "checkpoint-8").iterdir() if "rng" in path.name)
    assert written == ["rng_state_0.pth", "rng_state_1.pth"]


# Sudden death --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on(tmp_path: Path, before: int, after: int) -> None:
    def of(processes: int, steps: int) -> ManyRun:
        training = {"per_device_train_batch_size": 8 // processes, "save_steps": 8}
        return ManyRun(steps=steps, calm=True, training={**training, "lr_scheduler_type": "constant"})

    launch_training(before, tmp_path / "many", of(before, 8))
    # As a longer run: the inner loops last as they did.
    launch_training(after, tmp_path / "many", of(after, 24), "--resume")
    one = alone(tmp_path / "one", of(1, 24), 1)
    end = load(tmp_path / "many" / "end-0.pt")
    assert decisions(tmp_path / "many" / "events-0.jsonl") == decisions(tmp_path / "one" / "events-0.jsonl")
    assert_close(end["weights"], one["weights"])
