"""Resuming: from any checkpoint, from another folder, after SIGKILL at any moment; always the uninterrupted run."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

import trainer_runs
from aroma import AromaCallback, last_complete_checkpoint
from aroma.errors import AromaWarning, CheckpointError, ConfigError
from aroma.state import read_controller_state
from aroma.tuner import live_adapter
from aroma.tuner.config import METHOD_FIELDS
from quick import slow_but
from ranks import processes
from trainer_runs import (
    Run,
    adapted,
    assert_same,
    growth,
    live,
    on_disk,
    read_events,
    resealed,
    tiny_bert,
    train,
    trainer_for,
)

# Every checkpoint ----------------------------------------------------------------------------------------------------

OPTIONS = {
    "as it comes": {},
    "bfloat16 pairs": {"half": True, "method": {"lora_alpha": 3}},
    "dropout, rank 2, a scale of 3/2": {"method": {"lora_dropout": 0.1, "r": 2, "lora_alpha": 3}},
    "update_change": {"method": {"inner_criterion": "update_change"}},
    "no reset": {"method": {"reset": "none"}},
    "ReLoRA": {"method": {"inner_tolerance": None, "outer_tolerance": None, "max_components": 4}},
    "cosine, other optimizer": {"training": {"lr_scheduler_type": "cosine", "optim": "adafactor"}},
    "restored callbacks": {"training": {"restore_callback_states_from_checkpoint": True}},
    "bfloat16 autocast": {"training": {"bf16": True}, "method": {"lora_alpha": 3}},
    "everything awkward": {
        "method": {"inner_criterion": "update_change", "r": 2, "lora_alpha": 3, "lora_dropout": 0.1, "reset": "zero"},
        "training": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "optim": "adafactor"},
    },
}


@pytest.mark.parametrize("name", slow_but(["everything awkward"], OPTIONS))
def test_resumed_equals_uninterrupted(tmp_path: Path, name: str) -> None:
    run = Run(**{"steps": 24, **OPTIONS[name]})
    run.training = {"save_steps": 2, **run.training}
    whole = live(train(tmp_path / "whole", run))
    second = outer_steps(tmp_path / "whole")[1]
    # At an outer step, and within an inner loop, after its first check.
    for step in (second, second + 4):
        assert_resumes(tmp_path, run, step, whole)


def outer_steps(out: Path) -> list[int]:
    return sorted({event["step"] for event in read_events(out / "events.jsonl") if event["kind"] == "merged"})


def assert_resumes(tmp_path: Path, run: Run, step: int, whole: dict[str, Any]) -> None:
    out = copy_until(tmp_path, step)
    resumed = train(out, run, str(out / f"checkpoint-{step}"))
    assert resumed.state.global_step == run.steps
    assert_same(live(resumed), whole, f"from step {step}")
    if not run.training.get("restore_callback_states_from_checkpoint"):  # the Trainer makes a new callback then
        events = [read_events(folder / "events.jsonl") for folder in (out, tmp_path / "whole")]
        assert_same(*events, f"events from step {step}")
    last = f"checkpoint-{run.steps}"
    assert_same(on_disk(out / last), on_disk(tmp_path / "whole" / last), f"{last} from step {step}")


def copy_until(tmp_path: Path, step: int) -> Path:
    """Copy the events and one checkpoint into a folder of their own."""
    out = tmp_path / f"from-{step}"
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", out / f"checkpoint-{step}")
    shutil.copy(tmp_path / "whole" / "events.jsonl", out)
    return out


class Announced(Trainer):
    """A trainer with a `train` of its own, as libraries have them."""

    def train(self, resume_from_checkpoint: Any = None, **options: Any) -> Any:
        return super().train(resume_from_checkpoint, **options)


def test_a_trainer_with_a_train_of_its_own_grows_and_resumes(tmp_path: Path) -> None:
    whole = train(tmp_path, Run(steps=12))
    shutil.rmtree(tmp_path / "checkpoint-12")
    again = trainer_for(adapted(), tmp_path, AromaCallback(), kind=Announced, max_steps=12)
    again.train(True)
    assert_same(live(again), live(whole))


def test_a_moved_run_resumes_without_the_original(tmp_path: Path) -> None:
    training = {
        "save_steps": 7,
        "eval_steps": 7,
        "eval_strategy": "steps",
        "load_best_model_at_end": True,
    }
    run = Run(steps=28, training=training)
    whole = train(tmp_path / "whole", run)
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "whole", moved)
    shutil.rmtree(moved / "checkpoint-28")
    expected, expected_best = live(whole), Path(whole.state.best_model_checkpoint).name
    shutil.rmtree(tmp_path / "whole")
    resumed = train(moved, run, str(moved / "checkpoint-14"))
    assert resumed.state.best_model_checkpoint == str(moved / expected_best)
    assert_same(live(resumed), expected)


def test_the_seed_of_the_components_comes_from_the_checkpoint(tmp_path: Path) -> None:
    trainers = []
    for seed, resume in ((11, None), (12, str(tmp_path / "checkpoint-7"))):
        base = tiny_bert()
        torch.manual_seed(seed)
        model = adapted(base, component_seed=None)
        trainer = trainer_for(model, tmp_path, AromaCallback(), save_steps=7, max_steps=20)
        trainer.train(resume_from_checkpoint=resume)
        trainers.append(trainer)
    assert growth(trainers[1]).controller.live.seed == 11
    assert_same(*map(live, trainers))


# A run that is over --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    slow_but(
        [{}],
        [{}, {"restore_callback_states_from_checkpoint": True}, {"save_strategy": "epoch", "save_total_limit": 1}],
    ),
)
def test_resuming_a_run_that_stopped_early_changes_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = Run(method={"max_components": 2}, training={"weight_decay": 0.1, **changes})
    whole = live_at_the_end(train(tmp_path, run))
    left = checkpoints_of(tmp_path)
    end = whole["controller"]["state"]["global_step"]
    assert end < run.steps
    resumed = train(tmp_path, run, last_complete_checkpoint(tmp_path))
    after = live_at_the_end(resumed)
    assert_same(after, whole)
    assert checkpoints_of(tmp_path) == left
    assert not torch.equal(
        after["weights"]["base_model.model.classifier.modules_to_save.default.weight"],
        after["weights"]["base_model.model.classifier.original_module.weight"],
    ), "the head is to have learned"


def test_resuming_a_run_at_its_last_step_changes_nothing(tmp_path: Path) -> None:
    run = Run(steps=13, training={"weight_decay": 0.1, "save_total_limit": 1, "eval_strategy": "steps"})
    whole = live_at_the_end(train(tmp_path, run))
    left = checkpoints_of(tmp_path)
    resumed = train(tmp_path, run, str(tmp_path / "checkpoint-13"))
    assert_same(live_at_the_end(resumed), whole)
    assert checkpoints_of(tmp_path) == left, "that of the step too many took the place of the last"


def checkpoints_of(out: Path) -> dict[str, bytes]:
    """All files of all checkpoints in `out`."""
    return {str(file): file.read_bytes() for file in out.glob("checkpoint-*/**/*") if file.is_file()}


def live_at_the_end(trainer: Any) -> dict[str, Any]:
    """As `live`, without what counts the step that the Trainer takes before it asks whether to stop."""
    return {key: value for key, value in live(trainer).items() if key not in ("schedule", "log", "optimizer")} | {
        "optimizer": trainer.optimizer.state_dict()["state"]
    }


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint within outer step 2."""
    out = tmp_path_factory.mktemp("run")
    train(out, Run(steps=6, training={"save_steps": 6}))
    return out / "checkpoint-6"


def resume(folder: Path, model: Any = None, **training: Any) -> None:
    trainer_for(model or adapted(), folder.parent, AromaCallback(), **{"max_steps": 8, **training}).train(
        resume_from_checkpoint=str(folder)
    )


def test_another_configuration_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resume(checkpoint, adapted(outer_tolerance=0.5, reset="zero", component_seed=6))
    message = str(caught.value)
    for part in (
        "outer_tolerance=0.5 (checkpoint: 0.045)",
        "reset='zero' (checkpoint: 'prune')",
        "component_seed=6 (checkpoint: 5)",
        "new run",
    ):
        assert part in message
    assert "inner_tolerance" not in message


def test_each_field_that_decides_growth_is_refused_if_it_is_another(checkpoint: Path) -> None:
    others = {
        **{"r": 2, "lora_alpha": 8, "lora_dropout": 0.1, "inner_tolerance": 0.3, "inner_check_interval": 4},
        **{"max_inner_steps": 9, "outer_tolerance": None, "min_components": 1, "max_components": 3},
        **{"inner_criterion": "update_change", "reset": "none", "prune_ratio": 0.5, "rewarmup_steps": 3},
        "component_seed": 6,
    }
    assert others.keys() == {*METHOD_FIELDS}
    state = read_controller_state(checkpoint)
    assert state is not None
    for name, value in others.items():
        model = adapted(**{name: value})
        with pytest.raises(ConfigError, match=rf"^cannot resume with another configuration: {name}="):
            live_adapter(model).check_resumable(state["state"]["config"])


def test_a_run_of_more_steps_goes_on_with_its_own_inner_loops_and_says_so(tmp_path: Path) -> None:
    derived = {"max_inner_steps": None, "outer_tolerance": None}
    train(tmp_path, Run(steps=60, method=derived, training={"save_steps": 30}))
    trainer = trainer_for(adapted(**derived), tmp_path, AromaCallback(), max_steps=720)
    trainer.add_callback(StopAt(31))
    with pytest.warns(AromaWarning, match=r"^max_inner_steps=None: 720 planned steps would give 60, and .* own 50;"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-30"))
    assert growth(trainer).controller.max_inner_steps == 50


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_a_checkpoint_without_the_callback_is_refused(tmp_path: Path) -> None:
    with pytest.warns(AromaWarning, match="trained without its controller"):
        trainer_for(adapted(), tmp_path, max_steps=4).train()
    with pytest.raises(CheckpointError, match="no AromaCallback took part"):
        resume(tmp_path / "checkpoint-4")


def edited(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))


def test_an_edited_adapter_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = edited(checkpoint, tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] += 1e-3
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    resealed(folder)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: .*edited"):
        resume(folder)


# Sudden death --------------------------------------------------------------------------------------------------------


def go_on(out: Path, run: Run, after: float | None = None) -> int:
    """Begin or resume `run` in a process of its own; SIGKILL it `after` seconds. Return its exit code."""
    process = processes().Process(target=trainer_runs.main, args=(str(out), run.json(), "--resume"))
    process.start()
    process.join(after)
    if process.is_alive():
        process.kill()
    process.join()
    assert process.exitcode in (0, -9)
    return process.exitcode


def assert_same_end(out: Path, whole: Path, run: Run) -> None:
    last = f"checkpoint-{run.steps}"
    assert_same(on_disk(out / last), on_disk(whole / last))
    assert_same(read_events(out / "events.jsonl"), read_events(whole / "events.jsonl"))


MORTAL = Run(
    steps=24,
    method={"r": 2, "lora_alpha": 3, "lora_dropout": 0.1, "inner_criterion": "update_change"},
    training={"save_steps": 3},
)


@pytest.fixture(scope="module")
def immortal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the uninterrupted run."""
    out = tmp_path_factory.mktemp("immortal")
    train(out, MORTAL)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "moments",
    # The first save, where there is nothing to go back to; some in between; the last.
    [
        {3: "adapter", 6: "vouching", 12: "optimizer", 18: "scheduler", 24: "trainer"},
        {3: "trainer", 12: "vouching", 24: "adapter"},
    ],
)
def test_killed_within_saves(tmp_path: Path, immortal: Path, moments: dict[int, str]) -> None:
    for step, moment in moments.items():
        die_within_the_save(tmp_path, moment, step)
    assert go_on(tmp_path, MORTAL) == 0
    assert_same_end(tmp_path, immortal, MORTAL)


def die_within_the_save(out: Path, moment: str, step: int) -> None:
    assert go_on(out, Run(**{**MORTAL.__dict__, "kill": f"{moment} {step}"})) == -9
    assert (out / f"checkpoint-{step}").is_dir(), "it is to die within the save"
    whole = f"checkpoint-{step - 3}"
    assert last_complete_checkpoint(out) == (str(out / whole) if step > 3 else None)


def kill_until_done(out: Path, run: Run, times: list[float]) -> None:
    for after in times:
        if go_on(out, run, after) == 0:
            return
    assert go_on(out, run) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "changes"), [(0, {}), (1, {"r": 1, "inner_criterion": "norm_change", "reset": "zero"})]
)
def test_killed_many_times(tmp_path: Path, seed: int, changes: dict[str, Any]) -> None:
    run = Run(steps=48, method={**MORTAL.method, **changes}, training={"save_steps": 2})
    train(tmp_path / "whole", run)
    clock = random.Random(seed)
    kill_until_done(tmp_path / "mortal", run, [clock.uniform(0.2, 1.2) for _ in range(10)])
    assert_same_end(tmp_path / "mortal", tmp_path / "whole", run)
