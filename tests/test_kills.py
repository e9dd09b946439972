"""Saves killed at any operation on a file: old or new, whole, and the next save is as if nothing had been."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

import aroma.folders
from aroma.errors import CheckpointError
from aroma.folders import replacing_files, settle
from kills import ADAPTERS, CHECKPOINTS, contents, strikes

NAMES = ("config", "weights", "state")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", [*ADAPTERS, *CHECKPOINTS])
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


def put(folder: Path, text: str, names: Iterable[str] = NAMES) -> None:
    with replacing_files(folder, NAMES) as new:
        for name in names:
            (new / name).write_text(text)


def test_old_files_go_and_others_stay(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "adapter"
    put(folder, "one")
    (folder / "notes").write_text("the user's")
    (folder / "checkpoint-3").mkdir()
    (tmp_path / "latest").symlink_to(folder)
    put(tmp_path / "latest", "two", ["config", "weights"])
    assert contents(folder) == {"config": b"two", "weights": b"two", "notes": b"the user's", "checkpoint-3": None}
    assert (tmp_path / "latest").is_symlink()


def test_an_exception_leaves_everything(tmp_path: Path) -> None:
    put(tmp_path / "adapter", "one")
    with pytest.raises(FileNotFoundError), replacing_files(tmp_path / "adapter", NAMES) as new:
        (new / "nowhere" / "config").write_text("two")
    assert contents(tmp_path / "adapter") == dict.fromkeys(NAMES, b"one")
    (tmp_path / "file").write_text("of the user")
    with pytest.raises(CheckpointError, match=r"^folder=.*file': it is a file"):
        put(tmp_path / "file", "one")


def test_a_folder_made_to_look_half_saved_is_refused(tmp_path: Path) -> None:
    arriving = tmp_path / "adapter" / aroma.folders._ARRIVING
    arriving.parent.mkdir()
    (tmp_path / "outside").mkdir()
    for name in ("secret", aroma.folders._LIST):
        (tmp_path / "outside" / name).write_text("[]")
    arriving.symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="a symlink, which no save has left"):
        settle(arriving.parent)
    arriving.unlink()
    arriving.mkdir()
    for text in ("[", "{}x", "[[]]", "[" * 100_000):
        (arriving / aroma.folders._LIST).write_text(text)
        with pytest.raises(CheckpointError, match="and save again"):
            settle(arriving.parent)
    (arriving / aroma.folders._LIST).write_text('["../outside/secret"]')
    settle(arriving.parent)
    assert (tmp_path / "outside" / "secret").exists()


def test_everything_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "adapter", "one")
    done: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, Path.rename

    def noted(handle: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        done.append(f"synced {'new' if name.startswith('.aroma-saving') else name}")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", lambda *each: done.append("placed") or rename(*each))
    monkeypatch.setattr(os, "replace", lambda *each: done.append("moved") or replace(*each))
    put(tmp_path / "adapter", "two")
    placed = done.index("placed")
    assert {f"synced {name}" for name in (*NAMES, "new")} <= {*done[:placed]}
    assert done[placed + 1 :] == ["synced adapter", *["moved"] * len(NAMES), "synced adapter"]
