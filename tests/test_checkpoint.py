"""A Trainer's checkpoint is whole, or no run goes on from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from aroma import AromaCallback, last_complete_checkpoint
from aroma.checkpoint import RECORD_FILE, verify_checkpoint
from aroma.errors import AromaWarning, CheckpointError
from trainer_runs import Run, adapted, assert_same, on_disk, train, trainer_for

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


def test_a_checkpoint_without_an_optimizer_is_no_place_to_go_on_from(tmp_path: Path) -> None:
    train(tmp_path, Run(steps=3, training={"save_steps": 3, "save_only_model": True}))
    with pytest.raises(CheckpointError, match=r"saved without the optimizer \(save_only_model\?\)"):
        verify_checkpoint(tmp_path / "checkpoint-3")


# What is wrong with a checkpoint; `test_fuzz` has the rest -----------------------------------------------------------


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def of_another_step(file: Path) -> None:
    shutil.copy(file.parent.parent / "checkpoint-3" / file.name, file)


@pytest.mark.parametrize("harm", [Path.unlink, flipped, of_another_step])
@pytest.mark.parametrize("name", ["optimizer.pt", "aroma_state.json", RECORD_FILE])
def test_whatever_is_wrong_with_the_newest_the_one_before_is_taken_and_it_is_said_why(
    copied: Path, name: str, harm: Callable[[Path], None]
) -> None:
    newest = copied / "checkpoint-8"
    assert last_complete_checkpoint(copied) == str(newest)
    harm(newest / name)
    shutil.copytree(newest, copied / "checkpoint-12")
    (copied / "checkpoint-13").symlink_to("checkpoint-13")
    with pytest.warns(AromaWarning, match=r"passed over") as caught:
        assert last_complete_checkpoint(copied) == str(copied / "checkpoint-6")
    found = [str(each.message) for each in caught if "passed over" in str(each.message)]
    assert [step for line in found for step in (13, 12, 8) if f"checkpoint-{step}" in line] == [13, 12, 8]
    assert str(newest) in found[2]
    with pytest.raises(CheckpointError):
        verify_checkpoint(newest)


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
    with pytest.warns(AromaWarning, match=r"checkpoint-8/optimizer\.pt: truncated, edited"):
        trainer.train(resume_from_checkpoint=True)
    assert_same(on_disk(copied / "checkpoint-8"), on_disk(whole / "checkpoint-8"))
    for folder in copied.glob("checkpoint-*"):
        (folder / "optimizer.pt").unlink()
    trainer = trainer_for(adapted(), copied, AromaCallback(), max_steps=8)
    with (
        pytest.warns(AromaWarning, match="passed over"),
        pytest.raises(CheckpointError, match=r"^resume_from_checkpoint=True: .* holds no whole checkpoint"),
    ):
        trainer.train(resume_from_checkpoint=True)
