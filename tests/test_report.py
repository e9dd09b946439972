"""Tables and pages of runs: every number against one worked out here, and what a table says beside its numbers."""

import functools
import io
import re
import shutil
import statistics
from pathlib import Path

import pandas as pd
import pytest

from aroma.cli import main
from aroma.errors import CheckpointError, ConfigError, DataError
from aroma_lab.cli import lab_report
from aroma_lab.report import figures
from aroma_lab.report.formats import Table
from aroma_lab.report.run_page import run_facts
from aroma_lab.report.runs import TABLE, collect_runs, read_runs
from aroma_lab.report.statistics import not_learnt
from aroma_lab.report.tables import KINDS, make_table
from made_up_runs import edit, write_run

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
    return pd.DataFrame(table(folder, kind, **options).values).drop_duplicates("method").set_index("method")


# Numbers


@pytest.mark.parametrize("is_collected", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_have_the_numbers_on_record_from_folders_and_from_a_table_of_runs(kind, is_collected, collected):
    folder = OF_SETS if kind == "sets" else FROZEN
    found = table(collected[folder] if is_collected else folder, kind)
    expected = pd.read_csv(GOLDEN / "tables" / f"{kind}.csv")
    values = pd.read_csv(io.StringIO(found.written(".csv")))
    pd.testing.assert_frame_equal(values, expected, rtol=1e-12, atol=1e-14, check_dtype=False)
    assert found.written(".md") == table(folder, kind).written(".md")


def test_the_baseline_decides_the_difference(grid):
    assert raw(FROZEN).difference["aroma"] == -raw(FROZEN, baseline="aroma").difference["lora-r8"] != 0
    assert raw(FROZEN).loc["aroma-no-reset", ["difference", "error"]].notna().tolist() == [True, False], "one pair"
    for task in ("mrpc", "rte"):
        shutil.rmtree(grid / "runs" / task / "lora-r8")
    assert "difference" not in raw(grid)
    with pytest.raises(ConfigError, match=r"--baseline='lora-r8': no run of it has finished; give one of head"):
        table(grid, baseline="lora-r8")


def of_ranks(output, task, method, scores, trained, kind="lora"):
    for seed, score in enumerate(scores):
        write_run(output, task, method, seed, kind=kind, score=score, trained_rank=trained)


def test_the_best_fixed_rank_is_compared_with_seed_by_seed(tmp_path):
    of_ranks(tmp_path, "easy", "lora-r1", (0.80, 0.84), 1.0)
    of_ranks(tmp_path, "easy", "lora-r4", (0.70, 0.74), 4.0)
    of_ranks(tmp_path, "easy", "lora-r8", (0.9,), 8.0)  # of which a seed failed
    of_ranks(tmp_path, "easy", "aroma", (0.79, 0.84), 0.9, kind="aroma")
    of_ranks(tmp_path, "equal", "lora-r4", (0.60, 0.60), 4.0)
    of_ranks(tmp_path, "equal", "lora-r1", (0.60, 0.60), 1.0)
    of_ranks(tmp_path, "equal", "aroma", (0.55, 0.57), 2.0, kind="aroma")
    for seed in (0, 1):  # another method, though the best
        write_run(tmp_path, "equal", "lora-ga", seed, score=0.99, trained_rank=4.0, options={"init": "lora_ga"})
    rows = pd.DataFrame(table(tmp_path, "ranks").values).set_index(["method", "task"]).loc["aroma"]
    assert rows.best.to_dict() == {"easy": "lora-r1", "equal": "lora-r1"}, "the smaller one of equals"
    assert rows.difference.to_dict() == pytest.approx({"easy": -0.005, "equal": -0.04})
    assert rows.error["easy"] == pytest.approx(statistics.stdev([-0.01, 0.0]) / 2**0.5)


# What is said beside the numbers


def test_failed_unfinished_and_absent_runs_are_listed():
    words = table(FROZEN).written(".md")
    assert "Failed: rte/adalora-r8/seed-2: NonFiniteError: loss=nan: training has diverged; lower" in words
    assert "Not finished: rte/aroma-no-reset/seed-1." in words
    assert "Not begun: rte/aroma-no-reset/seed-2." in words


def test_the_caption_says_how_it_was_measured(grid):
    for path in grid.glob("**/result.json"):
        edit(path, lambda content: content["examples"].pop("held_out", None))
    found = table(grid, "ranks")
    assert "by the score on what is trained on" in found.caption
    assert "held-out loss" not in found.shown


# Tasks that were not learnt


def write_task(folder, task, scores, examples=1000):
    """Write runs of a task: by method and seed their scores."""
    for method, several in scores.items():
        for seed, score in enumerate(several):
            kind = {"head-only": "head_only", "pretrained": "pretrained"}.get(method, "lora")
            values = {"reported": {"test": {"accuracy": score}}, "score": score, "kind": kind}
            write_run(folder, task, method, seed, **values, examples={"train": 90, "held_out": 10, "test": examples})


LEARNT = {"head-only": [0.50, 0.51, 0.52], "lora-r1": [0.80, 0.82, 0.81], "lora-r8": [0.90, 0.91, 0.93]}
NOT_LEARNT = {"head-only": [0.50, 0.51, 0.52], "lora-r1": [0.51, 0.50, 0.55], "lora-r8": [0.53, 0.51, 0.52]}


def test_of_a_task_that_was_not_learnt_nothing_is_said(tmp_path):
    write_task(tmp_path, "good", LEARNT)
    write_task(tmp_path, "bad", NOT_LEARNT)
    found = table(tmp_path)
    assert list(found.shown)[:3] == ["method", "bad (accuracy), not learnt", "good (accuracy)"]
    assert {title for title, _ in found.best} == {"good (accuracy)"}
    assert "average" not in found.shown, "of one task"
    rows = raw(tmp_path)
    assert rows.bad_mean["lora-r1"] == pytest.approx(0.52)
    assert rows.difference["lora-r1"] == pytest.approx(0.81 - 2.74 / 3)
    assert rows.pairs["lora-r1"] == 3
    (note,) = [note for note in found.notes if "NOT LEARNT" in note]
    assert note.startswith("bad: NOT LEARNT: no method is clearly above head-only, so nothing is said about methods")
    assert "Nearest is lora-r8, +1.00 points in 3 seeds, p = 0.211" in note
    assert note in table(tmp_path, "sets").notes


@pytest.mark.parametrize(
    ("scores", "is_learnt"),
    [
        (LEARNT, True),
        ({"head-only": [0.5], "lora-r1": [0.5]}, True),  # a single seed
        ({"head-only": [0.5, 0.5], "pretrained": [0.5, 0.5]}, True),  # nothing that could learn
        ({"head-only": [0.5, 0.5, 0.5], "lora-r1": [0.501, 0.501, 0.501]}, False),  # one example, each time
        ({"head-only": [0.5, 0.5, 0.5], "lora-r1": [0.51, 0.51, 0.51]}, True),
        (NOT_LEARNT, False),
    ],
    ids=str,
)
def test_a_task_is_learnt_if_a_method_is_clearly_above_head_only(tmp_path, scores, is_learnt):
    write_task(tmp_path, "task", scores)
    assert (not_learnt(read_runs(tmp_path).reported) == {}) == is_learnt


# Formats


def test_formats_escape_what_means_something_to_them_and_mark_the_best():
    hostile = "a|b_c & 50 % <t> *w*"
    found = Table(["m", "n"], 2)
    found.add(hostile, [f"{hostile} −1", "2"])
    found.best, found.caption, found.notes = {(hostile, 0)}, hostile, [hostile]
    assert r"m & a|b\_c \& 50 \% <t> *w* $-$1 \\" in found.written(".tex")
    lines = found.written(".md").splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines[:4]} == {3}
    assert r"\*w\* −1**" in lines[2]


# Pages


def test_a_recorded_run_is_read(tmp_path):
    folder = write_run(tmp_path, "mrpc", "aroma", 0, kind="aroma", trained_rank=2.0)
    facts = run_facts(folder)
    lines = [(line.name, line.metrics.get("accuracy")) for line in facts.results]
    assert lines == [("held-out examples", None), ("test", 0.8)]
    assert facts.lora_parameters == 8 * 500
    assert facts.command == "aroma lab run grid.yaml 'seeds=[0]' --tasks mrpc --methods aroma"
    edit(folder / "result.json", lambda result: result.update(examples={"train": 100, "pairs": 100}))
    assert run_facts(folder).results[0].name == "what is trained on"
    (folder / "result.json").unlink()
    with pytest.raises(DataError, match="it has not finished"):
        run_facts(folder)


def test_what_holds_no_run_has_no_page(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "no run there" in capsys.readouterr().err
    folder = write_run(tmp_path, "mrpc", "aroma", 0, kind="aroma")
    assert main(["report", str(folder)]) == 0
    assert main(["report", str(folder)]) == 0, "its own report may be replaced"
    assert str(folder / "report.html") in capsys.readouterr().out


# Bad input


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("trial.json", lambda one: one.pop("purpose")),
        ("trial.json", lambda one: one["training"].update(seed="a")),
        ("result.json", lambda one: one.update(score=None)),
        ("result.json", lambda one: one["parameters"].update(average="many")),
        ("result.json", None),
        ("selection.json", None),
        ("grid.yaml", None),
    ],
)
def test_a_damaged_file_is_named(file, change, grid):
    path = grid / file if (grid / file).exists() else grid / "runs/mrpc/aroma/seed-0" / file
    if change is None:
        path.write_text('{"a": [')
    else:
        edit(path, change)
    with pytest.raises(CheckpointError, match="missing, truncated or edited") as error:
        read_runs(grid)
    assert str(error.value).startswith(str(path.parent))


def test_no_runs_and_the_same_run_twice_are_refused(grid, tmp_path):
    with pytest.raises(ConfigError, match=r"no runs there, and no runs\.parquet; give the output folder"):
        read_runs(tmp_path / "absent")
    shutil.copytree(grid / "runs/mrpc/aroma", grid / "runs/mrpc/copy")
    with pytest.raises(CheckpointError, match="both hold mrpc, aroma, seed 0"):
        read_runs(grid)


# The commands


def command(*arguments):
    return main(["lab", *map(str, arguments)])


def test_the_commands_choices_are_all_there_are():
    assert list(lab_report.TABLES) == list(KINDS)
    assert list(lab_report.FIGURES) == list(figures.FIGURES)


def test_a_table_is_printed_or_written_in_the_format_of_its_file(tmp_path, capsys):
    assert command("table", FROZEN, "--kind", "ranks", "--out", tmp_path / "t.tex") == 0
    assert (tmp_path / "t.tex").read_text().startswith("\\begin{tabular}")
    capsys.readouterr()
    assert command("table", FROZEN, "--out", tmp_path / "t.csv") == 0
    assert (tmp_path / "t.csv").read_text() == table(FROZEN).written(".csv")
    assert "Failed: rte/adalora-r8/seed-2" in capsys.readouterr().out
    command("table", FROZEN)
    assert capsys.readouterr().out == table(FROZEN).written(".md")
    assert command("table", FROZEN, "--out", tmp_path / "t.xlsx") == 2


def test_figures_and_collected_runs_are_written_and_overwrite_nothing(grid, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    planted = GOLDEN.parents[1] / "results" / "lab" / "planted-nets"
    assert command("figure", "budget", planted, "--task", "graded") == 0
    assert Path("budget-graded.png").stat().st_size > 1000
    assert command("figure", "budget", grid, "--methods", "head-only") == 2
    assert "--methods='head-only': none of them" in capsys.readouterr().err
    assert command("collect", grid) == 0
    assert "32 runs" in capsys.readouterr().out
    shutil.rmtree(grid / "runs")
    assert table(grid).written(".md") == table(FROZEN).written(".md")
    for arguments in (("collect", grid), ("table", grid, "--out", grid / TABLE)):
        assert command(*arguments) != 0
        assert "it exists, and nothing is overwritten" in capsys.readouterr().err
    assert command("figure", "ranks", grid, "--out", "a.docx") != 0
    assert "a.docx': unknown kind of picture" in capsys.readouterr().err
