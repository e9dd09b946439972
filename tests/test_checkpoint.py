"""A Trainer's checkpoint is whole, or no run goes on from it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import TrainerState

from aroma import AromaCallback, last_complete_checkpoint
from aroma.checkpoint import RECORD_FILE, complete_record, record_checkpoint, verify_checkpoint
from aroma.errors import CheckpointError
from aroma.files import replacing
from trainer_runs import Run, adapted, assert_same, live, on_disk, train, trainer_for

RUN = Run(steps=8, training={"save_steps": 3})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with checkpoints 3, 6 and 8."""
    out = tmp_path_factory.mktemp("whole")
    train(out, RUN)
    return out


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


# What is recorded ----------------------------------------------------------------------------------------------------


def test_every_file_of_the_moment_is_recorded(whole: Path) -> None:
    record = verify_checkpoint(whole / "checkpoint-6")
    there = {path.name for path in (whole / "checkpoint-6").iterdir()}
    assert record["step"] == 6
    assert set(record["files"]) == there - {RECORD_FILE, "README.md"}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "adapter_model.safetensors"} < set(
        record["files"]
    )


def test_files_in_folders_are_recorded(tmp_path: Path) -> None:
    """As DeepSpeed and torch.distributed.checkpoint write them."""
    folder = tmp_path / "checkpoint-7"
    names = ["global_step7/zero_pp_rank_0_mp_rank_00_optim_states.pt", "optimizer_0/__0_0.distcp", "latest"]
    for name in [*names, "rng_state_0.pth", "rng_state_1.pth"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    written(folder, TrainerState(global_step=7))
    for name in [*names, "rng_state_1.pth"]:
        assert verify_checkpoint(folder)["step"] == 7
        (folder / name).write_text(name.upper())
        with pytest.raises(CheckpointError, match=rf"{name}: sha256=.*use another checkpoint"):
            verify_checkpoint(folder)
        (folder / name).write_text(name)


def test_what_a_killed_save_left_is_no_part_of_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-7"
    left = []
    for name in ("README.md", "other/aroma_state.safetensors"):
        with replacing(folder / name) as temporary:  # what a kill here would leave
            left.append(str(temporary.relative_to(folder)))
            (tmp_path / temporary.name).touch()
        shutil.move(tmp_path / temporary.name, temporary)
        (folder / name).unlink()
    kept = ["optimizer.pt", "rng_state.pth", ".notes.tmp", "other/adapter_config.json"]
    for name in [*left, *kept]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    written(folder, TrainerState(global_step=7))
    assert verify_checkpoint(folder)["files"].keys() == {*kept, "trainer_state.json"}
    assert not any((folder / name).exists() for name in left)


def written(folder: Path, state: TrainerState, completes: bool = True) -> None:
    """Record a checkpoint as the callback does, around the Trainer's last file."""
    record = record_checkpoint(folder, state)
    state.save_to_json(str(folder / "trainer_state.json"))
    if completes:
        complete_record(folder, record)


def test_a_run_killed_before_its_record_was_complete_goes_on_from_there(whole: Path, copied: Path) -> None:
    """After the Trainer's last file, when it may have removed all older checkpoints."""
    folder = copied / "checkpoint-6"
    state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
    state.log_history[0]["loss"] = float("nan")
    record_checkpoint(folder, state)
    with pytest.raises(CheckpointError, match=r"trainer_state\.json: edited, or of another save"):
        verify_checkpoint(folder)
    (folder / "trainer_state.json").unlink()
    with pytest.raises(CheckpointError, match=r"trainer_state\.json: missing"):
        verify_checkpoint(folder)
    state.save_to_json(str(folder / "trainer_state.json"))
    verify_checkpoint(folder)


def test_a_checkpoint_without_an_optimizer_is_no_place_to_go_on_from(tmp_path: Path) -> None:
    train(tmp_path, Run(steps=3, training={"save_steps": 3, "save_only_model": True}))
    with pytest.raises(CheckpointError, match=r"saved without the optimizer \(save_only_model\?\)"):
        verify_checkpoint(tmp_path / "checkpoint-3")


def test_a_second_training_of_one_trainer_records_its_checkpoints(tmp_path: Path) -> None:
    trainer = trainer_for(adapted(), tmp_path / "one", AromaCallback(), max_steps=3, save_steps=3)
    trainer.train()
    trainer.args.output_dir = str(tmp_path / "two")
    trainer.train()
    for out in ("one", "two"):
        verify_checkpoint(tmp_path / out / "checkpoint-3")


# What is wrong with a checkpoint -------------------------------------------------------------------------------------


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2])  # the last byte of JSON is a newline


def of_another_step(file: Path) -> None:
    shutil.copy(file.parent.parent / "checkpoint-3" / file.name, file)


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def a_loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def a_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def nested(file: Path) -> None:
    file.write_text("[" * 100_000)


def empty_object(file: Path) -> None:
    file.write_text("{}")


def another_step_in_it(file: Path) -> None:
    text = file.read_text()
    assert '"global_step": 8' in text
    file.write_text(text.replace('"global_step": 8', '"global_step": 6'))


FILES = [
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    "aroma_state.json",
    RECORD_FILE,
]
HARMS: list[tuple[str, Callable[[Path], None]]] = [
    *((file, harm) for file in FILES for harm in (Path.unlink, flipped, truncated, of_another_step, a_folder, a_loop)),
    *((file, a_fifo) for file in ("optimizer.pt", RECORD_FILE, "trainer_state.json")),
    *((file, nested) for file in ("trainer_state.json", RECORD_FILE, "aroma_state.json")),
    ("trainer_state.json", empty_object),
    ("trainer_state.json", another_step_in_it),
    (RECORD_FILE, empty_object),
]


def test_whatever_is_wrong_with_the_newest_the_one_before_is_taken_and_it_is_said_why(copied: Path) -> None:
    assert last_complete_checkpoint(copied) == str(copied / "checkpoint-8")
    kept = Path(shutil.move(copied / "checkpoint-8", copied / "kept"))
    for name, harm in HARMS:
        newest = Path(shutil.copytree(kept, copied / "checkpoint-8"))
        harm(newest / name)
        with pytest.warns(UserWarning, match=r"passed over, and the run goes on from .*checkpoint-6:\n.*") as caught:
            assert last_complete_checkpoint(copied) == str(copied / "checkpoint-6"), f"{name}: {harm.__name__}"
        (warning,) = [str(each.message) for each in caught if "passed over" in str(each.message)]
        reason = warning.split("\n")[1]
        assert str(newest) in reason, warning
        assert name in reason or "it holds step 3" in reason, warning
        assert "another" in reason, warning
        with pytest.raises(CheckpointError):
            verify_checkpoint(newest)
        shutil.rmtree(newest)


def test_of_several_broken_ones_each_is_named(copied: Path) -> None:
    (copied / "checkpoint-8" / "optimizer.pt").unlink()
    shutil.rmtree(copied / "checkpoint-6")
    (copied / "checkpoint-6").write_text("no folder")
    (copied / "checkpoint-12").symlink_to("checkpoint-12")
    shutil.copytree(copied / "checkpoint-3", copied / "checkpoint-10")
    shutil.copytree(copied / "checkpoint-3", copied / "checkpoint-11-copy")
    (copied / f"checkpoint-{'9' * 5000}"[:200]).mkdir()
    with pytest.warns(UserWarning, match="passed over") as caught:
        assert last_complete_checkpoint(copied) == str(copied / "checkpoint-3")
    lines = str(caught[0].message).split("\n")[1:]
    found = [next(step for step in (12, 10, 8, 6) if f"checkpoint-{step}" in line) for line in lines]
    assert found == [12, 10, 8, 6], "the latest first; 10 is later than 8"
    assert "it holds step 3" in lines[1]


def test_no_folder_and_no_checkpoint() -> None:
    assert last_complete_checkpoint("/nowhere/at/all") is None


def test_what_the_trainer_would_load_and_nobody_saved_is_noticed(copied: Path) -> None:
    """The Trainer takes a model.safetensors for the whole model, and leaves the adapter alone."""
    folder = copied / "checkpoint-8"
    (folder / "notes.txt").write_text("of the user")
    (folder / "README.md").write_text("edited")
    verify_checkpoint(folder)
    for name in ("model.safetensors", "scaler.pt", "optimizer_0/part.distcp", "pytorch_model.bin.index.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
        with pytest.raises(CheckpointError, match=rf"{name}: this file is not of the save; remove it"):
            verify_checkpoint(folder)
        (folder / name).unlink()
    (folder / "notes").symlink_to(".")  # in whose place it would take the adapter
    with pytest.raises(CheckpointError, match="notes: this file is not of the save"):
        verify_checkpoint(folder)


def test_a_checkpoint_may_be_renamed_to_what_is_no_step(copied: Path) -> None:
    verify_checkpoint((copied / "checkpoint-6").rename(copied / "best"))


def test_a_symlink_to_the_same_content_is_the_file(copied: Path) -> None:
    """As the hub's cache keeps what it has downloaded."""
    folder = copied / "checkpoint-6"
    (folder / "optimizer.pt").rename(copied / "blob")
    (folder / "optimizer.pt").symlink_to("../blob")
    verify_checkpoint(folder)


def test_a_record_made_to_point_elsewhere_is_refused(copied: Path) -> None:
    from aroma.tuner.state import checksum_of

    file = copied / "checkpoint-6" / RECORD_FILE
    for name in ("../checkpoint-3/optimizer.pt", "/dev/zero"):
        record = json.loads(file.read_text())
        record["files"][name] = {"bytes": 0, "sha256": "0" * 64}
        file.write_text(json.dumps({**record, "checksum": checksum_of(record)}))
        with pytest.raises(CheckpointError, match="it lies elsewhere"):
            verify_checkpoint(file.parent)


# Resuming ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"])
def test_a_folder_named_directly_is_checked_before_anything_is_loaded(copied: Path, name: str) -> None:
    """A head's weights too: they are the last tensors of the adapter's file."""
    of_another_step(copied / "checkpoint-6" / name)
    trainer = trainer_for(adapted(), copied, AromaCallback(), max_steps=8)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"checkpoint-6/{name}: "):
        trainer.train(resume_from_checkpoint=str(copied / "checkpoint-6"))
    assert_same(dict(trainer.model.state_dict()), before)


def test_resuming_from_true_takes_the_last_whole_checkpoint(whole: Path, copied: Path) -> None:
    flipped(copied / "checkpoint-8" / "optimizer.pt")
    trainer = trainer_for(adapted(), copied, AromaCallback(), max_steps=8, save_steps=3)
    with pytest.warns(UserWarning, match=r"checkpoint-8/optimizer\.pt: sha256"):
        trainer.train(resume_from_checkpoint=True)
    assert_same(on_disk(copied / "checkpoint-8"), on_disk(whole / "checkpoint-8"))


def test_resuming_from_true_where_nothing_is_whole(copied: Path) -> None:
    for folder in copied.glob("checkpoint-*"):
        (folder / "optimizer.pt").unlink()
    trainer = trainer_for(adapted(), copied, AromaCallback(), max_steps=8)
    with (
        pytest.warns(UserWarning, match="no other is whole"),
        pytest.raises(CheckpointError, match=r"^resume_from_checkpoint=True: .* holds no whole checkpoint"),
    ):
        trainer.train(resume_from_checkpoint=True)


def test_a_trainer_without_the_callback_resumes_as_ever(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from trainer_runs import tiny_bert

    def lora() -> torch.nn.Module:
        return get_peft_model(tiny_bert(), LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=1))

    trainer_for(lora(), tmp_path, max_steps=2, save_steps=2).train()
    trainer_for(adapted(), tmp_path, AromaCallback(), max_steps=2)  # has wrapped the Trainer's train
    again = trainer_for(lora(), tmp_path, max_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 3


def test_the_run_that_is_resumed_is_the_uninterrupted_one(whole: Path, copied: Path) -> None:
    resumed = train(copied, RUN, str(copied / "checkpoint-6"))
    assert_same(on_disk(copied / "checkpoint-8"), on_disk(whole / "checkpoint-8"))
    assert live(resumed)["controller"]["state"]["global_step"] == 8
