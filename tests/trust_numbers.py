"""Writes the numbers of docs/trust.md on kills and checkpoints.

    python tests/trust_numbers.py saves [--seed 0] [--count 40]
    python tests/trust_numbers.py damages [--seed 0] [--count 10000] [--kept FILE]
    python tests/trust_numbers.py ranks [--seed 0] [--count 20] [--ways DDP FSDP2 ZeRO-2 ZeRO-3] [--processes 2 4]
        [--kept FILE]

`count` is that of strikes on each kind of save (without it: two at every operation), of damaged checkpoints, or of
killed runs of each way and number of processes. What is done is kept in FILE, one JSON object a line, so that a
command that was stopped goes on; without FILE, among the temporary files, by the revision. `--only-write` writes the
table of what FILE holds. ZeRO needs DeepSpeed: AROMA_DEEPSPEED is the folder that holds it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import frozen  # noqa: F401
from kills import ADAPTERS, CHECKPOINTS, strikes
from rank_kills import FINE, WAYS, kills
from resume_fuzz import BAD, counted, damages

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "trust.md"


Rows = list[list[object]]
Done = set[tuple[object, ...]]
"""What tells apart the entries that are known."""


def saves(seed: int, count: int | None) -> Rows:
    rows: Rows = [["save", "operations", "killed", "failed", "old", "new", "neither", "next save is whole"]]
    for kind, entries in strikes([*ADAPTERS, *CHECKPOINTS], seed, count).items():
        how, left = (Counter(entry[name] for entry in entries) for name in ("how", "left"))
        whole = "–" if kind in CHECKPOINTS else sum(entry["next save"] for entry in entries)
        numbers = [entries[0]["of"], how["killed"], how["failed"], left["old"], left["new"], left["neither"], whole]
        rows.append([kind, *numbers])
    return rows


def damaged(seed: int, count: int, kept: Path, only_write: bool) -> tuple[Rows, set[str]]:
    def go_on(done: Done) -> Iterator[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as scratch:
            yield from damages(Path(scratch), seed, [number for number in range(count) if (number,) not in done])

    told = [
        entry
        for entry in finished(kept, seed, ("number",), nothing if only_write else go_on)
        if entry["number"] < count
    ]
    outcomes = ("clear error", "equal", *BAD)
    by_kind, bad = counted(told)
    print("\n".join(bad))
    rows: Rows = [["damage", "checkpoints", *outcomes]]
    for name, counts in by_kind.items():
        rows.append([name, sum(counts.values()), *(counts[outcome] for outcome in outcomes)])
    total = sum(by_kind.values(), Counter())
    rows.append(["**all**", sum(total.values()), *(total[outcome] for outcome in outcomes)])
    return rows, {entry["revision"] for entry in told}


def ranks(
    seed: int, count: int, kept: Path, only_write: bool, ways: list[str], processes: list[int]
) -> tuple[Rows, set[str]]:
    def go_on(done: Done) -> Iterator[dict[str, Any]]:
        asked = []
        for way in ways:
            for size in processes:
                if numbers := [number for number in range(count) if (way, size, number) not in done]:
                    asked.append((way, size, numbers))
        yield from kills(asked, seed)

    told = finished(kept, seed, ("way", "processes", "number"), nothing if only_write else go_on)
    heads = ["killed after a step", "killed in a save", "others ended with one error", "within, s", "resumed, equal"]
    rows: Rows = [["way", "processes", *heads]]
    shown = []
    for way, size in product(ways, processes):
        mine = [e for e in told if (e["way"], e["processes"]) == (way, size) and e["number"] < count]
        died = [entry for entry in mine if entry["outcome"] != "outlived"]
        at_steps = sum(entry["k"] == 0 for entry in died)
        ended = sum(not entry["outcome"].startswith("others did not") for entry in died)
        slowest = max((entry["seconds"] for entry in died), default="–")
        equal = sum(entry["outcome"] == "equal" for entry in died)
        rows.append([way, size, at_steps, len(died) - at_steps, ended, slowest, equal])
        shown += mine
    for entry in shown:
        if entry["outcome"] not in FINE:
            print(entry)
    return rows, {entry["revision"] for entry in shown}


def nothing(done: Done) -> Iterator[dict[str, Any]]:
    return iter(())


def finished(
    kept: Path, seed: int, names: tuple[str, ...], go_on: Callable[[Done], Iterator[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Return what is known of a seed, after what is missing has been done.

    Args:
        kept: A file of one JSON object a line, to which every new one is added at once. Several commands may share it.
        seed: The seed.
        names: The fields that tell entries of one seed apart.
        go_on: Yields the entries that are not among those given to it.
    """
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
    entries = [entry for line in lines if (entry := json.loads(line))["seed"] == seed]
    told = {tuple(entry[name] for name in names): entry for entry in entries}
    for entry in go_on({*told}):
        told[tuple(entry[name] for name in names)] = entry = {**entry, "revision": revision()}
        with kept.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
    return [*told.values()]


@cache
def revision() -> str:
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def write(what: str, seed: int, rows: Rows, revisions: set[str]) -> None:
    """Put a table between the marks of its own in the page."""
    lines = [
        f"Seed {seed}, revision {' and '.join(sorted(revisions))}.",
        "",
        *("| " + " | ".join(map(str, row)) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]),
    ]
    begin, end = f"<!-- {what}: begin -->", f"<!-- {what}: end -->"
    page = PAGE.read_text(encoding="utf-8")
    assert begin in page
    text = "\n".join([begin, *lines, end])
    PAGE.write_text(re.sub(f"{begin}.*{end}", lambda _: text, page, flags=re.DOTALL), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["saves", "damages", "ranks"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--kept", type=Path)
    parser.add_argument("--only-write", action="store_true", help="write the table of what FILE holds already")
    asked = parser.parse_args()
    kept = asked.kept or Path(tempfile.gettempdir()) / f"trust-{asked.what}-{revision()}.jsonl"
    if asked.what == "ranks":
        rows, revisions = ranks(asked.seed, asked.count or 20, kept, asked.only_write, asked.ways, asked.processes)
    elif asked.what == "damages":
        rows, revisions = damaged(asked.seed, asked.count or 10_000, kept, asked.only_write)
    else:
        rows, revisions = saves(asked.seed, asked.count), {revision()}
    write(asked.what, asked.seed, rows, revisions)


if __name__ == "__main__":
    main()
