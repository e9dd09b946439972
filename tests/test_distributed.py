"""DistributedDataParallel: several processes decide alike, end alike, and end as one process with their global batch.

Processes are started as torchrun starts them (see `ranks`) and talk over gloo. Several processes and one add the same
gradients in another order (a mean of the ranks' means). Decisions agree exactly all the same. Weights agree to 1e-9 in
float64, so nothing but rounding differs; in float32, where Adam divides gradients by their own size, so that entries
with hardly any gradient move as the rounding of 1e-7 wants, to 1e-3 of a tensor's largest weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distributed_runs
from aroma import AromaController, aroma_layers, last_complete_checkpoint
from aroma.errors import ConfigError
from aroma.sharding import agree, is_distributed, refuse_sharding, world_size
from aroma.tuner.graph import GraphKeeper
from distributed_runs import LOOPS, REFUSALS, UNLIKE_MODULES, Loop, ManyRun, adamw, end_of, run_loop
from ranks import launch, torchrun
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
    assert first["events"] == second["events"]
    assert first["digest"] == second["digest"]
    assert_same(first, second)
    assert first["finished"]


@pytest.mark.parametrize("name", LOOPS)
def test_frozen_pairs_stay_at_zero(told: Path, name: str) -> None:
    first, _ = both(told, name)
    assert first["frozen pairs that moved"] == []


def test_modules_finish_at_different_times(told: Path) -> None:
    for name, loop in LOOPS.items():
        first, _ = both(told, name)
        frozen = {event["step"] for event in first["events"] if event["kind"] == "frozen"}
        assert len(frozen) > 1, name
        assert max(frozen) < loop.steps, "all have finished before the end"
        assert first["stopped"] == (max(frozen) if loop.early_stop else loop.steps)


@pytest.mark.parametrize("name", [name for name, loop in LOOPS.items() if not (loop.unlike or loop.uneven)])
def test_two_processes_do_what_one_does(told: Path, name: str) -> None:
    first, _ = both(told, name)
    alone = one_process(name)
    assert first["events"] == alone["events"]
    assert first["stopped"] == alone["stopped"]
    assert first["values"] == pytest.approx(alone["values"], rel=1e-7)
    assert_close(first["weights"], alone["weights"])


def test_the_optimizer_leaves_frozen_pairs_alone_as_in_one_process(told: Path) -> None:
    for name in ("all parameters used", "adafactor", "static graph, momentum"):
        first, _ = both(told, name)
        alone = one_process(name)
        steps = [
            {index: float(state.get("step", 0)) for index, state in result["optimizer"].items()}
            for result in (first, alone)
        ]
        assert steps[0] == steps[1]


def test_the_comparison_with_one_process_can_fail(told: Path) -> None:
    first, _ = both(told, "all parameters used")
    alone = run_loop(replace(Loop(), method={"component_seed": 6}))
    with pytest.raises(AssertionError):
        assert_close(first["weights"], alone["weights"])


def test_ranks_with_other_seeds_use_that_of_the_first(told: Path) -> None:
    for result in both(told, "other random numbers"):
        assert result["seed"] == 100


def test_one_collective_a_check_and_none_a_step(told: Path) -> None:
    for name in LOOPS:
        first, _ = both(told, name)
        at_start, later = first["collectives"]
        assert later == 1 + first["checks"], name  # one for the optimizer's state at the first step
        assert at_start <= 4


def test_ddp_does_not_send_the_finished_components(told: Path) -> None:
    for name in LOOPS:
        first, _ = both(told, name)
        assert first["buffers that DDP sends"] == []


# Refusals ------------------------------------------------------------------------------------------------------------

SAYS = {
    "made_too_early": ("ConfigError", "world_size=2: "),
    "other_weights": ("ConfigError", "model='base_model.model.bert.embeddings.word_embeddings.weight': it differs"),
    "other_drawn_seeds": ("ConfigError", "lora_A.default.weight': it differs"),
    "other_tolerances": ("ConfigError", "outer_tolerance="),
    "other_components": ("ConfigError", "finished B': it differs"),
    "not_wrapped": ("ConfigError", "the replicas drift apart; wrap the model"),
    "broken_component": ("NonFiniteError", "query: the component in training is not finite"),
    "broken_head": ("NonFiniteError", "classifier.modules_to_save.default.bias: not finite"),
    "broken_checkpoint": ("CheckpointError", "aroma_state.json: the file is missing"),
    "joined": ("ConfigError", "join=True: "),
}


@pytest.mark.parametrize("name", ["made_too_early", *(refuse.__name__ for refuse in REFUSALS)])
def test_a_clear_error_on_every_rank(told: Path, name: str) -> None:
    distributed_runs.assert_refused(told, name, *SAYS[name])


# One process ---------------------------------------------------------------------------------------------------------


def test_one_process_agrees_with_itself() -> None:
    assert (world_size(), is_distributed()) == (1, False)
    norms, values = agree(["m"], [float("nan")], [None, 2.0], torch.device("cpu"))
    assert norms[0] != norms[0]
    assert values == [None, 2.0]


def test_a_frozen_module_of_one_process_asks_for_no_gradient() -> None:
    model = adapted()
    controller = AromaController(model, adamw(model), total_steps=32)
    controller.matrices.freeze(controller.modules[0])
    assert not any(parameter.requires_grad for parameter in controller.modules[0].pair)


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


def test_zero_gradients_reach_every_tensor_that_a_model_returns() -> None:
    model = adapted()
    keeper = GraphKeeper()
    keeper.layers = [*aroma_layers(model).values()]
    for layer in keeper.layers:
        layer.stay_in_graph("default", True)
        layer.freeze("default")
    tensors = [torch.ones(2, requires_grad=True) * 2 for _ in range(4)]
    output = {"loss": tensors[0], "states": (tensors[1], [tensors[2], None]), "count": torch.ones(1, dtype=torch.long)}
    model.train()
    changed = keeper(model, (), {**output, "more": {"deep": tensors[3]}})
    for tensor in (changed["loss"], changed["states"][0], changed["states"][1][0], changed["more"]["deep"]):
        model.zero_grad()
        tensor.mul_(1).sum().backward()  # in place, as some losses do with logits
        assert all(parameter.grad is not None for parameter in keeper.layers[0].pair("default"))
    assert changed["states"][1][1] is None
    assert changed["count"] is output["count"]


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


def test_four_processes_in_the_trainer_do_what_one_does(tmp_path: Path) -> None:
    # The two processes above do not look for unused parameters.
    training = {"per_device_train_batch_size": 2, "ddp_find_unused_parameters": True}
    run = replace(CALM, training=training)
    launch_training(4, tmp_path / "many", run)
    assert_does_what_one_does(tmp_path / "many", tmp_path / "one", run, 4)


def test_uneven_last_batches_and_an_early_stop(tmp_path: Path) -> None:
    # 80 examples in global batches of 14: the last of an epoch has 10.
    training = {"per_device_train_batch_size": 7, "ddp_find_unused_parameters": False}
    run = ManyRun(steps=40, method=UNLIKE_MODULES, training=training)
    launch_training(2, tmp_path, run)
    first, second = (load(tmp_path / f"end-{rank}.pt") for rank in (0, 1))
    assert_same(first, second)
    assert first["stopped"] < 40
    assert first["frozen"] == 13


# Sudden death --------------------------------------------------------------------------------------------------------

MORTAL = ManyRun(
    steps=24,
    method={"r": 2, "lora_alpha": 3, "lora_dropout": 0.1, "inner_criterion": "update_change"},
    training={"save_steps": 3, "per_device_train_batch_size": 4},
)


@pytest.fixture(scope="module")
def immortal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the uninterrupted run."""
    out = tmp_path_factory.mktemp("immortal")
    launch_training(2, out, MORTAL)
    return out


@pytest.mark.parametrize(
    ("rank", "moment", "starts"),
    [
        (1, "step 11", torchrun),
        (0, "adapter 12", launch),
        (1, "random 12", launch),
        (0, "trainer 12", launch),
    ],
)
def test_a_killed_rank_ends_the_job_which_resumes_exactly(
    tmp_path: Path, immortal: Path, rank: int, moment: str, starts: Callable[..., str]
) -> None:
    doomed = replace(MORTAL, kill=moment, dying_rank=rank)
    said = starts(2, RUNS, "train", str(tmp_path), doomed.json(), fails=True)
    assert "SIGKILL" in said or "Signal 9" in said or "exitcode  : -9" in said
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    launch_training(2, tmp_path, MORTAL, "--resume")
    for who in (0, 1):
        assert_same(load(tmp_path / f"end-{who}.pt"), load(immortal / f"end-{who}.pt"))
        assert read_events(tmp_path / f"events-{who}.jsonl") == read_events(immortal / f"events-{who}.jsonl")


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
