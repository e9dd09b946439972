"""Tables of runs: every number against one worked out here, and everything a table has to say beside its numbers."""

import argparse
import csv
import functools
import io
import itertools
import json
import re
import shutil
import statistics
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import yaml

from aroma.errors import CheckpointError, ConfigError
from aroma_lab.cli import lab_collect, lab_table
from aroma_lab.report import formats
from aroma_lab.report.formats import FORMATS, SUFFIXES, Table
from aroma_lab.report.runs import TABLE, collect_runs, read_runs
from aroma_lab.report.statistics import paired_differences, spread
from aroma_lab.report.tables import KINDS, inner_loops, make_table
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


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """Tables of runs in place of the run folders, by the folder that they were made of."""
    found = {}
    for folder in (FROZEN, OF_SETS):
        found[folder] = tmp_path_factory.mktemp("collected") / folder.name
        found[folder].mkdir()
        for name in ("grid.yaml", "selection.json"):
            shutil.copy(folder / name, found[folder])
        collect_runs(read_runs(folder), found[folder] / TABLE)
    return found


def edit_result(grid, name, **values):
    edit(grid / "runs" / name / "result.json", lambda content: content.update(values))


@functools.cache
def frozen(folder, kind, baseline):
    return make_table(read_runs(folder), kind, baseline)


def table(folder, kind="main", baseline=None):
    if folder in (FROZEN, OF_SETS):
        return frozen(folder, kind, baseline)
    return make_table(read_runs(folder), kind, baseline)


def raw(folder, kind="main", baseline=None):
    """Return the CSV as rows by method (the first of several), each a mapping from heads to texts."""
    rows = list(csv.DictReader(io.StringIO(formats.to_csv(table(folder, kind, baseline)))))
    return {row["method"]: row for row in reversed(rows)}


def scores(folder, method):
    return {
        (result["task"], result["seed"]): result["score"]
        for path in sorted(folder.glob("runs/*/*/*/result.json"))
        if (result := json.loads(path.read_text()))["method"] == method and result["purpose"] == "report"
    }


def same(one, other):
    pd.testing.assert_frame_equal(one.values, other.values)
    pd.testing.assert_frame_equal(one.shown, other.shown)
    return (one.best, one.caption, list(one.notes)) == (other.best, other.caption, list(other.notes))


# Numbers


@pytest.mark.parametrize("is_collected", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_have_the_numbers_on_record(kind, is_collected, collected):
    folder = OF_SETS if kind == "sets" else FROZEN
    found = formats.to_csv(table(collected[folder] if is_collected else folder, kind))
    expected = pd.read_csv(GOLDEN / "tables" / f"{kind}.csv")
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(found)), expected, rtol=1e-12, atol=1e-14, check_dtype=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_of_runs_gives_the_same_table_as_the_run_folders(kind, collected):
    assert same(table(collected[FROZEN] / TABLE, kind), table(FROZEN, kind))


def test_a_table_of_runs_keeps_what_made_each_run(collected):
    frame = pd.read_parquet(collected[FROZEN] / TABLE)
    trial, result = (
        json.loads((FROZEN / "runs/mrpc/aroma/seed-1" / f"{name}.json").read_text()) for name in ("trial", "result")
    )
    row = frame[frame.name == "mrpc/aroma/seed-1"].iloc[0]
    kept = json.loads(row["result"])
    assert json.loads(row["trial"]) == trial
    assert kept.items() <= result.items()
    assert set(result) - set(kept) <= {"singular_values", "overlaps"}
    assert (row["score"], row["seed"], row["state"], row["git_revision"]) == (
        result["score"],
        1,
        "finished",
        result["git_revision"],
    )


def test_means_and_deviations_are_those_of_the_runs():
    rows = raw(FROZEN)
    assert list(rows) == ["aroma-no-reset", "aroma", "adalora-r8", "lora-r8", "head-only"]
    for method, row in rows.items():
        for task in ("mrpc", "rte"):
            of_task = [score for (name, _), score in scores(FROZEN, method).items() if name == task]
            assert int(row[f"{task}_seeds"]) == len(of_task)
            assert float(row[f"{task}_mean"]) == pytest.approx(statistics.fmean(of_task), rel=1e-12)
            if len(of_task) > 1:
                assert float(row[f"{task}_std"]) == pytest.approx(statistics.stdev(of_task), rel=1e-9)
            else:
                assert row[f"{task}_std"] == ""
        assert float(row["average"]) == pytest.approx((float(row["mrpc_mean"]) + float(row["rte_mean"])) / 2)


def test_a_single_seed_has_no_interval_and_the_table_says_so():
    row = raw(FROZEN)["aroma-no-reset"]
    assert row["difference_low"] == row["difference_high"] == ""
    assert row["difference"] != ""
    assert (
        table(FROZEN).notes[0].startswith("No interval for aroma-no-reset: a single seed shared with lora-r8 on rte")
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


def test_another_baseline_turns_the_difference_round():
    there, back = raw(FROZEN, baseline="lora-r8")["aroma"], raw(FROZEN, baseline="aroma")["lora-r8"]
    assert float(there["difference"]) == -float(back["difference"]) != 0


def test_without_the_default_baseline_there_is_no_comparison(grid):
    for task in ("mrpc", "rte"):
        shutil.rmtree(grid / "runs" / task / "lora-r8")
    assert "difference" not in raw(grid)["aroma"]
    with pytest.raises(ConfigError, match=r"--baseline='lora-r8': no run of it has finished; give one of head"):
        table(grid, baseline="lora-r8")
    with pytest.raises(ConfigError, match=r"^--baseline=None: a table of differences compares two methods"):
        table(grid, "paired")


# What failed or is missing


def test_failed_unfinished_and_absent_runs_are_listed_in_every_format():
    for form in ("text", "markdown", "latex"):
        words = re.sub(r"\s+", " ", FORMATS[form](table(FROZEN)).replace("\\", ""))
        assert "Failed: rte/adalora-r8/seed-2: NonFiniteError: loss=nan: training has diverged; lower" in words
        assert "runs/rte/adalora-r8/seed-2/failure.json" in words
        assert "Not finished: rte/aroma-no-reset/seed-1." in words
        assert "Not begun: rte/aroma-no-reset, seed 2." in words
    rows = raw(FROZEN)
    assert rows["adalora-r8"]["failed"] == "rte/adalora-r8/seed-2"
    assert rows["aroma"]["failed"] == ""
    assert (rows["adalora-r8"]["rte_seeds"], rows["adalora-r8"]["planned_seeds"]) == ("2", "3")


def test_a_method_that_only_failed_keeps_its_row(grid):
    for result in grid.glob("runs/*/aroma/*/result.json"):
        result.unlink()
        (result.parent / "failure.json").write_text(json.dumps({"error": "ValueError", "message": "no"}))
    found = table(grid)
    assert found.shown.set_index("method").loc["aroma"].iloc[0] == "– (0 of 3)"
    assert sum(note.startswith("Failed: ") for note in found.notes) == 7


def test_survivors_of_a_failure_do_not_win_a_column():
    # AdaLoRA's two surviving seeds on RTE have the higher mean.
    rows, found = raw(FROZEN), table(FROZEN)
    assert max(rows, key=lambda method: float(rows[method]["rte_mean"])) == "adalora-r8"
    # 180 + 176 + 182 and 179 + 181 + 178 right answers are the same number: ties as printed are both the best.
    best = {(found.shown.columns[column].split()[0], found.shown.method[row]) for row, column in found.best}
    assert best == {("rte", "lora-r8"), ("mrpc", "aroma"), ("rte", "aroma"), ("average", "aroma")}


# The caption's protocol, and the notes on what was not alike


def test_the_caption_says_how_it_was_measured():
    for words in (
        "over 3 seeds (0, 1, 2)",
        "mrpc: accuracy on all 1,725 of test; trained on 3,301 examples, 367 held out of training.",
        "rte: accuracy on all 277 of validation; trained on 2,241 examples, 249 held out of training.",
        "600 steps of 32 examples in bf16 mixed precision.",
        "Weights: those of the last step.",
        "training.learning_rate, among 0.0005, 0.001 and 0.002, by the score on held-out training examples (the lower "
        "loss decides between equal scores) in runs of 200 steps, seed 100; none of them saw a reported example.",
        "percentiles of 10,000 resamples",
        "With 3 seeds such an interval is narrower than it should be.",
    ):
        assert words in table(FROZEN).caption


def test_without_a_selection_the_caption_says_so(grid):
    (grid / "selection.json").unlink()
    assert "These runs chose nothing" in table(grid).caption
    start = "Different training.learning_rate on rte: "
    assert any(note.startswith(start) for note in table(grid).notes)
    assert not any(note.startswith(start) for note in table(FROZEN).notes)


def test_weights_of_the_best_evaluation_are_called_so(grid):
    for trial in grid.glob("runs/mrpc/*/*/trial.json"):
        edit(trial, lambda content: content["training"].update(checkpoint="best"))
    words = "Weights: those of the best evaluation on held-out training examples and those of the last step."
    assert words in table(grid).caption
    edit(grid / "runs/mrpc/aroma/seed-0/trial.json", lambda content: content["training"].pop("checkpoint"))
    assert any(note.startswith("Different training.checkpoint on mrpc: best (") for note in table(grid).notes)


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
    found = set(table(grid).notes) - set(table(FROZEN).notes)
    assert any(re.fullmatch(note, one) for one in found), found


def test_other_versions_threads_and_settings_are_noted_but_not_another_seed(grid):
    trial = grid / "runs" / "rte" / "lora-r8" / "seed-1" / "trial.json"
    edit(trial, lambda content: (content["training"].update(batch_size=16), content["task"].update(max_length=64)))
    found = " ".join(table(grid).notes)
    assert "Different torch: 2.13.0+cpu (26 runs); 2.12.1+cpu (mrpc/head-only/seed-2)." in found
    assert "Different threads: 1 (26 runs); 2 (mrpc/head-only/seed-2)." in found
    assert "Different training.batch_size on rte: 32 (" in found
    assert "; 16 (lora-r8)." in found
    assert "Different task.max_length on rte: 128 (" in found
    assert "seed on" not in found


def test_choices_that_were_not_kept_to_are_noted(grid):
    edit(grid / "runs/rte/lora-r8/seed-1/trial.json", lambda content: content["training"].update(learning_rate=0.3))
    place = next((grid / "runs" / "select" / "mrpc" / "lora-r8").iterdir())
    edit(place / "result.json", lambda content: content.update(reported={"test": {"accuracy": 0.8}}))
    edit(grid / "selection.json", lambda content: content["rte"]["aroma"].update(chosen=None))
    notes = table(grid).notes
    assert "Not with the chosen values: rte/lora-r8/seed-1." in notes
    assert f"The choice looked at reported examples: select/mrpc/lora-r8/{place.name}." in notes
    assert "none of them saw" not in table(grid).caption
    assert "Nothing could be chosen, no candidate has a score: rte/aroma." in notes
    assert any(note.startswith("Without a choice on held-out examples, with the given values: rte") for note in notes)
    assert any(note.startswith("Chosen at the edge of what was tried") for note in notes)


# Statistics


def differences(scores, baseline, **options):
    rows = [("a", *key, value) for key, value in scores.items()] + [("b", *key, v) for key, v in baseline.items()]
    found, single = paired_differences(pd.DataFrame(rows, columns=["method", "task", "seed", "x"]), "x", "b", ["a"])
    row = found.loc["a"]
    return row.difference, (row.low, row.high), row.pairs, single.get("a", [])


def against_zero(scores):
    return differences(scores, dict.fromkeys(scores, 0.0))


@pytest.mark.parametrize(
    ("values", "interval"),
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
def test_intervals_with_a_known_answer(values, interval):
    mean, found, pairs, _ = against_zero({("t", seed): value for seed, value in enumerate(values)})
    assert mean == pytest.approx(sum(values) / len(values), rel=1e-15)
    assert found == interval
    assert pairs == len(values)


def test_seeds_are_drawn_task_by_task():
    # Three tasks with pairs 0 and 2: the mean is (2/6) times six fair coins. All tails has probability 1/64 < 0.025,
    # at most one head 7/64; were the tasks drawn together, it would be 1/4.
    mean, interval, _, _ = against_zero({(task, seed): 2.0 * seed for task in "abc" for seed in (0, 1)})
    assert mean == 1.0
    assert interval == (pytest.approx(1 / 3), pytest.approx(5 / 3))


def test_the_interval_is_that_of_all_resamples_and_the_same_every_time():
    samples = {"a": (0.011, -0.002, 0.007), "b": (0.031, 0.012, -0.004)}
    draws = [[statistics.fmean(draw) for draw in itertools.product(values, repeat=3)] for values in samples.values()]
    means = sorted(statistics.fmean(pair) for pair in itertools.product(*draws))
    low, high = (means[round(share * (len(means) - 1))] for share in (0.025, 0.975))
    scores = {(task, seed): value for task, values in samples.items() for seed, value in enumerate(values)}
    _, interval, _, _ = against_zero(scores)
    assert interval == (pytest.approx(low, abs=4e-4), pytest.approx(high, abs=4e-4))
    assert interval == against_zero(scores)[1]


def test_the_variance_that_both_share_is_not_in_the_interval():
    baseline = {("t", seed): float(seed) for seed in range(4)}
    assert differences({k: v + 0.5 for k, v in baseline.items()}, baseline)[:2] == (0.5, (0.5, 0.5))
    assert differences(baseline, baseline)[:2] == (0.0, (0.0, 0.0))


def test_only_shared_tasks_and_seeds_count_and_a_single_pair_leaves_no_interval():
    ours = {("a", 0): 1.0, ("a", 1): 2.0, ("b", 0): 9.0}
    mean, _, pairs, single = differences(ours, {("a", 0): 0.0, ("a", 1): 0.0, ("a", 2): 5.0})
    assert (mean, pairs, single) == (1.5, 2, [])
    assert pd.isna(differences({("a", 0): 1.0}, {("a", 1): 1.0})[0])
    mean, (low, high), pairs, single = against_zero(ours)
    assert (mean, pairs, single) == (5.25, 3, ["b"])
    assert pd.isna(low)
    assert pd.isna(high)


def test_a_spread_is_a_sample_deviation():
    frame = pd.DataFrame({"method": list("aaab"), "x": [1.0, 2.0, 4.0, 5.0]})
    found = spread(frame, "x", ["a", "b", "c"])
    assert found["count"].tolist() == [3, 1, 0]
    assert found.loc["a", "std"] == pytest.approx((7 / 3) ** 0.5)
    assert found.loc["b", "mean"] == 5.0
    assert found[["std"]].isna().sum().item() == 2


# Tables 4 and 5, and the inner criterion


def test_an_epoch_that_was_cut_short_counts_as_what_it_is(grid):
    # 3301 examples in batches of 32 are 104 steps; 600 steps are 5 epochs of 60 s and 80 steps of the sixth.
    assert read_runs(grid).of("lora-r8", "mrpc").epoch_seconds.iloc[0] == pytest.approx(60.0, rel=1e-6)
    trial = grid / "runs" / "mrpc" / "lora-r8" / "seed-0" / "trial.json"
    edit(trial, lambda content: content["training"].update(batch_size=10, gradient_accumulation_steps=4))
    edit_result(grid, "mrpc/lora-r8/seed-0", epoch_seconds=[9.0, 3.0], steps=4, examples={"train": 101, "test": 5})
    assert read_runs(grid).of("lora-r8", "mrpc").epoch_seconds.iloc[0] == 9.0  # 11 batches are 3 steps


def test_ratios_of_times_stand_beside_the_papers():
    rows = raw(FROZEN, "time")
    assert float(rows["aroma"]["over_lora-r8"]) == pytest.approx(48 / 60, rel=1e-6)
    # AdaLoRA lacks the slowest seed on RTE: the mean there is of 1 and 1.01 times 0.7 · 72 s.
    expected = 48 * 1.01 * 1.7 / (72 * (1.01 + 0.7 * 1.005))
    assert float(rows["aroma"]["over_adalora-r8"]) == pytest.approx(expected, rel=1e-6)
    assert (rows["aroma"]["paper_over_lora-r8"], rows["aroma"]["paper_over_adalora-r8"]) == ("0.76", "0.285")
    assert rows["lora-r8"]["paper_over_lora-r8"] == ""
    other = raw(FROZEN, "time", baseline="head-only")["aroma"]
    assert float(other["over_head-only"]) == pytest.approx(48 / 20, rel=1e-6)
    assert "paper_over_head-only" not in other


def test_the_inner_criterion_is_counted_loop_by_loop(grid):
    (grid / "runs" / "mrpc" / "aroma" / "seed-0" / "events.jsonl").write_text(
        "".join(
            json.dumps({"kind": kind, "outer_step": outer, "module": f"encoder.layer.{layer}.output.dense"}) + "\n"
            for kind, outer, layer in (("checked", 3, 1), ("merged", 1, 0), ("frozen", 2, 0), ("merged", 1, 1))
        )
    )
    checks = [[1, 110, "encoder.layer.0.output.dense"], [2, 90, "encoder.layer.1.output.dense"]]
    edit_result(grid, "mrpc/aroma/seed-0", inner_checks=checks)
    loops = pd.DataFrame(inner_loops(next(read_runs(grid).of("aroma", "mrpc").itertuples())))
    assert set(loops.kind) == {"output.dense"}
    assert sorted(zip(loops.outer_step, loops.fired.fillna(0), strict=True)) == [(1, 0), (1, 110), (2, 0), (2, 90)]


def test_the_quartiles_of_the_inner_criterion():
    # First loops on MRPC fire at 110, 120, 110, 120 with seeds 0 and 2, the other way round with seed 1; second loops
    # at 140, 150, 160 and, of the last matrix, never.
    row = raw(FROZEN, "inner")["aroma"]
    steps = sorted([110] * 6 + [120] * 6 + [140, 150, 160] * 3)
    assert (row["task"], row["matrices"], row["fired"], row["never"]) == ("mrpc", "all", "21", "3")
    assert [float(row[key]) for key in ("lower_quartile", "median", "upper_quartile")] == [
        steps[5],
        steps[10],
        steps[15],
    ]


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [("reset", "no run of kind aroma has finished"), ("inner", "no run with inner checks has finished")],
)
def test_a_table_of_aroma_without_runs_of_it_is_refused(kind, remedy, grid):
    for place in grid.glob("runs/*/aroma*/*/result.json"):
        place.unlink()
    with pytest.raises(ConfigError, match=f"--kind='{kind}': {remedy}"):
        table(grid, kind)
    with pytest.raises(ConfigError, match=f"^--baseline='aroma': a table of kind {kind} compares with no method"):
        table(FROZEN, kind, "aroma")


# Formats

HOSTILE = "a|b_c & 50 % #1 {x} $y$ ~^\\ [z] <t> *w* --k"


@pytest.fixture
def hostile():
    values = pd.DataFrame({"word": [HOSTILE, "plain"], "n": [1.5, 2.0], "m": [None, None]})
    shown = pd.DataFrame({"word": [HOSTILE, "plain"], HOSTILE: ["1 ± 2", "2"]}, dtype=object)
    return Table("main", HOSTILE, values, shown, frozenset({(0, 1)}), [HOSTILE])


def test_latex_escapes_what_means_something_to_it(hostile):
    rendered = formats.latex(hostile)
    escaped = (
        r"a\textbar{}b\_c \& 50 \% \#1 \{x\} \$y\$ \textasciitilde{}\textasciicircum{}\textbackslash{} {[}z{]} "
        r"\textless{}t\textgreater{} {*}w{*} -{}-k"
    )
    assert rendered.count(escaped) == 4  # caption, head, cell, note
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
    found = hostile if kind == "hostile" else table(OF_SETS if kind == "sets" else FROZEN, kind)
    (tmp_path / "table.tex").write_text(formats.latex(found))
    (tmp_path / "page.tex").write_text(DOCUMENT)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    for _ in range(2):  # labels are known the second time
        said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=True).stdout
    assert "Output written on page.pdf (1 page" in said
    for complaint in ("Overfull", "Undefined", "undefined", "Missing", "too large"):
        assert complaint not in said


def test_markdown_escapes_what_means_something_to_it(hostile):
    lines = formats.markdown(hostile).splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines[:4]} == {3}
    assert r"\*w\*" in lines[2]
    assert "**1 ± 2**" in lines[2]


def test_text_is_aligned_and_marks_the_best(hostile):
    lines = formats.text(hostile).splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("word"))
    assert lines[start + 2].endswith("1 ± 2 *")
    assert lines[start + 3].index("2") == lines[start + 2].rindex("2"), "a star does not shift the others"


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0"),
        (514, "514"),
        (999.6, "1K"),
        (9216, "9.22K"),
        (999_600, "1M"),
        (22_713_216, "22.7M"),
        (8.03e9, "8.03B"),
    ],
)
def test_amounts_have_three_digits(count, words):
    assert formats.amount(count) == words


@pytest.mark.parametrize(
    ("difference", "words"),
    [(0.0, "0.00"), (0.0123, "+1.23"), (-0.0123, "−1.23"), (-0.00001, "0.00"), (0.00001, "0.00")],
)
def test_differences_have_a_sign_unless_they_round_to_nothing(difference, words):
    assert formats.signed_points(difference) == words


# Bad input

OF_RUN = "; restore the file, or remove the run's folder and run it again"
OF_GRID = "; restore the file, or remove it and run the grid again, which writes it anew"


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no runs there, and no runs\.parquet; give the output folder"):
        read_runs(tmp_path / "absent")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("trial.json", {"purpose": ...}, "trial.json: edited, or of another version: purpose missing"),
        ("trial.json", {"options": 3}, "trial.json, options: edited, or of another version: 3 is not a mapping"),
        ("trial.json", {"training": {"seed": "0"}}, "trial.json, training, seed: edited"),
        ("result.json", {"threads": ...}, "result.json: edited, or of another version: threads missing"),
        ("result.json", {"score": None}, "result.json, score: edited, or of another version: None is not a number"),
        ("result.json", {"steps": True}, "result.json, steps: edited, or of another version: True is not a whole num"),
        ("result.json", {"parameters": {"initial": 1, "average": "1", "head": 0}}, "parameters, average: edited"),
        ("result.json", {"examples": {"test": 3}}, "result.json, examples: edited, or of another version: train miss"),
        ("result.json", None, "result.json: missing, truncated or edited"),
        ("trial.json", None, "trial.json: missing, truncated or edited"),
    ],
    ids=str,
)
def test_an_edited_record_is_named(file, change, message, grid):
    path = grid / "runs" / "mrpc" / "aroma" / "seed-0" / file
    if change is None:
        path.write_text('{"a": [')
    else:
        kept = {key: value for key, value in {**json.loads(path.read_text()), **change}.items() if value is not ...}
        path.write_text(json.dumps(kept))
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        read_runs(grid)
    assert str(path) in str(error.value)
    assert str(error.value).endswith(OF_RUN)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("selection.json", {"mrpc": 3}, "selection.json, mrpc: edited, or of another version: 3 is not a mapping"),
        ("selection.json", {"mrpc": {"aroma": {"chosen": 3}}}, "selection.json, mrpc, aroma, chosen: edited"),
        ("selection.json", {"mrpc": {"aroma": {"tried": [[{}]]}}}, "[{}] is not a pair of values and score"),
        (
            "selection.json",
            {"mrpc": {"aroma": {"chosen": {"training.learning_rate": 1}, "tried": [[{}, 0.5]]}}},
            "mrpc, aroma, tried: edited, or of another version: training.learning_rate missing",
        ),
        ("grid.yaml", {"methods": 3}, "grid.yaml, methods: edited, or of another version: 3 is not a mapping"),
        ("grid.yaml", {"seeds": ["a"]}, "grid.yaml, seeds: edited, or of another version: 'a' is not a whole number"),
        ("grid.yaml", [3], "grid.yaml: edited, or of another version: [3] is not a mapping"),
        ("grid.yaml", None, "grid.yaml: edited, no YAML"),
        ("selection.json", None, "selection.json: missing, truncated or edited"),
    ],
    ids=str,
)
def test_an_edited_file_of_the_grid_is_named(file, content, message, grid):
    text = '{"a": [' if content is None else json.dumps(content) if file.endswith("json") else yaml.safe_dump(content)
    (grid / file).write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        read_runs(grid)
    assert str(error.value).endswith(OF_GRID)


def test_a_damaged_table_of_runs_is_named(collected, tmp_path):
    whole = collected[FROZEN] / TABLE
    path = tmp_path / TABLE
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


def test_the_same_run_twice_is_refused(grid):
    shutil.copytree(grid / "runs" / "mrpc" / "aroma", grid / "runs" / "mrpc" / "copy")
    with pytest.raises(CheckpointError, match="both hold mrpc, aroma, seed 0"):
        read_runs(grid)


def test_damaged_events_are_refused(grid):
    (grid / "runs" / "mrpc" / "aroma" / "seed-0" / "events.jsonl").write_text("{")
    with pytest.raises(CheckpointError, match=r"events\.jsonl: truncated or edited"):
        table(grid, "inner")


# The commands


def command(module, *arguments):
    parser = argparse.ArgumentParser()
    module.add_parser(parser.add_subparsers())
    parsed = parser.parse_args(list(map(str, arguments)))
    parsed.run(parsed)


def test_the_commands_choices_are_all_there_are():
    assert tuple(KINDS) == lab_table.KINDS
    assert set(lab_table.FORMAT_NAMES) == set(FORMATS) == set(SUFFIXES.values())


def test_the_suffix_of_the_file_decides_its_format_unless_told(tmp_path, capsys):
    command(lab_table, "table", FROZEN, "--kind", "time", "--out", tmp_path / "t.tex")
    command(lab_table, "table", FROZEN, "--kind", "time", "--out", tmp_path / "t.md", "--format", "csv")
    assert (tmp_path / "t.tex").read_text().startswith("\\begin{table}")
    assert (tmp_path / "t.md").read_text() == formats.to_csv(table(FROZEN, "time"))
    command(lab_table, "table", FROZEN)
    assert capsys.readouterr().out.endswith(formats.text(table(FROZEN)))


def test_csv_leaves_protocol_and_failures_to_standard_error(capsys):
    command(lab_table, "table", FROZEN, "--format", "csv")
    output = capsys.readouterr()
    assert "Failed: rte/adalora-r8/seed-2" in output.err
    assert "Failed" not in output.out


def test_collecting_writes_a_table_beside_the_runs_and_overwrites_nothing(grid, capsys):
    command(lab_collect, "collect", grid)
    assert "27 runs" in capsys.readouterr().out or (grid / TABLE).exists()
    shutil.rmtree(grid / "runs")
    assert same(table(grid), table(FROZEN))
    for module, name in ((lab_collect, "collect"), (lab_table, "table")):
        with pytest.raises(ConfigError, match="it exists; give another name, or move it away"):
            command(module, name, grid, "--out", grid / TABLE)
