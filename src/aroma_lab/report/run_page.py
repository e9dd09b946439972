"""What a report says of a run's folder: of a finished run everything, of another what there is."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import yaml

from aroma.errors import AromaError, CheckpointError
from aroma.files import read_json, write_text
from aroma.report.facts import LORA_RANK, MatrixFacts, Result, RunFacts
from aroma.report.run import run_page

from ..run.files import TrialFiles
from ..run.recorder import history_of
from .protocol import holds_out
from .runs import read_events, read_runs

_MACHINE = ("platform", "device", "cpu_count", "threads", "processes")


def write_run_page(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], compare: Sequence[str | os.PathLike[str]] = ()
) -> None:
    """Write the report of a run to `out`; see `run_facts`."""
    write_text(out, run_page(run_facts(folder, compare)))


def run_facts(folder: str | os.PathLike[str], compare: Sequence[str | os.PathLike[str]] = ()) -> RunFacts:
    """Return what is known of a run.

    Args:
        folder: Folder of a run of `aroma train`, or of a grid's trial.
        compare: Folders of other runs; their metrics become lines of the table of results.

    Raises:
        ConfigError: There is no run.
        CheckpointError: A file is damaged or edited.
    """
    files = TrialFiles(Path(folder))
    row = read_runs(folder).rows[0]
    try:
        return _facts(files, row, compare)
    except AromaError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{folder}: a file is edited, or of another version ({said:.120}); restore it, or run the trial again"
        ) from error


def _facts(files: TrialFiles, row: Mapping[str, Any], compare: Sequence[str | os.PathLike[str]]) -> RunFacts:
    trial, result = row["trial"], row.get("result") or {}
    history, curve, steps = _course(files, row)
    training = trial["training"]
    method = str(trial["method"])
    metric = result.get("metric")
    is_finished = row["state"] == "finished"
    events = read_events(files.events, is_finished) if files.events.is_file() else []
    ranks = curve.get("ranks") or _told_ranks(events)
    facts = RunFacts(
        title=str(row["task"]) if trial.get("data") is None else files.root.resolve().name,
        about=[f"model {_base_name(trial['model'])}", f"method {method}", f"seed {training['seed']}"],
        results=_results(trial, result),
        metric=metric,
        steps=steps,
        planned_steps=result.get("planned_steps") or curve.get("planned_steps"),
        seconds=result.get("wall_seconds"),
        loss=history["loss"],
        eval_loss=[[one["step"], one["loss"]] for one in history["evaluations"] if "loss" in one],
        parameters=curve["parameters"][-1][1] if curve.get("parameters") else None,
        head_parameters=result.get("parameters", {}).get("head"),
        lora_parameters=_of_lora(result),
        matrices=_matrices(result, ranks),
        ranks=ranks,
        explanation=result.get("explanation"),
        notes=[*_state_notes(row, steps), *result.get("notes", ())],
        settings=_settings(files, trial),
        recipe=files.recipe.read_text(encoding="utf-8") if files.recipe.is_file() else None,
        versions=_versions(result),
        command=_command(files, trial),
    )
    others = [one for other in compare for one in _named(other)]
    return replace(facts, results=[*facts.results, *others])


def _course(files: TrialFiles, row: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any], int]:
    """Return history, curve and optimizer steps taken; of an unfinished run, those of its last checkpoint."""
    if row["state"] == "finished":
        history = read_json(files.history) if files.history.is_file() else {}
        empty: dict[str, Any] = {"loss": [], "learning_rate": [], "evaluations": []}
        return {**empty, **history}, row["curve"] or {}, int(row["result"]["steps"])
    states = [*files.checkpoints.glob("checkpoint-*/trainer_state.json")]
    numbers = {int(found[1]): file for file in states if (found := re.search(r"-(\d{1,18})$", file.parent.name))}
    if not numbers:
        progress = read_json(files.progress) if files.progress.is_file() else {}
        return history_of([], ()), {}, int(progress.get("step", 0))
    state = read_json(numbers[max(numbers)])
    split = "held_out" if row["trial"].get("data") is None else "validation"
    recorded = state.get("stateful_callbacks", {}).get("Recorder", {}).get("attributes", {}).get("curve", {})
    curve = {**recorded, "ranks": dict(recorded.get("ranks", ())), "planned_steps": state.get("max_steps")}
    return history_of(state["log_history"], [split]), curve, int(state["global_step"])


def _told_ranks(events: Sequence[Mapping[str, Any]]) -> dict[str, list[list[int]]]:
    ranks: dict[str, list[list[int]]] = {}
    for event in events:
        changes = ranks.setdefault(event["module"], []) if event["module"] is not None else []
        if not changes or changes[-1][1] != event["rank"]:
            changes.append([int(event["step"]), int(event["rank"])])
    return ranks


def _results(trial: Mapping[str, Any], result: Mapping[str, Any]) -> list[Result]:
    if not result:
        return []
    held_out = "held-out training examples" if holds_out(result) else "what is trained on"
    if trial.get("data") is not None:
        held_out = "validation"
    lines = [Result(held_out, result.get("held_out", {}))]
    lines += [Result(split, metrics) for split, metrics in result["reported"].items()]
    guessed = result.get("guessed") or {}
    splits = [*result["reported"]] or [*guessed]
    return [
        *lines,
        *(Result(f"{split}, for guessing", guessed[split], "guess") for split in splits if split in guessed),
    ]


def _named(folder: str | os.PathLike[str]) -> list[Result]:
    facts = run_facts(folder)
    name = Path(folder).resolve().name
    return [Result(f"{one.name}, {name}", one.metrics, "other") for one in facts.results if one.kind == "own"]


def _matrices(result: Mapping[str, Any], ranks: Mapping[str, Any]) -> list[MatrixFacts]:
    if not result:
        return [MatrixFacts(name, int(changes[-1][1])) for name, changes in ranks.items()]
    effective, relative = result.get("effective_ranks", {}), result.get("relative_updates", {})
    found = result.get("ranks", {})
    return [MatrixFacts(name, int(rank), effective.get(name), relative.get(name)) for name, rank in found.items()]


def _of_lora(result: Mapping[str, Any]) -> int | None:
    """Return the parameters of a LoRA on the same matrices."""
    if not result.get("trained_rank"):
        return None
    parameters: float = LORA_RANK * result["parameters"]["average"] / result["trained_rank"]
    return round(parameters)


def _state_notes(row: Mapping[str, Any], steps: int) -> list[str]:
    if row["state"] == "finished":
        result = row["result"]
        early = f"It stopped early, after {steps:,} of {result['planned_steps']:,} planned steps."
        return [early] if result["stopped_early"] else []
    state = f"This run failed: {row['message']}." if row["state"] == "failed" else "This run is not finished."
    return [f"{state} Shown is what it has left up to step {steps:,}."]


def _settings(files: TrialFiles, trial: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what differs from the defaults, by section of the recipe; of a grid's trial all options and the loop."""
    if not files.recipe.is_file():
        return {"options of the method": dict(trial["options"]), "training": dict(trial["training"])}
    from ..run.recipe import recipe_help

    recipe = yaml.safe_load(files.recipe.read_text(encoding="utf-8"))
    differing: dict[str, Any] = {}
    for key, default, _ in recipe_help():
        section, _, name = key.partition(".")
        value = recipe.get(section, {}).get(name) if name else default
        if value != default:
            differing[key] = _base_name(value) if key == "model.name" else value
    return {"Settings that differ from the defaults": differing}


def _versions(result: Mapping[str, Any]) -> dict[str, Any]:
    if not result:
        return {}
    found = {**result["versions"], **{key: result[key] for key in _MACHINE if result.get(key) is not None}}
    return {**found, "source": short_revision(result.get("git_revision"))}


def short_revision(revision: str | None) -> str:
    """Return a revision of the source as a line has room for it."""
    if revision is None:
        return "installed package"
    commit, _, changes = revision.partition("+")
    return commit[:12] + (f" with {changes}" if changes else "")


def _command(files: TrialFiles, trial: Mapping[str, Any]) -> str:
    """Return what to type to run it again, without this machine's folders."""
    if files.recipe.is_file():
        recipe = files.recipe if not files.recipe.is_absolute() else PurePath(files.recipe.name)
        return shlex.join(["aroma", "train", str(recipe), f"output={files.root.name or 'run'}-again"])
    options = ["--tasks", trial["task"]["name"], "--methods", trial["method"]]
    return shlex.join(["aroma", "lab", "run", "grid.yaml", f"seeds=[{trial['training']['seed']}]", *options])


def _base_name(name: object) -> str:
    """Return the name of a model, of a folder elsewhere on this machine without its path."""
    text = str(name)
    return PurePath(text).name if PurePath(text).is_absolute() else text
