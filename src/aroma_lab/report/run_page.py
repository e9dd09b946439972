"""The report of a run, made from the files of its folder."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aroma.errors import DataError, bad_value
from aroma.files import read_json, write_text
from aroma.report.run import LORA_RANK, MatrixFacts, Result, RunFacts, run_page

from ..run.trial import TrialFiles
from .protocol import holds_out
from .runs import read_runs


def write_run_page(folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Write the report of a run to `out`; see `run_facts`."""
    write_text(out, run_page(run_facts(folder)))


def run_facts(folder: str | os.PathLike[str]) -> RunFacts:
    """Return the parts of the page of a finished run.

    Args:
        folder: Folder of a run of `aroma train`, or of a grid's trial.

    Raises:
        ConfigError: There is no run.
        DataError: It has not finished.
        CheckpointError: A file is damaged or edited.
    """
    files, row = TrialFiles(Path(folder)), read_runs(folder).rows[0]
    if row["state"] != "finished":
        said = row["message"] or "resume it, or wait for it"
        raise bad_value("RUN", str(folder), f"it has not finished; {said}", DataError)
    trial, result, metric = row["trial"], row["result"], row["metric"]
    history, curve = read_json(files.history), row["curve"]
    effective, relative = result.get("effective_ranks", {}), result.get("relative_updates", {})
    early = f"It stopped early, after {row['steps']:,} of {row['planned_steps']:,} planned steps."
    of_rank_1 = result["parameters"]["average"] / result["trained_rank"] if result.get("trained_rank") else None
    return RunFacts(
        title=files.root.resolve().name if files.recipe.is_file() else str(row["task"]),
        about=[f"model {Path(trial['model']).name}", f"method {row['method']}", f"seed {row['seed']}"],
        results=_results(trial, result),
        metric="perplexity" if metric == "token_probability" else metric,  # what people know
        steps=row["steps"],
        planned_steps=row["planned_steps"],
        seconds=result.get("wall_seconds"),
        loss=history.get("loss", ()),
        eval_loss=[[one["step"], one["loss"]] for one in history["evaluations"] if "loss" in one],
        parameters=curve["parameters"][-1][1] if curve.get("parameters") else None,
        head_parameters=result["parameters"]["head"],
        lora_parameters=None if of_rank_1 is None else round(LORA_RANK * of_rank_1),
        matrices=[
            MatrixFacts(name, int(rank), effective.get(name), relative.get(name))
            for name, rank in result.get("ranks", {}).items()
        ],
        ranks=curve["ranks"],
        explanation=result.get("explanation"),
        notes=[*([early] if row["stopped_early"] else ()), *result.get("notes", ())],
        settings={
            "options of the method": trial["options"],
            "training": {f"training.{key}": value for key, value in trial["training"].items()},
        },
        recipe=files.recipe.read_text(encoding="utf-8") if files.recipe.is_file() else None,
        versions={**result["versions"], "source": row["git_revision"] or "installed package"},
        command=_command(files, trial),
    )


def _results(trial: Mapping[str, Any], result: Mapping[str, Any]) -> list[Result]:
    held_out = "held-out examples" if holds_out(result) else "what is trained on"
    guessed = result.get("guessed") or {}
    splits = [*result["reported"]] or [*guessed]
    return [
        Result(held_out, result.get("held_out", {})),
        *(Result(split, metrics) for split, metrics in result["reported"].items()),
        *(Result(f"{split}, for guessing", guessed[split], "guess") for split in splits if split in guessed),
    ]


def _command(files: TrialFiles, trial: Mapping[str, Any]) -> str:
    """Return what to type to run it again."""
    if files.recipe.is_file():
        return shlex.join(["aroma", "train", files.recipe.name, f"output={files.root.name or 'run'}-again"])
    options = ["--tasks", trial["task"]["name"], "--methods", trial["method"]]
    return shlex.join(["aroma", "lab", "run", "grid.yaml", f"seeds=[{trial['training']['seed']}]", *options])
