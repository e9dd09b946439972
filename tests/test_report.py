"""Tables of runs: every number against one worked out here, every table stable to the character."""

import argparse
import csv
import io
import itertools
import json
import re
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest
import yaml

from aroma.errors import CheckpointError, ConfigError
from aroma_lab.cli import lab_table
from aroma_lab.report import formats
from aroma_lab.report.inner_table import Loop, loops_of, predicted_step
from aroma_lab.report.kinds import KINDS, make_table
from aroma_lab.report.records import load_records
from aroma_lab.report.render import FORMATS, SUFFIXES, render
from aroma_lab.report.stats import Spread, paired_difference
from aroma_lab.report.table import Cell, Column, Table, mark_best
from aroma_lab.report.time_table import epoch_seconds
from made_up_runs import edit

GOLDEN = Path(__file__).parent / "golden"
FROZEN = GOLDEN / "lab"
"""Made-up runs: five methods, two tasks, three seeds; one has failed, one is unfinished, one has not begun."""
OF_SETS = GOLDEN / "sets"
"""Made-up runs of a language model: four methods, one of them untrained, on three sets, two seeds; one has failed."""


@pytest.fixture
def grid(tmp_path):
    """A copy of the frozen runs that a test may change."""
    return Path(shutil.copytree(FROZEN, tmp_path / "grid"))


def edit_result(grid, name, **values):
    edit(grid / "runs" / name / "result.json", lambda content: content.update(values))


def raw(folder, kind="main", baseline=None):
    """Return the CSV as rows by method (the first of several), each a mapping from heads to texts."""
    rows = list(csv.DictReader(io.StringIO(render(make_table(load_records(folder), kind, baseline), "csv"))))
    return {row["method"]: row for row in reversed(rows)}


def notes(folder, kind="main"):
    return make_table(load_records(folder), kind).notes


def scores(folder, method):
    return {
        (result["task"], result["seed"]): result["score"]
        for path in sorted(folder.glob("runs/*/*/*/result.json"))
        if (result := json.loads(path.read_text()))["method"] == method and result["purpose"] == "report"
    }


# Stable to the character. To make them anew: aroma lab table tests/golden/lab --kind KIND --out tests/golden/tables/…
# (and tests/golden/sets for the kind `sets`).


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tables_are_those_on_record(kind, suffix):
    frozen = OF_SETS if kind == "sets" else FROZEN
    rendered = render(make_table(load_records(frozen), kind), SUFFIXES[suffix])
    assert rendered == (GOLDEN / "tables" / f"{kind}{suffix}").read_text(encoding="utf-8")


def test_every_kind_is_on_record_in_every_format():
    assert set(SUFFIXES.values()) == set(FORMATS)
    expected = {f"{kind}{suffix}" for kind in KINDS for suffix in SUFFIXES}
    assert {path.name for path in (GOLDEN / "tables").iterdir()} == expected
    assert len(expected) == 24


def test_a_folder_that_was_moved_or_has_adapters_and_checkpoints_gives_the_same_tables(grid):
    for place in grid.glob("runs/*/*/*"):
        (place / "adapter").mkdir()
        (place / "adapter" / "adapter_config.json").write_text("{}")
        (place / "checkpoints" / "checkpoint-100").mkdir(parents=True)
    for kind in KINDS:
        assert make_table(load_records(grid), kind) == make_table(load_records(FROZEN), kind)


# Table 2


def test_means_and_deviations_are_those_of_the_runs():
    rows = raw(FROZEN)
    assert list(rows) == ["aroma-no-reset", "aroma", "adalora-r8", "lora-r8", "head-only"]
    for method, row in rows.items():
        found = scores(FROZEN, method)
        for task in ("mrpc", "rte"):
            of_task = [score for (name, _), score in found.items() if name == task]
            assert int(row[f"{task}_seeds"]) == len(of_task)
            assert float(row[f"{task}_mean"]) == pytest.approx(sum(of_task) / len(of_task), rel=1e-12)
            if len(of_task) > 1:
                mean = sum(of_task) / len(of_task)
                variance = sum((score - mean) ** 2 for score in of_task) / (len(of_task) - 1)
                assert float(row[f"{task}_std"]) == pytest.approx(variance**0.5, rel=1e-9)
            else:
                assert row[f"{task}_std"] == ""
        assert float(row["average"]) == pytest.approx((float(row["mrpc_mean"]) + float(row["rte_mean"])) / 2)


def test_a_cell_worked_out_by_hand():
    # 1392, 1380 and 1401 of 1725: mean 1391, deviation sqrt((1 + 121 + 100) / 2) = 10.536.
    table = make_table(load_records(FROZEN))
    lora = next(row for row in table.rows if row[0].text == "lora-r8")
    assert lora[1].text == f"{100 * 1391 / 1725:.2f} ± {100 * 10.536 / 1725:.2f}" == "80.64 ± 0.61"


def test_the_difference_is_paired_by_task_and_seed():
    ours, theirs = scores(FROZEN, "adalora-r8"), scores(FROZEN, "lora-r8")
    assert ("rte", 2) not in ours
    by_task = [
        statistics.fmean(ours[task, seed] - theirs[task, seed] for name, seed in ours if name == task)
        for task in ("mrpc", "rte")
    ]
    row = raw(FROZEN)["adalora-r8"]
    assert float(row["difference"]) == pytest.approx(statistics.fmean(by_task), rel=1e-12)
    assert row["difference_pairs"] == "5"
    assert float(row["difference_low"]) <= float(row["difference"]) <= float(row["difference_high"])


def test_the_baseline_differs_from_itself_by_exactly_nothing():
    row = raw(FROZEN)["lora-r8"]
    assert (row["difference"], row["difference_low"], row["difference_high"]) == ("0.0", "0.0", "0.0")
    assert "0.00 [0.00, 0.00]" in render(make_table(load_records(FROZEN)), "text")


def test_a_single_seed_has_no_interval_and_the_table_says_so():
    table = make_table(load_records(FROZEN))
    row = raw(FROZEN)["aroma-no-reset"]
    assert row["difference_low"] == row["difference_high"] == ""
    assert row["difference"] != ""
    assert any(
        note.startswith("No interval for aroma-no-reset: a single seed shared with lora-r8 on rte")
        for note in table.notes
    )


def test_on_each_task_the_difference_is_that_of_its_seeds():
    ours, theirs = scores(FROZEN, "aroma"), scores(FROZEN, "lora-r8")
    row, whole = raw(FROZEN, "paired")["aroma"], raw(FROZEN)["aroma"]
    for task in ("mrpc", "rte"):
        differences = [ours[task, seed] - theirs[task, seed] for seed in range(3)]
        assert float(row[f"{task}_difference"]) == pytest.approx(statistics.fmean(differences), rel=1e-12)
        assert min(differences) <= float(row[f"{task}_difference_low"]) <= float(row[f"{task}_difference_high"])
        assert row[f"{task}_difference_pairs"] == "3"
    assert sum(float(row[f"{task}_difference"]) for task in ("mrpc", "rte")) / 2 == pytest.approx(
        float(whole["difference"]), rel=1e-12
    )


def test_a_method_is_better_where_its_whole_interval_is_above_zero():
    rows = raw(FROZEN, "paired")
    assert "lora-r8" not in rows
    for method, row in rows.items():
        intervals = [
            (float(row[f"{task}_difference_low"]), float(row[f"{task}_difference_high"]))
            for task in ("mrpc", "rte")
            if row[f"{task}_difference_low"]
        ]
        assert int(row["better"]) == sum(low > 0 for low, _ in intervals), method
        assert int(row["worse"]) == sum(high < 0 for _, high in intervals), method
        assert sum(int(row[verdict]) for verdict in ("better", "tied", "worse")) == len(intervals), method
    assert int(rows["head-only"]["worse"]) == 2
    assert int(rows["aroma"]["tied"]) > 0
    assert int(rows["aroma-no-reset"]["worse"]) + int(rows["aroma-no-reset"]["tied"]) == 1


def test_differences_need_a_baseline(grid):
    for task in ("mrpc", "rte"):
        shutil.rmtree(grid / "runs" / task / "lora-r8")
    with pytest.raises(ConfigError, match=r"^--baseline=None: a table of differences compares two methods"):
        make_table(load_records(grid), "paired")


def test_another_baseline_turns_the_difference_round():
    there, back = raw(FROZEN, baseline="lora-r8")["aroma"], raw(FROZEN, baseline="aroma")["lora-r8"]
    assert float(there["difference"]) == -float(back["difference"])
    assert float(there["difference"]) != 0


def test_without_the_default_baseline_there_is_no_comparison(grid):
    for task in ("mrpc", "rte"):
        shutil.rmtree(grid / "runs" / task / "lora-r8")
    assert "difference" not in raw(grid)["aroma"]
    with pytest.raises(
        ConfigError, match=r"--baseline='lora-r8': no run of it has finished; give one of head-only, ada"
    ):
        make_table(load_records(grid), baseline="lora-r8")


def test_failed_unfinished_and_absent_runs_are_listed_in_every_format():
    table = make_table(load_records(FROZEN))
    for form in ("text", "markdown", "latex"):
        words = re.sub(r"\s+", " ", render(table, form).replace("\\", ""))
        assert "Failed: rte/adalora-r8/seed-2: NonFiniteError: loss=nan: training has diverged; lower" in words
        assert "runs/rte/adalora-r8/seed-2/failure.json" in words
        assert "Not finished: rte/aroma-no-reset/seed-1." in words
        assert "Not begun: rte/aroma-no-reset, seed 2." in words
    rows = raw(FROZEN)
    assert rows["adalora-r8"]["failed"] == "rte/adalora-r8/seed-2"
    assert rows["aroma"]["failed"] == ""
    assert (rows["adalora-r8"]["rte_seeds"], rows["adalora-r8"]["planned_seeds"]) == ("2", "3")


def test_a_failed_choice_is_listed_too(grid):
    place = next((grid / "runs" / "select" / "mrpc" / "lora-r8").iterdir())
    (place / "result.json").unlink()
    (place / "failure.json").write_text(json.dumps({"error": "MemoryError", "message": "none left"}))
    assert any(
        note.startswith(f"Failed: select/mrpc/lora-r8/{place.name}: MemoryError: none left") for note in notes(grid)
    )


def test_a_method_that_only_failed_keeps_its_row(grid):
    for result in grid.glob("runs/*/aroma/*/result.json"):
        result.unlink()
        (result.parent / "failure.json").write_text(json.dumps({"error": "ValueError", "message": "no"}))
    table = make_table(load_records(grid))
    row = next(row for row in table.rows if row[0].text == "aroma")
    assert row[1].text == "– (0 of 3)"
    assert sum(note.startswith("Failed: ") for note in table.notes) == 7


def test_a_run_that_succeeded_after_a_failure_counts(grid):
    place = grid / "runs" / "mrpc" / "aroma" / "seed-0"
    (place / "failure.json").write_text(json.dumps({"error": "ValueError", "message": "no"}))
    assert make_table(load_records(grid)) == make_table(load_records(FROZEN))


def test_survivors_of_a_failure_do_not_win_a_column():
    table = make_table(load_records(FROZEN))
    best = [
        (table.columns[i].keys[0], row[0].text) for row in table.rows for i, cell in enumerate(row) if cell.is_best
    ]
    # AdaLoRA's two surviving seeds on RTE have the higher mean.
    rows = raw(FROZEN)
    assert max(rows, key=lambda method: float(rows[method]["rte_mean"])) == "adalora-r8"
    # 180 + 176 + 182 and 179 + 181 + 178 right answers are the same number.
    assert best == [("rte_mean", "lora-r8"), ("mrpc_mean", "aroma"), ("rte_mean", "aroma"), ("average", "aroma")]


def test_ties_as_printed_are_both_the_best():
    cells = [
        Cell("80.00 ± 1.00", (0.80001,)),
        Cell("80.00 ± 0.10", (0.79999,)),
        Cell("79.99", (0.7999,)),
        Cell("–", (None,)),
    ]
    assert [cell.is_best for cell in mark_best(cells, [3, 3, 3, 0])] == [True, True, False, False]
    assert [cell.is_best for cell in mark_best(cells, [2, 3, 3, 0])] == [False, True, False, False]
    assert not any(cell.is_best for cell in mark_best(cells[2:], [3, 0]))
    below_zero = [Cell("−1.00", (-0.01,)), Cell("−2.00", (-0.02,))]
    assert [cell.is_best for cell in mark_best(below_zero, [3, 3])] == [True, False]


# The caption's protocol and the notes on what was not alike


def test_the_caption_says_how_it_was_measured():
    caption = make_table(load_records(FROZEN)).caption
    for words in (
        "over 3 seeds (0, 1, 2)",
        "mrpc: accuracy on all 1,725 of test; trained on 3,301 examples, 367 held out of training.",
        "rte: accuracy on all 277 of validation; trained on 2,241 examples, 249 held out of training.",
        "600 steps of 32 examples in bf16 mixed precision.",
        "Weights: those of the last step.",
        "training.learning_rate, among 0.0005, 0.001 and 0.002, by the score on held-out training examples (of equal "
        "scores the lower loss) in runs of 200 steps, seed 100; none of them saw a reported example.",
        "percentiles of 10,000 resamples",
        "With 3 seeds such an interval is narrower than it should be.",
    ):
        assert words in caption


def test_two_reported_splits_are_both_named(grid):
    for result in grid.glob("runs/rte/*/*/result.json"):
        edit(
            result, lambda content: content.update(examples={"train": 9, "held_out": 1, "matched": 4, "mismatched": 5})
        )
    assert (
        "rte: accuracy on all 4 of matched and 5 of mismatched; trained on 9" in make_table(load_records(grid)).caption
    )


def test_without_a_selection_the_caption_says_so(grid):
    (grid / "selection.json").unlink()
    table = make_table(load_records(grid))
    assert "Nothing was chosen by these runs" in table.caption
    assert any(note.startswith("Different training.learning_rate on rte: ") for note in table.notes)
    assert not any(note.startswith("Different training.learning_rate") for note in notes(FROZEN))


def test_weights_of_the_best_evaluation_are_called_so(grid):
    for trial in grid.glob("runs/mrpc/*/*/trial.json"):
        edit(trial, lambda content: content["training"].update(checkpoint="best"))
    table = make_table(load_records(grid))
    assert (
        "Weights: those of the best evaluation on held-out training examples and those of the last step."
        in table.caption
    )
    edit(
        grid / "runs" / "mrpc" / "aroma" / "seed-0" / "trial.json",
        lambda content: content["training"].pop("checkpoint"),
    )
    assert any(note.startswith("Different training.checkpoint on mrpc: best (") for note in notes(grid))


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ({"git_revision": "abc+changes"}, "Made with a source that was edited after its revision: rte/aroma/seed-0."),
        (
            {"git_revision": "abc"},
            r"Different git_revision: 0123456789abcdef\w+ \(26 runs\); abc \(rte/aroma/seed-0\).",
        ),
        ({"cpu_count": 64}, r"Different cpu_count: 2 \(26 runs\); 64 \(rte/aroma/seed-0\)."),
        ({"planned_steps": 700}, r"Different planned steps on rte: 600 \(.*\); 700 \(aroma\)."),
        ({"metric": "f1"}, r"Different metric on rte: accuracy \(.*\); f1 \(aroma\)."),
    ],
    ids=str,
)
def test_runs_that_were_not_made_alike_are_noted(values, note, grid):
    edit_result(grid, "rte/aroma/seed-0", **values)
    found = set(notes(grid)) - set(notes(FROZEN))
    assert any(re.fullmatch(note, one) for one in found), found


def test_other_versions_and_threads_are_noted():
    assert "Different torch: 2.13.0+cpu (26 runs); 2.12.1+cpu (mrpc/head-only/seed-2)." in notes(FROZEN)
    assert "Different threads: 1 (26 runs); 2 (mrpc/head-only/seed-2)." in notes(FROZEN)


def test_another_batch_or_length_is_noted_but_not_another_seed(grid):
    trial = grid / "runs" / "rte" / "lora-r8" / "seed-1" / "trial.json"
    edit(trial, lambda content: (content["training"].update(batch_size=16), content["task"].update(max_length=64)))
    found = " ".join(notes(grid))
    assert "Different training.batch_size on rte: 32 (" in found
    assert "; 16 (lora-r8)." in found
    assert "Different task.max_length on rte: 128 (" in found
    assert "seed on" not in found


def test_a_run_without_the_chosen_value_is_noted(grid):
    trial = grid / "runs" / "rte" / "lora-r8" / "seed-1" / "trial.json"
    edit(trial, lambda content: content["training"].update(learning_rate=0.3))
    assert "Not with the chosen values: rte/lora-r8/seed-1." in notes(grid)
    assert not any(note.startswith("Not with the chosen") for note in notes(FROZEN))


def test_a_method_that_nothing_was_chosen_for_is_noted(grid):
    edit(grid / "selection.json", lambda content: content["rte"].pop("lora-r8"))
    message = "Without a choice on held-out examples, with the given values: rte/lora-r8/seed-0, rte/lora-r8/seed-1"
    assert any(note.startswith(message) for note in notes(grid))


def test_a_choice_that_failed_is_noted(grid):
    edit(grid / "selection.json", lambda content: content["rte"]["lora-r8"].update(chosen=None))
    assert "Nothing could be chosen, no candidate has a score: rte/lora-r8." in notes(grid)


def test_a_choice_that_saw_reported_examples_is_noted(grid):
    place = next((grid / "runs" / "select" / "mrpc" / "lora-r8").iterdir())
    edit(place / "result.json", lambda content: content.update(reported={"test": {"accuracy": 0.8}}))
    assert f"The choice looked at reported examples: select/mrpc/lora-r8/{place.name}." in notes(grid)
    assert "none of them saw" not in make_table(load_records(grid)).caption


# Statistics


def of_one_task(*differences):
    return {("t", seed): difference for seed, difference in enumerate(differences)}


@pytest.mark.parametrize(
    ("differences", "interval"),
    [
        # Of 2 pairs 0 and 1 a resample has mean 0, 1/2, 1 with probability 1/4, 1/2, 1/4.
        ((0.0, 1.0), (0.0, 1.0)),
        # Of 0, 0, 3 the mean is the number of 3s drawn, 3 of them with probability 1/27 > 0.025.
        ((0.0, 0.0, 3.0), (0.0, 3.0)),
        # Of 0, 0, 0, 4: four of them with probability 1/256, three or four with 13/256 > 0.025.
        ((0.0, 0.0, 0.0, 4.0), (0.0, 3.0)),
        ((0.25, 0.25, 0.25), (0.25, 0.25)),
    ],
)
def test_intervals_with_a_known_answer(differences, interval):
    found = paired_difference(of_one_task(*differences), dict.fromkeys(of_one_task(*differences), 0.0))
    assert found.mean == pytest.approx(sum(differences) / len(differences), rel=1e-15)
    assert found.interval == interval


def test_seeds_are_drawn_task_by_task():
    # Three tasks with pairs 0 and 2: the mean is (2/6) times six fair coins. All tails has probability 1/64 < 0.025,
    # at most one head 7/64; were the tasks drawn together, it would be 1/4.
    scores = {(task, seed): 2.0 * seed for task in "abc" for seed in (0, 1)}
    found = paired_difference(scores, dict.fromkeys(scores, 0.0))
    assert found.mean == 1.0
    assert found.interval == (pytest.approx(1 / 3), pytest.approx(5 / 3))


def test_the_interval_is_that_of_all_resamples():
    samples = {"a": (0.011, -0.002, 0.007), "b": (0.031, 0.012, -0.004)}
    scores = {(task, seed): value for task, values in samples.items() for seed, value in enumerate(values)}
    draws = [[statistics.fmean(draw) for draw in itertools.product(values, repeat=3)] for values in samples.values()]
    means = sorted(statistics.fmean(pair) for pair in itertools.product(*draws))
    low, high = (means[round(share * (len(means) - 1))] for share in (0.025, 0.975))
    found = paired_difference(scores, dict.fromkeys(scores, 0.0))
    assert len(means) == 729
    assert found.interval == (pytest.approx(low, abs=4e-4), pytest.approx(high, abs=4e-4))


def test_equal_methods_differ_by_exactly_nothing():
    scores = {(task, seed): 0.1 * seed + 0.37 for task in "ab" for seed in range(3)}
    found = paired_difference(scores, dict(scores))
    assert (found.mean, found.interval) == (0.0, (0.0, 0.0))


def test_the_variance_that_both_share_is_not_in_the_interval():
    baseline = {("t", seed): float(seed) for seed in range(4)}
    found = paired_difference({key: value + 0.5 for key, value in baseline.items()}, baseline)
    assert (found.mean, found.interval) == (0.5, (0.5, 0.5))


def test_only_shared_tasks_and_seeds_count():
    found = paired_difference(
        {("a", 0): 1.0, ("a", 1): 2.0, ("b", 0): 9.0}, {("a", 0): 0.0, ("a", 1): 0.0, ("a", 2): 5.0}
    )
    assert (found.mean, found.pairs) == (1.5, {"a": 2})
    assert paired_difference({("a", 0): 1.0}, {("a", 1): 1.0}) is None


def test_a_single_pair_of_one_task_leaves_no_interval():
    scores = {("a", 0): 1.0, ("a", 1): 2.0, ("b", 0): 3.0}
    found = paired_difference(scores, dict.fromkeys(scores, 0.0))
    assert (found.mean, found.interval, found.single) == (2.25, None, ["b"])


def test_the_interval_is_the_same_every_time():
    scores = {("t", seed): value for seed, value in enumerate((0.3, 0.1, 0.25, 0.7, 0.4))}
    assert len({paired_difference(scores, dict.fromkeys(scores, 0.0)).interval for _ in range(3)}) == 1


def test_a_spread_is_a_sample_deviation():
    assert Spread.of([1.0, 2.0, 4.0]) == Spread(pytest.approx(7 / 3), pytest.approx((7 / 3) ** 0.5), 3)
    assert Spread.of([5.0]) == Spread(5.0, None, 1)
    assert Spread.of([]) is None


# Tables 4 and 5, and the inner criterion


def test_the_ablation_is_of_aroma_alone_and_names_what_is_reset():
    rows = raw(FROZEN, "reset")
    assert {method: row["reset"] for method, row in rows.items()} == {"aroma": "prune", "aroma-no-reset": "none"}
    # Ranks 3.5, 3.75, 4 and effective ranks 2.4, 2.525, 2.65.
    assert float(rows["aroma"]["mrpc_average_rank_mean"]) == 3.75
    assert float(rows["aroma"]["mrpc_average_rank_std"]) == 0.25
    assert float(rows["aroma"]["mrpc_effective_rank_mean"]) == pytest.approx(2.525)
    assert rows["aroma"]["rte_mean"] == raw(FROZEN)["aroma"]["rte_mean"]


def test_an_epoch_that_was_cut_short_counts_as_what_it_is():
    # 3301 examples in batches of 32 are 104 steps; 600 steps are 5 epochs of 60 s and 80 steps of the sixth.
    run = next(run for run in load_records(FROZEN).of("lora-r8", "mrpc") if run.seed == 0)
    assert len(run.result["epoch_seconds"]) == 6
    assert epoch_seconds(run) == pytest.approx(60.0, rel=1e-6)
    assert statistics.fmean(run.result["epoch_seconds"]) < 58


def test_steps_of_an_epoch_count_accumulation(grid):
    place = grid / "runs" / "mrpc" / "lora-r8" / "seed-0"
    edit(
        place / "trial.json", lambda content: content["training"].update(batch_size=10, gradient_accumulation_steps=4)
    )
    edit_result(grid, "mrpc/lora-r8/seed-0", epoch_seconds=[9.0, 3.0], steps=4, examples={"train": 101, "test": 5})
    run = next(run for run in load_records(grid).of("lora-r8", "mrpc") if run.seed == 0)
    assert epoch_seconds(run) == 9.0  # 11 batches are 3 steps


def test_ratios_of_times_stand_beside_the_papers():
    rows = raw(FROZEN, "time")
    assert float(rows["aroma"]["over_lora-r8"]) == pytest.approx(48 / 60, rel=1e-6)
    # AdaLoRA lacks the slowest seed on RTE: the mean there is of 1 and 1.01 times 0.7 · 72 s.
    assert float(rows["aroma"]["over_adalora-r8"]) == pytest.approx(
        48 * 1.01 * 1.7 / (72 * (1.01 + 0.7 * 1.005)), rel=1e-6
    )
    assert float(rows["lora-r8"]["over_lora-r8"]) == 1
    assert (rows["aroma"]["paper_over_lora-r8"], rows["aroma"]["paper_over_adalora-r8"]) == ("0.76", "0.285")
    assert rows["lora-r8"]["paper_over_lora-r8"] == ""
    # The mean of 60, 60.6 and 61.2 s, and seven tenths of it.
    assert float(rows["lora-r8"]["average_seconds"]) == pytest.approx((60.6 + 0.7 * 60.6) / 2, rel=1e-6)


def test_against_another_method_the_papers_ratio_is_not_shown():
    rows = raw(FROZEN, "time", baseline="head-only")
    assert float(rows["aroma"]["over_head-only"]) == pytest.approx(48 / 20, rel=1e-6)
    assert "paper_over_head-only" not in rows["aroma"]


def test_the_inner_criterion_is_counted_loop_by_loop(grid):
    (grid / "runs" / "mrpc" / "aroma" / "seed-0" / "events.jsonl").write_text(
        "".join(
            json.dumps({"kind": kind, "outer_step": outer, "module": f"encoder.layer.{layer}.output.dense"}) + "\n"
            for kind, outer, layer in (("checked", 3, 1), ("merged", 1, 0), ("frozen", 2, 0), ("merged", 1, 1))
        )
    )
    checks = [[1, 110, "encoder.layer.0.output.dense"], [2, 90, "encoder.layer.1.output.dense"]]
    edit_result(grid, "mrpc/aroma/seed-0", inner_checks=checks)
    run = next(run for run in load_records(grid).of("aroma", "mrpc") if run.seed == 0)
    kind = "output.dense"
    assert set(loops_of(run)) == {Loop(kind, 1, 110), Loop(kind, 2, 90), Loop(kind, 2, None), Loop(kind, 1, None)}
    assert len(loops_of(run)) == 4


def test_the_quartiles_of_the_inner_criterion():
    # First loops on MRPC fire at 110, 120, 110, 120 with seeds 0 and 2, the other way round with seed 1; second loops
    # at 140, 150, 160 and, of the last matrix, never.
    row = raw(FROZEN, "inner")["aroma"]
    steps = sorted([110] * 6 + [120] * 6 + [140, 150, 160] * 3)
    assert (row["task"], row["matrices"], row["fired"], row["never"]) == ("mrpc", "all", "21", "3")
    assert float(row["lower_quartile"]) == steps[5] == 110
    assert float(row["median"]) == steps[10] == 120
    assert float(row["upper_quartile"]) == steps[15]
    assert (float(row["first_median"]), float(row["later_median"])) == (115, 150)
    assert float(row["predicted"]) == 110


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({}, 110),
        ({"inner_tolerance": 0.2}, 60),
        ({"inner_check_interval": 20}, 220),
        ({"inner_tolerance": None}, None),
    ],
)
def test_the_predicted_step_follows_interval_and_tolerance(options, step):
    assert predicted_step(options) == step


@pytest.mark.parametrize(
    ("kind", "remedy"), [("reset", "no run of kind aroma"), ("inner", "no run with inner checks")]
)
def test_a_table_of_aroma_needs_runs_of_it(kind, remedy, grid):
    for task in ("mrpc", "rte"):
        for method in ("aroma", "aroma-no-reset"):
            shutil.rmtree(grid / "runs" / task / method)
    with pytest.raises(ConfigError, match=rf"--kind='{kind}': {remedy}"):
        make_table(load_records(grid), kind)


@pytest.mark.parametrize("kind", ["reset", "inner"])
def test_a_table_that_compares_nothing_takes_no_baseline(kind):
    with pytest.raises(ConfigError, match=f"^--baseline='aroma': a table of kind {kind} compares with no method"):
        command(FROZEN, "--kind", kind, "--baseline", "aroma")


# Formats


@pytest.fixture
def hostile():
    word = "a|b_c & 50 % #1 {x} $y$ ~^\\ [z] <t> *w* --k"
    columns = [Column(word, ("word",), is_text=True), Column("n", ("n", "m"))]
    return Table(
        "main", word, columns, [[Cell(word, (word,)), Cell("1 ± 2", (1.5, None), True)]], "best", [f"{word}\nnext"]
    )


def test_latex_escapes_what_means_something_to_it(hostile):
    rendered = render(hostile, "latex")
    escaped = (
        r"a\textbar{}b\_c \& 50 \% \#1 \{x\} \$y\$ \textasciitilde{}\textasciicircum{}\textbackslash{} {[}z{]} "
        r"\textless{}t\textgreater{} {*}w{*} -{}-k"
    )
    assert rendered.count(escaped) == 3  # caption, cell, note
    first, second = escaped.split(r" \$y", 1)
    assert rf"\shortstack[l]{{{first}\\\$y{second}}} & n \\" in rendered, "its head is in two lines"
    assert rf"{escaped} & \textbf{{1 $\pm$ 2}} \\" in rendered
    assert rendered.isascii()


DOCUMENT = r"""\documentclass{article}
\usepackage{booktabs,graphicx}
\begin{document}
\input{table}
\end{document}
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "hostile"])
def test_latex_sets_the_table_within_the_text(kind, hostile, tmp_path):
    """By pdflatex, which .ci/run installs: texlive-latex-recommended of Debian."""
    rendered = render(hostile, "latex") if kind == "hostile" else (GOLDEN / "tables" / f"{kind}.tex").read_text()
    (tmp_path / "table.tex").write_text(rendered)
    (tmp_path / "page.tex").write_text(DOCUMENT)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    for _ in range(2):  # labels are known the second time
        said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=True).stdout
    assert "Output written on page.pdf (1 page" in said
    for complaint in ("Overfull", "Undefined", "undefined", "Missing", "too large"):
        assert complaint not in said


def test_markdown_escapes_what_means_something_to_it(hostile):
    lines = render(hostile, "markdown").splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines[:3]}) == 1
    assert r"\*w\*" in lines[2]
    assert "**1 ± 2**" in lines[2]
    assert lines[-1].endswith("next")


def test_csv_reads_back(hostile):
    heads, row = csv.reader(io.StringIO(render(hostile, "csv")))
    assert (heads, row) == (["word", "n", "m"], [hostile.columns[0].title, "1.5", ""])


def test_text_is_aligned_and_marks_the_best(hostile):
    lines = render(hostile, "text").splitlines()
    head, rule, row = lines[2:5]
    assert len(head) == len(rule) == len(row)
    assert row.endswith("1 ± 2 *")
    assert "* best." in lines


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (514, "514"),
        (999.6, "1K"),
        (9216, "9.22K"),
        (171072, "171K"),
        (999_600, "1M"),
        (22_713_216, "22.7M"),
        (8.03e9, "8.03B"),
    ],
)
def test_amounts_have_three_digits(count, text):
    assert formats.amount(count) == text


@pytest.mark.parametrize(
    ("difference", "text"),
    [(0.0, "0.00"), (0.0123, "+1.23"), (-0.0123, "−1.23"), (-0.00001, "0.00"), (0.00001, "0.00")],
)
def test_differences_have_a_sign_unless_they_round_to_nothing(difference, text):
    assert formats.signed_points(difference) == text


# Bad input


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no runs there; give the output folder of `aroma lab run`"):
        load_records(tmp_path / "absent")


def test_a_damaged_result_is_refused_with_its_path(grid):
    path = grid / "runs" / "mrpc" / "aroma" / "seed-0" / "result.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_records(grid)


@pytest.mark.parametrize(
    ("file", "key"), [("trial.json", "purpose"), ("result.json", "score"), ("result.json", "threads")]
)
def test_a_missing_key_is_named(file, key, grid):
    edit(grid / "runs" / "mrpc" / "aroma" / "seed-0" / file, lambda content: content.pop(key))
    with pytest.raises(CheckpointError, match=rf"{file}: edited, or of another version: {key} missing"):
        load_records(grid)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("trial.json", {"options": 3}, "trial.json, options: edited, or of another version: 3 is not a mapping; "),
        ("trial.json", {"training": {"seed": "0"}}, "trial.json, training, seed: edited"),
        ("result.json", {"score": None}, "result.json, score: edited, or of another version: None is not a number; "),
        ("result.json", {"steps": True}, "result.json, steps: edited, or of another version: True is not a whole num"),
        ("result.json", {"parameters": 3}, "result.json, parameters: edited, or of another version: 3 is not a map"),
        ("result.json", {"parameters": {"initial": 1, "average": "1", "head": 0}}, "parameters, average: edited"),
        ("result.json", {"examples": {"test": 3}}, "result.json, examples: edited, or of another version: train miss"),
        ("result.json", {"epoch_seconds": 3.0}, "result.json, epoch_seconds: edited"),
    ],
    ids=str,
)
def test_a_value_of_another_type_is_named(file, change, message, grid):
    edit(grid / "runs" / "mrpc" / "aroma" / "seed-0" / file, lambda content: content.update(change))
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        load_records(grid)
    assert str(error.value).endswith("; restore the file, or remove the run's folder and run it again")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("selection.json", {"mrpc": 3}, "selection.json, mrpc: edited, or of another version: a mapping missing; "),
        ("selection.json", {"mrpc": {"aroma": 3}}, "selection.json, mrpc/aroma: edited"),
        ("selection.json", {"mrpc": {"aroma": {"chosen": 3}}}, "selection.json, mrpc/aroma, chosen: edited"),
        (
            "selection.json",
            {"mrpc": {"aroma": {"tried": 3}}},
            "mrpc/aroma, tried: edited, or of another version: 3 ",
        ),
        ("selection.json", {"mrpc": {"aroma": {"tried": [[{}]]}}}, "[{}] is not a pair of values and score; "),
        (
            "selection.json",
            {"mrpc": {"aroma": {"chosen": {"training.learning_rate": 1}, "tried": [[{}, 0.5]]}}},
            "mrpc/aroma, tried: edited, or of another version: training.learning_rate missing; ",
        ),
        ("grid.yaml", {"methods": 3}, "grid.yaml, methods: edited, or of another version: 3 is not a mapping; "),
        ("grid.yaml", {"tasks": {3: {}}}, "grid.yaml, tasks: edited, or of another version: 3 is not a text; "),
        ("grid.yaml", {"seeds": 3}, "grid.yaml, seeds: edited, or of another version: 3 is not a list; "),
        (
            "grid.yaml",
            {"seeds": ["a"]},
            "grid.yaml, seeds: edited, or of another version: 'a' is not a whole number",
        ),
        ("grid.yaml", [3], "grid.yaml: edited, or of another version: a mapping missing; "),
    ],
    ids=str,
)
def test_an_edited_file_of_the_grid_is_named(file, content, message, grid):
    (grid / file).write_text(json.dumps(content) if file.endswith("json") else yaml.safe_dump(content))
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        load_records(grid)
    assert str(error.value).endswith("; restore the file, or remove it and run the grid again, which writes it anew")


@pytest.mark.parametrize("change", [{"chosen": None}, {"chosen": {}}, {"tried": []}], ids=str)
def test_a_choice_of_nothing_is_no_edited_one(change, grid):
    edit(grid / "selection.json", lambda content: content["rte"]["lora-r8"].update(change))
    assert make_table(load_records(grid)).rows


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("selection.json", "restore the file, or remove it and run the grid again, which writes it anew"),
        ("grid.yaml", "restore the file, or remove it and run the grid again, which writes it anew"),
        ("runs/mrpc/aroma/seed-0/trial.json", "restore the file, or remove the run's folder and run it again"),
        ("runs/mrpc/aroma/seed-0/result.json", "restore the file, or remove the run's folder and run it again"),
    ],
)
def test_a_truncated_record_is_not_called_a_checkpoint(file, remedy, grid):
    (grid / file).write_text('{"a": [')
    with pytest.raises(CheckpointError, match=f"{re.escape(file)}: .*edited.*; {remedy}$"):
        load_records(grid)


def test_a_lost_trial_is_named(grid):
    (grid / "runs" / "mrpc" / "aroma" / "seed-0" / "trial.json").unlink()
    with pytest.raises(CheckpointError, match=r"seed-0/trial\.json: missing.*; restore the file"):
        load_records(grid)


def test_the_same_run_twice_is_refused(grid):
    shutil.copytree(grid / "runs" / "mrpc" / "aroma", grid / "runs" / "mrpc" / "copy")
    with pytest.raises(CheckpointError, match="both hold mrpc, aroma, seed 0"):
        load_records(grid)


def test_damaged_events_are_refused(grid):
    (grid / "runs" / "mrpc" / "aroma" / "seed-0" / "events.jsonl").write_text("{")
    with pytest.raises(CheckpointError, match=r"events\.jsonl: truncated or edited"):
        make_table(load_records(grid), "inner")


# The command


def command(*arguments):
    parser = argparse.ArgumentParser()
    lab_table.add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["table", *map(str, arguments)])
    parsed.run(parsed)


def test_the_command_prints_the_table(capsys):
    command(FROZEN)
    output = capsys.readouterr()
    assert output.out == (GOLDEN / "tables" / "main.txt").read_text(encoding="utf-8")
    assert output.err == ""


def test_the_commands_choices_are_all_there_are():
    assert lab_table.KINDS == KINDS
    assert set(lab_table.FORMATS) == set(FORMATS)


def test_the_suffix_of_the_file_decides_its_format_unless_told(tmp_path, capsys):
    command(FROZEN, "--kind", "time", "--out", tmp_path / "t.tex")
    command(FROZEN, "--kind", "time", "--out", tmp_path / "t.md", "--format", "csv")
    assert (tmp_path / "t.tex").read_bytes() == (GOLDEN / "tables" / "time.tex").read_bytes()
    assert (tmp_path / "t.md").read_bytes() == (GOLDEN / "tables" / "time.csv").read_bytes()


def test_csv_leaves_protocol_and_failures_to_standard_error(capsys):
    command(FROZEN, "--format", "csv")
    output = capsys.readouterr()
    assert "Failed: rte/adalora-r8/seed-2" in output.err
    assert "Failed" not in output.out


def test_a_file_of_the_users_is_not_overwritten(tmp_path):
    path = tmp_path / "table.md"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="it exists; give another name, or move it away"):
        command(FROZEN, "--out", path)
    assert path.read_text() == "mine"


def test_the_examples_of_the_help_parse(capsys):
    with pytest.raises(SystemExit):
        command("--help")
    lines = capsys.readouterr().out.partition("\nexamples:\n")[2].splitlines()
    assert len(lines) == 4
    parser = argparse.ArgumentParser()
    lab_table.add_parser(parser.add_subparsers())
    for line in lines:
        program, lab, *arguments = line.split()
        assert (program, lab) == ("aroma", "lab")
        assert parser.parse_args(arguments).run is lab_table.run


def test_inner_loops_that_never_fired_are_counted(grid):
    for place in grid.glob("runs/*/aroma*/seed-*/result.json"):
        edit(place, lambda content: content.update(inner_checks=[]))
    table = make_table(load_records(grid), "inner", None)
    keys = [column.keys[0] for column in table.columns]
    fired, never = ([row[keys.index(key)].values[0] for row in table.rows] for key in ("fired", "never"))
    assert set(fired) == {0}
    assert max(never) > 0
