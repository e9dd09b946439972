"""Whole runs, timed: trajectories, their replay, the accounting, and the command."""

import dataclasses
import json
from contextlib import contextmanager

import pytest
import torch
import yaml
from aroma_lab.run.run_folder import EventLog

from aroma import aroma_layers
from aroma.cli import main
from aroma.errors import CheckpointError, ConfigError, DataError
from aroma.events import Event
from aroma_lab.bench.accounting import ADALORA, AROMA, LORA, UNFROZEN, ArmEpoch, ArmLedger, Epoch, Means, Saving
from aroma_lab.bench.recorder import TrajectoryRecorder, read_trajectory
from aroma_lab.bench.replay import Replayer, fit_modules
from aroma_lab.bench.run import WholeRun, bench_run
from aroma_lab.bench.run_data import RandomBatches, RecipeBatches
from aroma_lab.bench.run_lineup import line_up
from aroma_lab.bench.run_settings import RunSettings
from aroma_lab.bench.sampling import draw_steps, turn_order
from aroma_lab.bench.settings import BenchSettings
from aroma_lab.bench.shapes import make_model
from aroma_lab.bench.trajectory import Change, Trajectory
from aroma_lab.run.recipe import load_recipe
from aroma_lab.tasks.classification import load_tokenizer
from aroma_lab.tasks.data import load_splits
from models import adapted, batch, grow, ranks, trainable
from tiny_classifier import save_tiny_bert, sentences, write_json_lines

KINDS = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
DENSE = ("intermediate.dense", "output.dense")
NAMES = tuple(f"roberta.encoder.layer.{layer}.{kind}" for layer in range(2) for kind in (*KINDS, *DENSE))
"""The growing modules of the shape "tiny"."""


def made_up(names=NAMES, steps=12):
    """A trajectory with every kind of change: merge, merge and freeze, freeze alone; at step 9 all have finished."""
    changes = [Change(4, name, merged=index % 3 > 0, frozen=index % 3 == 0) for index, name in enumerate(names)]
    changes += [Change(7, name, merged=True, frozen=index % 3 == 1) for index, name in enumerate(names) if index % 3]
    changes += [Change(9, name, merged=False, frozen=True) for index, name in enumerate(names) if index % 3 == 2]
    return Trajectory(tuple(names), 1, steps, checks=(2, 4, 6), changes=tuple(changes))


def expected_ranks(step, names=NAMES):
    """Ranks of `made_up` by hand."""
    return {name: (0 if index % 3 == 0 else (step >= 4) + (step >= 7)) for index, name in enumerate(names)}


def write_trajectory(folder, trajectory):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trajectory.json").write_text(json.dumps(trajectory.as_dict()))
    return str(folder)


def replay_settings(tmp_path, **changes):
    given = {"model": "tiny", "examples": 10, "batch_size": 2, "length": 8}
    trajectory = write_trajectory(tmp_path / "recorded", made_up())
    return RunSettings(trajectory=trajectory, **{**given, **changes})


def adapter_parameters(model):
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and ".lora_" in name)


# Trajectories --------------------------------------------------------------------------------------------------------


@pytest.fixture
def live(tmp_path):
    """A short run with merges and freezes; its model, its events in a folder, and what each step ended with."""
    model = adapted("roberta", max_components=2, outer_tolerance=0.02, min_components=1)
    log = EventLog(tmp_path / "events.jsonl", upto=0)
    states = []

    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    growth, _ = grow(model, batch("roberta"), 0, optimizer, on_event=log, total_steps=14)
    model.train()
    for _ in range(14):
        model(**batch("roberta")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        states.append(state_of(model))
    return model, tmp_path, states, growth


def state_of(model):
    layers = aroma_layers(model)
    return (
        {name: layer.finished("default").rank for name, layer in layers.items()},
        {name for name, layer in layers.items() if layer.is_frozen("default")},
        adapter_parameters(model),
    )


def test_the_events_of_a_run_make_its_trajectory(live):
    model, folder, states, _ = live
    trajectory = read_trajectory(folder)
    assert trajectory.modules == tuple(aroma_layers(model))
    assert trajectory.component_rank == 1
    assert trajectory.frozen(14)
    assert max(trajectory.ranks(14).values()) == 2
    for step, (rank, frozen, _) in enumerate(states[: trajectory.steps], start=1):
        assert trajectory.ranks(step) == rank
        assert trajectory.frozen(step) == frozen
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert set(trajectory.checks) == {event["step"] for event in events if event["kind"] == "checked"}


def test_a_trajectory_survives_json(live):
    trajectory = read_trajectory(live[1])
    assert Trajectory.from_dict(json.loads(json.dumps(trajectory.as_dict()))) == trajectory


def test_the_steps_of_a_finished_run_are_what_its_result_says(live):
    (live[1] / "result.json").write_text('{"steps": 40}')
    assert read_trajectory(live[1]).steps == 40


def test_a_line_that_a_kill_cut_short_is_left_out(live):
    whole = read_trajectory(live[1])
    with (live[1] / "events.jsonl").open("a") as stream:
        stream.write('{"kind": "merg')
    assert read_trajectory(live[1]) == whole


def test_components_of_a_higher_rank_are_seen(tmp_path):
    recorder = TrajectoryRecorder()
    for step in (5, 10):
        recorder(Event("merged", step, 1, 5, "m", 0.1, rank=4 * step // 5, converged=True))
    assert recorder.trajectory(12).component_rank == 4
    assert recorder.trajectory(12).ranks(7) == {"m": 4}


def event(**changes):
    given = {"kind": "checked", "step": 5, "outer_step": 1, "inner_step": 5, "module": "m", "value": None}
    return given | {"rank": 0, "converged": False} | changes


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, r"there is no events\.jsonl in it; give the folder that `aroma train`"),
        (["{"], r"events\.jsonl, line 1: not an event as AROMA writes it"),
        ([json.dumps({"kind": "merged"})], r"events\.jsonl, line 1: not an event"),
        ([json.dumps(event(rank=3))], "line 1: rank=3: m had rank 0 before this event of step 5; a trajectory begins"),
        (
            [json.dumps(event(kind="merged", rank=1)), json.dumps(event(kind="merged", step=9, rank=3))],
            "line 2: rank=3: m had rank 1",
        ),
        ([json.dumps(event(step=8)), json.dumps(event())], "line 2: step=5: an event of step 8 comes before it"),
        ([json.dumps(event(kind="finished", module=None))], r"events\.jsonl: modules=\[\]: no module grew"),
        (
            [json.dumps(event(kind="frozen")), json.dumps(event(kind="frozen", step=6))],
            r"events\.jsonl: changes \(step 6\)='m': the module changes twice",
        ),
    ],
)
def test_events_that_make_no_trajectory_are_refused_by_file_and_line(tmp_path, lines, message):
    if lines is not None:
        (tmp_path / "events.jsonl").write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(DataError, match=message):
        read_trajectory(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules": [], "changes": []}, r"modules=\[\]"),
        ({"modules": ["a", "a"]}, "a name stands there twice"),
        ({"steps": 0, "checks": [], "changes": []}, "steps=0"),
        ({"component_rank": 0}, "component_rank=0"),
        ({"checks": [2, 1]}, "their steps do not ascend"),
        ({"changes": [[13, 0, True, False]]}, "changes=13: not one of the run's steps, 1 to 12"),
        ({"changes": [[3, 0, False, False]]}, "neither kept nor is it finished"),
        ({"changes": [[3, 9, True, False]]}, "IndexError"),
        ({"changes": 5}, "not a trajectory as AROMA writes it"),
    ],
)
def test_an_edited_trajectory_is_refused(tmp_path, changes, message):
    content = made_up(("a", "b")).as_dict() | changes
    (tmp_path / "trajectory.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        read_trajectory(tmp_path)


def test_a_damaged_trajectory_file_is_refused(tmp_path):
    (tmp_path / "trajectory.json").write_text('{"modules"')
    with pytest.raises(CheckpointError, match="truncated or edited"):
        read_trajectory(tmp_path)


# Replay --------------------------------------------------------------------------------------------------------------


def replayed(model, trajectory, freezes=True):
    """Yield ranks, finished modules and trainable parameters after every step of a replay that trains."""
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    replayer = Replayer(model, optimizer, trajectory, freezes=freezes)
    model.train()
    for step in range(1, trajectory.steps + 1):
        model(**batch("roberta")).loss.backward()
        optimizer.step()
        assert replayer.step(step) == bool(trajectory.changes_at(step))
        optimizer.zero_grad()
        assert (replayer.ranks, replayer.frozen) == state_of(model)[:2]
        yield state_of(model)


def test_a_replay_passes_through_the_recorded_ranks_and_finished_modules():
    model = adapted("roberta")
    trajectory = made_up(tuple(aroma_layers(model)))
    full = adapter_parameters(model)
    for step, (rank, frozen, parameters) in enumerate(replayed(model, trajectory), start=1):
        assert rank == expected_ranks(step, trajectory.modules) == trajectory.ranks(step)
        assert frozen == trajectory.frozen(step)
        assert (parameters == full) == (step < 4)
    assert parameters == 0


def test_a_replay_of_a_run_has_its_parameters_at_every_step(live):
    _, folder, states, _ = live
    model = adapted("roberta", max_components=2)
    assert list(replayed(model, read_trajectory(folder))) == states[: read_trajectory(folder).steps]


def test_without_freezing_ranks_are_equal_and_nothing_finishes():
    model = adapted("roberta")
    trajectory = made_up(tuple(aroma_layers(model)))
    full = adapter_parameters(model)
    for step, (rank, frozen, parameters) in enumerate(replayed(model, trajectory, freezes=False), start=1):
        assert rank == trajectory.ranks(step)
        assert frozen == set()
        assert parameters == full
    assert all(layer.pair("default")[0].any() for layer in aroma_layers(model).values())  # every pair does train


def test_what_is_merged_is_what_was_trained():
    model = adapted("roberta")
    trajectory = made_up(tuple(aroma_layers(model)))
    for _ in replayed(model, trajectory):
        pass
    assert {name: rank > 0 for name, rank in ranks(model).items()} == {
        name: bool(layer.finished("default").B.any()) for name, layer in aroma_layers(model).items()
    }


# Modules of another model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return make_model(BenchSettings(model="tiny", length=8))


def test_modules_are_found_by_name_or_by_layer_and_kind(tiny):
    assert fit_modules(made_up(), tiny) == {name: name for name in NAMES}
    foreign = tuple(name.replace("roberta", "bert") for name in NAMES)
    assert fit_modules(made_up(foreign), tiny) == dict(zip(foreign, NAMES, strict=True))
    renamed = made_up(foreign).renamed(fit_modules(made_up(foreign), tiny))
    assert renamed == made_up()


def test_modules_that_the_model_lacks_are_named(tiny):
    deeper = tuple(name.replace("layer.1", "layer.7") for name in NAMES)
    with pytest.raises(ConfigError, match=r"--trajectory='roberta\.encoder\.layer\.7\.attention\.self\.query': the "):
        fit_modules(made_up(deeper), tiny)
    with pytest.raises(ConfigError, match="no such module, and 5 more; it has 14 weight matrices"):
        fit_modules(made_up(deeper), tiny)


# Accounting ----------------------------------------------------------------------------------------------------------


def test_a_ledger_scales_what_was_drawn_and_adds_what_was_timed_every_time():
    ledger = ArmLedger()
    ledger.measured(0.5, stands_for=4)
    ledger.measured(0.7, stands_for=2)
    ledger.extra(0.25)
    for parameters in (60, 60, 60, 30, 30, 30):
        ledger.had(parameters)
    closed = ledger.close(total_rank=7, finished=2)
    assert closed.seconds == pytest.approx(4 * 0.5 + 2 * 0.7 + 0.25)
    assert closed.median_step_seconds == pytest.approx(0.6)
    assert (closed.trainable, closed.total_rank, closed.finished) == (45, 7, 2)


def epoch_of(number, steps, **seconds):
    arms = {name: ArmEpoch(value, value / steps, 10.0 * number, 0, 0) for name, value in seconds.items()}
    return Epoch(number, steps, steps, arms)


def test_means_weigh_epochs_by_their_steps():
    epochs = [epoch_of(1, 10, lora=20.0, aroma=16.0), epoch_of(2, 5, lora=11.5, aroma=5.0)]
    means = Means.of(epochs, steps_per_epoch=10)
    assert means.seconds == pytest.approx({"lora": 31.5 / 15 * 10, "aroma": 21.0 / 15 * 10})
    assert means.trainable == pytest.approx({"lora": (10 * 10 + 20 * 5) / 15, "aroma": (10 * 10 + 20 * 5) / 15})


def test_the_share_of_finished_modules():
    saving = Saving.of({LORA: 10.0, ADALORA: 20.0, AROMA: 6.0, UNFROZEN: 7.0})
    assert (saving.total, saving.finished, saving.share) == (4.0, 1.0, 0.25)
    more_than_all = Saving.of({LORA: 10.0, ADALORA: 20.0, AROMA: 9.0, UNFROZEN: 11.0})
    assert more_than_all.share == 2.0
    slower = Saving.of({LORA: 10.0, ADALORA: 20.0, AROMA: 11.0, UNFROZEN: 12.0})
    assert (slower.total, slower.finished, slower.share) == (-1.0, 1.0, None)


def test_drawn_steps_stand_for_all_and_stay_in_their_epoch():
    assert draw_steps(7, 3, every=1, seed=0) == dict.fromkeys(range(1, 8), 1)
    drawn = draw_steps(25, 10, every=4, seed=3)
    assert list(drawn.values()) == [4, 4, 2, 4, 4, 2, 4, 1]
    for step, first, length in zip(drawn, (1, 5, 9, 11, 15, 19, 21, 25), drawn.values(), strict=True):
        assert first <= step < first + length
    assert drawn == draw_steps(25, 10, every=4, seed=3)
    # At random, so that what happens every 10 steps is met as often as it happens.
    met = sum(step % 10 == 0 for step in draw_steps(100_000, 1000, every=10, seed=1))
    assert met == pytest.approx(1000, rel=0.15)


def test_everybody_is_first_in_turn():
    assert ["".join(turn_order("abcd", turn)) for turn in range(5)] == ["abcd", "bcda", "cdab", "dabc", "abcd"]


# Data ----------------------------------------------------------------------------------------------------------------


def test_random_batches_are_those_of_their_step_and_the_last_is_smaller(tiny):
    batches = RandomBatches(tiny, BenchSettings(model="tiny", batch_size=4, length=8), examples=10)
    assert batches.steps_per_epoch == 3
    assert [len(batches.at(step)[0]["labels"]) for step in range(1, 7)] == [4, 4, 2, 4, 4, 2]
    assert torch.equal(batches.at(5)[0]["input_ids"], batches.at(5)[0]["input_ids"])
    assert not torch.equal(batches.at(4)[0]["input_ids"], batches.at(5)[0]["input_ids"])


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    save_tiny_bert(folder / "model")
    write_json_lines(folder / "train.jsonl", sentences(44, seed=1))
    recipe = {
        "model": {"name": str(folder / "model")},
        "data": {"train": str(folder / "train.jsonl"), "validation_fraction": 0.1, "max_length": 10},
        "adapter": {"max_inner_steps": 6, "inner_check_interval": 3, "rewarmup_steps": 2, "outer_tolerance": 0.03},
        "training": {"max_steps": 25, "batch_size": 4, "learning_rate": 0.01, "warmup_steps": 2},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return str(folder / "recipe.yaml")


def test_an_epoch_of_a_recipe_has_every_example_once(recipe_file):
    recipe = load_recipe(recipe_file, ["training.gradient_accumulation_steps=3"])
    splits = load_splits(recipe.data)
    batches = RecipeBatches(recipe, splits, load_tokenizer(recipe.model.name, 10), "cpu")
    assert len(splits.train) == 39
    assert batches.steps_per_epoch == 4  # 10 batches in threes
    first, second = ([batches.at(step) for step in range(start, start + 4)] for start in (1, 5))
    assert [len(passes) for passes in first] == [3, 3, 3, 1]
    for epoch in (first, second):
        rows = [tuple(row.tolist()) for passes in epoch for part in passes for row in part["input_ids"]]
        assert len(rows) == 39
        assert set(rows) == {tuple(row["input_ids"]) for row in batches._data}
    assert not torch.equal(first[0][0]["input_ids"], second[0][0]["input_ids"])
    assert torch.equal(batches.at(2)[1]["input_ids"], first[1][1]["input_ids"])


# Whole runs ----------------------------------------------------------------------------------------------------------


def test_a_replayed_run_leaves_its_epochs(tmp_path):
    out = tmp_path / "out"
    result = bench_run(replay_settings(tmp_path), out)
    record = json.loads((out / "result.json").read_text())
    assert (record["complete"], record["mode"], record["steps"], record["modules"]) == (True, "replay", 12, 12)
    assert [(epoch["number"], epoch["steps"]) for epoch in record["epochs"]] == [(1, 5), (2, 5), (3, 2)]
    assert record["versions"]["torch"] == torch.__version__
    assert record["paper"]["aroma_over"] == {"lora": 0.76, "adalora": 0.285}
    assert read_trajectory(out) == made_up()
    for epoch, end in zip(result.epochs, (5, 10, 12), strict=True):
        rank, frozen = sum(expected_ranks(end).values()), len(made_up().frozen(end))
        arms = epoch.arms
        assert (arms[AROMA].total_rank, arms[AROMA].finished) == (rank, frozen)
        assert (arms[UNFROZEN].total_rank, arms[UNFROZEN].finished) == (rank, 0)
        assert (arms[LORA].total_rank, arms[LORA].finished) == (8 * 12, 0)
        assert all(arm.seconds > 0 for arm in arms.values())
    pair, every = {"attn": 32, "ffn": 48}, [*["attn"] * 4, *["ffn"] * 2] * 2
    sizes = [pair[kind] for kind in every]
    # Steps 1 to 4 train every pair, step 5 those that did not finish after step 4.
    left = sum(size for index, size in enumerate(sizes) if index % 3)
    assert result.epochs[0].arms[AROMA].trainable == pytest.approx((4 * sum(sizes) + left) / 5)
    assert result.epochs[0].arms[UNFROZEN].trainable == sum(sizes)
    assert result.epochs[0].arms[LORA].trainable == 8 * sum(sizes)
    assert result.epochs[0].arms[ADALORA].trainable == 12 * (sum(sizes) + 12)
    assert result.epochs[-1].arms[ADALORA].total_rank == 8 * 12  # its budget has shrunk
    for row in (record["mean_epoch"], *record["epochs"]):
        seconds = row.get("seconds") or {name: arm["seconds"] for name, arm in row["arms"].items()}
        assert row["aroma_over"]["lora"] == pytest.approx(seconds["aroma"] / seconds["lora"])
        assert row["saving_of_finished_seconds"] == pytest.approx(seconds["aroma-unfrozen"] - seconds["aroma"])


def test_of_a_sampled_run_only_drawn_steps_are_run_and_ranks_are_the_same(tmp_path):
    settings = replay_settings(tmp_path, every=4, steps=11)
    lineup = line_up(settings)
    forwards = dict.fromkeys((LORA, ADALORA, AROMA, UNFROZEN), 0)

    def count(name):
        def hook(*_):
            forwards[name] += 1

        return hook

    for arm in lineup.arms:
        arm.model.register_forward_hook(count(arm.name))
    epochs = list(WholeRun(lineup, "cpu").epochs())
    drawn = len(draw_steps(11, 5, 4, 0))
    assert forwards == dict.fromkeys(forwards, drawn + 1)  # and one to warm up
    assert [epoch.measured_steps for epoch in epochs] == [2, 2, 1]
    assert [epoch.arms[AROMA].total_rank for epoch in epochs] == [
        sum(expected_ranks(end).values()) for end in (5, 10, 11)
    ]
    full = list(WholeRun(line_up(replay_settings(tmp_path, steps=11)), "cpu").epochs())
    for sampled, whole in zip(epochs, full, strict=True):
        for name in forwards:
            assert sampled.arms[name].trainable == whole.arms[name].trainable
            assert sampled.arms[name].finished == whole.arms[name].finished


def test_all_methods_see_the_same_batches_in_turn(tmp_path):
    lineup = line_up(replay_settings(tmp_path, steps=5))
    seen = []
    for arm in lineup.arms:
        arm.model.register_forward_hook(
            lambda model, args, kwargs, output, name=arm.name: seen.append((name, kwargs["input_ids"].clone())),
            with_kwargs=True,
        )
    list(WholeRun(lineup, "cpu").epochs())
    rounds = [seen[start : start + 4] for start in range(4, len(seen), 4)]  # the first is the warm-up
    assert [turn[0][0] for turn in rounds] == [LORA, ADALORA, AROMA, UNFROZEN, LORA]
    for step, turn in enumerate(rounds, start=1):
        expected = lineup.batches.at(step)[0]["input_ids"]
        assert {name for name, _ in turn} == {LORA, ADALORA, AROMA, UNFROZEN}
        assert all(torch.equal(tokens, expected) for _, tokens in turn)


def test_the_backbone_is_shared_and_never_written(tmp_path):
    lineup = line_up(replay_settings(tmp_path))
    weights = [
        next(p for name, p in arm.model.named_parameters() if "query.base_layer.weight" in name) for arm in lineup.arms
    ]
    before = weights[0].clone()
    list(WholeRun(lineup, "cpu").epochs())
    assert len({weight.data_ptr() for weight in weights}) == 1
    assert torch.equal(weights[0], before)


def test_training_for_real_leaves_a_trajectory_whose_replay_has_the_same_parameters(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file)
    trained = bench_run(RunSettings(recipe=recipe), tmp_path / "trained")
    assert not trained.is_replay
    assert trained.epochs[-1].arms[AROMA].total_rank > 0
    assert trained.epochs[-1].arms[AROMA].finished > 0
    assert {epoch.arms[UNFROZEN].finished for epoch in trained.epochs} == {0}
    settings = RunSettings(recipe=recipe, trajectory=str(tmp_path / "trained"))
    again = bench_run(settings, tmp_path / "replayed")
    assert again.is_replay
    assert again.steps == trained.steps
    for one, other in zip(trained.epochs, again.epochs, strict=True):
        assert {name: arm.trainable for name, arm in one.arms.items()} == {
            name: arm.trainable for name, arm in other.arms.items()
        }
        for name in (LORA, AROMA, UNFROZEN):  # AdaLoRA's budget follows the planned steps, which AROMA cut short
            first, second = one.arms[name], other.arms[name]
            assert (first.total_rank, first.finished) == (second.total_rank, second.finished)
        assert one.arms[UNFROZEN].total_rank == one.arms[AROMA].total_rank
    assert (tmp_path / "trained" / "trajectory.json").read_text() == (
        tmp_path / "replayed" / "trajectory.json"
    ).read_text()


def test_a_run_for_real_decides_as_the_controller_does_alone(recipe_file, tmp_path):
    # Interleaved with three others, of which none may disturb it.
    recipe = load_recipe(recipe_file, ["adapter.lora_dropout=0"])
    bench_run(RunSettings(recipe=recipe), tmp_path / "together")
    lineup = line_up(RunSettings(recipe=recipe))
    alone = dataclasses.replace(lineup, arms=[arm for arm in lineup.arms if arm.name == AROMA])
    list(WholeRun(alone, "cpu").epochs())
    together = read_trajectory(tmp_path / "together")
    assert alone.trajectory(together.steps) == together


def test_a_run_for_real_ends_for_all_when_aroma_has_finished(recipe_file, tmp_path):
    stopping = ["adapter.max_components=1", "adapter.inner_tolerance=null", "adapter.max_inner_steps=6"]
    result = bench_run(RunSettings(recipe=load_recipe(recipe_file, stopping)), tmp_path / "out")
    assert (result.steps, result.planned_steps) == (6, 25)
    assert result.epochs[-1].arms[AROMA].finished == result.modules == 13
    going_on = [*stopping, "training.early_stop=false"]
    assert bench_run(RunSettings(recipe=load_recipe(recipe_file, going_on)), tmp_path / "on").steps == 25


def test_after_every_epoch_there_is_a_result(tmp_path):
    @contextmanager
    def interrupted(name, total):
        steps = iter(range(1, total + 1))

        def advance(done):
            if next(steps) == 7:
                raise KeyboardInterrupt

        yield advance

    with pytest.raises(KeyboardInterrupt):
        bench_run(replay_settings(tmp_path), tmp_path / "out", phase=interrupted)
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (record["complete"], record["steps"], len(record["epochs"])) == (False, 5, 1)


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command_prints_tables_and_leaves_result_and_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    trajectory = write_trajectory(tmp_path / "recorded", made_up())
    out = tmp_path / "out"
    arguments = ["--trajectory", trajectory, "--model", "tiny", "--batch-size", "2", "--length", "8", "--every", "2"]
    assert main(["bench", "run", *arguments, "--examples", "10", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"result.json", "trajectory.json", "run.png"}
    assert (out / "run.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "tiny, batch 2×8, 12 steps replayed, one step of 2" in printed
    for text in (
        "LoRA r=8",
        "AdaLoRA r=12→8",
        "AROMA, never finished",
        "0.76",
        "0.285",
        "come from modules that have",
    ):
        assert text in printed
    assert "Seconds are estimates: one step of 2, drawn at random" in printed
    assert "…" not in printed  # nothing is cut off at 80 characters
    settings = json.loads((out / "result.json").read_text())["settings"]
    assert (settings["every"], settings["examples"], settings["seed"]) == (2, 10, 0)


def test_model_and_data_are_those_of_the_run_unless_given(recipe_file, tmp_path):
    run = tmp_path / "run"
    assert main(["train", recipe_file, f"output={run}", "training.max_steps=14"]) == 0
    out = tmp_path / "out"
    assert main(["bench", "run", "--trajectory", str(run), "--batch-size", "13", "--out", str(out)]) == 0
    record = json.loads((out / "result.json").read_text())
    settings = record["settings"]
    assert settings["model"] == load_recipe(recipe_file).model.name
    assert (settings["examples"], settings["batch_size"], settings["length"]) == (39, 13, 10)
    trained = json.loads((run / "result.json").read_text())
    assert (record["steps"], record["steps_per_epoch"]) == (trained["steps"], 3)
    states = list(trained["states"].values())
    assert record["epochs"][-1]["arms"]["aroma"]["finished"] == states.count("frozen")
    assert Trajectory.from_dict(json.loads((out / "trajectory.json").read_text())) == read_trajectory(run)


def test_an_output_in_use_is_refused_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "precious.txt").write_text("thesis")
    assert main(["bench", "run", "--trajectory", "nowhere", *_SHAPE, "--out", str(tmp_path)]) == 2
    assert f"--out={str(tmp_path)!r}: it is not an empty folder, and nothing is overwritten" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"precious.txt"}


_SHAPE = ["--model", "tiny", "--examples", "4", "--batch-size", "2", "--length", "8"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--trajectory=None: give the folder of a run whose ranks are replayed, or a recipe to train for real"),
        (["--trajectory", "nowhere", *_SHAPE], "--trajectory='nowhere': there is no events.jsonl in it"),
        (["--trajectory", "RECORDED", *_SHAPE[2:]], "--model=None: the trajectory's folder has no recipe that tells"),
        (["--trajectory", "RECORDED", *_SHAPE, "--steps", "13"], "--steps=13: the trajectory has 12 steps"),
        (["--trajectory", "RECORDED", *_SHAPE, "--every", "0"], "every=0: give 1 or more"),
        (["--trajectory", "RECORDED", *_SHAPE, "--dropout", "1"], "dropout=1.0: give a probability"),
        (["--trajectory", "RECORDED", *_SHAPE[:-1], "100"], "length=100: the model takes at most"),
        (["--trajectory", "DEEP", *_SHAPE], "the model has no such module, and 11 more"),
        (["RECIPE", "--every", "3"], "--every=3: a training for real needs every step"),
        (["RECIPE", "--model", "tiny"], "--model='tiny': the recipe says it; leave it out"),
        (["RECIPE", "training.max_steps=1"], "training.warmup_steps=2: the run of 1 optimizer steps ends before"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(recipe_file, tmp_path, capsys, arguments, message):
    known = {
        "RECORDED": write_trajectory(tmp_path / "recorded", made_up()),
        "DEEP": write_trajectory(
            tmp_path / "deep", made_up(tuple(name.replace("layer.", "layer.3") for name in NAMES))
        ),
        "RECIPE": recipe_file,
    }
    out = tmp_path / "out"
    assert main(["bench", "run", *(known.get(word, word) for word in arguments), "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
