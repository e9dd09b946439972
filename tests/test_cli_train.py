"""The commands on a tiny model: train, resume, evaluate, inspect, export."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from aroma.cli import main
from aroma_lab.run.machine import git_revision
from aroma_lab.run.recorder import Recorder
from aroma_lab.tasks.saved import evaluate_adapter
from full_disk import room_for
from tiny_classifier import save_tiny_bert, sentences, write_json_lines

STEPS = 60


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    save_tiny_bert(folder / "model")
    write_json_lines(folder / "train.jsonl", sentences(120, seed=1))
    write_json_lines(folder / "test.jsonl", sentences(37, seed=2))
    recipe = {
        "model": {"name": str(folder / "model")},
        "data": {"source": str(folder), "reported": {"test": "test.jsonl"}, "max_length": 10},
        "adapter": {"max_inner_steps": 10, "inner_check_interval": 5, "rewarmup_steps": 2},
        "training": {"max_steps": STEPS, "batch_size": 8, "learning_rate": 0.01, "warmup_steps": 4, "save_steps": 20},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def run(files):
    out = files / "run"
    command = ["-m", "aroma", "train", str(files / "recipe.yaml"), f"output={out}", "data.held_out=0.2"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "gemm" not in done.stdout + done.stderr, "a notice of bitsandbytes that no user needs"
    return out


def read(path):
    return json.loads(Path(path).read_text())


def assert_same_tensors(folder, other):
    one, two = (load_file(path / "adapter_model.safetensors") for path in (folder, other))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


# Training ------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_all_it_came_from(run):
    files = {"curve.json", "events.jsonl", "history.json", "recipe.yaml", "report.html", "result.json", "trial.json"}
    assert {path.name for path in run.iterdir()} == {"adapter", "checkpoints", *files}
    result = read(run / "result.json")
    assert set(result["reported"]) == {"test"}
    assert set(result["held_out"]) == set(result["reported"]["test"]) == {"accuracy", "macro_f1", "mcc", "f1"}
    assert result["reported"]["test"]["accuracy"] * 37 > 30  # it learned: chance is 18.5
    assert result["examples"] == {"train": 96, "held_out": 24, "test": 37}
    assert set(result["versions"]) == {"python", "aroma-peft", "torch", "transformers", "peft", "accelerate"}
    assert result["versions"]["torch"] == version("torch")
    assert (result["seed"], result["steps"], result["checkpoint"]) == (0, STEPS, "last")
    assert result["git_revision"] == git_revision()
    assert result["wall_seconds"] > 0
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["data"]["held_out"] == 0.2
    assert recipe["training"]["weight_decay"] == 0.0  # resolved: defaults are written out


def test_ranks_events_parameters_and_adapter_agree(run):
    result = read(run / "result.json")
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert {event["kind"] for event in events} >= {"checked", "merged"}
    merged = [event["module"] for event in events if event["kind"] == "merged"]
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    for name, rank in result["ranks"].items():
        # The component in training at the end counts too, once it has moved.
        assert rank - merged.count(name) in (0, 1)
        if rank:
            assert tensors[f"base_model.model.{name}.lora_A.weight"].shape[0] == rank
    assert result["total_rank"] == sum(result["ranks"].values()) > 0
    pairs = 2 * (4 * (16 + 16) + (16 + 32) + (32 + 16))  # two layers
    head = (16 * 16 + 16) + (16 * 2 + 2)  # the pooler, which was never pretrained, and the classifier
    assert (result["parameters"]["initial"], result["parameters"]["head"]) == (pairs, head)


def test_a_run_ends_with_a_report(run, tmp_path, capsys):
    page, result = (run / "report.html").read_text(), read(run / "result.json")
    assert f"{result['reported']['test']['accuracy']:.4f}" in page
    assert f"{result['guessed']['test']['accuracy']:.4f} for guessing" in page
    assert "training.max_steps" in page
    again = tmp_path / "again.html"
    assert main(["report", str(run), "--out", str(again)]) == 0
    assert capsys.readouterr().out == f"report: {again}\n"
    again.write_text("mine")
    assert main(["report", str(run), "--out", str(again)]) == 2
    assert "--force" in capsys.readouterr().err
    assert again.read_text() == "mine"
    assert main(["report", str(run), "--out", str(again), "--force"]) == 0
    assert "training.max_steps" in again.read_text()


def test_a_regression_runs(files, tmp_path):
    out = tmp_path / "run"
    overrides = ["data.kind=regression", "data.label=score", "training.max_steps=20", f"output={out}"]
    assert main(["train", str(files / "recipe.yaml"), *overrides, "--no-report"]) == 0
    assert not (out / "report.html").exists()
    assert set(read(out / "result.json")["reported"]["test"]) == {"pearson", "spearman", "mse"}
    evaluation = evaluate_adapter(out / "adapter", str(files / "test.jsonl"))
    assert evaluation.metrics == pytest.approx(read(out / "result.json")["reported"]["test"], abs=1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.text=body", "it has no column 'body'"),
        ("adapter.target_modules=[nothing]", "nothing"),
        ("training.max_steps=4", "training.warmup_steps=4: the run of 4 optimizer steps ends before the warm-up"),
        ("model.name=no/model", "model.name='no/model'"),
    ],
)
def test_what_cannot_work_is_refused_before_training(files, tmp_path, capsys, override, message):
    assert main(["train", str(files / "recipe.yaml"), override, f"output={tmp_path / 'run'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# Resuming ------------------------------------------------------------------------------------------------------------


def cut_short(run, out):
    """Copy a run as a kill between steps 40 and 60, in the middle of an event's line, would have left it."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "checkpoints" / f"checkpoint-{STEPS}")
    shutil.rmtree(out / "adapter")
    (out / "result.json").unlink()
    events = (out / "events.jsonl").read_text()
    (out / "events.jsonl").write_text(events[: int(len(events) * 0.95)])


def test_an_interrupt_says_how_to_go_on(files, run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    command = ["train", str(files / "recipe.yaml"), "data.held_out=0.2", f"output={out}"]

    def interrupted(self, args, state, control, **_):
        if state.global_step == 27:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_step_begin", interrupted)
        assert main(command) == 130
    resumed = [*command, "--resume"]
    said = " ".join(capsys.readouterr().err.split())
    assert f"error: interrupted; checkpoint-20 is saved. Go on with: aroma {shlex.join(resumed)}" in said
    assert main(resumed) == 0
    assert_same_run(out, run)


def assert_same_run(out, run):
    assert (out / "events.jsonl").read_text() == (run / "events.jsonl").read_text()
    assert_same_tensors(out / "adapter", run / "adapter")
    for name in ("held_out", "reported", "effective_ranks"):
        assert read(out / "result.json")[name] == read(run / "result.json")[name], name
    for name in ("history.json", "curve.json"):
        assert (out / name).read_text() == (run / name).read_text(), name


@pytest.mark.slow
def test_a_full_disk_at_a_checkpoint_is_one_line_and_the_run_resumes(files, run, tmp_path, capsys):
    out, size = tmp_path / "run", (run / "checkpoints" / f"checkpoint-{STEPS}" / "optimizer.pt").stat().st_size
    arguments = ["train", str(files / "recipe.yaml"), "data.held_out=0.2", f"output={out}"]
    with room_for(size - 1):
        assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith(f"error: {out / 'checkpoints'}: cannot be written (")
    assert "make room" in said.splitlines()[-1]
    assert main([*arguments, "--resume"]) == 0
    assert_same_tensors(out / "adapter", run / "adapter")


def test_a_resume_of_another_recipe_is_refused_by_key(files, run, tmp_path, capsys):
    out = tmp_path / "copy"
    cut_short(run, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    overrides = ["training.learning_rate=0.02", "adapter.r=2", f"output={out}", "--resume"]
    assert main(["train", str(files / "recipe.yaml"), *overrides]) == 2
    error = capsys.readouterr().err
    assert "it differs in task.held_out, options.r, training.learning_rate." in error
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_finished_run_and_a_folder_in_use_are_refused(files, run, tmp_path, capsys):
    recipe = str(files / "recipe.yaml")
    (tmp_path / "thesis.txt").write_text("precious")
    for arguments, message in (
        (["data.held_out=0.2", f"output={run}", "--resume"], "the run there is finished"),
        ([f"output={run}"], "is not an empty folder, and nothing is overwritten; give another, or --resume this run"),
        ([f"output={tmp_path}", "--resume"], "it holds no run to resume"),
    ):
        assert main(["train", recipe, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "precious"


# Evaluating, inspecting, exporting -----------------------------------------------------------------------------------


def test_eval_finds_what_the_run_reported(files, run, tmp_path, capsys):
    out = tmp_path / "metrics.json"
    arguments = ["eval", str(run / "adapter"), "--data", str(files / "test.jsonl"), "--json", str(out)]
    assert main([*arguments, "--batch-size", "5"]) == 0
    assert "all 37 examples" in capsys.readouterr().out
    assert read(out)["metrics"] == read(run / "result.json")["reported"]["test"]


def test_eval_refuses(files, run, tmp_path, capsys):
    unknown = write_json_lines(tmp_path / "d.jsonl", [{"text": "w1", "label": "middling"}])
    edited = shutil.copytree(run / "adapter", tmp_path / "adapter")
    (edited / "aroma_task.json").write_text('{"kind": "classification"}')
    for adapter, data, further, message in (
        (run / "adapter", files / "test.jsonl", ["--base-model", "no/model"], "base_model='no/model': cannot be load"),
        (run / "adapter", files / "test.jsonl", ["--batch-size", "0"], "--batch-size=0: give 1 or more"),
        (run / "adapter", unknown, [], "'middling': no training example has this label"),
        (edited, files / "test.jsonl", [], "aroma_task.json: edited"),
    ):
        assert main(["eval", str(adapter), "--data", str(data), *further]) == 2
        assert message in capsys.readouterr().err


def test_inspect_shows_a_summary_a_grid_and_a_picture(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    picture = tmp_path / "pictures" / "ranks.svg"
    assert main(["inspect", str(run / "adapter"), "--plot", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = read(run / "result.json")
    ranks = result["ranks"]
    assert lines[0] == str(run / "adapter")
    least, most = min(ranks.values()), max(ranks.values())
    assert lines[1].startswith(f"{len(ranks)} matrices · ranks {least} to {most}, {result['total_rank']} in all · ")
    (head,) = [line.split() for line in lines if line.startswith("rank by layer")]
    layers = [int(number) for number in head[3:]]
    grid = {kind: cells for kind, *cells in map(str.split, filter(None, lines)) if "." in kind}
    for name, rank in ranks.items():
        layer, kind = re.fullmatch(r"bert\.encoder\.layer\.(\d+)\.(.+)", name).groups()
        assert grid[kind][layers.index(int(layer))] == str(rank or "·")
    assert all(len(line) <= 80 for line in lines if line.split()[:1] and line.split()[0] in grid)
    assert picture.read_text().startswith("<?xml")


def test_inspect_prints_json(run, capsys):
    result = read(run / "result.json")
    assert main(["inspect", str(run / "adapter"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {matrix["name"]: matrix["rank"] for matrix in told["matrices"]} == result["ranks"]
    for matrix in told["matrices"]:
        assert matrix["effective_rank"] == pytest.approx(result["effective_ranks"][matrix["name"]])
        assert matrix["parameters"] == matrix["rank"] * sum(matrix["shape"])
    assert told["total_rank"] == result["total_rank"]
