"""A Trainer's checkpoint is whole, or no run goes on from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from aroma import AromaCallback, last_complete_checkpoint
from aroma.checkpoint import RECORD_FILE, record_checkpoint, verify_checkpoint
from aroma.errors import CheckpointError
from trainer_runs import Run, adapted, assert_same, live, on_disk, tiny_bert, train, trainer_for

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
    assert {*record["files"]} == there - {RECORD_FILE, "README.md"}
    known = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "adapter_model.safetensors"}
    assert known < {*record["files"]}


def test_files_in_folders_are_recorded_and_those_of_killed_writes_are_not(tmp_path: Path) -> None:
    """As DeepSpeed and torch.distributed.checkpoint write them."""
    folder = tmp_path / "checkpoint-7"
    names = ["global_step7/zero_pp_rank_0_mp_rank_00_optim_states.pt", "optimizer_0/__0_0.distcp", "rng_state_1.pth"]
    names.append("trainer_state.json")
    for name in [*names, ".README.md.k2j3h4g5.tmp"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    record_checkpoint(folder, 7, {"files": {}})
    for name in names:
        assert verify_checkpoint(folder)["files"].keys() == {*names}
        (folder / name).write_text(name.upper())
        with pytest.raises(CheckpointError, match=rf"{name}: truncated, edited.*use another checkpoint"):
            verify_checkpoint(folder)
        (folder / name).write_text(name)


def test_a_run_killed_before_its_record_was_complete_goes_on_from_there(copied: Path) -> None:
    """After the Trainer's last file, when it may have removed all older checkpoints."""
    folder = copied / "checkpoint-6"
    record_checkpoint(folder, 6)
    verify_checkpoint(folder)
    text = (folder / "trainer_state.json").read_text()
    (folder / "trainer_state.json").write_text(text[:-20])
    with pytest.raises(CheckpointError, match=r"trainer_state\.json: truncated or edited"):
        verify_checkpoint(folder)
    shutil.copy(copied / "checkpoint-3" / "trainer_state.json", folder)
    with pytest.raises(CheckpointError, match=r"trainer_state\.json: edited, or of another save"):
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


# What is wrong with a checkpoint; `test_fuzz` has the rest -----------------------------------------------------------


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def of_another_step(file: Path) -> None:
    shutil.copy(file.parent.parent / "checkpoint-3" / file.name, file)


@pytest.mark.parametrize("harm", [Path.unlink, flipped, of_another_step])
@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "aroma_state.json", RECORD_FILE])
def test_whatever_is_wrong_with_the_newest_the_one_before_is_taken_and_it_is_said_why(
    copied: Path, name: str, harm: Callable[[Path], None]
) -> None:
    newest = copied / "checkpoint-8"
    assert last_complete_checkpoint(copied) == str(newest)
    harm(newest / name)
    with pytest.warns(UserWarning, match=r"passed over, and the run goes on from .*checkpoint-6:\n.*") as caught:
        assert last_complete_checkpoint(copied) == str(copied / "checkpoint-6")
    (warning,) = [str(each.message) for each in caught if "passed over" in str(each.message)]
    reason = warning.split("\n")[1]
    assert str(newest) in reason, warning
    assert name in reason or "it holds step 3" in reason, warning
    with pytest.raises(CheckpointError):
        verify_checkpoint(newest)


def test_of_several_broken_ones_each_is_named(copied: Path) -> None:
    (copied / "checkpoint-8" / "optimizer.pt").unlink()
    shutil.rmtree(copied / "checkpoint-6")
    (copied / "checkpoint-6").write_text("no folder")
    (copied / "checkpoint-12").symlink_to("checkpoint-12")
    shutil.copytree(copied / "checkpoint-3", copied / "checkpoint-10")
    shutil.copytree(copied / "checkpoint-3", copied / "checkpoint-11-copy")
    with pytest.warns(UserWarning, match="passed over") as caught:
        assert last_complete_checkpoint(copied) == str(copied / "checkpoint-3")
    lines = str(caught[0].message).split("\n")[1:]
    found = [next(step for step in (12, 10, 8, 6) if f"checkpoint-{step}" in line) for line in lines]
    assert found == [12, 10, 8, 6], "the latest first; 10 is later than 8"
    assert "it holds step 3" in lines[1]
    assert last_complete_checkpoint("/nowhere/at/all") is None


def test_what_the_trainer_would_load_and_nobody_saved_is_noticed(copied: Path) -> None:
    """The Trainer takes a model.safetensors for the whole model, and leaves the adapter alone."""
    folder = copied / "checkpoint-8"
    (folder / "notes.txt").write_text("of the user")
    (folder / "README.md").write_text("edited")
    (folder / "optimizer.pt").rename(copied / "blob")
    (folder / "optimizer.pt").symlink_to("../blob")  # as the hub's cache keeps what it has downloaded
    verify_checkpoint(folder)
    (folder / "model.safetensors").write_text("")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: this file is not of the save; remove it"):
        verify_checkpoint(folder)
    verify_checkpoint((copied / "checkpoint-6").rename(copied / "best"))


# Resuming ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "adapter_model.safetensors"])
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
    with pytest.warns(UserWarning, match=r"checkpoint-8/optimizer\.pt: truncated, edited"):
        trainer.train(resume_from_checkpoint=True)
    assert_same(on_disk(copied / "checkpoint-8"), on_disk(whole / "checkpoint-8"))
    for folder in copied.glob("checkpoint-*"):
        (folder / "optimizer.pt").unlink()
    trainer = trainer_for(adapted(), copied, AromaCallback(), max_steps=8)
    with (
        pytest.warns(UserWarning, match="no other is whole"),
        pytest.raises(CheckpointError, match=r"^resume_from_checkpoint=True: .* holds no whole checkpoint"),
    ):
        trainer.train(resume_from_checkpoint=True)


def test_a_trainer_without_the_callback_resumes_as_ever(tmp_path: Path) -> None:
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
