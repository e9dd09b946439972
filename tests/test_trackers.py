"""What a person sees in TensorBoard, MLflow and Trackio: the stores that they write are read back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from aroma import AromaCallback, aroma_layers
from aroma.export import rank_table
from aroma.integrations.trackers import RankLogs
from trainer_runs import Run, adapted, arguments, examples, growth, steps_of, tiny_bert, train, trainer_for

STEPS = 20


class Log(TrainerCallback):
    """Keeps the logs that it is shown, as they are then."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        self.seen.append(dict(logs))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run with all three trackers."""
    root = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(root / "events"))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
        patch.chdir(root)
        trainer = train(
            root / "out",
            Run(steps=STEPS, early_stop=False, training={"logging_steps": 2, "save_steps": STEPS}),
            report_to=["tensorboard", "mlflow", "trackio"],
            project="aroma",
            run_name="mine",
        )
    trainer.root = root
    return trainer


def expected(trainer: Any) -> dict[str, list[tuple[int, float]]]:
    """What the log history says, by name: (step, value)."""
    entries = steps_of(trainer.state.log_history)
    assert len(entries) == STEPS // 2
    return {name: [(one["step"], one[name]) for one in entries] for name in ("total_rank", "active_modules", "loss")}


def check(found: dict[str, list[tuple[int, float]]], trainer: Any) -> None:
    """Check what a tracker has: totals at every step, and the rank of every matrix, up to the saved one."""
    for name, values in expected(trainer).items():
        assert found[f"train/{name}"] == [(step, pytest.approx(value)) for step, value in values], name
    ranks = {row.name: row.rank for row in rank_table(trainer.root / "out" / f"checkpoint-{STEPS}")}
    assert max(ranks.values()) > 1
    modules = {name.removeprefix("train/rank/"): values for name, values in found.items() if "/rank/" in name}
    assert {name: values[-1] for name, values in modules.items()} == {
        name: (STEPS, rank) for name, rank in ranks.items()
    }
    for index, (_, total) in enumerate(expected(trainer)["total_rank"]):
        assert sum(values[index][1] for values in modules.values()) == total


@pytest.mark.slow
def test_tensorboard(run: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.root / "events")).Reload()
    found = {
        name: [(one.step, one.value) for one in events.Scalars(name)]
        for name in events.Tags()["scalars"]
        if name.startswith("train/")
    }
    check(found, run)
    (picture,) = events.Images("ranks")
    assert picture.step == STEPS
    assert picture.encoded_image_string.startswith(b"\x89PNG")
    assert min(picture.width, picture.height) > 100


@pytest.mark.slow
def test_mlflow(run: Any) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run.root / 'mlflow.db'}")
    (one,) = client.search_runs(["0"])
    history = {name: client.get_metric_history(one.info.run_id, name) for name in one.data.metrics}
    found = {name: [(point.step, point.value) for point in points] for name, points in history.items()}
    check(
        {f"train/{name}" if "/" not in name or name.startswith("rank") else name: v for name, v in found.items()}, run
    )
    assert [artifact.path for artifact in client.list_artifacts(one.info.run_id)] == ["ranks.png"]


@pytest.mark.slow
def test_trackio(run: Any) -> None:
    import json
    import sqlite3

    (store,) = Path(os.environ["TRACKIO_DIR"]).glob("*.db")
    rows = sqlite3.connect(store).execute("select metrics from metrics order by id").fetchall()
    found: dict[str, list[tuple[int, float]]] = {}
    pictures = []
    for (text,) in rows:
        values = json.loads(text)
        pictures += [values["ranks"]] if "ranks" in values else []
        for name, value in values.items():
            if name.startswith("train/") and "train/loss" in values:
                found.setdefault(name, []).append((values["train/global_step"], value))
    check(found, run)
    (picture,) = pictures
    assert (
        next(Path(os.environ["TRACKIO_DIR"]).rglob(Path(picture["file_path"]).name))
        .read_bytes()
        .startswith(b"\x89PNG")
    )


# One definition ------------------------------------------------------------------------------------------------------


def test_log_summary_inspect_and_what_is_saved_say_one_rank(tmp_path: Path) -> None:
    """At every step: before a component has moved, amid it, and at its end."""
    callback, log, steps = AromaCallback(early_stop=False), Log(), 16
    trainer = trainer_for(adapted(), tmp_path, callback, log, max_steps=steps, per_device_train_batch_size=2)
    trainer.args.save_steps = 1
    trainer.args.save_strategy = "steps"
    seen = {}

    class Look(TrainerCallback):
        def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            controller = callback.controller
            assert controller is not None
            saved = {row.name: row.rank for row in rank_table(tmp_path / f"checkpoint-{state.global_step}")}
            told = {one.name: one.rank for one in controller.summary()}
            assert saved == told == controller.ranks()
            assert state.log_history[-1]["total_rank"] == controller.total_rank == sum(saved.values())
            seen[state.global_step] = saved

    trainer.add_callback(Look())
    trainer.train()
    assert len(seen) == steps
    assert len({tuple(ranks.values()) for ranks in seen.values()}) > 2


# Who sees what -------------------------------------------------------------------------------------------------------


def test_printed_logs_have_totals_only(tmp_path: Path) -> None:
    before = Log()
    trainer = trainer_for(adapted(), tmp_path, before, AromaCallback(), max_steps=4, save_strategy="no")
    trainer.add_callback(type("After", (Log,), {})())
    after = trainer.callback_handler.callbacks[-1]
    trainer.train()
    modules = len([name for name in before.seen[0] if name.startswith("rank/")])
    assert modules == len(aroma_layers(trainer.model)) > 10
    assert before.seen[0].keys() - after.seen[0].keys() == {n for n in before.seen[0] if n.startswith("rank/")}
    assert {"total_rank", "active_modules"} < after.seen[0].keys()
    assert not any("rank/" in name for entry in trainer.state.log_history for name in entry)


def test_the_callbacks_keep_their_order(tmp_path: Path) -> None:
    own = [Log(), AromaCallback()]
    trainer = trainer_for(adapted(), tmp_path, *own)
    callbacks = trainer.callback_handler.callbacks
    assert isinstance(callbacks[0], RankLogs)
    assert not any(isinstance(callback, RankLogs) for callback in callbacks[1:])
    assert [callback for callback in callbacks if callback in own] == own
    again = trainer_for(adapted(), tmp_path, own[1])
    assert sum(isinstance(callback, RankLogs) for callback in again.callback_handler.callbacks) == 1


def test_one_that_calls_callbacks_by_itself_gets_totals(tmp_path: Path) -> None:
    """Other trainers have no list of callbacks that is known."""
    callback = AromaCallback()
    trainer = trainer_for(adapted(), tmp_path, callback, max_steps=2, save_strategy="no")
    trainer.train()
    state, logs = trainer.state, {"loss": 1.0}
    state.log_history.append(dict(logs))
    callback.on_log(trainer.args, state, trainer.control, logs=logs)
    assert logs == {
        "loss": 1.0,
        "total_rank": growth(trainer).controller.total_rank,
        "active_modules": growth(trainer).controller.active_modules,
    }
    assert state.log_history[-1] == logs


def test_a_run_without_growth_is_left_alone(tmp_path: Path) -> None:
    from transformers import Trainer

    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    trainer = Trainer(get_peft_model(tiny_bert(), config), arguments(tmp_path), train_dataset=examples())
    assert not any(isinstance(callback, RankLogs) for callback in trainer.callback_handler.callbacks)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
