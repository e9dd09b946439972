"""The answer that a generated text gives, if it gives one in the form that was asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence


def extract(text: str, candidates: Sequence[str], lead: str) -> str | None:
    """Return the label that a text answers with, or None where it does not say one clearly.

    Either the text begins with the lead and a label ("The correct answer is answer2.", and then what it likes, unless
    the same line names another label too), or the label is all that it says. A label that merely occurs somewhere
    does not count. Letter case, quotation marks and the spaces around do not matter.

    Args:
        text: What was generated.
        candidates: The labels.
        lead: What a response says before the label; it may be empty.
    """
    said = text.strip()
    one_of = "|".join(re.escape(label) for label in sorted(candidates, key=len, reverse=True))
    opening = r"\s+".join(map(re.escape, lead.split()))
    if opening:
        answer = re.match(rf"{opening}\s*:?\s*[\"'*(]*({one_of})(?!\w)(.*)", said, re.IGNORECASE)
        if answer is not None:
            named = {label.lower() for label in re.findall(rf"(?<!\w)({one_of})(?!\w)", answer[2], re.IGNORECASE)}
            return _as_listed(answer[1], candidates) if named <= {answer[1].lower()} else None
    alone = re.fullmatch(rf"[\"'*(]*({one_of})[\"'*).!]*", said, re.IGNORECASE)
    return None if alone is None else _as_listed(alone[1], candidates)


def _as_listed(label: str, candidates: Sequence[str]) -> str:
    return next(candidate for candidate in candidates if candidate.lower() == label.lower())
