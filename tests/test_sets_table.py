"""The table of reported sets (Table 3): its numbers against ones worked out here, and what it says beside them."""

import csv
import io
import json
import re
import shutil
import statistics
from pathlib import Path

import pytest

from aroma.cli import main
from aroma.errors import CheckpointError, ConfigError
from aroma_lab.pictures.draw import Choice, draw_figure
from aroma_lab.report.kinds import KINDS, make_table
from aroma_lab.report.records import load_records
from aroma_lab.report.render import render
from made_up_runs import edit, write_grid, write_run, write_untrained_run

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
    return make_table(load_records(folder), "sets", **options)


def raw(folder, **options):
    """Return the CSV as rows by method."""
    return {row["method"]: row for row in csv.DictReader(io.StringIO(render(table_of(folder, **options), "csv")))}


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


def test_a_cell_worked_out_by_hand():
    # 1021 and 1045 of 2376: mean 1033, deviation 24 / sqrt(2).
    lora = next(row for row in table_of(FROZEN).rows if row[0].text == "lora-r8")
    assert lora[1].text == f"{100 * 1033 / 2376:.2f} ± {100 * 16.97 / 2376:.2f}" == "43.48 ± 0.71"


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
    turned = raw(FROZEN, baseline="aroma-r1")["lora-r8"]
    assert float(turned["difference"]) == -float(row["difference"])


def test_another_metric_can_be_shown():
    rows = raw(FROZEN, metric="accuracy_normalised")
    values = [reported("lora-r8", seed)["openbookqa"]["accuracy_normalised"] for seed in (0, 1)]
    assert float(rows["lora-r8"]["reasoning_openbookqa_mean"]) == pytest.approx(statistics.fmean(values))
    assert float(rows["lora-r8"]["average_mean"]) != float(raw(FROZEN)["lora-r8"]["average_mean"])
    caption = table_of(FROZEN, metric="accuracy_normalised").caption
    assert "Shown: accuracy_normalised (the candidate whose label has the highest mean log-probability" in caption
    assert "Shown: accuracy (the candidate whose label has the highest log-probability)" in table_of(FROZEN).caption


def test_survivors_of_a_failure_do_not_win_a_column():
    table = table_of(FROZEN)
    best = [(table.columns[i].title, row[0].text) for row in table.rows for i, cell in enumerate(row) if cell.is_best]
    assert best == [
        ("arc-easy", "lora-r8"),
        ("arc-challenge", "aroma-r1"),
        ("openbookqa", "aroma-r1"),
        ("average", "aroma-r1"),
    ]
    last = table.rows[-1]
    assert [last[i].text for i in (0, 4, 8)] == ["aroma-r8", "40.72 (1 of 2)", "+1.67 [no interval] (1 of 2 pairs)"]


def test_a_run_without_one_of_the_sets_has_no_average(grid):
    edit(results(grid, "lora-r8/seed-1")[0], lambda content: content["reported"].pop("openbookqa"))
    row = raw(grid)["lora-r8"]
    assert [row[f"{key}_seeds"] for key in ("reasoning_arc-easy", "reasoning_openbookqa", "average")] == [
        "2",
        "1",
        "1",
    ]
    assert raw(grid)["aroma-r1"]["difference_pairs"] == "1"


def test_sets_of_several_tasks_bear_the_tasks_name(tmp_path):
    write_grid(tmp_path, ["lora-r8"])
    write_run(tmp_path, "mnli", "lora-r8", 0, reported={"matched": {"accuracy": 0.5}, "mismatched": {"accuracy": 0.7}})
    write_run(tmp_path, "rte", "lora-r8", 0, reported={"validation": {"accuracy": 0.9}})
    table = table_of(tmp_path)
    titles = [column.title for column in table.columns[1:5]]
    assert titles == ["mnli: matched", "mnli: mismatched", "rte: validation", "average"]
    # Of the tasks, each the average of its sets: not that of the three sets, which is 0.7.
    assert [cell.text for cell in table.rows[0][1:5]] == ["50.00", "70.00", "90.00", "75.00"]
    assert "over the sets of a task, then over the tasks" in table.caption
    assert "Shown: accuracy of each set" in table.caption  # no questions, so nothing is ranked


def test_an_average_over_some_of_the_tasks_is_none(tmp_path):
    write_grid(tmp_path, ["lora-r8", "aroma"])
    for task, method in (("a", "lora-r8"), ("b", "lora-r8"), ("a", "aroma")):
        write_run(tmp_path, task, method, 0)
    average = {row[0].text: row[3].text for row in table_of(tmp_path).rows}
    assert average == {"lora-r8": "80.00", "aroma": "– (0 of 1)"}


# Beside the numbers


def test_what_nothing_trains_takes_no_parameters_and_no_choice():
    table = table_of(FROZEN)
    row = raw(FROZEN)["pretrained"]
    assert (row["initial_parameters"], row["average_parameters"]) == ("0.0", "0.0")
    assert "pretrained: nothing trains; the pretrained model as it is." in table.notes
    chosen = [note for note in table.notes if note.startswith(("Chosen", "Without a choice", "Not with"))]
    assert len(chosen) == 2
    assert not any("pretrained" in note for note in chosen)
    assert not any("pretrained: " in note and "stopped early" in note for note in table.notes)
    assert "head" not in table.caption.replace("held", "")


def test_without_a_choice_of_its_own_it_is_not_called_lacking(grid):
    edit(grid / "selection.json", lambda content: content["reasoning"].pop("pretrained"))
    assert table_of(grid).notes == table_of(FROZEN).notes


def test_failed_runs_are_listed():
    notes = table_of(FROZEN).notes
    assert any(note.startswith("Failed: reasoning/aroma-r8/seed-1: NonFiniteError: loss=nan") for note in notes)
    assert raw(FROZEN)["aroma-r8"]["failed"] == "reasoning/aroma-r8/seed-1"


def test_unfinished_runs_and_absent_ones_are_listed(grid):
    (grid / "runs" / "reasoning" / "lora-r8" / "seed-1" / "result.json").unlink()
    shutil.rmtree(grid / "runs" / "reasoning" / "aroma-r1" / "seed-0")
    notes = table_of(grid).notes
    assert "Not finished: reasoning/lora-r8/seed-1." in notes
    assert "Not begun: reasoning/aroma-r1, seed 0." in notes


def test_answers_that_could_not_be_read_are_told(grid):
    assert not any("could not be read" in note for note in table_of(grid).notes)
    for path in results(grid, "lora-r8/*"):
        edit(
            path,
            lambda content: [each.update(generated=0.4, unparseable=0.0) for each in content["reported"].values()],
        )
    for path, share in zip(results(grid, "pretrained/*"), (0.1, 0.2), strict=True):
        edit(path, lambda content, share=share: content["reported"]["openbookqa"].update(unparseable=share))
    expected = (
        "Written answers that could not be read, and count as wrong: pretrained: 15.00 % of openbookqa; lora-r8: none."
    )
    assert expected in table_of(grid).notes
    rows = raw(grid, metric="generated")
    assert float(rows["lora-r8"]["average_mean"]) == pytest.approx(0.4)
    assert rows["aroma-r1"]["average_mean"] == ""


def test_what_became_of_examples_is_told():
    assert any("1 prompts cut from the left" in note for note in table_of(FROZEN).notes)


@pytest.mark.parametrize("kind", ["main", "sets", "time"])
def test_every_table_of_all_methods_has_a_row_for_an_untrained_one(kind):
    rows = make_table(load_records(FROZEN), kind).rows
    assert [row[0].text for row in rows] == ["pretrained", "lora-r8", "aroma-r1", "aroma-r8"]


@pytest.mark.parametrize("kind", ["pareto", "curves"])
def test_figures_take_an_untrained_method(kind, tmp_path):
    write_grid(tmp_path, ["pretrained", "lora-r8"])
    write_run(tmp_path, "t", "lora-r8", 0)
    write_untrained_run(tmp_path, "t", 0)
    figure = draw_figure(kind, Choice(folders=(tmp_path,), task="t"))
    assert figure.axes


# Bad input


def test_a_metric_that_no_run_has_is_refused():
    with pytest.raises(
        ConfigError, match=r"--metric='f1': no run has it; give one of accuracy, accuracy_normalised, "
    ):
        table_of(FROZEN, metric="f1")


def test_the_share_of_unreadable_answers_is_no_metric(grid):
    for path in results(grid):
        edit(path, lambda content: [each.update(unparseable=0.5) for each in content["reported"].values()])
    with pytest.raises(ConfigError, match="--metric='unparseable': no run has it"):
        table_of(grid, metric="unparseable")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sets"])
def test_another_table_takes_no_metric(kind):
    with pytest.raises(ConfigError, match=f"--metric='accuracy': a table of kind {kind} shows"):
        make_table(load_records(FROZEN), kind, metric="accuracy")


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
        (lambda content: content["reported"].update(openbookqa=0.5), r"result\.json, reported\.openbookqa: edited"),
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
    assert re.search(r"^lora-r8 .*\b41\.71\b", printed, re.MULTILINE)  # 980 and 1002 of 2376
