"""Damaged checkpoints: a clear error or the uninterrupted run, nothing else; see `resume_fuzz`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import aroma.checkpoint
from resume_fuzz import NAMES, Fuzzer, counted, damages


def test_damaged_checkpoints_are_refused_or_harmless(tmp_path: Path) -> None:
    told, bad = counted(damages(tmp_path, 0, range(2 * len(NAMES))))
    assert not bad, "\n".join(bad)
    assert sum(counts["clear error"] for counts in told.values()) > 30


@pytest.mark.slow
def test_more_damaged_checkpoints_are_refused_or_harmless(tmp_path: Path) -> None:
    # Ten thousand are a command, whose numbers docs/trust.md has.
    told, bad = counted(damages(tmp_path, 1, range(7 * len(NAMES))))
    assert not bad, "\n".join(bad)
    assert all(sum(counts.values()) > 5 for name, counts in told.items() if not name.startswith("hostile")), told
    assert sum(counts["equal"] for counts in told.values()) > 5


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    return Fuzzer(tmp_path_factory.mktemp("fuzzer"))


@pytest.mark.parametrize(
    ("mend", "kind", "seeds", "found"),
    [
        # The digests: a state of another step is resumed without a word.
        ("_require_file", "state of torch edited", range(6), "silently wrong"),
        ("_require_file", "file of another step", range(6), "silently wrong"),
        ("_require_file", "truncated", range(12), "unrelated traceback"),
        # What nobody saved is loaded in place of the adapter.
        ("_LOADED", "file that nobody saved", range(6), "unrelated traceback"),
    ],
)
@pytest.mark.slow
def test_the_fuzzer_finds_what_a_mend_prevents(
    fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch, mend: str, kind: str, seeds: range, found: str
) -> None:
    class Never:
        def fullmatch(self, name: str) -> None:
            return None

    without: dict[str, Any] = {
        "_require_file": lambda *_: None,
        "_LOADED": Never(),
    }
    with monkeypatch.context() as patch:
        patch.setattr(aroma.checkpoint, mend, without[mend])
        outcomes = [result[0] for seed in seeds if (result := fuzzer.outcome(kind, seed))]
    assert found in outcomes, outcomes
    again = [result[0] for seed in seeds if (result := fuzzer.outcome(kind, seed))]
    assert set(again) <= {"clear error", "equal"}, again
