"""The rank picture of one adapter, drawn by `aroma demo` and `aroma inspect`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .circles import Matrix, RankPanel, draw_rank_panels
from .places import Place, places_of
from .style import SUFFIXES, require_picture_name, save_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SUFFIXES", "Place", "draw_ranks", "places_of", "rank_picture"]


def rank_picture(
    matrices: Sequence[Matrix], path: str | os.PathLike[str], title: str = "Ranks grown by AROMA"
) -> None:
    """Draw ranks and effective ranks and write the picture to `path`.

    The area of the outer circle is proportional to the rank, that of the inner one to the effective rank, on the same
    scale; the number is the rank. A cross marks a matrix that ended at rank 0.

    Args:
        matrices: The matrices, in the order of the model.
        path: File to write: .png, .svg or .pdf.
        title: Title of the picture.

    Raises:
        ConfigError: Another suffix, or no matrices.
    """
    require_picture_name("plot", path)
    save_picture(draw_ranks(matrices, title), path)


def draw_ranks(matrices: Sequence[Matrix], title: str) -> Figure:
    """Return the picture as a matplotlib figure that belongs to no window; see `rank_picture`."""
    return draw_rank_panels([RankPanel(title, matrices)])
