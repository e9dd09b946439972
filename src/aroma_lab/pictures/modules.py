"""Which modules a figure shows: named ones, or the ones the paper shows."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from aroma.errors import bad_value


def matching_module(wanted: str, names: Sequence[str]) -> str:
    """Return the one of `names` that is, or ends in, `wanted`.

    Raises:
        ConfigError: None does, or several do.
    """
    matches = [name for name in names if name == wanted or name.endswith(f".{wanted}")]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise bad_value("--modules", wanted, f"{len(matches)} modules end so, as {', '.join(matches[:2])}; give more")
    short = [short_name(name) for name in names]
    near = difflib.get_close_matches(wanted, short, n=1, cutoff=0.0)
    raise bad_value("--modules", wanted, f"no module here ends so; the nearest is {near[0] if near else 'none'}")


def paper_modules(names: Sequence[str]) -> list[str]:
    """Return the two modules of Figure 1: the first layer's attention output, and value at 3/4 of the depth.

    Where names are of another make, the first and the last.
    """
    deep = int(0.75 * _depth(names))
    found = [
        *_ending(names, r"\.0\.attention\.output\.dense"),
        *_ending(names, rf"\.{deep}\.attention\.self\.value"),
    ]
    return found if len(found) == 2 else list(dict.fromkeys([names[0], names[-1]]))


def short_name(name: str) -> str:
    """Return the name from its last part before the first number on: `layer.0.attention.output.dense`."""
    match = re.search(r"(?:^|\.)((?:[^.]+\.)?\d+(?:\..*)?)$", name)
    return match[1] if match else name


def _depth(names: Sequence[str]) -> int:
    layers = [int(match[1]) for name in names if (match := re.search(r"\.(\d+)\.", name))]
    return 1 + max(layers, default=0)


def _ending(names: Sequence[str], pattern: str) -> list[str]:
    return [name for name in names if re.search(f"{pattern}$", name)][:1]
