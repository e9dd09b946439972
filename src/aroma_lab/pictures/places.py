"""Where a matrix stands in the picture of a model: its layer, and its kind within the layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile


@dataclass(frozen=True)
class Place:
    """Where a matrix stands in the picture.

    Args:
        layer: Index of its layer; None for a module outside the numbered layers.
        kind: Its name without the layer, as `attention.self.query`.
    """

    layer: int | None
    kind: str


def places_of(names: Sequence[str]) -> list[Place]:
    """Split module names at their first number: `encoder.layer.3.output.dense` is `output.dense` of layer 3.

    Where numbered layers stand in several stacks, as encoder and decoder, the kind begins with what tells them apart.
    """
    matches = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", name) for name in names]
    stacks = _short_stacks({name[: match.start()] for name, match in zip(names, matches, strict=True) if match})
    places = []
    for name, match in zip(names, matches, strict=True):
        if match is None:
            places.append(Place(None, name))
        else:
            stack, kind = stacks[name[: match.start()]], name[match.end() :]
            places.append(Place(int(match[1]), ".".join(filter(None, (stack, kind))) or name[: match.start()]))
    return places


def columns_of(places: Sequence[Place]) -> list[int | None]:
    """Return the layers in order, modules without one last."""
    numbered = sorted({place.layer for place in places if place.layer is not None})
    return [*numbered, None] if any(place.layer is None for place in places) else [*numbered]


def _short_stacks(prefixes: set[str]) -> dict[str, str]:
    """Return each prefix without the parts, at its front and its back, that all have in common."""
    parts = {prefix: prefix.split(".") for prefix in prefixes}
    front = _common(list(parts.values()))
    short = {prefix: names[front:] for prefix, names in parts.items()}
    back = _common([names[::-1] for names in short.values()])
    return {prefix: ".".join(names[: len(names) - back]) for prefix, names in short.items()}


def _common(sequences: Sequence[Sequence[str]]) -> int:
    """Return how many items from the front all sequences share."""
    return sum(1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*sequences, strict=False)))
