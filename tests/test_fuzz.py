"""Damaged adapters: none is silently wrong, none hangs, and the fuzzer finds each fault whose mend is taken out."""

from __future__ import annotations
import __future__

import inspect
import re
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import corruptions
from corruptions import KINDS, Corruption, corruption
from fuzz import (
    BEGIN,
    CLEAR,
    END,
    EQUAL,
    FAILURES,
    HANG,
    OUTCOMES,
    TRACEBACK,
    WRONG,
    Adapter,
    attack,
    fuzz,
    make_adapters,
)
from quick import slow_but

PAGE = Path(__file__).parents[1] / "docs" / "trust.md"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    return {adapter.name: adapter for adapter in make_adapters(tmp_path_factory.mktemp("whole"))}


def test_no_damage_is_silently_wrong(adapters: dict[str, Adapter]) -> None:
    findings = [*fuzz([*adapters.values()], range(8 * len(KINDS)))]
    assert not [str(finding) for finding in findings if finding.outcome in FAILURES]
    seen = Counter(finding.outcome for finding in findings)
    assert seen[CLEAR] > 400, "most damage is found"
    assert seen[EQUAL] > 100, "and what harms nothing is no error"
    assert {finding.harm.kind for finding in findings} == {*KINDS}
    assert {finding.operation for finding in findings} >= {"verify_adapter", "inspect", "export --gguf"}


@pytest.mark.slow
def test_more_damages_of_every_kind_to_every_adapter(adapters: dict[str, Adapter]) -> None:
    # Ten thousand are a command, whose numbers docs/trust.md has.
    numbers = range(8 * len(KINDS), 24 * len(KINDS))
    findings = [*fuzz([*adapters.values()], numbers)]
    assert not [str(finding) for finding in findings if finding.outcome in FAILURES]
    assert {finding.harm.kind for finding in findings} == {*KINDS}
    assert len(findings) > 1_400


def test_a_corruption_is_its_seed(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    whole, other = adapters["paper"].whole, adapters["paper"].other

    def struck(harm: Corruption, name: str) -> tuple[str | None, dict[str, bytes]]:
        folder = Path(shutil.copytree(whole, tmp_path / name / "adapter"))
        done = harm.apply(folder, other)
        files = {file.name: file.read_bytes() for file in corruptions.files_of(folder)} if folder.is_dir() else {}
        return done, files

    whole_files = {file.name: file.read_bytes() for file in corruptions.files_of(whole)}
    for number in range(len(KINDS)):
        harm = corruption(number)
        first, again = struck(harm, f"{number}-first"), struck(harm, f"{number}-again")
        assert first == again, harm.name
        assert first[1] != whole_files, harm.name
    assert len({struck(Corruption(seed, "bytes flipped"), f"seed-{seed}")[0] for seed in range(5)}) == 5


# Mends taken out -----------------------------------------------------------------------------------------------------

MENDS: dict[str, tuple[str, str, str, str, str, str, str]] = {
    # Where something is taken out, its text and what stands there instead; the adapter, the kind of damage, a pattern
    # of what is done by it, and what comes of it.
    "the digest of tensors": (
        "aroma.tuner.state.require_files",
        "if found != digest:",
        "if False:",
        "paper",
        "tensors changed",
        r"adapter_model\.safetensors: doubled \(base_model\.model\.bert\.encoder",
        WRONG,
    ),
    "the copy of the configuration": (
        "aroma.saved._require_saved_config",
        "if now == then:",
        "if True:",
        "paper",
        "json value changed",
        r"adapter_config\.json: modules_to_save",
        WRONG,
    ),
    "the checksum of the state": (
        "aroma.tuner.state.require_checksum",
        "if state.get",
        "if False and state.get",
        "paper",
        "json value changed",
        r"controller\.global_step",
        WRONG,
    ),
    "the types of the state": (
        "aroma.tuner.state._require_layout",
        "if not fits:",
        "if False:",
        "paper",
        "hostile state",
        "processes='2'",
        TRACEBACK,
    ),
    "ranks and shapes of the state": (
        "aroma.saved._require_modules",
        "if expected.get(name) != found.get(name):",
        "if False:",
        "paper",
        "hostile state",
        "another shape",
        WRONG,
    ),
    "regular files only": (
        "aroma.files.require_regular_file",
        "if not stat.S_ISREG(mode):",
        "if False:",
        "start",
        "endless file",
        r"aroma_state\.json: a FIFO",
        HANG,
    ),
    "files of the folder only": (
        "aroma.files.own_file",
        "if not any(",
        "if False and not any(",
        "start",
        "symlink in its place",
        r"adapter_config\.json: a symlink to the same content",
        WRONG,
    ),
    "nested JSON": (
        "aroma.files.read_json",
        "except RecursionError as error:",
        "except ZeroDivisionError as error:",
        "start",
        "json replaced",
        r"aroma_state\.json: \[\[\[",
        TRACEBACK,
    ),
    "JSON that is none": (
        "aroma.files.read_json",
        "except ValueError as error:",
        "except ZeroDivisionError as error:",
        "start",
        "truncated",
        "aroma_state.json",
        TRACEBACK,
    ),
    "a configuration that is none": (
        "aroma.saved.read_config",
        'if not isinstance(config, dict) or "peft_type" not in config:',
        "if False:",
        "foreign",
        "json replaced",
        r"adapter_config\.json: \[\]",
        TRACEBACK,
    ),
    "safetensors that are none": (
        "aroma.files.read_tensors",
        "except (SafetensorError, KeyError, ValueError, RuntimeError, OverflowError)",
        "except ZeroDivisionError",
        "foreign",
        "safetensors header",
        r"adapter_model\.safetensors: a huge header",
        TRACEBACK,
    ),
    "NaN, infinity and integers": (
        "aroma.saved._require_numbers",
        "if remedy is not None:",
        "if False:",
        "foreign",
        "hostile tensors",
        "complex",
        TRACEBACK,
    ),
    "a limit of time for patterns": (
        "aroma.patterns.Patterns._matches",
        "regex.compile(pattern)",
        "__import__('corruptions').Unlimited(pattern)",
        "foreign",
        "hostile pattern",
        r"rank_pattern=\{'\(\[a-z0-9\._\]\*\)\*X'",
        HANG,
    ),
    "a word on missing state": (
        "aroma.export._tell_of_strangers",
        "if adapter.state is None:",
        "if False:",
        "paper",
        "deleted",
        r"^aroma_state\.json$",
        WRONG,
    ),
    "checked copies": (
        "aroma.export.copy_files",
        "own_file(source, file.name)",
        "file",
        "start",
        "symlink in its place",
        r"tokenizer_config\.json: a symlink to the same content",
        WRONG,
    ),
    "a place for every tensor": (
        "aroma.export.put_into",
        "except (ValueError, RuntimeError, KeyError)",
        "except ZeroDivisionError",
        "foreign",
        "tensors changed",
        r"one lost \(base_model\.model\.classifier",
        TRACEBACK,
    ),
}


@pytest.mark.parametrize("mend", slow_but(list(MENDS)[::3], MENDS))
def test_the_fuzzer_finds_what_a_mend_keeps_out(
    adapters: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch, mend: str
) -> None:
    where, text, instead, name, kind, done, outcome = MENDS[mend]
    adapters[name].expected  # noqa: B018  what the whole code makes of the whole adapter
    take_out(monkeypatch, where, text, instead)
    operations = ["inspect", "export --merged" if outcome == TRACEBACK else "export --uniform"]
    findings = attack(adapters[name], first_that(adapters[name], kind, done), 0.5, operations)
    assert outcome in [finding.outcome for finding in findings], [str(finding) for finding in findings]


def first_that(adapter: Adapter, kind: str, what: str) -> Corruption:
    """Return the first corruption of a kind that does what is wanted."""
    for seed in range(2000):
        folder = Path(shutil.copytree(adapter.whole, adapter.home / "tried" / "adapter"))
        try:
            if re.search(what, Corruption(seed, kind).apply(folder, adapter.other) or ""):
                return Corruption(seed, kind)
        finally:
            shutil.rmtree(folder.parent)
    raise AssertionError(f"no {kind} does {what!r}")


def take_out(monkeypatch: pytest.MonkeyPatch, where: str, text: str, instead: str) -> None:
    """Replace a text in the source of a function, wherever the function was imported to."""
    module_name = next(name for name in sorted(sys.modules, key=len, reverse=True) if where.startswith(f"{name}."))
    *classes, name = where.removeprefix(f"{module_name}.").split(".")
    holder: Any = sys.modules[module_name]
    for each in classes:
        holder = getattr(holder, each)
    function: Callable[..., Any] = getattr(holder, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(text) == 1, f"{where} has no {text!r}"
    made: dict[str, Any] = {}
    code = compile(source.replace(text, instead), where, "exec", flags=__future__.annotations.compiler_flag)
    exec(code, function.__globals__, made)
    monkeypatch.setattr(holder, name, made[name])
    for module in [module for key, module in sys.modules.items() if key.startswith("aroma")]:
        for key, value in [*vars(module).items()]:
            if value is function:
                monkeypatch.setattr(module, key, made[name])


# The page ------------------------------------------------------------------------------------------------------------


def test_the_page_tells_of_no_failure() -> None:
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert re.search(r"^10,000 corruptions: 400 seeds, counted from 0, of each of 25 kinds", text, flags=re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    head = rows[0]
    assert head[1:] == [*OUTCOMES]
    counted = [row for row in rows if len(row) == len(head) and row[1] != head[1]]
    assert {row[0] for row in counted} >= {*KINDS, "verify_adapter", "inspect", "export --merged", "export --uniform"}
    for row in counted:
        assert [row[head.index(outcome)] for outcome in FAILURES] == ["0"] * len(FAILURES), row
        assert sum(int(cell.replace(",", "")) for cell in row[1:]) > 100
