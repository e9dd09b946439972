"""Searches: exactly N trials whoever runs them, every one on held-out data, and clear about what cannot work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aroma.cli import main
from aroma.errors import ConfigError, DataError
from aroma_lab.study.grid import make_grid
from aroma_lab.study.search import Search, run_search
from fake_trial import score_of
from study_files import RATE, output_of, real_grid, runs_in, search_values, start_command, write_yaml


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where stand-ins write the names of their trials."""
    return tmp_path / "log.txt"


def search_of(output: Path, **changes: Any) -> Search:
    return make_grid(search_values(output, **changes), Search)


def searched(output: Path, **changes: Any) -> list[dict[str, Any]]:
    return run_search(search_of(output, **changes), runner="fake_trial")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "space={}: give 1 trial or more, and a key of the space"),
        ({"space": {RATE: 1e-3}}, f"space.{RATE}=0.001: write {{low: 1e-4"),
        ({"space": {RATE: {"low": 1e-2, "high": 1e-3}}}, "'high': 0.001}: `low <= high`"),
        ({"space": {RATE: {"low": 0.1, "high": 0.55, "step": 0.1}}}, f"space.{RATE}={{'low': 0.1, 'high': 0.55"),
        ({"space": {"training.learning_rat": {"choices": [1]}}}, f"no such key; the nearest is 'space.{RATE}'"),
        ({"space": {RATE: {"low": -1.0, "high": 1.0}}}, f"{RATE}=-1.0: give a positive number"),
        ({"space": {"training.seed": {"choices": [0, 1]}}}, "space.training.seed=0: seeds are given by"),
        ({"tasks": {"a": {}, "b": {}}}, "tasks=['a', 'b']: a search has one task"),
        ({"sampler": "bayes"}, "sampler='bayes': give one of random, tpe"),
        ({"trails": 5}, "trails=5: a search has no such key; the nearest is 'trials'"),
    ],
    ids=str,
)
def test_a_search_file_that_cannot_work_is_one_clear_error(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as raised:
        search_of(tmp_path, **changes)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_search_runs_each_trial_once_and_more_trials_run_only_what_is_new(tmp_path: Path, log: Path) -> None:
    out = tmp_path / "out"
    found = searched(out)
    assert sorted(runs_in(log).items()) == [(f"search/{n:04d}", 1) for n in range(4)]
    rates = [one["values"][RATE] for one in found]
    assert len(set(rates)) == 4
    assert all(1e-5 <= rate <= 1e-1 for rate in rates)
    assert [one["score"] for one in found] == sorted(map(score_of, rates), reverse=True)
    record = json.loads((out / "search.json").read_text())
    assert record["scored_on"] == "held_out"
    assert record["tried"] == found
    for entry in found:
        trial = json.loads((out / "runs" / entry["name"] / "trial.json").read_text())
        assert (trial["purpose"], trial["training"]["learning_rate"]) == ("select", entry["values"][RATE])

    assert run_search(search_of(out)) == found, "a finished search needs no data"
    with pytest.raises(DataError, match=r"^tasks\.mine\.train='absent\.jsonl'"):
        run_search(search_of(out, trials=5))
    assert {*rates} < {one["values"][RATE] for one in searched(out, trials=5)}
    assert list(runs_in(log).values()) == [1] * 5
    with pytest.raises(
        ConfigError, match=r"search\.json there is of a search with another training\.max_steps, sampl"
    ):
        searched(out, sampler="tpe", training={"max_steps": 20, "warmup_steps": 1})
    with pytest.raises(ConfigError, match=r"methods\.lora-r8: .*rr"):
        run_search(search_of(tmp_path / "bad", space={"options.rr": {"choices": [1, 2]}}))
    assert not (tmp_path / "bad").exists()


def test_random_points_depend_on_the_seed_alone_and_tpe_learns_and_tries_no_place_twice(
    tmp_path: Path, log: Path
) -> None:
    one, two = searched(tmp_path / "one", processes=1), searched(tmp_path / "two", processes=3)
    assert one == two
    other = searched(tmp_path / "three", seeds=[1])
    assert {found["values"][RATE] for found in one}.isdisjoint(found["values"][RATE] for found in other)
    found = searched(tmp_path / "tpe", sampler="tpe", trials=30, processes=2)
    assert len({one["values"][RATE] for one in found}) == 30
    early, late = ([one["score"] for one in found if (int(one["name"][-4:]) < 10) == is_early] for is_early in (1, 0))
    assert sum(late) / 20 > sum(early) / 10


def test_two_commands_share_a_search_and_a_killed_trial_keeps_its_values(tmp_path: Path, log: Path) -> None:
    methods = {"x": {"kind": "x", "until": "absent"}}
    space = {"options.fail": {"choices": [None, "raise", "kill once"]}, RATE: {"low": 1e-5, "high": 1e-1}}
    values = search_values(tmp_path / "out", trials=12, methods=methods, space=space)
    file = write_yaml(tmp_path / "search.yaml", values)
    commands = [start_command(file, seconds=0.1) for _ in range(2)]
    assert [output_of(command) for command in commands] == ["", ""]
    tried = json.loads((tmp_path / "out" / "search.json").read_text())["tried"]
    assert len(tried) == 12
    assert {entry["values"]["options.fail"] for entry in tried} == {None, "raise", "kill once"}
    for entry in tried:
        how = entry["values"]["options.fail"]
        assert entry["error"] == ("DataError: no such file" if how == "raise" else None)
        assert runs_in(log)[entry["name"]] == (2 if how == "kill once" else 1)


@pytest.mark.slow
def test_the_command_trains_for_real_and_never_opens_what_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora, training = {"lora": {"kind": "lora", "r": 2}}, {"max_steps": 12, "batch_size": 8, "warmup_steps": 1}
    file = real_grid(tmp_path, "out", methods=lora, training=training, space={RATE: {"choices": [1e-6, 5e-2]}})
    (tmp_path / "test.jsonl").write_text("not to be read\n")
    assert main(["lab", "search", str(file), "--trials", "3"]) == 0
    tried = json.loads((tmp_path / "out" / "search.json").read_text())["tried"]
    assert "3 trials finished, 0 failed." in capsys.readouterr().out
    for entry in tried:
        result = json.loads((tmp_path / "out" / "runs" / entry["name"] / "result.json").read_text())
        assert (result["score"], result["reported"]) == (entry["score"], {})
        assert result["examples"] == {"train": 180, "held_out": 20}
