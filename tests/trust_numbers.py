"""Writes the numbers of docs/trust.md on kills and checkpoints.

    python tests/trust_numbers.py saves [--seed 0] [--count 40]
    python tests/trust_numbers.py damages [--seed 0] [--count 10000]
    python tests/trust_numbers.py ranks [--seed 0] [--count 20] [--ways DDP FSDP2 ZeRO-2 ZeRO-3] [--processes 2 4]

`count` is that of strikes on each kind of save (without it: two at every operation), of damaged checkpoints, or of
killed runs of each way and number of processes. ZeRO needs DeepSpeed: AROMA_DEEPSPEED is the folder that holds it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from kills import ADAPTERS, CHECKPOINTS, strikes
from rank_kills import WAYS, kills
from resume_fuzz import BAD, fuzz

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "trust.md"


def saves(seed: int, count: int | None) -> list[list[object]]:
    rows: list[list[object]] = [
        ["save", "operations", "killed", "failed", "old", "new", "neither", "next save is whole"]
    ]
    for kind, entries in strikes([*ADAPTERS, *CHECKPOINTS], seed, count).items():
        how, left = (Counter(entry[name] for entry in entries) for name in ("how", "left"))
        whole = "–" if kind in CHECKPOINTS else sum(entry["next save"] for entry in entries)
        numbers = [entries[0]["of"], how["killed"], how["failed"], left["old"], left["new"], left["neither"], whole]
        rows.append([kind, *numbers])
    return rows


def damages(seed: int, count: int | None) -> list[list[object]]:
    outcomes = ("clear error", "equal", *BAD)
    with tempfile.TemporaryDirectory() as scratch:
        told, bad = fuzz(Path(scratch), seed, count or 10_000)
    print("\n".join(bad))
    rows: list[list[object]] = [["damage", "checkpoints", *outcomes]]
    for name, counts in told.items():
        rows.append([name, sum(counts.values()), *(counts[outcome] for outcome in outcomes)])
    total = sum(told.values(), Counter())
    return [*rows, ["**all**", sum(total.values()), *(total[outcome] for outcome in outcomes)]]


def ranks(seed: int, count: int | None, ways: list[str], processes: list[int]) -> list[list[object]]:
    told = kills(ways, processes, seed, count or 20)
    rows: list[list[object]] = [["way", "processes", "killed", "others ended by themselves", "resumed, equal"]]
    for way in ways:
        for number in processes:
            mine = [entry for entry in told if (entry["way"], entry["processes"]) == (way, number)]
            died = [entry["outcome"] for entry in mine if entry["outcome"] != "outlived"]
            ended = sum(outcome != "others did not end by themselves" for outcome in died)
            rows.append([way, number, len(died), ended, sum(outcome == "equal" for outcome in died)])
    for entry in told:
        if entry["outcome"] not in ("equal", "outlived"):
            print(entry)
    return rows


def write(what: str, seed: int, rows: list[list[object]]) -> None:
    """Put a table between the marks of its own in the page."""
    revision = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    lines = [f"Seed {seed}, revision {revision}.", "", *("| " + " | ".join(map(str, row)) + " |" for row in rows)]
    lines.insert(3, "|" + "---|" * len(rows[0]))
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
    asked = parser.parse_args()
    if asked.what == "ranks":
        rows = ranks(asked.seed, asked.count, asked.ways, asked.processes)
    else:
        rows = {"saves": saves, "damages": damages}[asked.what](asked.seed, asked.count)
    write(asked.what, asked.seed, rows)


if __name__ == "__main__":
    main()
