"""What a run of growth by evidence shows a person: its picture, its line of progress, and why it ended."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from peft import get_peft_model
from rich.console import Console
from torch import nn

from aroma import AromaCallback, AromaConfig, attach
from aroma.algorithm.duels import Reading, log_evidence, log_mean
from aroma.algorithm.evidence import EvidenceRule, EvidenceSettings
from aroma.algorithm.paper import PaperRule, PaperSettings
from aroma.cli import main
from aroma.errors import ConfigError
from aroma.integrations.progress import RichProgress
from aroma.pictures import birth_picture, draw_births, histories_of
from aroma.report.run import run_page
from evidence_runs import METHOD, WIDTH, Loop, bert, growth_dataset, net
from evidence_runs import STEPS as STEPS_OF_A_RUN
from made_up_facts import GROWN, event, events, made_up
from trainer_runs import trainer_for

KINDS = ("attention.query", "attention.value", "output.dense")
NAMES = [f"encoder.layer.{layer}.{kind}" for layer in range(4) for kind in KINDS]
STEPS = 200
BIRTH, MERGE = "#d55e00", "#222222"


class Coin:
    """A matrix whose unused direction wins a batch with a given probability."""

    converged, is_frozen, inner_value, outer_value = False, False, None, None

    def __init__(self, name: str, chance: float) -> None:
        self.name, self.chance = name, chance
        self.rank = self.component_count = 0
        self.heads, self.flips = [0], [0]
        self.log_evidence = 0.0
        self.steepness: float | None = None


class Coins:
    """Matrices for the rule: as many directions stay after the trial as `settled` says."""

    def __init__(self, chances: dict[str, float], settled: int, slots: int) -> None:
        self.matrices = [Coin(name, chance) for name, chance in chances.items()]
        self.settled, self.slots = settled, slots
        self.random = np.random.default_rng(0)

    @property
    def known_rank(self) -> int:
        return sum(matrix.component_count for matrix in self.matrices)

    def all(self) -> list[Coin]:
        return self.matrices

    active = all

    def take_readings(self) -> list[Reading]:
        count = len(self.matrices)
        wins = self.random.random((4, count)) < [matrix.chance for matrix in self.matrices]
        known = np.ones((count, 1)), np.zeros(count, bool)
        return [Reading(np.where(batch, 2.0, 0.5)[:, None], *known) for batch in wins]

    def bear(self, births: Any) -> list[Coin]:
        for matrix, _ in births:
            matrix.component_count += 1
        return list(dict.fromkeys(matrix for matrix, _ in births if matrix.component_count > self.slots))

    def take_credits(self) -> list[np.ndarray]:
        return [np.ones((len(self.matrices), self.slots))]

    def keep(self, kept: Any, share: float) -> None:
        for matrix in self.matrices:
            matrix.component_count = self.settled

    def norms(self, matrices: Any) -> list[float]:
        return [1.0] * len(matrices)

    def stop_following(self) -> None: ...

    def follow_unused(self, taken: Any) -> None: ...

    def take_apart(self) -> None: ...

    def ask_at(self, strength: float) -> None: ...

    def note_moves(self) -> None: ...


def run(chances: dict[str, float], steps: int = STEPS, settled: int = 2, slots: int = 4, most: int | None = None):
    """Return the rule after a run over coins, its events as dicts, and its lines of progress."""
    matrices = Coins(chances, settled, slots)
    settings = EvidenceSettings(
        0.05, 1.0, slots, trial_steps=20, memory=0.97, last_step=steps - 20, max_components=most, total_steps=steps
    )
    rule: Any = EvidenceRule(settings, matrices)
    events, lines = [], []
    for _ in range(steps):
        events += [event.as_dict() for event in rule.step()]
        lines.append(" · ".join(rule.status))
    return rule, events, lines


@pytest.fixture(scope="module")
def grown():
    """A run in which one matrix grows beyond its slots, another gets a few components, and the others none."""
    return run({**dict.fromkeys(NAMES, 0.2), NAMES[4]: 0.97, NAMES[9]: 0.75})


def marks(axes: Any, colour: str) -> list[float]:
    """Steps of the dots of a colour."""
    found = [one for one in axes.collections if isinstance(one, PathCollection) and len(one.get_offsets())]
    own = [one for one in found if matplotlib_hex(one.get_facecolor()) == colour]
    return sorted(float(x) for one in own for x, _ in one.get_offsets())


def matplotlib_hex(colours: Any) -> str:
    from matplotlib.colors import to_hex

    return to_hex(colours[0])


# The picture ---------------------------------------------------------------------------------------------------------


def test_histories_say_what_happened_to_every_matrix(grown):
    rule, events, _ = grown
    histories = {matrix.name: matrix for matrix in histories_of(events)}
    assert [*histories] == NAMES
    born = {
        name: [event["step"] for event in events if event["kind"] == "born" and event["module"] == name][1:]
        for name in NAMES
    }
    for name, matrix in histories.items():
        assert matrix.births == born[name]
        assert (matrix.settled, matrix.rank) == (2, 2 + len(born[name]))
        assert matrix.evidence[0] == (30, 0.0)
        assert [*dict.fromkeys(step for step, value in matrix.evidence if value >= math.log(20))] == born[name]
    most = histories[NAMES[4]]
    assert len(most.births) == max(map(len, born.values())) > 4
    assert most.merges == most.births[2:], "two slots were free"
    assert rule.births == sum(map(len, born.values()))


def test_the_picture_has_a_row_for_each_matrix_and_a_dot_for_each_birth(grown):
    rule, events, _ = grown
    figure = draw_births(events, steps=STEPS, title="T")
    large, small = figure.axes[:2], figure.axes[2:]
    assert [axes.get_title(loc="left") for axes in small] == [*KINDS]
    assert all([tick.get_text() for tick in axes.get_yticklabels()] == ["0", "1", "2", "3"] for axes in small)
    histories = {matrix.name: matrix for matrix in histories_of(events)}
    for axes, kind in zip(small, KINDS, strict=True):
        own = [matrix for name, matrix in histories.items() if name.endswith(kind)]
        every = sorted(step for matrix in own for step in matrix.births)
        merged = sorted(step for matrix in own for step in matrix.merges)
        assert (marks(axes, BIRTH), marks(axes, MERGE)) == (every, merged)
        assert [text.get_text() for text in axes.texts] == [str(matrix.rank) for matrix in own]
        widths = [bar.get_width() for bar in axes.patches]
        assert sum(widths) == pytest.approx(sum(matrix.rank for matrix in own) * widths[0] / 2)
    # Large: the most births, and one of those without any; each against the threshold.
    assert (
        large[0].get_title(loc="left")
        == f"attention.value, layer 1: trial left 2, {len(histories[NAMES[4]].births)} born"
    )
    assert large[1].get_title(loc="left").endswith("trial left 2, none born")
    assert [tick.get_text() for tick in large[0].get_yticklabels()] == ["1/20", "1", "1/α = 20"]
    assert [axes.get_xlim() for axes in large] == [(0, STEPS)] * 2
    assert large[0].get_ylim() == large[1].get_ylim()
    assert marks(large[0], BIRTH) == histories[NAMES[4]].births
    summary = (
        f"12 matrices · the trial left 24 components at step 30 · births {rule.births}, last at step {rule.last_birth}"
    )
    assert summary in figure.subfigs[0].get_suptitle()


def test_what_went_where_growth_ended_is_hollow(grown):
    rule, events, _ = grown
    before = {matrix.name: matrix for matrix in histories_of(events)}
    last = {event["module"]: event for event in events if event["module"]}
    lost = {NAMES[4]: 3, NAMES[0]: 2}
    gone = [
        {**last[name], "kind": "squeezed", "step": 180, "rank": before[name].rank - count}
        for name, count in lost.items()
    ]
    for name, matrix in {matrix.name: matrix for matrix in histories_of([*events, *gone])}.items():
        assert (matrix.squeezed, matrix.rank) == (lost.get(name, 0), before[name].rank - lost.get(name, 0))
        assert (matrix.births, matrix.evidence) == (before[name].births, before[name].evidence)
    figure, whole = draw_births([*events, *gone], steps=STEPS), draw_births(events, steps=STEPS)
    hollow = [bar for axes in figure.axes for bar in axes.patches if bar.get_width() and not bar.get_facecolor()[3]]
    assert len(hollow) == 2
    for one, other in zip(figure.axes[2:], whole.axes[2:], strict=True):
        ends = [max(bar.get_x() + bar.get_width() for bar in axes.patches) for axes in (one, other)]
        assert ends[0] == pytest.approx(ends[1]), "with what went a bar is as long as before"
    said = f"last at step {rule.last_birth}\ngone: 5 · ranks 0 to"
    assert said in figure.subfigs[0].get_suptitle()
    legends = [[text.get_text() for text in one.subfigs[1].legends[0].get_texts()] for one in (figure, whole)]
    assert ["gone in a squeeze" in legend for legend in legends] == [True, False]


def test_no_evidence_is_no_dot_and_the_threshold_is_that_of_the_run(grown):
    _, events, _ = run(dict.fromkeys(NAMES, 0.2))
    figure = draw_births(events, significance=0.01)
    assert not any(marks(axes, BIRTH) for axes in figure.axes)
    assert "births 0 · ranks 2 to 2, total 24" in figure.subfigs[0].get_suptitle()
    assert figure.axes[0].get_yticklabels()[-1].get_text() == "1/α = 100"
    legend = [text.get_text() for text in figure.subfigs[1].legends[0].get_texts()]
    assert "birth, the oldest merged" not in legend
    legend = [text.get_text() for text in draw_births(grown[1]).subfigs[1].legends[0].get_texts()]
    assert "birth, the oldest merged" in legend


@pytest.mark.parametrize(
    "names",
    [
        ["only"],
        [*NAMES, "bert.pooler.dense"],
        pytest.param(
            [f"layers.{layer}.{kind}" for layer in range(32) for kind in ("q", "k", "v", "o", "gate", "up", "down")],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["1", "13", "224"],
)
def test_no_text_lies_on_another_at_any_size(names, tmp_path):
    _, events, _ = run(dict.fromkeys(names, 0.5), steps=120)
    figure = draw_births(events, steps=120)
    figure.canvas.draw()
    shown = [axes for axes in figure.axes if axes.axison]
    texts = [text for axes in shown for text in (*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels())]
    texts += [axes._left_title for axes in shown]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    for place, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, "nothing is cut off"
        assert not any(box.overlaps(other) for other in boxes[:place])
    birth_picture(events, tmp_path / "births.png")
    assert 5_000 < (tmp_path / "births.png").stat().st_size < 300_000


def test_a_run_that_ended_in_its_trial_is_drawn_as_that():
    _, events, _ = run(dict.fromkeys(NAMES, 0.2), steps=25)
    figure = draw_births(events, steps=25)
    assert "12 matrices · the trial had not ended at step 25" in figure.subfigs[0].get_suptitle()
    assert "in its trial" in figure.axes[0].get_title(loc="left")


def test_events_of_the_papers_rule_have_no_births(tmp_path):
    event = {"kind": "checked", "step": 10, "module": "a", "rank": 0, "log_evidence": None}
    with pytest.raises(ConfigError, match="events='none of evidence': only growth='evidence' has births"):
        draw_births([event])
    with pytest.raises(ConfigError, match="unknown kind of picture"):
        birth_picture([event], tmp_path / "births.docx")


# The line of progress, and the end -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "interval"), [(110, 4), (320, 12), (1500, 40)])
def test_a_short_run_tells_of_its_evidence_more_often(steps, interval):
    _, events, _ = run({"one": 0.3}, steps)
    told = sorted({event["step"] for event in events if event["kind"] == "checked"})
    assert {after - before for before, after in itertools.pairwise(told[:-1])} == {interval}
    assert told[-1] == math.ceil((steps - 20) / 4) * 4  # where growth ends
    assert len(told) >= 16


def test_the_line_of_progress_reads_well_in_every_phase(grown):
    rule, _, lines = grown
    assert lines[0] == "trial 1/20 · 0 components"
    assert lines[10] == "trial 11/20 · 48 components"
    assert lines[19] == "asking 0/10 · 48 components"
    assert lines[25] == "asking 6/10 · 48 components"
    assert lines[29] == "24 components · births 0"
    total = 24 + rule.births
    assert lines[-1] == f"{total} components · births {rule.births}, last at step {rule.last_birth}"


def test_the_end_says_what_is_open(grown):
    rule, _, _ = grown
    hopeful = [matrix for matrix in rule._matrices.all() if matrix.log_evidence > 0]
    assert rule.explanation.startswith(f"no evidence for another component in {12 - len(hopeful)} of 12 matrices; ")
    assert rule.explanation.endswith(f"; last birth at step {rule.last_birth}; nothing is born after step 180")
    rule, _, _ = run(dict.fromkeys(NAMES, 0.2))
    assert rule.explanation == (
        "no evidence for another component in 12 of 12 matrices; no birth since the trial; "
        "nothing is born after step 180"
    )
    rule._matrices.all()[3].log_evidence = math.log(8.2)
    assert rule.explanation == (
        "no evidence for another component in 11 of 12 matrices; some in 1, the most in "
        "encoder.layer.1.attention.query (E = 8.2 of 20.0); no birth since the trial; "
        "nothing is born after step 180"
    )


def test_the_end_says_that_nothing_was_kept():
    rule, _, _ = run(dict.fromkeys(NAMES, 0.2), settled=0)
    assert rule.explanation == (
        "no matrix has a component, as none saves loss on unseen examples: there is nothing to learn, or the learning "
        "rate is too high; no evidence for another component in 12 of 12 matrices; no birth since the trial; "
        "nothing is born after step 180"
    )


def test_the_end_says_where_the_limit_is_reached_and_where_the_trial_was_cut_short():
    rule, _, _ = run({**dict.fromkeys(NAMES, 0.2), NAMES[4]: 0.97}, most=4)
    assert rule.explanation == (
        "no evidence for another component in 11 of 12 matrices; max_components=4 is reached in 1; "
        f"last birth at step {rule.last_birth}; nothing is born after step 180"
    )
    rule, _, _ = run(dict.fromkeys(NAMES, 0.2), steps=25)
    assert rule.explanation == "the trial is not over at step 25: which components stay is not decided"


def test_the_papers_rule_says_why_its_matrices_finished():
    class Frozen:
        def __init__(self, count: int, is_frozen: bool) -> None:
            self.component_count, self.is_frozen, self.rank, self.name = count, is_frozen, count, "a"
            self.converged, self.inner_value, self.outer_value = False, None, None

    class Matrices:
        known_rank = 9

        def __init__(self, *matrices: Frozen) -> None:
            self.matrices = matrices

        def all(self):
            return self.matrices

        def active(self):
            return [matrix for matrix in self.matrices if not matrix.is_frozen]

        def start_unmoved(self, draw): ...

    settings = PaperSettings(0.1, 10, 50, 0.01, 0, 4, 0)
    rule: Any = PaperRule(settings, Matrices(Frozen(2, True), Frozen(4, True), Frozen(3, False)))
    assert rule.status == ["inner 0/50", "active 1/3", "finished rank 9"]
    assert rule.explanation == (
        "2 of 3 matrices have finished (1 found the next component too small, 1 have max_components=4); 1 still train"
    )
    assert (
        PaperRule(settings, Matrices(Frozen(1, False))).explanation == "0 of 1 matrices have finished; 1 still train"
    )


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [False, True])
def test_the_trainers_own_bar_ends_with_the_explanation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], hidden: bool
) -> None:
    callback = AromaCallback(growth_dataset=growth_dataset())
    trainer_for(bert(), tmp_path, callback, max_steps=STEPS_OF_A_RUN, save_strategy="no", disable_tqdm=hidden).train()
    assert callback.controller is not None
    assert (f"{callback.controller.explanation()}.\n" in capsys.readouterr().out) == (not hidden)


@pytest.mark.parametrize("width", [200, 80])
def test_the_progress_bar_ends_with_the_explanation(tmp_path: Path, width: int) -> None:
    stream = io.StringIO()
    callback = AromaCallback(growth_dataset=growth_dataset())
    bar = RichProgress(callback, console=Console(file=stream, width=width, force_terminal=False))
    trainer = trainer_for(bert(), tmp_path, callback, bar, max_steps=STEPS_OF_A_RUN, save_strategy="no")
    trainer.train()
    controller = callback.controller
    assert controller is not None
    shown = stream.getvalue().strip().splitlines()
    line = next(index for index, text in enumerate(shown) if text.startswith("train"))
    assert " ".join(map(str.strip, shown[line + 1 :])) == controller.explanation()
    assert shown[line + 1].startswith("no evidence for another component in ")
    for said in (f" {STEPS_OF_A_RUN}/{STEPS_OF_A_RUN} ", f" {controller.total_rank} components · births "):
        assert said in shown[line], "only the end of the line may be cut"


# The summary, and what `aroma inspect` makes of it -------------------------------------------------------------------


def test_the_summary_has_the_evidence_that_the_rule_weighs() -> None:
    loop = Loop(net(significance=0.05, duel_factor=1.0)).go_on()
    controller = loop.growth.controller
    told = {event.module: event for event in loop.events if event.step == 40 and event.kind == "checked"}
    assert set(told) == {module.name for module in controller.summary()}
    for module, matrix in zip(controller.summary(), controller.modules, strict=True):
        assert module.rank == matrix.component_count
        assert module.log_evidence == log_mean([*map(log_evidence, matrix.heads, matrix.flips)])
        assert module.steepness is not None
        assert module.steepness != 0
        assert module.state == "training"
    assert any(module.log_evidence for module in controller.summary())


def test_inspect_shows_evidence_and_steepness(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    loop = Loop().go_on()
    loop.save(tmp_path / "grown")
    assert main(["inspect", str(tmp_path / "grown"), "--sort", "evidence"]) == 0
    output = capsys.readouterr().out
    rule = loop.growth.controller.rule
    assert f"at optimizer step 60: births since the trial {rule.births}, the last at step {rule.last_birth}." in output
    assert f"E of {1 / METHOD['significance']:.3g}" in output
    ordered = sorted(loop.growth.controller.summary(), key=lambda module: -module.log_evidence)
    lines = [line.split() for line in output.splitlines() if "×" in line and "m×n" not in line]
    for cells, module in zip(lines, ordered, strict=True):
        evidence = math.exp(module.log_evidence)
        assert cells[0] == module.name.split(".")[1]
        assert cells[3] == str(module.rank)
        assert cells[-2:] == ["<0.01" if evidence < 0.01 else f"{evidence:.2f}", f"{module.steepness:.1e}"]

    assert main(["inspect", str(tmp_path / "grown"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["growth"]["births"] == rule.births
    assert told["growth"]["squeezed"] == 0
    assert [(matrix["log_evidence"], matrix["steepness"]) for matrix in told["matrices"]] == [
        (module.log_evidence, module.steepness) for module in loop.growth.controller.summary()
    ]

    rule.squeezed = 3
    rule.strength, rule._is_shortened, rule.is_anything_known = 0.75, True, False
    loop.save(tmp_path / "squeezed")
    assert main(["inspect", str(tmp_path / "squeezed")]) == 0
    assert (
        f"the last at step {rule.last_birth}; components that went 3; its last step left 0.75 of what trained; "
        "nothing was known yet when the trial ended." in " ".join(capsys.readouterr().out.split())
    )
    assert main(["inspect", str(tmp_path / "squeezed"), "--json"]) == 0
    growth = json.loads(capsys.readouterr().out)["growth"]
    assert (growth["is_anything_known"], growth["strength_at_end"]) == (False, 0.75)

    Loop().go_on(until=12).save(tmp_path / "trial")
    assert main(["inspect", str(tmp_path / "trial")]) == 0
    assert "its trial was not over at optimizer step 12." in capsys.readouterr().out


def test_evidence_beyond_any_float_is_saved_shown_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A matrix that is full goes on winning: after a thousand batches in a row E is beyond 1e308."""
    loop = Loop(net(max_components=1)).go_on()
    full = loop.growth.controller.modules[0]
    full.heads = full.flips = [2000] * len(full.heads)
    full.log_evidence, full.steepness = log_evidence(2000, 2000), 5e4
    assert full.log_evidence > 1000
    loop.save(tmp_path)
    assert main(["inspect", str(tmp_path), "--sort", "evidence"]) == 0
    assert re.search(r"\b0 .* 1e\+304 +5\.0e\+04", capsys.readouterr().out)
    looks = [event("checked", 240 + place, GROWN, 1, 700.0 * place) for place in (1, 2, 3)]
    assert "1e+304 of" in run_page(made_up(events=[*events(), *looks]))
    assert draw_births([*events(), *looks], 0.05, 400).axes


def test_a_matrix_without_an_unused_direction_has_no_evidence_and_no_steepness(tmp_path: Path) -> None:
    """Its slots are all the ranks that it has; the other matrix has directions left."""
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))
    model = get_peft_model(base, AromaConfig(growth="evidence", target_modules=r"[01]", slots=3, component_seed=0))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    x, y = torch.randn(STEPS_OF_A_RUN * 8, WIDTH, generator=torch.Generator().manual_seed(0)), torch.ones(8, 3)
    growth = attach(model, optimizer, total_steps=STEPS_OF_A_RUN)
    for batch in x.split(8):
        optimizer.zero_grad()
        (model(batch) - y * batch[:, :3].sign()).square().mean().backward()
        optimizer.step()
    free, full = growth.controller.summary()
    assert free.steepness is not None
    assert (full.log_evidence, full.steepness) == (0.0, None)
    assert json.loads(json.dumps(asdict(full), allow_nan=False))["rank"] == full.rank
    model.save_pretrained(tmp_path)
