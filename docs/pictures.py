"""Draw docs/pictures/: `python docs/pictures.py`, in about two minutes. `pip install -e '.[demo]'` first.

The README's example runs, with its events kept. The pictures show what `aroma inspect --plot` and `birth_picture` make
of that run.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"


def main() -> None:
    """Run the example, and draw its ranks and its births."""
    from aroma.cli import main as aroma
    from aroma.pictures import birth_picture

    events: list[Any] = []
    script = (ROOT / "examples" / "trainer.py").read_text(encoding="utf-8")
    kept = script.replace("AromaCallback()", "AromaCallback(on_event=events.append)")
    assert kept != script
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        exec(compile(kept, "examples/trainer.py", "exec"), {"__name__": "__main__", "events": events})
        aroma(["inspect", "out/adapter", "--plot", str(PICTURES / "ranks.png"), "--force"])
        records = [event.as_dict() for event in events]
        birth_picture(records, PICTURES / "births.png", steps=110, title="The README's example, BBC News")


if __name__ == "__main__":
    main()
