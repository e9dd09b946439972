"""Tables of runs: every number against one worked out here, and everything a table has to say beside its numbers."""

import functools
import io
import itertools
import json
import re
import shutil
import statistics
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.stats import ttest_rel

from aroma.cli import main
from aroma.errors import AromaError, CheckpointError, ConfigError
from aroma_lab.cli import lab_report
from aroma_lab.report import figures, formats
from aroma_lab.report.formats import FORMATS, SUFFIXES, Table
from aroma_lab.report.learnt import not_learnt
from aroma_lab.report.runs import TABLE, collect_runs, join_runs, read_runs
from aroma_lab.report.statistics import CHANCE, margins, paired_differences, spread
from aroma_lab.report.tables import KINDS, inner_loops, make_table
from made_up_runs import edit, write_grid, write_run

GOLDEN = Path(__file__).parent / "golden"
FROZEN = GOLDEN / "lab"
"""Made-up runs: five methods, two tasks, three seeds; one has failed, one is unfinished, one has not begun."""
OF_SETS = GOLDEN / "sets"
"""Made-up runs of a language model: four methods, one of them untrained, on three sets, two seeds; one has failed."""
QUESTIONS = {"arc-easy": 2376, "arc-challenge": 1172, "openbookqa": 500}


@pytest.fixture
def grid(tmp_path):
    """A copy of the frozen runs that a test may change."""
    return Path(shutil.copytree(FROZEN, tmp_path / "grid"))


@pytest.fixture
def grid_of_sets(tmp_path):
    return Path(shutil.copytree(OF_SETS, tmp_path / "sets"))


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """Tables of runs in place of the run folders, by the folder that they were made of."""
    found = {}
    for folder in (FROZEN, OF_SETS):
        found[folder] = tmp_path_factory.mktemp("collected") / folder.name
        collect_runs(read_runs(folder), found[folder] / TABLE)
        for name in ("grid.yaml", "selection.json"):
            shutil.copy(folder / name, found[folder])
    return found


frozen = functools.cache(lambda folder, kind, **options: make_table(read_runs(folder), kind, **options))


def table(folder, kind="main", **options):
    if folder in (FROZEN, OF_SETS):
        return frozen(folder, kind, **options)
    return make_table(read_runs(folder), kind, **options)


def raw(folder, kind="main", **options):
    """Return the numbers by method (the first row of several)."""
    values = table(folder, kind, **options).values
    return values.drop_duplicates("method").set_index("method")


def reported(method, seed):
    return json.loads((OF_SETS / f"runs/reasoning/{method}/seed-{seed}/result.json").read_text())["reported"]


# Numbers


@pytest.mark.parametrize("is_collected", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_have_the_numbers_on_record_from_folders_and_from_a_table_of_runs(kind, is_collected, collected):
    folder = OF_SETS if kind == "sets" else FROZEN
    found = table(collected[folder] if is_collected else folder, kind)
    expected = pd.read_csv(GOLDEN / "tables" / f"{kind}.csv")
    values = pd.read_csv(io.StringIO(formats.to_csv(found)))
    pd.testing.assert_frame_equal(values, expected, rtol=1e-12, atol=1e-14, check_dtype=False)
    assert formats.markdown(found) == formats.markdown(table(folder, kind))


def test_a_table_of_runs_keeps_what_made_each_run(collected):
    folder = FROZEN / "runs/mrpc/aroma/seed-1"
    trial, result = (json.loads((folder / f"{name}.json").read_text()) for name in ("trial", "result"))
    frame = pd.read_parquet(collected[FROZEN] / TABLE)
    row = frame[frame.name == "mrpc/aroma/seed-1"].iloc[0]
    kept = json.loads(row["result"])
    assert json.loads(row["trial"]) == trial
    assert kept.items() <= result.items()
    assert set(result) - set(kept) <= {"singular_values", "overlaps"}
    assert (row.score, row.seed, row.state, row.git_revision) == (
        result["score"],
        1,
        "finished",
        result["git_revision"],
    )


def test_a_table_of_runs_has_four_digits_of_the_measures_of_matrices(tmp_path):
    rows = list(read_runs(FROZEN).rows)
    measures = {"effective_ranks": {"query": 3.78089972601, "key": 1.0}, "relative_updates": {"key": 0.0218335412}}
    rows[0] = rows[0] | {"result": rows[0]["result"] | measures}
    collect_runs(replace(read_runs(FROZEN), rows=rows), tmp_path / TABLE)
    (kept,) = (row["result"] for row in read_runs(tmp_path / TABLE).rows if row["name"] == rows[0]["name"])
    assert kept["effective_ranks"] == {"query": 3.781, "key": 1.0}
    assert kept["relative_updates"] == {"key": 0.02183}


def test_the_baseline_decides_the_difference(grid):
    assert raw(FROZEN).difference["aroma"] == -raw(FROZEN, baseline="aroma").difference["lora-r8"] != 0
    single = raw(FROZEN).loc["aroma-no-reset"]
    assert single[["difference", "difference_low", "difference_high"]].notna().tolist() == [True, False, False]
    assert (
        table(FROZEN).notes[0].startswith("No interval for aroma-no-reset: a single seed shared with lora-r8 on rte")
    )
    for task in ("mrpc", "rte"):
        shutil.rmtree(grid / "runs" / task / "lora-r8")
    assert "difference" not in raw(grid)
    with pytest.raises(ConfigError, match=r"--baseline='lora-r8': no run of it has finished; give one of head"):
        table(grid, baseline="lora-r8")
    with pytest.raises(ConfigError, match=r"^--baseline=None: a table of differences compares two methods"):
        table(grid, "paired")


def test_ranks_are_held_against_planted_ones_where_these_are_known(tmp_path):
    for seed, fit in ((0, 0.5), (1, 1.0)):
        planted = {"ranks": {}, "spearman": fit, "pearson": fit / 2, "grew": 0.25}
        write_run(tmp_path, "net", "aroma", seed, average_rank=2.0 + seed, trained_rank=1.5, planted=planted)
        constant = {"ranks": {}, "spearman": None, "pearson": None, "grew": 0.0}
        write_run(tmp_path, "net", "lora", seed, average_rank=4.0, trained_rank=4.0, planted=constant)
    rows = raw(tmp_path, "ranks")
    aroma = rows.loc["aroma"]
    assert (aroma.task, aroma.average_rank_mean, aroma.trained_rank_mean) == ("net", 2.5, 1.5)
    assert (aroma.spearman_mean, aroma.pearson_mean, aroma.grew_mean) == (0.75, 0.375, 0.25)
    assert aroma.spearman_std == pytest.approx(statistics.stdev([0.5, 1.0]))
    assert pd.isna(rows.loc["lora"].spearman_mean)
    shown = table(tmp_path, "ranks").shown.set_index("method")
    assert shown.loc["lora", "spearman"] == formats.EMPTY
    assert shown.loc["aroma", "rank found"].startswith("2.5")
    assert "spearman" not in raw(FROZEN, "ranks"), "nothing is planted there"


def test_ranks_come_with_the_loss_on_examples_that_chose_settings(tmp_path):
    for seed, loss in enumerate((0.25, 0.5)):
        write_run(tmp_path, "task", "lora", seed, average_rank=2.0, trained_rank=2.0, held_out_loss=loss)
        write_run(tmp_path, "task", "other", seed, average_rank=2.0, trained_rank=2.0)
    rows = raw(tmp_path, "ranks")
    assert rows.held_out_loss_mean["lora"] == 0.375
    assert rows.held_out_loss_std["lora"] == pytest.approx(statistics.stdev([0.25, 0.5]))
    shown = table(tmp_path, "ranks").shown.set_index("method")["held-out loss"]
    assert shown.to_dict() == {"lora": "0.375 ± 0.177", "other": formats.EMPTY}
    assert "no run was trained on them" in table(tmp_path, "ranks").caption


def of_ranks(output, task, method, scores, trained, kind="lora"):
    for seed, score in enumerate(scores):
        write_run(output, task, method, seed, kind=kind, score=score, trained_rank=trained)


def test_regret_is_the_distance_to_the_best_fixed_rank_seed_by_seed(tmp_path):
    of_ranks(tmp_path, "easy", "lora-r1", (0.80, 0.84), 1.0)
    of_ranks(tmp_path, "easy", "lora-r4", (0.70, 0.74), 4.0)
    of_ranks(tmp_path, "easy", "aroma", (0.79, 0.84), 0.9, kind="aroma")
    of_ranks(tmp_path, "hard", "lora-r1", (0.50, 0.50), 1.0)
    of_ranks(tmp_path, "hard", "lora-r4", (0.60, 0.60), 4.0)
    of_ranks(tmp_path, "hard", "aroma", (0.55, 0.57), 2.0, kind="aroma")
    of_ranks(tmp_path, "dear", "lora-r1", (0.60, 0.60), 1.0)
    of_ranks(tmp_path, "dear", "lora-r4", (0.60, 0.60), 4.0)
    of_ranks(tmp_path, "dear", "aroma", (0.90, 0.90), 1.1, kind="aroma")
    rows = table(tmp_path, "regret").values.set_index("task").drop("average")
    assert rows.best.to_dict() == {"easy": "lora-r1", "hard": "lora-r4", "dear": "lora-r1"}, (
        "the smaller one of equals"
    )
    assert rows.difference.to_dict() == pytest.approx({"easy": -0.005, "hard": -0.04, "dear": 0.3})
    assert rows.error["easy"] == pytest.approx(statistics.stdev([-0.01, 0.0]) / 2**0.5)
    assert rows.met.to_dict() == {"easy": True, "hard": False, "dear": False}
    for task in rows.index:
        shutil.rmtree(tmp_path / "runs" / task / "aroma")
    with pytest.raises(ConfigError, match=r"--kind='regret': no task of .* has runs of AROMA and of LoRA"):
        table(tmp_path, "regret")


def of_trying(output, task, method, outcomes, first=0):
    for number, (score, loss) in enumerate(outcomes, first):
        label = f"select/{task}/{method}/learning_rate={number}"
        folder = write_run(output, task, method, 100 + number, purpose="select", score=score, held_out_loss=loss)
        place = output / "runs" / label
        place.parent.mkdir(parents=True, exist_ok=True)
        edit(folder / "trial.json", lambda trial, label=label: trial.update(name=label))
        folder.rename(place)


def test_a_rank_of_which_some_seeds_failed_is_not_the_best(tmp_path):
    scores = (0.80, 0.82, 0.84)
    of_ranks(tmp_path, "mrpc", "lora-r8", scores, 8.0)
    of_ranks(tmp_path, "mrpc", "grown", scores, 2.0, kind="aroma")
    of_ranks(tmp_path, "mrpc", "lora-r2", (0.9,), 2.0)
    row = table(tmp_path, "regret").values.iloc[0]
    assert (row.best, row.difference) == ("lora-r8", 0.0)


def test_parts_of_a_grid_are_joined_run_by_run(tmp_path):
    for machine, seeds in (("a", (0, 1)), ("b", (1, 2))):
        for seed in seeds:
            write_run(tmp_path / machine, "mrpc", "lora", seed, score=0.5 + (machine == "b") / 10)
    joined = join_runs([read_runs(tmp_path / machine) for machine in "ab"]).reported
    assert joined.sort_values("seed").score.tolist() == [0.5, 0.6, 0.6], "of seed 1 the later part's"


def test_regret_is_told_for_the_rank_that_trying_all_of_them_finds(tmp_path):
    for task, scores in (("easy", (0.80, 0.70)), ("hard", (0.50, 0.60))):
        for method, trained, score in zip(("lora-r1", "lora-r4"), (1.0, 4.0), scores, strict=True):
            of_ranks(tmp_path, task, method, (score, score + 0.04), trained)
        of_ranks(tmp_path, task, "aroma", (0.70, 0.76), 0.9, kind="aroma")
    for seed in (0, 1):  # another method, though the best
        write_run(tmp_path, "hard", "lora-ga", seed, score=0.99, trained_rank=4.0, options={"init": "lora_ga"})
    assert "chosen" not in table(tmp_path, "regret").values, "nothing was tried on held-out examples"
    of_trying(tmp_path, "easy", "lora-r1", [(0.5, 1.0), (0.75, 0.9)])
    of_trying(tmp_path, "easy", "lora-r4", [(0.75, 0.8), (0.7, 0.1)])
    of_trying(tmp_path, "hard", "lora-r4", [(0.5, 1.0)])
    rows = table(tmp_path, "regret").values.set_index("task")
    assert rows.loc["easy", "chosen"] == "lora-r4", "of equal scores the one with the lower loss"
    assert rows.loc["easy", "chosen_difference"] == pytest.approx(0.01)
    assert rows.loc["easy", "chosen_error"] == pytest.approx(statistics.stdev([0.0, 0.02]) / 2**0.5)
    assert pd.isna(rows.loc["hard", "chosen"]), "not all of them were tried"
    assert pd.isna(rows.loc["average", "chosen_difference"])
    of_trying(tmp_path, "hard", "lora-r1", [(0.6, 1.0)])
    rows = table(tmp_path, "regret").values.set_index("task")
    assert rows.loc["hard", "chosen"] == "lora-r1"
    assert rows.loc["average", "chosen_difference"] == pytest.approx((0.01 + 0.21) / 2)
    of_trying(tmp_path, "easy", "lora-r1", [(0.2, 0.05)], first=2)
    assert table(tmp_path, "regret").values.set_index("task").loc["easy", "chosen"] == "lora-r4"
    (tmp_path / "grid.yaml").write_text("select: {by: loss}\n")
    rows = table(tmp_path, "regret").values.set_index("task")
    assert rows.loc[["easy", "hard"], "chosen"].tolist() == ["lora-r1", "lora-r1"], "by loss, as its settings"
    for place in [*(tmp_path / "runs" / "select" / "easy" / "lora-r1").iterdir()]:
        further = place.with_name(f"{place.name},seed=101")
        shutil.copytree(place, further)
        name = str(further.relative_to(tmp_path / "runs"))
        edit(further / "trial.json", lambda trial, name=name: trial.update(name=name))
        edit(further / "result.json", lambda result: result.update(held_out_loss=2.0))
    rows = table(tmp_path, "regret").values.set_index("task")
    assert rows.loc["easy", "chosen"] == "lora-r4", "by the mean over seeds"


def test_the_last_row_of_a_regret_table_is_the_average_against_any_one_rank(tmp_path):
    for task, scores in (("easy", (0.80, 0.70)), ("hard", (0.50, 0.62))):
        for method, trained, score in zip(("lora-r1", "lora-r4"), (1.0, 4.0), scores, strict=True):
            of_ranks(tmp_path, task, method, (score, score + 0.04), trained)
        of_ranks(tmp_path, task, "aroma", (0.70, 0.76), 0.9, kind="aroma")
    of_ranks(tmp_path, "easy", "lora-r2", (0.99, 0.99), 2.0)  # has not run on all tasks
    row = table(tmp_path, "regret").values.set_index("task").loc["average"]
    assert (row.best, row.best_mean, row["mean"]) == ("lora-r4", pytest.approx(0.68), pytest.approx(0.73))
    assert row.difference == pytest.approx(0.05)
    easy, hard = (0.0, 0.02), (0.08, 0.10)
    errors = [statistics.stdev(differences) / 2**0.5 for differences in (easy, hard)]
    assert row.error == pytest.approx(sum(error**2 for error in errors) ** 0.5 / 2)
    assert row.met
    assert row.trained == pytest.approx(0.9)
    shutil.rmtree(tmp_path / "runs" / "hard" / "aroma")
    assert "average" not in table(tmp_path, "regret").values.task.tolist(), "one task alone has no average"


def test_the_average_of_sets_is_within_a_run_and_its_difference_seed_by_seed():
    rows = raw(OF_SETS, "sets")
    runs = {
        method: [statistics.fmean(one["accuracy"] for one in reported(method, seed).values()) for seed in (0, 1)]
        for method in ("pretrained", "lora-r8", "aroma-r1")
    }
    for method, averages in runs.items():
        assert rows.average_mean[method] == pytest.approx(statistics.fmean(averages), rel=1e-12)
        assert rows.average_std[method] == pytest.approx(statistics.stdev(averages), rel=1e-9, abs=1e-15)
        for name in QUESTIONS:
            values = [reported(method, seed)[name]["accuracy"] for seed in (0, 1)]
            assert rows[f"reasoning_{name}_mean"][method] == pytest.approx(statistics.fmean(values), rel=1e-12)
    right = sum(reported("lora-r8", 0)[name]["accuracy"] * count for name, count in QUESTIONS.items())
    assert abs(right / sum(QUESTIONS.values()) - runs["lora-r8"][0]) > 0.005, "not over questions"
    differences = sorted(one - other for one, other in zip(runs["aroma-r1"], runs["lora-r8"], strict=True))
    found = rows.loc["aroma-r1"]
    assert found.difference == pytest.approx(statistics.fmean(differences), rel=1e-12)
    # Of two pairs a resample has the lower one, the mean, or the higher one, with probability 1/4, 1/2, 1/4.
    assert [found.difference_low, found.difference_high] == pytest.approx(differences, rel=1e-12)


def test_a_run_without_one_of_the_sets_or_tasks_has_no_average(grid_of_sets, tmp_path):
    edit(
        grid_of_sets / "runs/reasoning/lora-r8/seed-1/result.json",
        lambda content: content["reported"].pop("openbookqa"),
    )
    rows = raw(grid_of_sets, "sets")
    keys = ("reasoning_arc-easy", "reasoning_openbookqa", "average")
    assert [rows[f"{key}_seeds"]["lora-r8"] for key in keys] == [2, 1, 1]
    assert rows.difference_pairs["aroma-r1"] == 1
    write_grid(tmp_path, ["lora-r8", "aroma"])
    write_run(tmp_path, "mnli", "lora-r8", 0, reported={"matched": {"accuracy": 0.5}, "mismatched": {"accuracy": 0.7}})
    for method in ("lora-r8", "aroma"):
        write_run(tmp_path, "rte", method, 0, reported={"validation": {"accuracy": 0.9}})
    found = table(tmp_path, "sets").shown
    # Of the tasks, each the average of its sets: not that of the three sets, which is 0.7.
    expected = {"mnli: matched": "50.00", "mnli: mismatched": "70.00", "rte: validation": "90.00", "average": "75.00"}
    assert found.iloc[0, 1:5].to_dict() == expected
    assert found["average"][1] == "– (0 of 1)"


# What failed or is missing


def test_failed_unfinished_and_absent_runs_are_listed_in_every_format():
    for form in ("text", "markdown", "latex"):
        words = re.sub(r"\s+", " ", FORMATS[form](table(FROZEN)).replace("\\", ""))
        assert "Failed: rte/adalora-r8/seed-2: NonFiniteError: loss=nan: training has diverged; lower" in words
        assert "runs/rte/adalora-r8/seed-2/failure.json" in words
        assert "Not finished: rte/aroma-no-reset/seed-1." in words
        assert "Not begun: rte/aroma-no-reset, seed 2." in words
    assert raw(FROZEN).failed.to_dict() == {
        **dict.fromkeys(raw(FROZEN).index, ""),
        "adalora-r8": "rte/adalora-r8/seed-2",
    }
    assert raw(FROZEN)[["rte_seeds", "planned_seeds"]].loc["adalora-r8"].tolist() == [2, 3]


def test_a_method_that_only_failed_keeps_its_row(grid):
    for result in grid.glob("runs/*/aroma/*/result.json"):
        result.unlink()
        (result.parent / "failure.json").write_text(json.dumps({"error": "ValueError", "message": "no"}))
    found = table(grid)
    assert found.shown.set_index("method").loc["aroma"].iloc[0] == "– (0 of 3)"
    assert sum(note.startswith("Failed: ") for note in found.notes) == 7
    for result in grid.glob("runs/**/result.json"):
        result.unlink()
    for kind in ("main", "time"):
        assert "No run has finished." in table(grid, kind).caption


def test_survivors_of_a_failure_do_not_win_a_column():
    found = table(FROZEN)
    assert raw(FROZEN).rte_mean.idxmax() == "adalora-r8", "of two surviving seeds"
    # 180 + 176 + 182 and 179 + 181 + 178 right answers are the same number: ties as printed are both the best.
    best = {(found.shown.columns[column].split()[0], found.shown.method[row]) for row, column in found.best}
    assert best == {("rte", "lora-r8"), ("mrpc", "aroma"), ("rte", "aroma"), ("average", "aroma")}
    last = table(OF_SETS, "sets").shown.set_index("method").loc["aroma-r8"]
    assert (last["average"], last.iloc[-1]) == ("40.72 (1 of 2)", "+1.67 [no interval] (1 of 2 pairs)")


# The caption's protocol, and the notes on what was not alike


def test_the_caption_does_not_call_held_out_what_is_trained_on(grid):
    for path in grid.glob("**/result.json"):
        edit(path, lambda content: content["examples"].pop("held_out", None))
    found = table(grid, "ranks")
    assert "by the score on what is trained on, in runs of 200 steps" in found.caption
    (grid / "grid.yaml").write_text("select: {by: loss}\n")
    assert "by the loss on what is trained on, in runs of 200 steps" in table(grid, "ranks").caption
    for title, words in (("held-out loss", "no run was trained on them"), ("held-out loss", "held-out training")):
        assert title not in found.shown.columns
        assert words not in found.caption


def test_the_caption_says_how_it_was_measured(grid):
    for words in (
        "over 3 seeds (0, 1, 2)",
        "mrpc: accuracy on all 1,725 of test; trained on 3,301 examples, 367 held out of training.",
        "600 steps of 32 examples, in bf16 mixed precision.",
        "Weights: those of the last step.",
        "in runs of 200 steps with seed 100; none of them saw a reported example",
        "training.learning_rate among 0.0005, 0.001 and 0.002",
        "percentiles of 10,000 resamples",
        "With 3 seeds such an interval is narrower than it should be.",
    ):
        assert words in table(FROZEN).caption
    first = next(grid.glob("runs/select/mrpc/*/*"))
    again = shutil.copytree(first, first.with_name(f"{first.name},seed=101"))
    for name in ("trial.json", "result.json"):
        edit(again / name, lambda content: content.update(name=f"{content['name']},seed=101"))
    edit(again / "trial.json", lambda content: content["training"].update(seed=101))
    further = "in runs of 200 steps with seed 100, and of the best with 101, whose mean counts; none of them"
    assert further in table(grid).caption
    (grid / "selection.json").unlink()
    for trial in grid.glob("runs/mrpc/*/*/trial.json"):
        edit(trial, lambda content: content["training"].update(checkpoint="best"))
    found = table(grid)
    assert "These runs chose nothing" in found.caption
    assert "those of the best evaluation on held-out training examples and those of the last step" in found.caption
    assert any(note.startswith("Different training.learning_rate on rte: ") for note in found.notes)


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
    edit(grid / "runs/rte/aroma/seed-0/result.json", lambda content: content.update(values))
    found = set(table(grid).notes) - set(table(FROZEN).notes)
    assert any(re.fullmatch(note, one) for one in found), found


def test_settings_and_choices_that_were_not_kept_to_are_noted(grid):
    trial = grid / "runs/rte/lora-r8/seed-1/trial.json"
    edit(trial, lambda content: content["training"].update(batch_size=16, learning_rate=0.3))
    place = next((grid / "runs/select/mrpc/lora-r8").iterdir())
    edit(place / "result.json", lambda content: content.update(reported={"test": {"accuracy": 0.8}}))
    edit(grid / "selection.json", lambda content: content["rte"]["aroma"].update(chosen=None))
    found = table(grid)
    notes = " ".join(found.notes)
    assert "Different torch: 2.13.0+cpu (26 runs); 2.12.1+cpu (mrpc/head-only/seed-2)." in notes
    assert re.search(r"Different training.batch_size on rte: 32 \(\S.*\); 16 \(lora-r8\)\.", notes)
    assert "seed on" not in notes
    assert "Not with the chosen values: rte/lora-r8/seed-1." in notes
    assert f"Runs that chose settings also evaluated reported examples: select/mrpc/lora-r8/{place.name}." in notes
    assert "none of them saw" not in found.caption
    assert "Without a choice on held-out examples, with the given values: rte/aroma/seed-0, rte/aroma/" in notes
    edge = "The optimum of head-only on rte is at the edge of what was tried: add training.learning_rate=0.004."
    assert edge in notes
    beside = {"training.learning_rate": 0.004}
    edit(grid / "selection.json", lambda content: content["rte"]["head-only"]["tried"].append([beside, 0.1]))
    assert edge not in table(grid).notes


def test_what_nothing_trains_takes_no_parameters_and_no_choice():
    found = table(OF_SETS, "sets")
    assert raw(OF_SETS, "sets").loc["pretrained", ["initial_parameters", "average_parameters"]].tolist() == [0, 0]
    assert "pretrained: nothing trains; the pretrained model as it is." in found.notes
    assert not any("pretrained" in note for note in found.notes if "hosen" in note or "choice" in note)
    assert any("1 prompts cut from the left" in note for note in found.notes)


def test_answers_that_could_not_be_read_are_told(grid_of_sets):
    for path in grid_of_sets.glob("runs/reasoning/lora-r8/*/result.json"):
        edit(
            path, lambda content: [one.update(generated=0.4, unparseable=0.0) for one in content["reported"].values()]
        )
    for seed, share in enumerate((0.1, 0.2)):
        path = grid_of_sets / f"runs/reasoning/pretrained/seed-{seed}/result.json"
        edit(path, lambda content, share=share: content["reported"]["openbookqa"].update(unparseable=share))
    found = "could not be read, and count as wrong: pretrained: 15.00 % of openbookqa; lora-r8: none."
    assert any(found in note for note in table(grid_of_sets, "sets").notes)
    rows = raw(grid_of_sets, "sets", metric="generated")
    assert rows.average_mean["lora-r8"] == pytest.approx(0.4)
    assert pd.isna(rows.average_mean["aroma-r1"])
    with pytest.raises(ConfigError, match="--metric='unparseable': no run has it"):
        table(grid_of_sets, "sets", metric="unparseable")


# Tasks that were not learnt


def write_task(folder, task, scores, examples=1000):
    """Write runs of a task: by method and seed their scores."""
    for method, several in scores.items():
        for seed, score in enumerate(several):
            kind = {"head-only": "head_only", "pretrained": "pretrained"}.get(method, "lora")
            shown = {"reported": {"test": {"accuracy": score}}, "score": score, "kind": kind}
            write_run(folder, task, method, seed, **shown, examples={"train": 90, "held_out": 10, "test": examples})


LEARNT = {"head-only": [0.50, 0.51, 0.52], "lora-r1": [0.80, 0.82, 0.81], "lora-r8": [0.90, 0.91, 0.93]}
NOT_LEARNT = {"head-only": [0.50, 0.51, 0.52], "lora-r1": [0.51, 0.50, 0.55], "lora-r8": [0.53, 0.51, 0.52]}


def test_of_a_task_that_was_not_learnt_nothing_is_said(tmp_path):
    write_task(tmp_path, "good", LEARNT)
    write_task(tmp_path, "bad", NOT_LEARNT)
    main_table = table(tmp_path)
    assert main_table.shown.columns[:3].tolist() == ["method", "bad (accuracy), not learnt", "good (accuracy)"]
    assert {main_table.shown.columns[column] for _, column in main_table.best} == {"good (accuracy)"}
    assert "average" not in main_table.shown, "of one task"
    rows = raw(tmp_path)
    assert rows.bad_mean["lora-r1"] == pytest.approx(0.52)
    assert rows.difference["lora-r1"] == pytest.approx(0.81 - 2.74 / 3)
    assert rows.difference_pairs["lora-r1"] == 3
    (note,) = [note for note in main_table.notes if "NOT LEARNT" in note]
    assert note.startswith("bad: NOT LEARNT: no method is clearly above head-only, so nothing is said about methods")
    assert "Nearest is lora-r8, +1.00 points in 3 seeds, where 4.30 would be clear" in note
    paired = table(tmp_path, "paired")
    assert paired.shown.columns.tolist() == ["method", "good [95%]", "better–tied–worse"]
    assert paired.shown["better–tied–worse"].tolist() == ["0–0–1", "0–0–1"]
    assert note in paired.notes
    sets = table(tmp_path, "sets")
    assert {sets.shown.columns[column] for _, column in sets.best} == {"good: test", "average"}
    assert raw(tmp_path, "sets").average_mean["lora-r8"] == pytest.approx(2.74 / 3)
    assert note in sets.notes
    drawn = figures.draw_figure("pareto", [tmp_path], methods=["lora-r1", "lora-r8"])
    titles = [axes.get_title(loc="left") for axes in drawn.axes]
    assert titles == ["bad: not learnt, so no method is compared"] * 2 + ["good"] * 2
    assert [len(axes.lines) for axes in drawn.axes[:2]] < [len(axes.lines) for axes in drawn.axes[2:]]


def test_where_no_task_was_learnt_there_are_no_differences(tmp_path):
    write_task(tmp_path, "bad", NOT_LEARNT)
    found = table(tmp_path)
    assert found.best == set()
    assert "difference" not in raw(tmp_path)
    assert table(tmp_path, "paired").shown["better–tied–worse"].tolist() == ["0–0–0"] * 2


@pytest.mark.parametrize(
    ("scores", "is_learnt"),
    [
        (LEARNT, True),
        ({"lora-r1": [0.5, 0.5], "lora-r8": [0.6, 0.7]}, True),  # nothing to be above
        ({"head-only": [0.5], "lora-r1": [0.5]}, True),  # a single seed
        ({"head-only": [0.5, 0.5], "pretrained": [0.5, 0.5]}, True),  # nothing that could learn
        ({"head-only": [0.5, 0.5, 0.5], "lora-r1": [0.5, 0.5, 0.5]}, False),
        ({"head-only": [0.5, 0.5, 0.5], "lora-r1": [0.501, 0.501, 0.501]}, False),  # one example, each time
        ({"head-only": [0.5, 0.5, 0.5], "lora-r1": [0.51, 0.51, 0.51]}, True),
        ({"head-only": [0.8, 0.8, 0.8], "lora-r1": [0.6, 0.61, 0.62]}, False),
        (NOT_LEARNT, False),
    ],
    ids=str,
)
def test_a_task_is_learnt_if_a_method_is_clearly_above_head_only(tmp_path, scores, is_learnt):
    write_task(tmp_path, "task", scores)
    assert (not_learnt(read_runs(tmp_path).reported) == {}) == is_learnt


def test_the_margin_is_that_of_a_paired_t_test():
    rows = [(method, seed, score) for method, several in NOT_LEARNT.items() for seed, score in enumerate(several)]
    frame = pd.DataFrame(rows, columns=["method", "seed", "score"])
    found = margins(frame, "score", "head-only", ["lora-r1", "lora-r8"], step=0.001)
    for method in ("lora-r1", "lora-r8"):
        for shift in (-1e-6, 1e-6):  # just below what is needed, and just above
            moved = [score + found.needed[method] - found.difference[method] + shift for score in NOT_LEARNT[method]]
            p = ttest_rel(moved, NOT_LEARNT["head-only"], alternative="greater").pvalue
            assert (p < CHANCE / 2) == (shift > 0)


def test_chance_seldom_makes_a_task_look_learnt():
    generator = np.random.default_rng(0)
    methods, count = [f"m{number}" for number in range(8)], 0
    for _ in range(300):
        scores = generator.normal(size=(9, 4))
        rows = [(["floor", *methods][row], seed, scores[row, seed]) for row in range(9) for seed in range(4)]
        found = margins(pd.DataFrame(rows, columns=["method", "seed", "x"]), "x", "floor", methods, 1e-9)
        count += bool((found.difference > found.needed).any())
    assert count <= 300 * CHANCE + 3 * (300 * CHANCE * (1 - CHANCE)) ** 0.5


# Statistics


def differences(scores, baseline):
    rows = [("a", *key, value) for key, value in scores.items()] + [("b", *key, v) for key, v in baseline.items()]
    row = paired_differences(pd.DataFrame(rows, columns=["method", "task", "seed", "x"]), "x", "b", ["a"]).loc["a"]
    return row.difference, (row.low, row.high), row.pairs, row.single


def against_zero(scores):
    return differences(scores, dict.fromkeys(scores, 0.0))


def test_the_interval_is_that_of_all_resamples_task_by_task_and_the_same_every_time():
    samples = {"a": (0.011, -0.002, 0.007), "b": (0.031, 0.012, -0.004)}
    draws = [[statistics.fmean(draw) for draw in itertools.product(values, repeat=3)] for values in samples.values()]
    means = sorted(statistics.fmean(pair) for pair in itertools.product(*draws))
    low, high = (means[round(share * (len(means) - 1))] for share in (0.025, 0.975))
    scores = {(task, seed): value for task, values in samples.items() for seed, value in enumerate(values)}
    interval = against_zero(scores)[1]
    assert interval == (pytest.approx(low, abs=4e-4), pytest.approx(high, abs=4e-4))
    assert interval == against_zero(scores)[1]
    # Three tasks with pairs 0 and 2: the mean is (2/6) times six fair coins. All tails has probability 1/64 < 0.025,
    # at most one head 7/64; were the tasks drawn together, it would be 1/4.
    mean, interval, _, _ = against_zero({(task, seed): 2.0 * seed for task in "abc" for seed in (0, 1)})
    assert (mean, interval) == (1.0, (pytest.approx(1 / 3), pytest.approx(5 / 3)))


def test_only_shared_tasks_and_seeds_count_and_what_both_share_is_not_in_the_interval():
    baseline = {("t", seed): float(seed) for seed in range(4)}
    assert differences({k: v + 0.5 for k, v in baseline.items()}, baseline)[:2] == (0.5, (0.5, 0.5))
    ours = {("a", 0): 1.0, ("a", 1): 2.0, ("b", 0): 9.0}
    mean, _, pairs, single = differences(ours, {("a", 0): 0.0, ("a", 1): 0.0, ("a", 2): 5.0})
    assert (mean, pairs, single) == (1.5, 2, "")
    assert pd.isna(differences({("a", 0): 1.0}, {("a", 1): 1.0})[0])
    mean, interval, pairs, single = against_zero(ours)
    assert (mean, pairs, single) == (5.25, 3, "b")
    assert all(map(pd.isna, interval))


def test_a_spread_is_a_sample_deviation():
    found = spread(pd.DataFrame({"method": list("aaab"), "x": [1.0, 2.0, 4.0, 5.0]}), "x", ["a", "b", "c"])
    assert found["count"].tolist() == [3, 1, 0]
    assert found["std"].tolist() == pytest.approx([(7 / 3) ** 0.5, float("nan"), float("nan")], nan_ok=True)


# Tables 4 and 5, and the inner criterion


def test_an_epoch_that_was_cut_short_counts_as_what_it_is(grid):
    # 3301 examples in batches of 32 are 104 steps; 600 steps are 5 epochs of 60 s and 80 steps of the sixth.
    assert read_runs(grid).of("lora-r8", "mrpc").epoch_seconds.iloc[0] == pytest.approx(60.0, rel=1e-6)
    folder = grid / "runs/mrpc/lora-r8/seed-0"
    edit(folder / "trial.json", lambda one: one["training"].update(batch_size=10, gradient_accumulation_steps=4))
    values = {"epoch_seconds": [9.0, 3.0], "steps": 4, "examples": {"train": 101, "test": 5}}
    edit(folder / "result.json", lambda content: content.update(values))
    assert read_runs(grid).of("lora-r8", "mrpc").epoch_seconds.iloc[0] == 9.0  # 11 batches are 3 steps
    edit(folder / "result.json", lambda content: content.update(asked_examples=21))
    assert read_runs(grid).of("lora-r8", "mrpc").epoch_seconds.iloc[0] == 6.0  # 8 batches are 2


def test_ratios_of_times_stand_beside_the_papers():
    rows = raw(FROZEN, "time")
    assert rows["over_lora-r8"]["aroma"] == pytest.approx(48 / 60, rel=1e-6)
    # AdaLoRA lacks the slowest seed on RTE: the mean there is of 1 and 1.01 times 0.7 · 72 s.
    expected = 48 * 1.01 * 1.7 / (72 * (1.01 + 0.7 * 1.005))
    assert rows["over_adalora-r8"]["aroma"] == pytest.approx(expected, rel=1e-6)
    assert rows.loc["aroma", ["paper_over_lora-r8", "paper_over_adalora-r8"]].tolist() == [0.76, 0.285]
    assert pd.isna(rows["paper_over_lora-r8"]["lora-r8"])
    other = raw(FROZEN, "time", baseline="head-only").loc["aroma"]
    assert other["over_head-only"] == pytest.approx(48 / 20, rel=1e-6)
    assert "paper_over_head-only" not in other


def test_the_inner_criterion_is_counted_loop_by_loop(grid):
    folder = grid / "runs/mrpc/aroma/seed-0"
    events = [("checked", 3, 1), ("merged", 1, 0), ("frozen", 2, 0), ("merged", 1, 1)]
    lines = [
        {"kind": kind, "step": 200, "outer_step": outer, "rank": 1, "module": f"encoder.layer.{layer}.output.dense"}
        for kind, outer, layer in events
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    checks = [[1, 110, "encoder.layer.0.output.dense"], [2, 90, "encoder.layer.1.output.dense"]]
    edit(folder / "result.json", lambda content: content.update(inner_checks=checks))
    loops = inner_loops(next(read_runs(grid).of("aroma", "mrpc").itertuples()))
    assert set(loops.kind) == {"output.dense"}
    assert sorted(zip(loops.outer_step, loops.fired.fillna(0), strict=True)) == [(1, 0), (1, 110), (2, 0), (2, 90)]
    # First loops on MRPC fire at 110, 120, 110, 120 with seeds 0 and 2, the other way round with seed 1; second loops
    # at 140, 150, 160 and, of the last matrix, never.
    row = raw(FROZEN, "inner").loc["aroma"]
    steps = sorted([110] * 6 + [120] * 6 + [140, 150, 160] * 3)
    assert row[["task", "matrices", "fired", "never"]].tolist() == ["mrpc", "all", 21, 3]
    assert row[["lower_quartile", "median", "upper_quartile"]].tolist() == [steps[5], steps[10], steps[15]]


# Formats

HOSTILE = "a|b_c & 50 % #1 {x} $y$ ~^\\ [z] <t> *w* --k"


@pytest.fixture
def hostile():
    found = Table(["m", "n"], 2)
    found.add(HOSTILE, [f"{HOSTILE} 1 ± 2", "2"])
    found.best, found.caption, found.notes = {(0, 1)}, HOSTILE, [HOSTILE]
    return found


def test_formats_escape_what_means_something_to_them_and_mark_the_best(hostile):
    escaped = (
        r"a\textbar{}b\_c \& 50 \% \#1 \{x\} \$y\$ \textasciitilde{}\textasciicircum{}\textbackslash{} {[}z{]} "
        r"\textless{}t\textgreater{} {*}w{*} -{}-k"
    )
    rendered = formats.latex(hostile)
    assert rendered.count(escaped) == 4  # caption, head, cell, note
    assert rf"m & \textbf{{{escaped} 1 ± 2}} \\" in rendered
    lines = formats.markdown(hostile).splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines[:4]} == {3}
    assert r"\*w\* --k 1 ± 2**" in lines[2]
    assert f"*{HOSTILE} 1 ± 2" in formats.text(hostile)


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
    found = hostile if kind == "hostile" else table(OF_SETS if kind == "sets" else FROZEN, kind)
    (tmp_path / "table.tex").write_text(formats.latex(found))
    (tmp_path / "page.tex").write_text(DOCUMENT)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    for _ in range(2):  # labels are known the second time
        said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=True).stdout
    assert "Output written on page.pdf (1 page" in said
    for complaint in ("Overfull", "Undefined", "undefined", "Missing", "too large"):
        assert complaint not in said


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (
            formats.amount,
            {0: "0", 514: "514", 999.6: "1K", 9216: "9.22K", 999_600: "1M", 22_713_216: "22.7M", 8.03e9: "8.03B"},
        ),
        (formats.signed_points, {0.0: "0.00", 0.0123: "+1.23", -0.0123: "−1.23", -0.00001: "0.00", 0.00001: "0.00"}),
    ],
)
def test_numbers_are_short_and_differences_have_a_sign_unless_they_round_to_nothing(form, words):
    assert {value: form(value) for value in words} == words


# Bad input

OF_RUN = "; restore the file, or remove the run's folder and run it again"
OF_GRID = "; restore the file, or remove it and run the grid again, which writes it anew"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("trial.json", {"purpose": ...}, "trial.json: edited, or of another version: purpose missing"),
        ("trial.json", {"options": 3}, "trial.json, options: edited, or of another version: 3 is not a mapping"),
        ("trial.json", {"training": {"seed": "0"}}, "trial.json, training, seed: edited"),
        ("trial.json", None, "trial.json: missing, truncated or edited"),
        ("result.json", {"score": None}, "result.json, score: edited, or of another version: None is not a number"),
        ("result.json", {"steps": True}, "result.json, steps: edited, or of another version: True is not a whole num"),
        ("result.json", {"parameters": {"initial": 1, "average": "1", "head": 0}}, "parameters, average: edited"),
        ("result.json", {"examples": {"test": 3}}, "result.json, examples: edited, or of another version: train miss"),
        ("result.json", None, "result.json: missing, truncated or edited"),
        ("events.jsonl", None, "events.jsonl: truncated or edited"),
        ("selection.json", {"mrpc": 3}, "selection.json, mrpc: edited, or of another version: 3 is not a mapping"),
        ("selection.json", {"mrpc": {"aroma": {"chosen": 3}}}, "selection.json, mrpc, aroma, chosen: edited"),
        ("selection.json", {"mrpc": {"aroma": {"tried": [[{}]]}}}, "[{}] has not 2 items"),
        ("selection.json", None, "selection.json: missing, truncated or edited"),
        ("grid.yaml", {"methods": 3}, "grid.yaml, methods: edited, or of another version: 3 is not a mapping"),
        ("grid.yaml", {"seeds": ["a"]}, "grid.yaml, seeds: edited, or of another version: 'a' is not a whole number"),
        ("grid.yaml", [3], "grid.yaml: edited, or of another version: [3] is not a mapping"),
        ("grid.yaml", None, "grid.yaml: missing, truncated or edited"),
    ],
    ids=str,
)
def test_an_edited_file_is_named(file, content, message, grid):
    path = grid / file if (grid / file).exists() else grid / "runs/mrpc/aroma/seed-0" / file
    if content is None:
        path.write_text('{"a": [')
    elif file == "grid.yaml":
        path.write_text(yaml.safe_dump(content))
    else:
        kept = {**json.loads(path.read_text()), **content}
        path.write_text(json.dumps({key: value for key, value in kept.items() if value is not ...}))
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        read_runs(grid)
    assert str(error.value).startswith(str(path))
    assert str(error.value).endswith(OF_GRID if path.parent == grid else OF_RUN)


def test_a_damaged_table_of_runs_is_named(collected, tmp_path):
    whole, path = collected[FROZEN] / TABLE, tmp_path / TABLE
    path.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"runs\.parquet: truncated, edited, or no table of runs"):
        read_runs(path)
    frame = pd.read_parquet(whole)
    frame.drop(columns="trial").to_parquet(path)
    with pytest.raises(CheckpointError, match=r"runs\.parquet: truncated, edited, or no table of runs"):
        read_runs(tmp_path)
    frame["result"] = frame.result.str.replace('"score":', '"scores":')
    frame.to_parquet(path)
    with pytest.raises(CheckpointError, match=r"runs\.parquet, runs/.*, result: .* score missing; .*lab collect"):
        read_runs(tmp_path)


def test_a_caption_says_how_many_training_examples_a_method_asks(grid):
    folder = grid / "runs/mrpc/lora-r8/seed-0"
    edit(folder / "result.json", lambda content: content.update(asked_examples=21))
    caption = make_table(read_runs(grid), "main").caption
    assert "lora-r8: asks 21 of the training examples, which train nothing." in caption
    assert caption.count("of the training examples, which") == 1


def test_no_runs_and_the_same_run_twice_are_refused(grid, tmp_path):
    with pytest.raises(ConfigError, match=r"no runs there, and no runs\.parquet; give the output folder"):
        read_runs(tmp_path / "absent")
    shutil.copytree(grid / "runs/mrpc/aroma", grid / "runs/mrpc/copy")
    with pytest.raises(CheckpointError, match="both hold mrpc, aroma, seed 0"):
        read_runs(grid)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, {"kind": "reset"}, "--kind='reset': no run of kind aroma has finished"),
        (None, {"kind": "inner"}, "--kind='inner': no run with inner checks has finished"),
        (None, {"kind": "reset", "baseline": "lora-r8"}, "a table of kind reset compares with no method"),
        (None, {"kind": "main", "metric": "accuracy"}, "--metric='accuracy': a table of kind main shows"),
        (None, {"kind": "sets", "metric": "f2"}, "--metric='f2': no run has it; give one of accuracy"),
        (None, {"kind": "none"}, "--kind='none': give one of main"),
        ({"reported": {}}, {"kind": "sets"}, "--kind='sets': no run with a reported set has finished"),
        ({"reported": [1]}, {"kind": "sets"}, "result.json, reported: edited"),
        ({"reported": {"test": 0.5}}, {"kind": "sets"}, "result.json, reported, test: edited"),
    ],
    ids=str,
)
def test_a_table_that_cannot_be_made_is_refused(change, options, message, tmp_path):
    write_run(tmp_path, "rte", "lora-r8", 0, **(change or {}))
    with pytest.raises(AromaError) as error:
        table(tmp_path, **options)
    assert message in str(error.value)


# The commands


def command(*arguments):
    return main(["lab", *map(str, arguments)])


def test_the_commands_choices_are_all_there_are():
    assert list(lab_report.TABLES) == list(KINDS)
    assert list(lab_report.FIGURES) == list(figures.FIGURES)
    assert set(lab_report.FORMAT_NAMES) == set(FORMATS) == set(SUFFIXES.values())


def test_a_table_is_printed_or_written_in_the_format_of_its_file(tmp_path, capsys):
    command("table", FROZEN, "--kind", "time", "--out", tmp_path / "t.tex")
    command("table", FROZEN, "--kind", "time", "--out", tmp_path / "t.md", "--format", "csv")
    assert (tmp_path / "t.tex").read_text().startswith("\\begin{table}")
    assert (tmp_path / "t.md").read_text() == formats.to_csv(table(FROZEN, "time"))
    command("table", FROZEN)
    assert capsys.readouterr().out.endswith(formats.text(table(FROZEN)))
    command("table", FROZEN, "--format", "csv")
    output = capsys.readouterr()
    assert "Failed: rte/adalora-r8/seed-2" in output.err
    assert "Failed" not in output.out
    command("table", OF_SETS, "--kind", "sets", "--metric", "accuracy_per_character")
    assert re.search(r"lora-r8.* \*?41\.71 ", capsys.readouterr().out)  # 980 and 1002 of 2376


def test_figures_and_collected_runs_are_written_and_overwrite_nothing(grid, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command("figure", "pareto", grid, "--task", "rte") == 0
    assert Path("pareto-rte.png").stat().st_size > 1000
    assert command("collect", grid) == 0
    assert "32 runs" in capsys.readouterr().out
    shutil.rmtree(grid / "runs")
    assert formats.markdown(table(grid)) == formats.markdown(table(FROZEN))
    for arguments in (
        ("figure", "pareto", grid, "--task", "rte"),
        ("collect", grid),
        ("table", grid, "--out", grid / TABLE),
    ):
        assert command(*arguments) != 0
        assert (
            "it exists, and nothing is overwritten; give another name, or --force to replace it"
            in capsys.readouterr().err
        )
    assert command("figure", "pareto", grid, "--out", "a.docx") != 0
    assert "--out='a.docx': unknown kind of picture" in capsys.readouterr().err


def test_parts_of_a_grid_are_joined_and_later_ones_replace(grid, tmp_path, capsys):
    def improved(row):
        return {**row, "result": {**row["result"], "score": row["score"] + 1}}

    runs = read_runs(grid)
    parts = {
        "early": [*runs.rows],
        "late": [improved(row) for row in runs.rows if row["name"].startswith("rte/lora-r8/")],
    }
    for name, rows in parts.items():
        collect_runs(replace(runs, rows=rows), tmp_path / name / TABLE)
        for file in ("selection.json", "grid.yaml"):
            shutil.copy(grid / file, tmp_path / name / file)
    assert command("collect", tmp_path / "early", tmp_path / "late") != 0
    assert "--out=None: name the new table of these parts" in capsys.readouterr().err
    assert command("collect", tmp_path / "early", tmp_path / "late", "--out", tmp_path / "both" / TABLE) == 0
    both = read_runs(tmp_path / "both")
    assert [row["name"] for row in both.rows] == [row["name"] for row in runs.rows]
    assert (both.selection, both.grid) == (runs.selection, runs.grid)
    before, after = (frame.reported.set_index("name").score for frame in (runs, both))
    changed = after[before != after].index
    assert set(changed) == {name for name in before.index if name.startswith("rte/lora-r8/")}
    assert command("collect", tmp_path / "early", tmp_path / "late", "--out", tmp_path / "both" / "again.parquet") != 0
    assert "selection.json': it exists" in capsys.readouterr().err
