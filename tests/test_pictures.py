"""Figures from made-up records: the right number of marks at the right places, and every wrong request refused."""

import argparse
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.patches import Circle, Rectangle

from aroma.errors import AromaError, CheckpointError, ConfigError, DataError
from aroma.files import write_json
from aroma.pictures import SUFFIXES
from aroma_lab.cli import lab_figure
from aroma_lab.report.figures import Choice, draw_figure, held_values, pareto_front
from aroma_lab.report.runs import TABLE, collect_runs, read_runs
from aroma_lab.report.style import matching_module, paper_modules
from made_up_runs import MODULES, edit, write_adapter, write_grid, write_run, write_untrained_run

FIRST, DEEP = "bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.3.attention.self.value"
NOTHING = {"curve": {"planned_steps": 100, "parameters": [[0, 30]], "total_rank": [], "ranks": {}}, "ranks": {}}


def evaluation(step, value, split="test"):
    return {"step": step, "split": split, "accuracy": value, "loss": 1.0}


def growth(steps, height):
    """A curve that grows by one component of every module at each of `steps`."""
    ranks = [[0, 0], *([step, index + 1] for index, step in enumerate(steps))]
    return {
        "planned_steps": 100,
        "parameters": [[0, height], [steps[-1], 0]],
        "total_rank": [[step, rank * len(MODULES)] for step, rank in ranks],
        "ranks": dict.fromkeys(MODULES, ranks),
    }


@pytest.fixture
def own_grid(grid, tmp_path):
    """A copy of `grid` to change."""
    return Path(shutil.copytree(grid, tmp_path / "own"))


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Three methods with 2, 3 and 1 seeds on `mrpc`, one of them also on `rte`; not to be changed."""
    output = tmp_path_factory.mktemp("pictures") / "grid"
    write_grid(output, ["lora", "aroma", "bitfit", "not-begun"])
    for seed in (0, 1):
        evaluations = [evaluation(50, 0.5 + 0.2 * seed), evaluation(50, 0.1, split="held_out"), evaluation(100, 0.8)]
        write_run(output, "mrpc", "lora", seed, evaluations=evaluations, score=0.8)
        write_run(output, "rte", "lora", seed, score=0.6)
    for seed in (0, 1, 2):
        write_run(
            output,
            "mrpc",
            "aroma",
            seed,
            kind="aroma",
            curve=growth([20, 40 + 10 * seed], height=200),
            ranks={module: 2 if index else 0 for index, module in enumerate(MODULES)},
            steps=70 + 10 * seed,
            stopped_early=True,
            score=(0.7, 0.8, 0.9)[seed],
            parameters={"initial": 200, "average": 100.0, "final": 0, "head": 10},
            epoch_seconds=[30.0],
        )
    write_run(output, "mrpc", "bitfit", 0, kind="bitfit", score=0.75, **NOTHING)
    write_run(output, "mrpc", "lora", 7, purpose="select", score=0.99)
    return output


def draw(kind, *folders, **choice):
    return draw_figure(kind, Choice(folders=folders, **choice))


def subtitle(figure):
    return figure.texts[1].get_text()


def panel_titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


# Figure 1 ------------------------------------------------------------------------------------------------------------


def test_curves_have_a_line_for_each_method_and_a_band_where_seeds_differ(grid):
    figure = draw("curves", grid, task="mrpc")
    assert panel_titles(figure) == [
        "(a) trainable parameters",
        "(b) total rank",
        "(c) rank of layer.0.attention.output.dense",
        "(d) rank of layer.3.attention.self.value",
        "(e) accuracy, %",
        "",
    ]
    assert [len(axes.lines) for axes in figure.axes[:5]] == [3, 2, 2, 2, 3]  # BitFit has no ranks
    assert len([band for band in figure.axes[4].collections if band.get_paths()]) == 2  # BitFit has a single seed
    legend = [text.get_text() for text in figure.axes[5].get_legend().get_texts()]
    assert legend == ["lora (2 seeds)", "aroma (3 seeds)", "bitfit (1 seed)"]


def test_a_line_is_the_mean_over_seeds_up_to_the_last_ones_end(grid):
    figure = draw("curves", grid, task="mrpc", methods=("aroma",))
    steps, ranks = figure.axes[2].lines[0].get_data()
    at = dict(zip(steps.tolist(), ranks.tolist(), strict=True))
    assert [at[step] for step in (0, 20, 40, 50, 60)] == pytest.approx([0, 1, 4 / 3, 5 / 3, 2])
    assert max(steps) == 90


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ({"a": [100, 100]}, None),
        ({"a": [60], "b": [100]}, "1 of 2 runs"),
        ({"a": [60, 70], "b": [100]}, "2 of 3 runs"),
    ],
    ids=str,
)
def test_the_subtitle_says_how_runs_that_stopped_show(tmp_path, steps, words):
    for label, of_method in steps.items():
        for seed, last in enumerate(of_method):
            write_run(tmp_path, "mrpc", label, seed, steps=last, stopped_early=last < 100)
    figure = draw("curves", tmp_path)
    ends = [max(line.get_xdata()) for line in figure.axes[0].lines]
    assert ends == [max(of_method) for of_method in steps.values()]
    held = "stopped early: the last value is held until the longest run of the method ends"
    assert subtitle(figure).split(" · ")[1:] == ([f"{words} {held}"] if words else [])


def test_ranks_and_steps_are_counted_in_whole_numbers(tmp_path):
    # At these heights and lengths matplotlib's own ticks are 2.5 apart.
    ranks = [[0, 0], *([step, step] for step in range(1, 17))]
    curve = {"planned_steps": 20, "parameters": [[0, 16]], "total_rank": ranks, "ranks": dict.fromkeys(MODULES, ranks)}
    write_run(tmp_path, "mrpc", "aroma", 0, curve=curve, steps=20)
    figure = draw("curves", tmp_path)
    ticks = [axes.get_yticks() for axes in figure.axes[:4]] + [axes.get_xticks() for axes in figure.axes[:5]]
    assert all(float(tick).is_integer() for of_axis in ticks for tick in of_axis)
    assert min(map(len, ticks)) > 2


def test_scores_are_of_reported_examples_and_end_with_the_result(grid):
    figure = draw("curves", grid, task="mrpc", methods=("lora",))
    steps, scores = figure.axes[4].lines[0].get_data()
    assert steps.tolist() == [50, 100]
    assert scores.tolist() == pytest.approx([60, 80])


@pytest.mark.parametrize(
    ("points", "expected"),
    [([[0, 4]], [4, 4, 4]), ([[0, 4], [6, 0]], [4, 0, 0]), ([[0, 4], [6, 0], [50, 9]], [4, 0, 9])],
)
def test_a_value_holds_from_its_step_on(points, expected):
    assert held_values(points, [0, 6, 60]).tolist() == expected


def test_scores_of_two_reported_splits_are_averaged_where_both_were_measured(tmp_path):
    evaluations = [evaluation(10, 0.4, "matched"), evaluation(10, 0.8, "mismatched"), evaluation(20, 0.9, "matched")]
    reported = {"matched": {"accuracy": 0.5}, "mismatched": {"accuracy": 0.7}}
    write_run(tmp_path, "mnli", "lora", 0, evaluations=evaluations, reported=reported, score=0.6)
    steps, scores = draw("curves", tmp_path).axes[4].lines[0].get_data()
    assert steps.tolist() == [10, 100]
    assert scores.tolist() == pytest.approx([60, 60])


def test_scores_between_measurements_are_on_straight_lines_and_hold_after_the_end(tmp_path):
    for seed, of_run in enumerate(([(2, 0.0), (10, 0.8)], [(5, 0.1), (8, 0.4)])):
        write_run(
            tmp_path,
            "mrpc",
            "lora",
            seed,
            evaluations=[evaluation(*point) for point in of_run],
            steps=of_run[-1][0],
            score=of_run[-1][1],
        )
    steps, scores = draw("curves", tmp_path).axes[4].lines[0].get_data()
    assert steps.tolist() == [5, 8, 10], "from where both were measured"
    assert scores.tolist() == pytest.approx([(30 + 10) / 2, (60 + 40) / 2, (80 + 40) / 2])


@pytest.mark.parametrize("kind", ["pareto", "curves"])
def test_figures_take_methods_that_train_nothing_or_have_no_ranks(kind, tmp_path):
    write_grid(tmp_path, ["pretrained", "bitfit"])
    write_run(tmp_path, "t", "bitfit", 0, kind="bitfit", **NOTHING)
    write_untrained_run(tmp_path, "t", 0)
    figure = draw(kind, tmp_path, task="t")
    if kind == "curves":
        assert [len(axes.lines) for axes in figure.axes[:5]] == [2, 0, 0, 0, 2]


@pytest.mark.parametrize("kind", ["curves", "ranks", "pareto"])
def test_a_table_of_runs_gives_the_same_figure_as_the_run_folders(kind, grid, tmp_path):
    collect_runs(read_runs(grid), tmp_path / TABLE)
    shutil.copy(grid / "grid.yaml", tmp_path)
    figures = [draw(kind, folder, task="mrpc") for folder in (grid, tmp_path)]
    data = [
        [line.get_xydata().tolist() for axes in one.axes for line in axes.lines]
        + [(patch.center, patch.radius) for axes in one.axes for patch in axes.patches if isinstance(patch, Circle)]
        for one in figures
    ]
    assert data[0] == data[1] != []


def test_named_modules_are_shown(grid):
    figure = draw("curves", grid, task="mrpc", modules=("2.output.dense", "layer.1.attention.self.query"))
    names = ["layer.2.output.dense", "layer.1.attention.self.query"]
    assert panel_titles(figure)[2:4] == [
        f"({letter}) rank of {name}" for letter, name in zip("cd", names, strict=True)
    ]
    with pytest.raises(ConfigError, match=r"--modules='1\.output\.dense': Figure 1 shows two"):
        draw("curves", grid, task="mrpc", modules=("1.output.dense",))


def test_a_method_looks_the_same_whatever_is_shown_with_it(grid):
    every = draw("curves", grid, task="mrpc").axes[0].lines
    alone = draw("curves", grid, task="mrpc", methods=("bitfit",)).axes[0].lines
    assert alone[0].get_color() == every[2].get_color() != every[0].get_color()


# Figures 3 and 5 -----------------------------------------------------------------------------------------------------


def test_ranks_have_a_panel_for_each_method_with_ranks(grid):
    figure = draw("ranks", grid, task="mrpc")
    plots, legend = figure.axes[:-1], figure.axes[-1]
    circles = [[patch for patch in axes.patches if isinstance(patch, Circle)] for axes in plots]
    assert [len(panel) for panel in circles] == [2 * len(MODULES), 2 * (len(MODULES) - 1)]
    crosses = [[line for line in axes.lines if line.get_marker() == "x"] for axes in plots]
    assert [len(panel) for panel in crosses] == [0, 1]
    assert not legend.axison
    texts = [text.get_text() for text in figure.texts]
    assert texts[0::2] == ["lora on mrpc, seed 0", "aroma on mrpc, seed 0"]
    assert texts[3] == "20 matrices · ranks 0 to 2, total 38 · effective 28.5 (75% of the rank)"


def test_another_seed_can_be_shown(grid):
    assert draw("ranks", grid, task="mrpc", methods=("aroma",), seed=2).texts[0].get_text().endswith("seed 2")
    with pytest.raises(ConfigError, match="--seed=2: lora has no finished run of it; there are 0, 1"):
        draw("ranks", grid, task="mrpc", methods=("lora",), seed=2)


def test_methods_without_ranks_have_no_circles(grid):
    with pytest.raises(ConfigError, match="--methods='bitfit': none of them has ranks"):
        draw("ranks", grid, task="mrpc", methods=("bitfit",))


# Figure 4 ------------------------------------------------------------------------------------------------------------


def two_components(*columns):
    """B and A of rank-one components e_i e_jᵀ, one for each (i, j, sign)."""
    B, A = torch.zeros(4, len(columns)), torch.zeros(len(columns), 5)
    for place, (i, j, sign) in enumerate(columns):
        B[i, place], A[place, j] = float(sign), 2.0
    return B, A


@pytest.fixture
def pair(tmp_path):
    """Two runs whose adapters share two modules."""
    output = tmp_path / "pair"
    one = write_run(output, "mrpc", "with", 0, kind="aroma")
    other = write_run(output, "mrpc", "without", 0, kind="aroma", options={"reset": "none"})
    write_adapter(one, {FIRST: two_components((0, 0, 1), (1, 1, 1), (2, 2, 1)), DEEP: two_components((0, 0, 1))})
    write_adapter(other, {FIRST: two_components((0, 0, 1), (1, 1, -1)), DEEP: two_components((1, 0, 1))})
    return output, one, other


def cells(axes):
    return np.asarray(axes.collections[0].get_array())


def test_cosines_have_a_cell_for_each_pair_of_components(pair):
    figure = draw("cosines", pair[0])
    axes = figure.axes[0]
    np.testing.assert_allclose(cells(axes), [[1, 0], [0, -1], [0, 0]])
    assert [text.get_text() for text in axes.texts] == ["1.00", "0.00", "0.00", "-1.00", "0.00", "0.00"]
    assert len([patch for patch in axes.patches if isinstance(patch, Rectangle)]) == 2, "the diagonal is framed"
    assert axes.get_title(loc="left") == "layer.0.attention.output.dense\nmean |cosine| on the diagonal 1.00"
    assert subtitle(figure) == "rows: with, seed 0 · columns: without, seed 0"


def test_folders_given_decide_what_stands_in_the_rows(pair):
    _, one, other = pair
    assert subtitle(draw("cosines", other, one)) == "rows: without, seed 0 · columns: with, seed 0"
    assert subtitle(draw("cosines", one, other)) == "rows: with, seed 0 · columns: without, seed 0"


def test_a_module_of_rank_0_in_one_run_has_nothing_to_compare(pair):
    output, _, other = pair
    write_adapter(other, {FIRST: (torch.zeros(4, 1), torch.ones(1, 5)), DEEP: two_components((1, 0, 1))})
    title = draw("cosines", output).axes[0].get_title(loc="left")
    assert title.splitlines()[0] == "layer.3.attention.self.value"
    with pytest.raises(ConfigError, match="no module here ends so"):
        draw("cosines", output, modules=("0.attention.output.dense",))


def test_many_components_have_no_numbers(tmp_path):
    torch.manual_seed(0)
    for label in ("a", "b"):
        write_adapter(write_run(tmp_path, "mrpc", label, 0), {FIRST: (torch.randn(9, 20), torch.randn(20, 8))})
    axes = draw("cosines", tmp_path).axes[0]
    assert cells(axes).shape == (20, 20)
    assert not axes.texts
    assert len(axes.get_xticks()) <= 16


def test_what_cosines_cannot_compare(pair, grid):
    output, one, _ = pair
    with pytest.raises(ConfigError, match="cosines compare two runs; choose two of lora, aroma, bitfit"):
        draw("cosines", grid, task="mrpc")
    with pytest.raises(CheckpointError, match=r"^FOLDER='.*/mrpc/lora/seed-0': the adapter of this run is not kept"):
        draw("cosines", grid, task="mrpc", methods=("lora", "aroma"))
    write_untrained_run(output, "mrpc", 0)
    with pytest.raises(ConfigError, match=r"^--methods='pretrained': it trains nothing"):
        draw("cosines", output, methods=("with", "pretrained"))
    alone = write_run(output.parent / "other", "mrpc", "stray", 5)
    write_adapter(alone, {"elsewhere": two_components((0, 0, 1))})
    with pytest.raises(DataError, match="no grown module in common"):
        draw("cosines", one, alone)
    with pytest.raises(DataError, match="no finished runs of the same seed"):
        draw("cosines", output, alone, methods=("with", "stray"))


# Score against cost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(1, 1)], [0]),
        ([(2, 5), (1, 3), (3, 4)], [1, 0]),
        ([(1, 3), (1, 5)], [1]),
        ([(1, 3), (2, 3)], [0]),
        ([(1, 3), (1, 3)], [0, 1]),
        ([(0, -0.2), (5, 0.1), (5, 0.0)], [0, 1]),
    ],
)
def test_pareto_front_by_hand(points, front):
    assert pareto_front(points) == front


def test_pareto_has_a_mark_for_each_method_filled_on_the_front(grid):
    figure = draw("pareto", grid)
    assert panel_titles(figure) == ["mrpc", "mrpc", "rte", "rte"]
    assert [len(axes.containers) for axes in figure.axes] == [3, 3, 1, 1]
    marks = {}
    for axes in figure.axes[:2]:
        for label, container in zip(("lora", "aroma", "bitfit"), axes.containers, strict=True):
            line = container.lines[0]
            filled = line.get_markerfacecolor() != "white"
            marks.setdefault(label, []).append((*map(float, line.get_xydata()[0]), filled))
    assert marks["lora"] == [(pytest.approx(1000), pytest.approx(80), False), (2, pytest.approx(80), False)]
    assert marks["aroma"] == [(pytest.approx(100), pytest.approx(80), True), (0.5, pytest.approx(80), True)]
    assert not marks["bitfit"][0][2]


def test_a_figure_of_costs_says_over_what_they_are_and_of_which_seeds(tmp_path, grid):
    figure = draw("pareto", grid)
    assert {axes.get_xlabel() for axes in figure.axes[::2]} == {"trainable parameters, average over the planned steps"}
    assert subtitle(figure) == (
        "mean over seeds, whiskers from lowest to highest · filled: on the Pareto front · after an early stop nothing "
        "trains: the planned steps that are left count as 0 parameters"
    )
    write_run(tmp_path, "mrpc", "lora", 0)
    write_run(tmp_path, "mrpc", "full", 0)
    write_run(tmp_path, "rte", "lora", 0)
    assert subtitle(draw("pareto", tmp_path)) == "one seed each · filled: on the Pareto front"


def test_costs_far_apart_are_on_a_logarithmic_axis_with_a_place_for_zero(tmp_path):
    for label, average in (("head", 0), ("bitfit", 25_000), ("full", 22_000_000)):
        parameters = {"initial": average, "average": average, "final": average, "head": 5}
        write_run(tmp_path, "mrpc", label, 0, parameters=parameters)
    axes = draw("pareto", tmp_path).axes
    assert (axes[0].get_xscale(), axes[1].get_xscale()) == ("symlog", "linear")
    parts = axes[0].transData.transform([(0, 80), (25_000, 80), (22_000_000, 80)])[:, 0]
    assert np.diff(parts).min() > 20  # pixels


# Which runs ----------------------------------------------------------------------------------------------------------


def test_runs_that_are_not_reported_or_not_finished_are_left_out(tmp_path):
    folder = write_run(tmp_path, "mrpc", "lora", 0, purpose="select")
    unfinished = write_run(tmp_path / "other", "mrpc", "lora", 0)
    (unfinished / "result.json").unlink()
    for place in (tmp_path, folder, unfinished):
        with pytest.raises(DataError, match="no finished run in it that is reported"):
            draw("pareto", place)


def test_two_runs_of_one_method_and_seed_are_refused(grid, tmp_path):
    other = write_run(tmp_path / "other", "mrpc", "lora", 0)
    with pytest.raises(DataError, match="of the same task, method and seed as"):
        draw("curves", grid, other, task="mrpc")


@pytest.mark.parametrize(
    ("kind", "choice", "message"),
    [
        ("curves", {}, "--task=None: this figure shows one task; choose one of mrpc, rte"),
        ("ranks", {}, "--task=None"),
        ("cosines", {}, "--task=None"),
        ("curves", {"task": "cola"}, "--task='cola': no finished run has it; there are mrpc, rte"),
        ("curves", {"task": "mrpc", "methods": ("not-begun",)}, "--methods='not-begun': no finished run has it"),
        (
            "curves",
            {"task": "rte", "methods": ("aroma",)},
            "--methods='aroma': no finished run has it; there are lora",
        ),
        ("pareto", {"methods": ("not-begun",)}, "--methods='not-begun': no finished run has it"),
        ("pareto", {"modules": ("a",)}, "--modules='a': only for curves and cosines"),
        ("curves", {"task": "mrpc", "seed": 0}, "--seed=0: only for ranks and cosines"),
    ],
)
def test_a_choice_that_cannot_be_drawn_is_refused(grid, kind, choice, message):
    with pytest.raises(AromaError) as error:
        draw(kind, grid, **choice)
    assert message in str(error.value)


@pytest.mark.parametrize(("file", "key"), [("curve.json", "ranks"), ("history.json", "evaluations")])
def test_a_damaged_record_is_named(own_grid, file, key):
    path = own_grid / "runs" / "mrpc" / "lora" / "seed-0" / file
    edit(path, lambda content: content.pop(key))
    with pytest.raises(CheckpointError, match=f"{file}: edited, or of another version: {key} missing; restore the"):
        draw("curves", own_grid, task="mrpc")
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{file}: missing, truncated or edited .*; restore the file"):
        draw("curves", own_grid, task="mrpc")


# Names of modules ----------------------------------------------------------------------------------------------------


def test_the_papers_modules_are_taken_at_the_same_depth():
    names = [
        f"roberta.encoder.layer.{layer}.attention.{part}"
        for layer in range(12)
        for part in ("self.value", "output.dense")
    ]
    assert paper_modules(names) == [
        "roberta.encoder.layer.0.attention.output.dense",
        "roberta.encoder.layer.9.attention.self.value",
    ]
    assert paper_modules(["h.0.c_attn", "h.1.c_attn", "h.1.c_proj"]) == ["h.0.c_attn", "h.1.c_proj"]
    assert paper_modules(["h.0.c_attn"]) == ["h.0.c_attn"]


def test_a_module_is_found_by_its_end():
    assert matching_module("layer.2.output.dense", MODULES) == "bert.encoder.layer.2.output.dense"
    with pytest.raises(ConfigError, match=r"--modules='query': 4 modules end so, such as bert"):
        matching_module("query", MODULES)
    with pytest.raises(ConfigError, match=r"no module here ends so; the nearest is layer\.2\.output\.dense"):
        matching_module("layer.2.output.dens", MODULES)


# Files and command ---------------------------------------------------------------------------------------------------


def command(*arguments):
    parser = argparse.ArgumentParser()
    lab_figure.add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["figure", *map(str, arguments)])
    parsed.run(parsed)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_command_writes_a_picture(grid, tmp_path, capsys, suffix):
    out = tmp_path / f"figure{suffix}"
    command("ranks", grid, "--task", "mrpc", "--methods", "aroma", "--out", out)
    assert out.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml", b"%PDF-")
    assert f"picture: {out}" in capsys.readouterr().out
    first = out.read_bytes()
    out.unlink()
    command("ranks", grid, "--task", "mrpc", "--methods", "aroma", "--out", out)
    assert out.read_bytes() == first, "the same figure gives the same bytes"


def test_the_command_names_its_picture_and_overwrites_nothing(grid, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command("curves", grid, "--task", "mrpc")
    assert (tmp_path / "curves-mrpc.png").exists()
    with pytest.raises(ConfigError, match=r"--out='curves-mrpc\.png': it exists"):
        command("curves", grid, "--task", "mrpc")
    command("pareto", grid)
    assert (tmp_path / "pareto.png").exists()
    with pytest.raises(ConfigError, match=r"--out='a\.docx': unknown kind of picture"):
        command("pareto", grid, "--out", "a.docx")


def test_a_grid_edited_by_hand_is_named(own_grid):
    (own_grid / "grid.yaml").write_text("methods: [")
    with pytest.raises(CheckpointError, match=r"grid\.yaml"):
        draw("pareto", own_grid)
    write_json(own_grid / "grid.yaml", {"methods": {"bitfit": {}, "lora": {}}})
    figure = draw("curves", own_grid, task="mrpc")
    legend = [text.get_text() for text in figure.axes[5].get_legend().get_texts()]
    assert legend == ["bitfit (1 seed)", "lora (2 seeds)", "aroma (3 seeds)"]
