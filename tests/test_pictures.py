"""Figures from made-up records: the right marks at the right places, and every wrong request refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from aroma.errors import AromaError, CheckpointError, ConfigError
from aroma.pictures import SUFFIXES, MatrixRank, draw_ranks, new_figure, positions_of, rank_picture, save_picture
from aroma_lab.report.figures import draw_figure, pareto_front
from aroma_lab.report.runs import TABLE, collect_runs, read_runs
from aroma_lab.report.style import looks, matching_module, paper_modules, write_title
from made_up_runs import MODULES, NO_RANKS, UNTRAINED, edit, write_adapter, write_grid, write_run

FIRST, DEEP = "bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.3.attention.self.value"


def evaluation(step, value, split="test"):
    return {"step": step, "split": split, "accuracy": value, "loss": 1.0}


def growth(steps, height):
    """A curve that grows by one component of every module at each of `steps`."""
    ranks = [[0, 0], *([step, index + 1] for index, step in enumerate(steps))]
    return {
        "parameters": [[0, height], [steps[-1], 0]],
        "total_rank": [[step, rank * len(MODULES)] for step, rank in ranks],
        "ranks": dict.fromkeys(MODULES, ranks),
    }


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Three methods with 2, 3 and 1 seeds on `mrpc`, one of them also on `rte`; not to be changed."""
    output = tmp_path_factory.mktemp("pictures") / "grid"
    write_grid(output, ["lora", "aroma", "bitfit", "not-begun"])
    for seed in (0, 1):
        evaluations = [evaluation(50, 0.5 + 0.2 * seed), evaluation(50, 0.1, split="held_out"), evaluation(100, 0.8)]
        write_run(output, "mrpc", "lora", seed, evaluations=evaluations)
        write_run(output, "rte", "lora", seed, score=0.6)
    for seed in (0, 1, 2):
        changes = {
            "kind": "aroma",
            "curve": growth([20, 40 + 10 * seed], height=200),
            "ranks": {module: 2 if index else 0 for index, module in enumerate(MODULES)},
            "steps": 70 + 10 * seed,
            "stopped_early": True,
            "score": (0.7, 0.8, 0.9)[seed],
            "parameters": {"initial": 200, "average": 100.0, "final": 0, "head": 10},
            "epoch_seconds": [30.0],
        }
        write_run(output, "mrpc", "aroma", seed, **changes)
    write_run(output, "mrpc", "bitfit", 0, kind="bitfit", score=0.75, **NO_RANKS)
    write_run(output, "mrpc", "lora", 7, purpose="select", score=0.99)
    return output


def draw(kind, *folders, **choice):
    return draw_figure(kind, folders, **choice)


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def remarks(figure):
    return figure.get_supxlabel().replace("\n", " ")


def drawn(axes):
    """Lines with points; seaborn adds empty ones for its legend."""
    return [one for one in axes.lines if len(one.get_xdata())]


def line(axes):
    """Values of the first line by step."""
    return dict(axes.lines[0].get_xydata().tolist())


# Figure 1


def test_curves_have_a_line_for_each_method_and_a_band_where_seeds_differ(grid):
    figure = draw("curves", grid, task="mrpc")
    modules = ("layer.0.attention.output.dense", "layer.3.attention.self.value")
    expected = ["trainable parameters", "total rank", *(f"rank of {name}" for name in modules), "accuracy × 100"]
    assert titles(figure)[:5] == [f"({letter}) {title}" for letter, title in zip("abcde", expected, strict=True)]
    assert [len(drawn(axes)) for axes in figure.axes[:5]] == [3, 2, 2, 2, 3]  # BitFit has no ranks
    assert len([band for band in figure.axes[4].collections if band.get_paths()]) == 2  # BitFit has a single seed
    legend = [text.get_text() for text in figure.axes[5].get_legend().get_texts()]
    assert legend == ["lora (2 seeds)", "aroma (3 seeds)", "bitfit (1 seed)"]
    assert "3 of 6 runs stopped early" in remarks(figure)
    alone = draw("curves", grid, task="mrpc", methods=("bitfit",)).axes[0].lines[0]
    assert alone.get_color() == drawn(figure.axes[0])[2].get_color(), "whatever is shown with it"


def test_a_step_line_is_the_mean_over_seeds_up_to_the_last_ones_end(grid):
    figure = draw("curves", grid, task="mrpc", methods=("aroma",), modules=("2.output.dense", "0.output.dense"))
    assert titles(figure)[2:4] == ["(c) rank of layer.2.output.dense", "(d) rank of layer.0.output.dense"]
    axes = figure.axes[2]
    assert line(axes) == pytest.approx({0: 0, 20: 1, 40: 4 / 3, 50: 5 / 3, 60: 2, 90: 2})
    assert axes.lines[0].get_drawstyle() == "steps-post", "a value holds from its step on"
    assert all(float(tick).is_integer() for tick in (*axes.get_yticks(), *axes.get_xticks()))


def test_scores_are_of_reported_examples_and_end_with_the_result(grid, tmp_path):
    assert line(draw("curves", grid, task="mrpc", methods=("lora",)).axes[4]) == pytest.approx({50: 60, 100: 80})
    write_run(tmp_path, "once", "lora", 0)
    (point,) = drawn(draw("curves", tmp_path, task="once").axes[4])
    assert point.get_marker() == "o", "one evaluation makes no line"
    # Two reported splits are averaged where both were measured.
    evaluations = [evaluation(10, 0.4, "matched"), evaluation(10, 0.8, "mismatched"), evaluation(20, 0.9, "matched")]
    reported = {"matched": {"accuracy": 0.5}, "mismatched": {"accuracy": 0.7}}
    write_run(tmp_path, "mnli", "lora", 0, evaluations=evaluations, reported=reported, score=0.6)
    assert line(draw("curves", tmp_path, task="mnli").axes[4]) == pytest.approx({10: 60, 100: 60})
    # Between measurements a score is on a straight line, it holds after the end, and begins where both were measured.
    for seed, of_run in enumerate(([(2, 0.0), (10, 0.8)], [(5, 0.1), (8, 0.4)])):
        evaluations = [evaluation(*point) for point in of_run]
        write_run(tmp_path, "t", "lora", seed, evaluations=evaluations, steps=of_run[-1][0], score=of_run[-1][1])
    assert line(draw("curves", tmp_path, task="t").axes[4]) == pytest.approx({5: 20, 8: 50, 10: 60})


@pytest.mark.parametrize("kind", ["pareto", "curves"])
def test_figures_take_methods_that_train_nothing_or_have_no_ranks(kind, tmp_path):
    write_run(tmp_path, "t", "bitfit", 0, kind="bitfit", **NO_RANKS)
    write_run(tmp_path, "t", "pretrained", 0, **UNTRAINED)
    figure = draw(kind, tmp_path, task="t")
    if kind == "curves":
        assert [len(drawn(axes)) for axes in figure.axes[:5]] == [2, 0, 2, 0, 0]


@pytest.mark.parametrize("kind", ["curves", "ranks", "pareto"])
def test_a_table_of_runs_gives_the_same_figure_as_the_run_folders(kind, grid, tmp_path):
    collect_runs(read_runs(grid), tmp_path / TABLE)
    shutil.copy(grid / "grid.yaml", tmp_path)
    data = [
        [[one.get_xydata().tolist() for one in axes.lines] or areas(axes) for axes in figure.axes]
        for figure in (draw(kind, folder, task="mrpc") for folder in (grid, tmp_path))
    ]
    assert data[0] == data[1] != []


# Figures 3 and 5


def areas(axes):
    """Areas of the circles as they were drawn, and the positions of crosses."""
    drawn = [one for one in axes.collections if len(one.get_offsets())]
    is_cross = [len(one.get_facecolor()) == 0 or one.get_linewidth()[0] == 1.3 for one in drawn]
    circles = [one.get_sizes()[0] for one, cross in zip(drawn, is_cross, strict=True) if not cross]
    crosses = [tuple(one.get_offsets()[0]) for one, cross in zip(drawn, is_cross, strict=True) if cross]
    return circles, crosses


def test_areas_are_in_proportion_on_one_scale_and_rank_0_is_a_cross():
    first = [MatrixRank("h.0.q", 8, 4.0), MatrixRank("h.1.q", 2, 2.0), MatrixRank("h.2.q", 0, 0.0)]
    figure = draw_ranks({"a": first, "b": [MatrixRank("h.0.q", 4, 1.0)]})
    (circles, crosses), (others, none) = (areas(axes) for axes in figure.axes)
    assert [area / circles[0] for area in (*circles, *others)] == pytest.approx([1, 4 / 8, 2 / 8, 2 / 8, 4 / 8, 1 / 8])
    assert (crosses, none) == ([(2.0, 0.0)], [])
    assert [text.get_text() for text in figure.axes[0].texts] == ["8", "2"]
    assert titles(figure)[0] == "a\n3 matrices · ranks 0 to 8, total 10 · effective 6.0 (60% of the rank)"
    assert titles(draw_ranks({"a": first[2:]})) == ["a\n1 matrix · ranks 0 to 0, total 0 · effective 0.0"]


def test_ranks_have_a_panel_for_each_method_with_ranks(grid):
    figure = draw("ranks", grid, task="mrpc")
    assert [title.splitlines()[0] for title in titles(figure)] == ["lora on mrpc, seed 0", "aroma on mrpc, seed 0"]
    assert [(len(circles), len(crosses)) for circles, crosses in map(areas, figure.axes)] == [(40, 0), (38, 1)]
    assert "seed 2" in titles(draw("ranks", grid, task="mrpc", methods=("aroma",), seed=2))[0]


@pytest.mark.parametrize(
    ("names", "positions"),
    [
        (
            ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.11.output.dense", "bert.pooler.dense"],
            [(0, "attention.self.query"), (11, "output.dense"), (None, "bert.pooler.dense")],
        ),
        (
            ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"],
            [(0, "encoder.block.layer.0.SelfAttention.q"), (0, "decoder.block.layer.0.SelfAttention.q")],
        ),
        (["h.0", "h.1"], [(0, "h"), (1, "h")]),
    ],
)
def test_names_are_split_into_layer_and_kind_and_stacks_are_told_apart(names, positions):
    assert positions_of(names) == positions


# Figure 4


def components(*columns):
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
    write_adapter(one, {FIRST: components((0, 0, 1), (1, 1, 1), (2, 2, 1)), DEEP: components((0, 0, 1))})
    write_adapter(other, {FIRST: components((0, 0, 1), (1, 1, -1)), DEEP: components((1, 0, 1))})
    return output, one, other


def test_cosines_have_a_cell_for_each_pair_of_components(pair):
    output, one, other = pair
    figure = draw("cosines", output)
    axes = figure.axes[0]
    np.testing.assert_allclose(np.asarray(axes.collections[0].get_array()), [[1, 0], [0, -1], [0, 0]])
    assert [text.get_text() for text in axes.texts] == ["1.00", "0.00", "0.00", "-1.00", "0.00", "0.00"]
    assert len(axes.patches) == 2, "the diagonal is framed"
    assert titles(figure)[0] == "layer.0.attention.output.dense\nmean |cosine| on the diagonal 1.00"
    assert remarks(figure).startswith("rows: with, seed 0 · columns: without, seed 0")
    assert remarks(draw("cosines", other, one)).startswith("rows: without, seed 0 · columns: with")
    # A module of rank 0 in one of the runs has nothing to compare.
    write_adapter(other, {FIRST: (torch.zeros(4, 1), torch.ones(1, 5)), DEEP: components((1, 0, 1))})
    assert titles(draw("cosines", output))[0].startswith("layer.3.attention.self.value\n")
    with pytest.raises(ConfigError, match="no module here ends so"):
        draw("cosines", output, modules=("0.attention.output.dense",))


def test_what_cosines_cannot_compare(pair, grid):
    output, one, _ = pair
    write_run(output, "mrpc", "pretrained", 0, **UNTRAINED)
    alone = write_run(output.parent / "other", "mrpc", "stray", 5)
    write_adapter(alone, {"elsewhere": components((0, 0, 1))})
    write_run(alone.parents[3], "mrpc", "stray", 6)
    for folders, methods, message in (
        ([grid], None, "cosines compare two runs; choose two of lora, aroma, bitfit"),
        ([grid], ("lora", "aroma"), "mrpc/lora/seed-0': the adapter of this run is not kept"),
        ([output], ("with", "pretrained"), "--methods='pretrained': it trains nothing"),
        ([one, alone], None, "no grown module in common"),
        ([output, alone.parents[3]], ("with", "stray"), "no finished runs of the same seed"),
    ):
        with pytest.raises(AromaError) as error:
            draw("cosines", *folders, task="mrpc", methods=methods)
        assert message in str(error.value)


# Score against cost


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(2, 5), (1, 3), (3, 4)], [1, 0]),
        ([(1, 3), (1, 5)], [1]),
        ([(1, 3), (2, 3)], [0]),
        ([(1, 3), (1, 3)], [0, 1]),
        ([(0, -0.2), (5, 0.1), (5, 0.0)], [0, 1]),
    ],
)
def test_pareto_front_by_hand(points, front):
    assert pareto_front(points) == front


def test_pareto_has_a_mark_for_each_method_filled_on_the_front(grid, tmp_path):
    figure = draw("pareto", grid)
    assert titles(figure) == ["mrpc", "mrpc", "rte", "rte"]
    assert [len(axes.containers) for axes in figure.axes] == [3, 3, 1, 1]
    for axes, costs in zip(figure.axes, ([1000, 100, 1000], [2, 0.5, 2]), strict=False):
        marks = [one.lines[0] for one in axes.containers]
        expected = [pytest.approx(point) for point in zip(costs, (80, 80, 75), strict=True)]
        assert [mark.get_xydata()[0].tolist() for mark in marks] == expected
        assert [mark.get_markerfacecolor() != "white" for mark in marks] == [False, True, False]
    assert figure.axes[0].get_xlabel() == "trainable parameters, average over the planned steps"
    assert "the planned steps that are left count as 0 parameters" in remarks(figure)
    for label, average in (("head", 0), ("bitfit", 25_000), ("full", 22_000_000)):
        parameters = {"initial": average, "average": average, "final": average, "head": 5}
        write_run(tmp_path, "mrpc", label, 0, parameters=parameters)
    axes = draw("pareto", tmp_path).axes
    assert (axes[0].get_xscale(), axes[1].get_xscale()) == ("symlog", "linear"), "costs far apart, with room for zero"


def test_a_budget_has_a_line_through_the_fixed_ranks_and_a_mark_for_what_finds_its_own(tmp_path):
    for seed, gain in enumerate((0.0, 0.1)):
        for rank, score in ((1, 0.5), (4, 0.7), (2, 0.6)):
            write_run(tmp_path, "t", f"lora-r{rank}", seed, score=score + gain, trained_rank=float(rank))
        write_run(tmp_path, "t", "aroma", seed, kind="aroma", score=0.7 + gain, trained_rank=1.5 + seed)
        write_run(tmp_path, "t", "head-only", seed, kind="head_only", score=0.3 + gain, trained_rank=None)
    axes = draw("budget", tmp_path).axes[0]
    marks = {one.get_label(): one.lines[0].get_xydata()[0].tolist() for one in axes.containers}
    assert [pytest.approx(point) for point in ([2, 75], [1, 55], [2, 65], [4, 75])] == list(marks.values())
    curve, across = ([one for one in axes.lines if len(one.get_xdata()) == count] for count in (3, 2))
    assert curve[0].get_xydata().tolist() == [pytest.approx(point) for point in ((1, 55), (2, 65), (4, 75))]
    assert [one.get_ydata()[0] for one in across] == pytest.approx([35])
    assert axes.get_xscale() == "log"
    assert axes.get_xticks().tolist() == [1, 2, 4]
    (alone,) = draw("budget", tmp_path, methods=["aroma"]).axes
    assert alone.get_xticks().tolist() == [2.0], "of no fixed rank the ticks are where the marks are"
    write_run(tmp_path, "nothing to compare with", "aroma", 0, kind="aroma", score=0.1, trained_rank=1.0)
    assert len(draw("budget", tmp_path).axes) == 1


@pytest.mark.parametrize("width", [6, 12])
def test_remarks_are_not_cut_off(width):
    figure = new_figure(width, 4)
    write_title(figure, "Title", "rows: aroma-evidence, seed 0 · " * 12)
    figure.draw_without_rendering()
    assert all(text.get_window_extent().x1 <= figure.bbox.x1 for text in figure.texts)


# Which runs


# Planted ranks and memory


def planted_run(output, method, seed, found, spearman=None, **changes):
    planted = dict(zip(MODULES, (0, 1, 4), strict=False))
    ranks = dict(zip(MODULES, found, strict=False))
    write_run(output, "net", method, seed, ranks=ranks, planted={"ranks": planted, "spearman": spearman}, **changes)


def test_every_matrix_of_every_seed_has_a_mark_at_its_planted_and_found_rank(tmp_path):
    planted_run(tmp_path, "aroma", 0, (1, 2, 5), spearman=0.5)
    planted_run(tmp_path, "aroma", 1, (1, 1, 3), spearman=1.0)
    planted_run(tmp_path, "lora", 0, (2, 2, 2))
    write_run(tmp_path, "net", "full", 0, kind="full", planted={"ranks": {}}, **NO_RANKS)
    axes = draw("planted", tmp_path).axes[0]
    marks = np.concatenate([np.asarray(one.get_offsets()) for one in axes.collections])
    assert sorted(zip(marks[:, 0].round(), marks[:, 1], strict=True)) == sorted(
        [(0, 1), (1, 2), (4, 5), (0, 1), (1, 1), (4, 3), (0, 2), (1, 2), (4, 2)]
    )
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["aroma (Spearman 0.75)", "lora"], "a constant has no correlation, full no ranks"
    assert axes.lines[0].get_xydata().tolist() == [[0, 0], [4, 4]], "where found and planted are equal"


def test_planted_ranks_are_only_of_tasks_that_plant_them(grid, tmp_path):
    with pytest.raises(ConfigError, match=r"--task='mrpc': nothing is planted in it"):
        draw("planted", grid, task="mrpc")
    write_run(tmp_path, "net", "full", 0, kind="full", planted={"ranks": {}}, **NO_RANKS)
    with pytest.raises(ConfigError, match=r"--methods='full': none of them has ranks"):
        draw("planted", tmp_path)
    planted_run(tmp_path, "aroma", 0, (1, 2, 5))
    edit(tmp_path / "runs/net/aroma/seed-0/result.json", lambda result: result["planted"].update(ranks={"a": 0.5}))
    with pytest.raises(CheckpointError, match=r"result\.json, ranks, a: edited, .* 0\.5 is not a whole number"):
        draw("planted", tmp_path)


def test_memory_has_ranks_and_what_is_recalled_against_the_number_of_pairs(grid, tmp_path):
    for pairs, rank, score in ((100, 1.0, 0.9), (1000, 3.0, 0.6)):
        for seed in (0, 1):
            changes = {"score": score + 0.1 * seed, "average_rank": rank + seed, "of_task": {"kind": "memory"}}
            write_run(tmp_path, f"n{pairs}", "aroma", seed, examples={"train": pairs, "pairs": pairs}, **changes)
    figure = draw("memory", tmp_path)
    assert titles(figure) == ["mean rank found", "bits recalled, %"]
    for axes, values in zip(figure.axes, ({100: 1.5, 1000: 3.5}, {100: 95, 1000: 65}), strict=True):
        assert line(axes) == pytest.approx(values)
        assert axes.get_xscale() == "log"
    with pytest.raises(ConfigError, match=r"--task='mrpc rte': no pairs are remembered in it"):
        draw("memory", grid)


def test_runs_that_are_not_reported_or_not_finished_are_left_out(tmp_path):
    folder = write_run(tmp_path, "mrpc", "lora", 0, purpose="select")
    unfinished = write_run(tmp_path / "other", "mrpc", "lora", 0)
    (unfinished / "result.json").unlink()
    for place in (tmp_path, folder, unfinished):
        with pytest.raises(AromaError, match="no finished run in it that is reported"):
            draw("pareto", place)


@pytest.mark.parametrize(
    ("kind", "choice", "message"),
    [
        ("curves", {"task": None}, "--task=None: this figure shows one task; choose one of mrpc, rte"),
        ("curves", {"task": "cola"}, "--task='cola': no finished run has it; there are mrpc, rte"),
        (
            "curves",
            {"methods": ("not-begun",)},
            "--methods='not-begun': no finished run has it; there are lora, aroma",
        ),
        ("curves", {"modules": ("1.output.dense",)}, "--modules='1.output.dense': Figure 1 shows two"),
        ("pareto", {"modules": ("a",)}, "--modules='a': only for curves and cosines"),
        ("curves", {"seed": 0}, "--seed=0: only for ranks"),
        ("ranks", {"methods": ("lora",), "seed": 2}, "--seed=2: lora has no finished run of it; there are 0, 1"),
        ("ranks", {"methods": ("bitfit",)}, "--methods='bitfit': none of them has ranks"),
    ],
)
def test_a_choice_that_cannot_be_drawn_is_refused(grid, kind, choice, message):
    with pytest.raises(AromaError) as error:
        draw(kind, grid, **{"task": "mrpc", **choice})
    assert message in str(error.value)


def test_a_damaged_record_or_the_same_run_twice_is_refused(grid, tmp_path):
    own = Path(shutil.copytree(grid, tmp_path / "own"))
    with pytest.raises(AromaError, match="of the same task, method and seed as"):
        draw("curves", grid, own, task="mrpc")
    path = own / "runs" / "mrpc" / "lora" / "seed-0" / "curve.json"
    edit(path, lambda content: content.pop("ranks"))
    with pytest.raises(CheckpointError, match=r"curve\.json: edited, or of another version: ranks missing"):
        draw("curves", own, task="mrpc")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"curve\.json: missing"):
        draw("curves", own, task="mrpc")


# Names of modules, and files


def test_modules_are_found_by_their_ends_and_the_papers_at_the_same_depth():
    names = [
        f"roberta.encoder.layer.{layer}.attention.{part}"
        for layer in range(12)
        for part in ("self.value", "output.dense")
    ]
    assert paper_modules(names) == [
        f"roberta.encoder.layer.{end}" for end in ("0.attention.output.dense", "9.attention.self.value")
    ]
    assert paper_modules(["h.0.c_attn", "h.1.c_attn", "h.1.c_proj"]) == ["h.0.c_attn", "h.1.c_proj"]
    assert paper_modules(["h.0.c_attn"]) == ["h.0.c_attn"]
    assert matching_module("layer.2.output.dense", MODULES) == "bert.encoder.layer.2.output.dense"
    for wanted, message in (
        ("query", r"--modules='query': 4 modules end so, such as bert"),
        ("layer.2.output.dens", r"no module here ends so; the nearest is layer\.2\.output\.dense"),
    ):
        with pytest.raises(ConfigError, match=message):
            matching_module(wanted, MODULES)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_picture_is_written_by_its_suffix_and_the_same_one_has_the_same_bytes(tmp_path, suffix):
    paths = [tmp_path / f"{name}{suffix}" for name in ("one", "other")]
    for path in paths:
        rank_picture([MatrixRank("a", 0, 0.0), MatrixRank("h.0.q", 3, 2.5)], path)
    assert paths[0].read_bytes()[:5] in (b"\x89PNG\r", b"<?xml", b"%PDF-")
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_picture_that_fails_leaves_nothing(tmp_path):
    class Broken:
        def savefig(self, *_, **__):
            raise OSError("disk full")

    with pytest.raises(ConfigError, match="there is nothing to draw"):
        rank_picture([], tmp_path / "ranks.png")
    with pytest.raises(ConfigError, match=r"unknown kind of picture; its name must end in \.png, \.svg, \.pdf"):
        rank_picture([MatrixRank("a", 1, 1.0)], tmp_path / "ranks.docx")
    with pytest.raises(OSError, match="disk full"):
        save_picture(Broken(), tmp_path / "ranks.png")
    assert list(tmp_path.iterdir()) == []


def test_methods_of_aroma_and_ranks_of_lora_look_the_same_in_grids_with_other_methods() -> None:
    own = ["lora-r1", "lora-r8", "aroma-evidence", "aroma-paper"]
    grids = [own, ["head-only", *own, "bitfit"], ["full", "lora-r8-eva", *own]]
    for part in ("palette", "dashes", "markers"):
        assert len({str([looks(grid)[part][method] for method in own]) for grid in grids}) == 1
    assert len({*looks(grids[1])["palette"].values()}) == 6
