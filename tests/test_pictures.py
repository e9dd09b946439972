"""Pictures: the right marks at the right places, and every wrong request refused."""

import pytest

from aroma.errors import AromaError
from aroma.pictures import SUFFIXES, MatrixRank, draw_ranks, positions_of, rank_picture
from aroma_lab.report.figures import draw_figure
from made_up_runs import MODULES, NO_RANKS, write_grid, write_run


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


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


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_picture_is_written_by_its_suffix_and_the_same_one_has_the_same_bytes(tmp_path, suffix):
    paths = [tmp_path / f"{name}{suffix}" for name in ("one", "other")]
    for path in paths:
        rank_picture([MatrixRank("a", 0, 0.0), MatrixRank("h.0.q", 3, 2.5)], path)
    assert paths[0].read_bytes()[:5] in (b"\x89PNG\r", b"<?xml", b"%PDF-")
    assert paths[0].read_bytes() == paths[1].read_bytes()


# Of a grid


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """LoRA of three ranks, AROMA and a method without ranks, two seeds each, on two tasks; not to be changed."""
    output = tmp_path_factory.mktemp("pictures") / "grid"
    write_grid(output, ["lora-r1", "lora-r2", "lora-r4", "aroma", "head-only", "not-begun"])
    for task in ("mrpc", "rte"):
        for seed, gain in enumerate((0.0, 0.1)):
            for rank, score in ((1, 0.5), (4, 0.7), (2, 0.6)):
                changes = {"average_rank": float(rank), "ranks": dict.fromkeys(MODULES, rank)}
                write_run(output, task, f"lora-r{rank}", seed, score=score + gain, **changes)
            some = {module: 2 if index else 0 for index, module in enumerate(MODULES)}
            changes = {"kind": "aroma", "score": 0.7 + gain, "average_rank": 1.5 + seed, "ranks": some}
            write_run(output, task, "aroma", seed, **changes)
            write_run(output, task, "head-only", seed, kind="head_only", score=0.3 + gain, **NO_RANKS)
    write_run(output, "mrpc", "lora-r1", 7, purpose="select", score=0.99, trained_rank=1.0)
    return output


def drawn(axes):
    """Points of every line, in order."""
    return [one.get_xydata().tolist() for one in axes.lines if len(one.get_xdata())]


def test_a_budget_has_a_line_through_the_fixed_ranks_and_a_mark_for_what_finds_its_own(grid):
    for axes in draw_figure("budget", grid).axes:
        *marks, line = drawn(axes)
        points = {(round(x, 6), round(y, 6)) for mark in marks for x, y in mark}
        assert points == {(1, 55), (2, 65), (4, 75), (2, 75)}
        assert line == [pytest.approx(one) for one in ([1, 55], [2, 65], [4, 75])]
        assert axes.get_xscale() == "symlog"
    (axes,) = draw_figure("budget", grid, task="rte", methods=["aroma"]).axes
    assert axes.get_title() == "rte"
    assert {(x, round(y, 6)) for mark in drawn(axes) for x, y in mark} == {(2, 75)}


def test_ranks_have_a_panel_for_each_method_with_ranks(grid):
    figure = draw_figure("ranks", grid, task="mrpc", methods=["lora-r2", "aroma", "head-only"])
    assert [title.splitlines()[0] for title in titles(figure)] == ["lora-r2 on mrpc, seed 0", "aroma on mrpc, seed 0"]
    assert [(len(circles), len(crosses)) for circles, crosses in map(areas, figure.axes)] == [(40, 0), (38, 1)]


@pytest.mark.parametrize(
    ("kind", "choice", "message"),
    [
        ("ranks", {"task": None}, "--task=None: this figure shows one task; choose one of mrpc, rte"),
        ("ranks", {"task": "cola"}, "--task='cola': no finished run has it; there are mrpc, rte"),
        ("budget", {"methods": ("not-begun",)}, "--methods='not-begun': no finished run has it; there are lora-r1"),
        ("ranks", {"methods": ("head-only",)}, "--methods='head-only': none of them has ranks"),
    ],
)
def test_a_choice_that_cannot_be_drawn_is_refused(grid, kind, choice, message):
    with pytest.raises(AromaError) as error:
        draw_figure(kind, grid, **{"task": "mrpc", **choice})
    assert message in str(error.value)
