"""Saves killed at any operation on a file: old or new, whole, and the next save is as if nothing had been."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest

import aroma.folders
from aroma.errors import CheckpointError
from aroma.folders import replacing_files, settle
from kills import ADAPTERS, CHECKPOINTS, contents, strikes

NAMES = ("config", "weights", "state")


def assert_old_or_new(told: dict[str, list[dict[str, Any]]]) -> None:
    for kind, entries in told.items():
        for entry in entries:
            assert entry["left"] in ("old", "new"), f"{kind}: {entry}"
            assert kind in CHECKPOINTS or entry["next save"], f"{kind}: {entry}"
            if entry["how"] == "killed":
                assert entry["ended"] == "SIGKILL", f"{kind}: {entry}"
            else:
                assert entry["ended"] == "raised" or entry["left"] == "new", f"{kind}: {entry}"
            if kind in ("save_adapter into a new folder", "save_adapter over an adapter"):
                assert entry["raw"] == "whole", f"{kind}: {entry}, read by anybody, plain PEFT too"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_saves_struck_at_every_fifth_operation() -> None:
    """At every one by `python tests/trust_numbers.py saves`. Files are written in steps of another number."""
    told = strikes([*ADAPTERS, *CHECKPOINTS], every=5)
    assert_old_or_new(told)
    for kind, entries in told.items():
        operations = entries[0]["of"]
        assert operations > 30, "every write and rename is counted"
        assert len(entries) == 2 * -(-operations // 5)
        left = Counter(entry["left"] for entry in entries)
        assert left["old"] > 10, kind
        assert left["new"] > 1, kind
    mixed = {kind for kind, entries in told.items() if any(entry.get("raw") == "mixed" for entry in entries)}
    assert mixed == {kind for kind, options in ADAPTERS.items() if options.keys() & {"folders", "exchange"}}


# Folders -------------------------------------------------------------------------------------------------------------


def put(folder: Path, text: str, names: Iterable[str] = NAMES) -> None:
    with replacing_files(folder, NAMES) as new:
        for name in names:
            (new / name).write_text(text)


@pytest.fixture(params=[True, False], ids=["exchanged", "moved in"])
def exchanges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(aroma.folders, "_exchange", lambda *_: False)
    return bool(request.param)


def test_old_files_go_and_others_stay(tmp_path: Path, exchanges: bool) -> None:
    folder = tmp_path / "deep" / "adapter"
    put(folder, "one")
    folder.chmod(0o750)
    (folder / "notes").write_text("the user's")
    (folder / "link").symlink_to("notes")
    open_log = (folder / "log").open("w")
    put(folder, "two", ["config", "weights"])
    open_log.write("goes on")
    open_log.close()
    assert contents(folder) == {
        "config": b"two",
        "weights": b"two",
        "notes": b"the user's",
        "link": b"the user's",
        "log": b"goes on",
    }
    assert (folder / "link").is_symlink()
    assert folder.stat().st_mode & 0o777 == 0o750
    assert os.listdir(folder.parent) == ["adapter"]


def test_an_exception_leaves_everything(tmp_path: Path, exchanges: bool) -> None:
    put(tmp_path / "adapter", "one")
    with pytest.raises(FileNotFoundError), replacing_files(tmp_path / "adapter", NAMES) as new:
        (new / "nowhere" / "config").write_text("two")
    assert set(contents(tmp_path / "adapter").values()) == {b"one"}
    assert os.listdir(tmp_path) == ["adapter"]


def test_the_folder_is_exchanged_where_that_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "adapter"
    put(folder, "one")
    number = folder.stat().st_ino
    put(folder, "two")
    assert folder.stat().st_ino != number, "another folder of the same name"
    # A process stands in it, or it holds folders: its own number stays.
    number = folder.stat().st_ino
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        put(Path("."), "three")
        assert Path("config").read_text() == "three"
    (folder / "checkpoint-3").mkdir()
    put(folder, "four")
    assert folder.stat().st_ino == number
    assert contents(folder) == {"checkpoint-3": None, **dict.fromkeys(NAMES, b"four")}


def test_a_symlink_to_a_folder_stays_one(tmp_path: Path, exchanges: bool) -> None:
    put(tmp_path / "runs" / "adapter", "one")
    (tmp_path / "latest").symlink_to("runs/adapter")
    put(tmp_path / "latest", "two")
    assert (tmp_path / "latest").is_symlink()
    assert set(contents(tmp_path / "runs" / "adapter").values()) == {b"two"}
    assert sorted(os.listdir(tmp_path)) == ["latest", "runs"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("of the user")
    with pytest.raises(CheckpointError, match=r"^folder=.*adapter': it is a file"):
        put(tmp_path / "adapter", "one")
    (tmp_path / "other" / "config").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"^folder=.*other': config in it is a folder"):
        put(tmp_path / "other", "one")
    assert (tmp_path / "adapter").read_text() == "of the user"


def test_leftovers_of_killed_saves_go_and_those_of_saves_under_way_stay(tmp_path: Path, exchanges: bool) -> None:
    put(tmp_path / "adapter", "one")
    dead = tmp_path / ".adapter.dead.saving"
    (dead / "new").mkdir(parents=True)
    (tmp_path / ".adapter[1].dead.saving").mkdir()  # of another adapter
    with replacing_files(tmp_path / "adapter", NAMES) as new:
        assert not dead.exists()
        put(tmp_path / "adapter", "two")
        assert new.is_dir(), "a save meanwhile leaves this one's alone"
        (new / "config").write_text("three")
    assert contents(tmp_path / "adapter") == {"config": b"three"}
    assert sorted(os.listdir(tmp_path)) == [".adapter[1].dead.saving", "adapter"]


def test_of_many_writers_one_wins_whole(tmp_path: Path, exchanges: bool) -> None:
    writers, rounds = 4, 12
    barrier = Barrier(writers)
    failed: list[BaseException] = []

    def write(text: str) -> None:
        try:
            for _ in range(rounds):
                barrier.wait()
                put(tmp_path / "adapter", text)
                barrier.wait()
                found = contents(tmp_path / "adapter")
                assert set(found) == set(NAMES)
                assert len(set(found.values())) == 1, found
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    threads = [Thread(target=write, args=(str(number),)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert os.listdir(tmp_path) == ["adapter"]


def test_what_others_put_there_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "adapter"
    put(folder, "one")
    (folder / "notes").write_text("old")
    exchange = aroma.folders._exchange

    def after_a_moment(one: Path, other: Path) -> bool:
        (folder / "arrived").write_text("new")
        (folder / "notes.tmp").write_text("newer")
        os.replace(folder / "notes.tmp", folder / "notes")
        return exchange(one, other)

    monkeypatch.setattr(aroma.folders, "_exchange", after_a_moment)
    put(folder, "two")
    assert contents(folder) == {"arrived": b"new", "notes": b"newer", **dict.fromkeys(NAMES, b"two")}


def test_a_folder_made_to_look_half_saved_is_refused(tmp_path: Path) -> None:
    arriving = tmp_path / aroma.folders._ARRIVING
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    arriving.symlink_to(outside)
    with pytest.raises(CheckpointError, match="no save has left it so"):
        settle(tmp_path)
    arriving.unlink()
    arriving.mkdir()
    for text in (
        '{"files": ["../secret"], "belonging": []}',
        '{"files": [], "belonging": ["../secret"]}',
        "[",
        "{}",
        '{"files": [[]], "belonging": []}',
        "[" * 100_000,
    ):
        (arriving / aroma.folders._LIST).write_text(text)
        with pytest.raises(CheckpointError, match=r"files\.json"):
            settle(tmp_path)
    assert (outside / "secret").read_text() == "secret"


def test_everything_is_on_the_disk_before_it_counts(
    tmp_path: Path, exchanges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "adapter", "one")
    done: list[str] = []
    fsync, exchange, replace, rename = os.fsync, aroma.folders._exchange, os.replace, Path.rename

    def noted(handle: int) -> None:
        done.append(f"synced {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(aroma.folders, "_exchange", lambda *each: done.append("placed") or exchange(*each))
    monkeypatch.setattr(Path, "rename", lambda *each: done.append("placed") or rename(*each))
    monkeypatch.setattr(os, "replace", lambda *each: done.append("moved") or replace(*each))
    put(tmp_path / "adapter", "two")
    placed = len(done) - done[::-1].index("placed") - 1
    assert {f"synced {name}" for name in (*NAMES, "new")} <= set(done[:placed])
    assert "moved" not in done[:placed]
    assert done[placed + 1] == f"synced {tmp_path.name if exchanges else 'adapter'}", "the folder that has a new entry"
    assert done[-1] == f"synced {tmp_path.name if exchanges else 'adapter'}"
    assert done.count("moved") == (0 if exchanges else len(NAMES))
