"""The table of reported sets (Table 3): its numbers against ones worked out here, and what it says beside them."""

import csv
import io
import json
import shutil
import statistics
from pathlib import Path

import pytest

from aroma.cli import main
from aroma.errors import CheckpointError, ConfigError
from aroma_lab.report.formats import to_csv
from aroma_lab.report.runs import read_runs
from aroma_lab.report.tables import KINDS, make_table
from made_up_runs import edit, write_grid, write_run

FROZEN = Path(__file__).parent / "golden" / "sets"
"""Made-up runs: pretrained, LoRA and AROMA on three sets, two seeds; one of AROMA r = 8 has failed."""
SETS = {"arc-easy": 2376, "arc-challenge": 1172, "openbookqa": 500}


@pytest.fixture
def grid(tmp_path):
    """A copy of the frozen runs that a test may change."""
    return Path(shutil.copytree(FROZEN, tmp_path / "grid"))


def results(folder, pattern="*/seed-*"):
    return sorted(folder.glob(f"runs/reasoning/{pattern}/result.json"))


def table_of(folder, **options):
    return make_table(read_runs(folder), "sets", **options)


def raw(folder, **options):
    """Return the CSV as rows by method."""
    return {row["method"]: row for row in csv.DictReader(io.StringIO(to_csv(table_of(folder, **options))))}


def reported(method, seed):
    path = FROZEN / "runs" / "reasoning" / method / f"seed-{seed}" / "result.json"
    return json.loads(path.read_text())["reported"]


# Numbers


def test_every_set_has_its_mean_and_deviation():
    rows = raw(FROZEN)
    assert list(rows) == ["pretrained", "lora-r8", "aroma-r1", "aroma-r8"]
    for method in ("pretrained", "lora-r8", "aroma-r1"):
        for name in SETS:
            values = [reported(method, seed)[name]["accuracy"] for seed in (0, 1)]
            assert float(rows[method][f"reasoning_{name}_mean"]) == pytest.approx(sum(values) / 2, rel=1e-12)
            deviation = abs(values[0] - values[1]) / 2**0.5
            assert float(rows[method][f"reasoning_{name}_std"]) == pytest.approx(deviation, rel=1e-9, abs=1e-15)


def test_the_average_is_over_sets_within_a_run_and_not_over_questions():
    runs = [statistics.fmean(found["accuracy"] for found in reported("lora-r8", seed).values()) for seed in (0, 1)]
    row = raw(FROZEN)["lora-r8"]
    assert float(row["average_mean"]) == pytest.approx(statistics.fmean(runs), rel=1e-12)
    assert float(row["average_std"]) == pytest.approx(statistics.stdev(runs), rel=1e-9)
    right = sum(reported("lora-r8", 0)[name]["accuracy"] * count for name, count in SETS.items())
    assert abs(right / sum(SETS.values()) - runs[0]) > 0.005


def test_the_difference_is_that_of_the_averages_seed_by_seed():
    def average(method, seed):
        return statistics.fmean(values["accuracy"] for values in reported(method, seed).values())

    differences = [average("aroma-r1", seed) - average("lora-r8", seed) for seed in (0, 1)]
    row = raw(FROZEN)["aroma-r1"]
    assert float(row["difference"]) == pytest.approx(statistics.fmean(differences), rel=1e-12)
    # Of two pairs a resample has the lower one, the mean, or the higher one, with probability 1/4, 1/2, 1/4.
    assert float(row["difference_low"]) == pytest.approx(min(differences), rel=1e-12)
    assert float(row["difference_high"]) == pytest.approx(max(differences), rel=1e-12)
    assert row["difference_pairs"] == "2"


def test_another_metric_can_be_shown():
    rows = raw(FROZEN, metric="accuracy_normalised")
    values = [reported("lora-r8", seed)["openbookqa"]["accuracy_normalised"] for seed in (0, 1)]
    assert float(rows["lora-r8"]["reasoning_openbookqa_mean"]) == pytest.approx(statistics.fmean(values))
    caption = table_of(FROZEN, metric="accuracy_normalised").caption
    assert "Shown: accuracy_normalised (the candidate whose label has the highest mean log-probability" in caption
    assert "Shown: accuracy (the candidate whose label has the highest log-probability)" in table_of(FROZEN).caption


def test_survivors_of_a_failure_do_not_win_a_column():
    table = table_of(FROZEN)
    best = {table.shown.columns[column]: table.shown.method[row] for row, column in table.best}
    assert best == {
        "arc-easy": "lora-r8",
        "arc-challenge": "aroma-r1",
        "openbookqa": "aroma-r1",
        "average": "aroma-r1",
    }
    last = table.shown.iloc[-1]
    assert [last.iloc[i] for i in (0, 4, 8)] == ["aroma-r8", "40.72 (1 of 2)", "+1.67 [no interval] (1 of 2 pairs)"]


def test_a_run_without_one_of_the_sets_has_no_average(grid):
    edit(results(grid, "lora-r8/seed-1")[0], lambda content: content["reported"].pop("openbookqa"))
    rows = raw(grid)
    keys = ("reasoning_arc-easy", "reasoning_openbookqa", "average")
    assert [rows["lora-r8"][f"{key}_seeds"] for key in keys] == ["2", "1", "1"]
    assert rows["aroma-r1"]["difference_pairs"] == "1"


def test_sets_of_several_tasks_bear_the_tasks_name(tmp_path):
    write_grid(tmp_path, ["lora-r8", "aroma"])
    write_run(tmp_path, "mnli", "lora-r8", 0, reported={"matched": {"accuracy": 0.5}, "mismatched": {"accuracy": 0.7}})
    write_run(tmp_path, "rte", "lora-r8", 0, reported={"validation": {"accuracy": 0.9}})
    write_run(tmp_path, "rte", "aroma", 0, reported={"validation": {"accuracy": 0.9}})
    table = table_of(tmp_path)
    # Of the tasks, each the average of its sets: not that of the three sets, which is 0.7.
    expected = {"mnli: matched": "50.00", "mnli: mismatched": "70.00", "rte: validation": "90.00", "average": "75.00"}
    assert table.shown.iloc[0, 1:5].to_dict() == expected
    assert table.shown["average"][1] == "– (0 of 1)", "an average over some of the tasks is none"
    assert "over the sets of a task, then over the tasks" in table.caption
    assert "Shown: accuracy of each set" in table.caption  # no questions, so nothing is ranked


# Beside the numbers


def test_what_nothing_trains_takes_no_parameters_and_no_choice(grid):
    table, row = table_of(FROZEN), raw(FROZEN)["pretrained"]
    assert (row["initial_parameters"], row["average_parameters"]) == ("0.0", "0.0")
    assert "pretrained: nothing trains; the pretrained model as it is." in table.notes
    chosen = [note for note in table.notes if note.startswith(("Chosen", "Without a choice", "Not with"))]
    assert len(chosen) == 2
    assert not any("pretrained" in note for note in chosen)
    assert "head" not in table.caption.replace("held", "")
    edit(grid / "selection.json", lambda content: content["reasoning"].pop("pretrained"))
    assert table_of(grid).notes == table.notes


def test_failed_runs_and_cut_examples_are_listed():
    notes = table_of(FROZEN).notes
    assert any(note.startswith("Failed: reasoning/aroma-r8/seed-1: NonFiniteError: loss=nan") for note in notes)
    assert any("1 prompts cut from the left" in note for note in notes)


def test_answers_that_could_not_be_read_are_told(grid):
    assert not any("could not be read" in note for note in table_of(grid).notes)
    for path in results(grid, "lora-r8/*"):
        edit(path, lambda content: [e.update(generated=0.4, unparseable=0.0) for e in content["reported"].values()])
    for path, share in zip(results(grid, "pretrained/*"), (0.1, 0.2), strict=True):
        edit(path, lambda content, share=share: content["reported"]["openbookqa"].update(unparseable=share))
    expected = (
        "Written answers that could not be read, and count as wrong: pretrained: 15.00 % of openbookqa; lora-r8: none."
    )
    assert expected in table_of(grid).notes
    rows = raw(grid, metric="generated")
    assert float(rows["lora-r8"]["average_mean"]) == pytest.approx(0.4)
    assert rows["aroma-r1"]["average_mean"] == ""
    with pytest.raises(ConfigError, match="--metric='unparseable': no run has it"):
        table_of(grid, metric="unparseable")


# Bad input


def test_a_metric_that_no_run_has_is_refused():
    with pytest.raises(
        ConfigError, match=r"--metric='f1': no run has it; give one of accuracy, accuracy_normalised, "
    ):
        table_of(FROZEN, metric="f1")
    for kind in KINDS:
        if kind != "sets":
            with pytest.raises(ConfigError, match=f"--metric='accuracy': a table of kind {kind} shows"):
                make_table(read_runs(FROZEN), kind, metric="accuracy")


def test_runs_that_report_nothing_are_refused(grid):
    for path in results(grid):
        edit(path, lambda content: content.update(reported={}))
    with pytest.raises(ConfigError, match="--kind='sets': no run with a reported set has finished"):
        table_of(grid)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("reported"), r"result\.json: edited, or of another version: reported missing"),
        (lambda content: content.update(reported=[1]), r"result\.json, reported: edited"),
        (lambda content: content["reported"].update(openbookqa=0.5), r"result\.json, reported, openbookqa: edited"),
    ],
)
def test_an_edited_result_is_refused(change, message, grid):
    edit(results(grid)[0], change)
    with pytest.raises(CheckpointError, match=message):
        table_of(grid)


def test_the_command_prints_it(capsys):
    assert main(["lab", "table", str(FROZEN), "--kind", "sets", "--metric", "accuracy_per_character"]) == 0
    printed = capsys.readouterr().out
    assert "accuracy_per_character" in printed
    line = next(line for line in printed.splitlines() if line.startswith("lora-r8"))
    assert "41.71" in line  # 980 and 1002 of 2376
