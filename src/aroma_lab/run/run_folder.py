"""The folder that a run leaves: what is where, and that nothing of the user's is overwritten."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from aroma.errors import ConfigError, bad_value
from aroma.events import Event
from aroma.files import is_new_or_empty, write_text

from .recipe import Recipe, differing_keys, load_recipe, save_recipe


@dataclass(frozen=True)
class RunFiles:
    """Names of what every run leaves in `root`."""

    root: Path

    @property
    def adapter(self) -> Path:
        """Folder of what was trained; of the plain LoRA adapter, where it is one."""
        return self.root / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Folder of the Trainer's checkpoints."""
        return self.root / "checkpoints"

    @property
    def events(self) -> Path:
        """Events of AROMA's controller, a JSON object a line."""
        return self.root / "events.jsonl"

    @property
    def history(self) -> Path:
        """Losses, learning rates and evaluations by optimizer step."""
        return self.root / "history.json"

    @property
    def result(self) -> Path:
        """Metrics, ranks and provenance; written last, so a folder that has it is a finished run's."""
        return self.root / "result.json"


@dataclass(frozen=True)
class RunFolder(RunFiles):
    """Names of what a run of a recipe leaves."""

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.root / "recipe.yaml"


def check_output(recipe: Recipe, resume: bool) -> RunFolder:
    """Return the run's folder if the run may write there; nothing is written yet.

    Raises:
        ConfigError: The folder is not empty and `resume` is false; or it holds another run, a finished one, or none.
    """
    folder = RunFolder(Path(recipe.output))
    if resume and folder.recipe.exists():
        _require_same(recipe, folder)
        if folder.result.exists():
            raise bad_value("output", recipe.output, "the run there is finished; for another run, give another output")
        return folder
    remedy = (
        "it holds no run to resume; give another output" if resume else "give another output, or --resume this run"
    )
    require_empty("output", folder.root, remedy)
    return folder


def open_folder(folder: RunFolder, recipe: Recipe) -> None:
    """Make the run's folder and put its resolved recipe there, unless a resumed run has it."""
    folder.root.mkdir(parents=True, exist_ok=True)
    if not folder.recipe.exists():
        save_recipe(recipe, folder.recipe)


def require_empty(field: str, folder: Path, remedy: str) -> None:
    """Raise unless `folder` is absent or an empty folder.

    Raises:
        ConfigError: It is a file, or holds something.
    """
    if not is_new_or_empty(folder):
        raise bad_value(field, str(folder), f"it is not an empty folder, and nothing is overwritten; {remedy}")


class EventLog:
    """Writes events as they happen, a JSON object a line; a killed run keeps what it wrote.

    Args:
        path: The file; made if missing.
        upto: Optimizer step that the run resumes from; what an earlier attempt wrote beyond it is dropped.
    """

    def __init__(self, path: str | os.PathLike[str], upto: int) -> None:
        self._path = Path(path)
        kept = [line for line in _whole_lines(self._path) if json.loads(line)["step"] <= upto]
        write_text(self._path, "".join(kept))

    def __call__(self, event: Event) -> None:
        """Append one event."""
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(event.as_dict()) + "\n")


def _whole_lines(path: Path) -> Iterable[str]:
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _require_same(recipe: Recipe, folder: RunFolder) -> None:
    differing = differing_keys(recipe, load_recipe(folder.recipe))
    if differing:
        raise ConfigError(
            f"output={recipe.output!r}: the run there has another recipe, which differs in {', '.join(differing)}. "
            f"Resume with the recipe stored there ({folder.recipe}), or give another output"
        )
