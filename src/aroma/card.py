"""The section of a model card that is ours: the ranks of an adapter, and how they were found. The rest is PEFT's."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import write_text
from .pictures import positions_of

CARD_FILE = "README.md"
PAPER = "https://arxiv.org/abs/2504.05343"
_BEGIN, _END = "<!-- aroma: ranks, written at every save -->", "<!-- aroma: end -->"
_SECTION = re.compile(rf"\n*{re.escape(_BEGIN)}.*?{re.escape(_END)}\n*", re.DOTALL)


def write_ranks(folder: str | os.PathLike[str], ranks: Mapping[str, int], method: Mapping[str, Any]) -> None:
    """Write the section into the card that PEFT has written in `folder`; without a card, nothing is done.

    `ranks`: of every matrix, by its name; `method`: the fields of `AromaConfig` that decided the run.
    """
    card = Path(folder) / CARD_FILE
    if card.is_file():
        text = _SECTION.sub("\n\n", card.read_text(encoding="utf-8", errors="replace")).rstrip()
        write_text(card, f"{text}\n\n{_BEGIN}\n{_section(ranks, method)}\n{_END}\n")


def _section(ranks: Mapping[str, int], method: Mapping[str, Any]) -> str:
    by_kind: dict[str, list[tuple[int, int]]] = {}
    for (layer, kind), rank in zip(positions_of([*ranks]), ranks.values(), strict=True):
        by_kind.setdefault(kind, []).append((-1 if layer is None else layer, rank))
    rows = [
        f"| `{kind}` | {' '.join(str(rank) for _, rank in sorted(found))} | {sum(rank for _, rank in found)} |"
        for kind, found in by_kind.items()
    ]
    given = ", ".join(f"{name}={value!r}" for name, value in method.items() if value is not None)
    return "\n".join(
        [
            "## Ranks\n",
            f"Every weight matrix grew its own rank with [AROMA]({PAPER}): `AromaConfig({given})`. The rank of every",
            "matrix, layer by layer:\n",
            "| matrix | rank | sum |",
            "| --- | --- | --- |",
            *rows,
        ]
    )
