"""Saves killed at any operation on a file: old or new, whole, and the next save is as if nothing had been."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from aroma.errors import CheckpointError
from aroma.files import replacing_files, require_adapter_folder
from kills import ADAPTERS, CHECKPOINT, contents, strikes

NAMES = ("config", "weights", "state")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", [*ADAPTERS, CHECKPOINT])
def test_a_save_struck_at_every_fourth_operation(kind: str) -> None:
    told = strikes(kind, every=4)
    left = Counter(entry["left"] for entry in told)
    assert left.keys() == {"old", "new"}, told
    assert len(told) > 20, "every write and rename is counted"
    for entry in told:
        if entry["how"] == "killed":
            assert entry["ended"] == "killed", entry
        else:
            assert entry["ended"] == "raised" or entry["left"] == "new", entry


# Folders -------------------------------------------------------------------------------------------------------------


def put(folder: Path, text: str) -> None:
    with replacing_files(folder) as new:
        for name in NAMES:
            (new / name).write_text(text)


def test_other_files_stay_and_an_exception_leaves_everything(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "adapter"
    put(folder, "one")
    (folder / "notes").write_text("the user's")
    (folder / "checkpoint-3").mkdir()
    (tmp_path / "latest").symlink_to(folder)
    put(tmp_path / "latest", "two")
    with pytest.raises(FileNotFoundError), replacing_files(folder) as new:
        (new / "nowhere" / "config").write_text("three")
    assert contents(folder) == {**dict.fromkeys(NAMES, b"two"), "notes": b"the user's", "checkpoint-3": None}
    assert (tmp_path / "latest").is_symlink()
    with pytest.raises(CheckpointError, match=r"^folder=.*notes': it is a file"):
        put(folder / "notes", "one")


def test_a_killed_move_is_finished_by_the_next_save_and_readers_change_nothing(tmp_path: Path) -> None:
    put(tmp_path, "one")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "config").write_text("two")
    (tmp_path / ".aroma-arriving").symlink_to("outside")
    with pytest.raises(NotADirectoryError):
        put(tmp_path, "three")
    assert (tmp_path / "outside" / "config").exists(), "no save leaves a symlink"
    (tmp_path / ".aroma-arriving").unlink()
    (tmp_path / "outside").rename(tmp_path / ".aroma-arriving")
    before = contents(tmp_path)
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match=rf"aroma-arriving: .* move these files into {tmp_path} and remove"):
        require_adapter_folder(tmp_path)
    tmp_path.chmod(0o700)
    assert contents(tmp_path) == before
    with pytest.raises(FileNotFoundError), replacing_files(tmp_path) as new:
        (new / "nowhere" / "config").write_text("three")
    assert contents(tmp_path) == {"config": b"two", "weights": b"one", "state": b"one"}
    assert require_adapter_folder(str(tmp_path)) == tmp_path
