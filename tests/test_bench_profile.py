"""`aroma bench profile`: every operation has its kind, and the kinds make up the step."""

import json

import pytest

from aroma.cli import main
from aroma_lab.bench.operations import BETWEEN, KINDS, kind_of, operation_times
from aroma_lab.bench.settings import BenchSettings

TOKENS, WEIGHTS = 16, {(48, 32), (32, 32)}


@pytest.mark.parametrize(
    ("operation", "shapes", "kind"),
    [
        ("aten::addmm", [[48], [16, 32], [32, 48]], "backbone matmuls"),
        ("aten::mm", [[16, 48], [48, 32]], "backbone matmuls"),
        ("aten::mm", [[16, 32], [32, 9]], "narrow matmuls"),
        ("aten::addmm_", [[16, 48], [16, 9], [9, 48]], "narrow matmuls"),
        ("aten::mm", [[9, 16], [16, 32]], "narrow matmuls"),
        ("aten::addmm_", [[48, 32], [48, 9], [9, 32]], "folding"),
        ("aten::copy_", [[48, 32], [48, 32]], "folding"),
        ("aten::copy_", [[16, 32], [16, 32]], "other operations"),
        ("aten::addmm", [[2], [2, 32], [32, 2]], "backbone matmuls"),  # the head sees sequences, not tokens
        ("aten::bitwise_and_", [[64], [64]], "dropout mask"),
        ("aten::mul_", [[16, 32], [16, 32]], "dropout mask"),
        ("aten::copy_", [[16 * 48], [16 * 48]], "dropout mask"),
        ("aten::embedding", [[99, 32], [2, 8]], "other operations"),
        ("aten::mul", [[2, 8, 32], []], "other operations"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", [[2, 4, 8, 8]], "attention"),
        ("aten::gelu", [[2, 8, 48]], "other operations"),
    ],
)
def test_kinds(operation, shapes, kind):
    assert kind_of(operation, shapes, TOKENS, WEIGHTS) == kind


@pytest.fixture(scope="module")
def found():
    only = ("lora-r8", "aroma-0", "aroma-8-dropout")
    settings = BenchSettings(model="tiny", batch_size=2, length=9, rounds=2, warmup_rounds=1, peak=False, only=only)
    return {times.key: times.milliseconds for times in operation_times(settings)}


def test_every_case_has_all_kinds_and_only_times(found):
    assert list(found) == ["floor", "lora-r8", "aroma-0", "aroma-8-dropout"]
    for milliseconds in found.values():
        assert list(milliseconds) == [*KINDS, BETWEEN]
        assert min(milliseconds.values()) >= 0


def test_what_a_case_does_takes_time_and_what_it_does_not_takes_none(found):
    assert found["floor"]["narrow matmuls"] == found["floor"]["folding"] == found["floor"]["dropout mask"] == 0
    assert found["aroma-0"]["narrow matmuls"] > 0 == found["aroma-0"]["dropout mask"]
    assert found["lora-r8"]["narrow matmuls"] > 0
    assert found["aroma-8-dropout"]["dropout mask"] > 0
    assert all(milliseconds["backbone matmuls"] > 0 for milliseconds in found.values())


def test_the_command_leaves_a_table_and_a_file(tmp_path, capsys):
    out = tmp_path / "p.json"
    options = ["--model", "tiny", "--batch-size", "2", "--length", "9", "--rounds", "1", "--only", "aroma-0"]
    assert main(["bench", "profile", *options, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "narrow matmuls" in printed
    assert "aroma-0" in printed
    record = json.loads(out.read_text())
    assert set(record["milliseconds"]) == {"floor", "aroma-0"}
    assert record["provenance"]["versions"]
    assert main(["bench", "profile", *options, "--out", str(out)]) != 0
    assert "exists" in capsys.readouterr().err
