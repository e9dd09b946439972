"""The picture of an adapter's ranks: where matrices stand, how large circles are, and what is refused."""

import pytest
from matplotlib.patches import Circle

from aroma.errors import ConfigError
from aroma.pictures import SUFFIXES, MatrixRank, RankPanel, draw_ranks, positions_of, rank_picture, save_picture


@pytest.mark.parametrize(
    ("names", "positions"),
    [
        (
            ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.11.output.dense", "bert.pooler.dense"],
            [(0, "attention.self.query"), (11, "output.dense"), (None, "bert.pooler.dense")],
        ),
        (
            ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"],
            [(0, "encoder.layer.0.SelfAttention.q"), (0, "decoder.layer.0.SelfAttention.q")],
        ),
        (["h.0", "h.1"], [(0, "h"), (1, "h")]),
    ],
)
def test_names_are_split_into_layer_and_kind_and_stacks_are_told_apart(names, positions):
    assert [(position.layer, position.kind) for position in positions_of(names)] == positions


def test_areas_are_in_proportion_on_one_scale_and_rank_0_is_a_cross():
    first = [MatrixRank("h.0.q", 8, 4.0), MatrixRank("h.1.q", 2, 2.0), MatrixRank("h.2.q", 0, 0.0)]
    figure = draw_ranks([RankPanel("a", first), RankPanel("b", [MatrixRank("h.0.q", 4, 1.0)])])
    areas = [[patch.radius**2 for patch in axes.patches if isinstance(patch, Circle)] for axes in figure.axes[:2]]
    assert [area / areas[0][0] for area in areas[0]] == pytest.approx([1, 4 / 8, 2 / 8, 2 / 8])  # none for rank 0
    assert [area / areas[0][0] for area in areas[1]] == pytest.approx([4 / 8, 1 / 8])
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert [tuple(line.get_xydata()[0]) for line in crosses] == [(2.0, 0.0)]
    assert [text.get_text() for text in figure.axes[0].texts] == ["8", "2"]
    assert figure.texts[1].get_text() == "3 matrices · ranks 0 to 8, total 10 · effective 6.0 (60% of the rank)"
    nothing = RankPanel("a", [MatrixRank("h.0.q", 0, 0.0)])
    assert nothing.caption() == "1 matrix · ranks 0 to 0, total 0 · effective 0.0"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_picture_is_written_by_its_suffix_and_the_same_one_has_the_same_bytes(tmp_path, suffix):
    paths = [tmp_path / f"{name}{suffix}" for name in ("one", "other")]
    for path in paths:
        rank_picture([MatrixRank("a", 0, 0.0), MatrixRank("h.0.q", 3, 2.5)], path)
    assert paths[0].read_bytes()[:5] in (b"\x89PNG\r", b"<?xml", b"%PDF-")
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_picture_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ConfigError, match="there is nothing to draw"):
        rank_picture([], tmp_path / "ranks.png")
    with pytest.raises(ConfigError, match=r"unknown kind of picture; its name must end in \.png, \.svg, \.pdf"):
        rank_picture([MatrixRank("a", 1, 1.0)], tmp_path / "ranks.docx")

    class Broken:
        def savefig(self, *_, **__):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_picture(Broken(), tmp_path / "ranks.png")
    assert list(tmp_path.iterdir()) == []
