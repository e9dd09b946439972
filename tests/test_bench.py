"""`aroma bench`: what is counted, how cases take turns, what is made of it."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from aroma import AromaConfig, aroma_layers
from aroma.cli import main, make_parser
from aroma.errors import ConfigError
from aroma_lab.bench.cases import all_cases, select_cases
from aroma_lab.bench.contestant import Contestant
from aroma_lab.bench.measure import measure
from aroma_lab.bench.memory import kept_bytes, optimizer_bytes, trainable_parameters
from aroma_lab.bench.peak import peak_resident_bytes
from aroma_lab.bench.picture import draw_bench
from aroma_lab.bench.result import BenchResult, Footprint, case_results, comparisons
from aroma_lab.bench.settings import BenchSettings
from aroma_lab.bench.shapes import SHAPES, copy_model, load_config, make_batch, make_model
from aroma_lab.bench.table import comparison_table, growth_lines, machine_lines, size_table, time_table
from aroma_lab.bench.timing import Spread, Times, interleave, stopwatch_for

SETTINGS = BenchSettings(
    model="tiny",
    batch_size=2,
    length=8,
    rounds=2,
    warmup_rounds=1,
    peak=False,
    only=("lora-r8", "lora-r8-dropout", "aroma-8", "aroma-8-dropout"),
)
CASES = {case.key: case for case in all_cases()}
TARGETS = ["linear"]


@pytest.fixture(scope="module")
def result():
    return measure(SETTINGS)


# Bytes kept for backward ---------------------------------------------------------------------------------------------

TOKENS, N, M = 4, 5, 3
X_BYTES = 4 * TOKENS * N


class OneLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(N, M)

    def forward(self, x):
        return self.linear(x)


def kept_of(model):
    x = torch.ones(TOKENS, N)
    return kept_bytes(lambda: model(x).sum(), model)


def test_a_trained_linear_keeps_its_input():
    assert kept_of(OneLinear()) == X_BYTES


def test_a_frozen_linear_keeps_nothing_but_its_own_weight():
    model = OneLinear().requires_grad_(False)
    x = torch.ones(TOKENS, N, requires_grad=True)
    assert kept_bytes(lambda: model(x).sum(), model) == 0


@pytest.mark.parametrize("rank", [1, 2])
def test_lora_keeps_input_and_projection(rank):
    model = get_peft_model(OneLinear(), LoraConfig(r=rank, target_modules=TARGETS))
    assert kept_of(model) == X_BYTES + 4 * TOKENS * rank


def test_loras_dropout_keeps_a_mask_and_a_masked_input_too():
    model = get_peft_model(OneLinear(), LoraConfig(r=2, lora_dropout=0.5, target_modules=TARGETS))
    plain = X_BYTES + 4 * TOKENS * 2
    # The input itself is not needed then: the masked one is, and a mask is, where the input wants a gradient.
    assert kept_of(model) == plain
    x = torch.ones(TOKENS, N, requires_grad=True)
    assert kept_bytes(lambda: model(x).sum(), model) == plain + TOKENS * N * _mask_bytes()


def _mask_bytes():
    """Bytes of one entry of the mask that this PyTorch keeps: a bool, or a float on CPUs."""
    x = torch.ones(8, requires_grad=True)
    return kept_bytes(lambda: torch.dropout(x, 0.5, True).sum(), nn.Identity()) // 8


@pytest.mark.parametrize("finished", [0, 3, 9])
def test_aroma_keeps_input_and_one_number_a_token_however_much_is_finished(finished):
    model = get_peft_model(OneLinear(), AromaConfig(target_modules=TARGETS, component_seed=0))
    (layer,) = aroma_layers(model).values()
    if finished:
        layer.finished("default").append(torch.ones(M, finished), torch.ones(finished, N))
    assert kept_of(model) == X_BYTES + 4 * TOKENS


def test_a_storage_counts_once_and_whole():
    x = torch.ones(10, requires_grad=True)

    def forward():
        y = x.exp()  # keeps its result, 40 bytes
        return (y[:2] * y[4:6]).sum()  # keeps two views of it

    assert kept_bytes(forward, nn.Identity()) == 40


def test_parameters_and_buffers_do_not_count_seen_through_views_either():
    model = OneLinear()
    model.register_buffer("factor", torch.ones(6))
    x = torch.ones(3, requires_grad=True)
    # Kept: a view of the factor, a view of the weight, and for the weight's gradient the 12 bytes of x * factor.
    assert kept_bytes(lambda: (x * model.factor[:3] * model.linear.weight[0, :3]).sum(), model) == 12


def test_what_the_graph_has_let_go_of_does_not_count():
    x = torch.ones(10, requires_grad=True)

    def forward():
        x.exp()  # its graph goes with its result
        return (x * 2).sum()

    assert kept_bytes(forward, nn.Identity()) == 0


@pytest.mark.parametrize("key", ["floor", "adalora", "aroma-8-dropout", "lora-r8-dropout", "aroma-half"])
def test_the_count_is_the_same_on_every_run_and_model(key):
    counts = []
    for _ in range(2):
        contestant = contestant_of(key)
        counts += [kept_bytes(contestant.forward, contestant.model) for _ in range(2)]
    assert len(set(counts)) == 1
    assert counts[0] > 0


# Other sizes ---------------------------------------------------------------------------------------------------------


def test_optimizer_state_and_trainable_parameters():
    model = OneLinear()
    model.linear.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([model.linear.weight])
    assert optimizer_bytes(optimizer) == 0
    model(torch.ones(1, N)).sum().backward()
    optimizer.step()
    assert trainable_parameters(model) == M * N
    assert optimizer_bytes(optimizer) == 2 * 4 * M * N + 4  # two moments, and the step count
    assert optimizer_bytes(None) == 0


def test_the_peak_is_that_of_a_process_of_its_own():
    ballast = torch.ones(2**28)  # 1 GiB in this process
    assert 2**27 < peak_resident_bytes(SETTINGS, "floor") < ballast.nbytes


def test_a_process_that_fails_is_one_error():
    with pytest.raises(ConfigError, match=r"^absent: the process that measures its peak memory ended with code 1 "):
        peak_resident_bytes(SETTINGS, "absent")


# Cases ---------------------------------------------------------------------------------------------------------------


def contestant_of(key, settings=SETTINGS, base=None):
    base = base or make_model(settings)
    case = CASES[key]
    return Contestant(case, copy_model(base, case.method.writes_backbone), make_batch(base, settings), settings.seed)


def test_the_cases_are_those_that_were_asked_for():
    assert set(CASES) == {
        *("floor", "head", "full", "relora", "adalora"),
        *(f"lora-r{r}{end}" for r in (1, 8, 16) for end in ("", "-dropout")),
        *(f"aroma-{count}" for count in (0, 4, 8, 16, 64)),
        *(f"aroma-{count}-dropout" for count in (0, 8, 64)),
        *("aroma-half", "aroma-lower", "aroma-all"),
    }
    assert len({case.name for case in CASES.values()}) == len(CASES)


@pytest.mark.parametrize("key", [key for key in CASES if key.startswith("aroma")])
def test_aroma_cases_are_at_their_stage_and_stay_there(key):
    contestant = contestant_of(key)
    layers = list(aroma_layers(contestant.model).values())
    expected = {"aroma-half": range(0, 12, 2), "aroma-lower": range(6), "aroma-all": range(12)}.get(key, range(0))
    components = 8 if len(expected) else int(key.split("-")[1])
    for _ in range(12):  # past the first inner check
        contestant.step()
    assert len(layers) == 12
    assert [index for index, layer in enumerate(layers) if layer.is_frozen("default")] == list(expected)
    assert all(layer.finished("default").rank == components for layer in layers)
    assert all(layer.finished("default").B.any() for layer in layers) == bool(components)
    dropout = layers[0].lora_dropout["default"]
    assert (isinstance(dropout, nn.Dropout) and dropout.p == 0.1) == key.endswith("dropout")


def test_cases_share_a_backbone_that_none_of_them_writes():
    base = make_model(SETTINGS)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    weight = base.roberta.encoder.layer[0].output.dense.weight
    sharing = 0
    for key in CASES:
        contestant = contestant_of(key, base=base)
        sharing += any(parameter is weight for parameter in contestant.model.parameters())
        for _ in range(2):
            contestant.step()
        assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items()), key
    assert sharing == len(CASES) - 2


def test_the_floor_is_always_measured_and_compiled_cases_come_last():
    assert [case.key for case in select_cases(["aroma-8"], compiled=False)] == ["floor", "aroma-8"]
    compiled = select_cases(["aroma-8"], compiled=True)[2:]
    assert [case.key for case in compiled] == ["floor-compiled", "aroma-8-compiled"]
    assert all(case.compiled and case.name.endswith(", compiled") for case in compiled)


# Shapes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_no_shape_has_dropout(name):
    dropouts = {key: value for key, value in load_config(name).to_dict().items() if "dropout" in key}
    assert dropouts
    assert not any(dropouts.values())


def test_a_folder_gives_a_shape_too(tmp_path):
    load_config("tiny").save_pretrained(tmp_path)
    model = make_model(replace(SETTINGS, model=str(tmp_path)))
    assert model.config.hidden_size == SHAPES["tiny"][1]["hidden_size"]
    assert model.config._attn_implementation == "sdpa"


def test_no_token_is_padding():
    settings = replace(SETTINGS, batch_size=64, length=64)
    model = make_model(settings)
    tokens = make_batch(model, settings)["input_ids"]
    assert set(tokens.unique().tolist()) == set(range(64)) - {model.config.pad_token_id}


# Turns and times -----------------------------------------------------------------------------------------------------


class Recorder:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def forward_backward(self):
        self.log.append(f"{self.name}1")

    def finish_step(self):
        self.log.append(f"{self.name}2")


def test_cases_take_turns_and_warm_up_rounds_do_not_count():
    log, turns = [], []
    clock = iter(range(100))

    def stopwatch(*parts):
        for part in parts:
            part()
        return [float(next(clock)) for _ in parts]

    times = interleave([Recorder("A", log), Recorder("B", log)], 2, 1, stopwatch, turns.append)
    assert log == ["A1", "A2", "B1", "B2"] * 3
    assert len(turns) == 6
    assert times == [Times([4.0, 8.0], [5.0, 9.0]), Times([6.0, 10.0], [7.0, 11.0])]


def test_the_stopwatch_times_each_part():
    import time

    short, long = stopwatch_for("cpu")(lambda: None, lambda: time.sleep(0.02))
    assert 0 <= short < 0.02 <= long < 1


def test_spreads():
    assert Spread.of([3.0, 1.0, 2.0, 5.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    assert Spread.of_ratios([2.0, 2.0, 12.0], [1.0, 2.0, 4.0]) == Spread(2.0, 1.5, 2.5)


def test_ratios_of_a_fabricated_table():
    cases = select_cases(["lora-r8", "aroma-0"], compiled=True)
    times = {
        "floor": Times([1.0, 2.0, 4.0], [0.0] * 3),
        "lora-r8": Times([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]),
        "aroma-0": Times([1.0, 3.0, 8.0], [0.5, 1.0, 0.0]),
        "floor-compiled": Times([0.5] * 3, [0.0] * 3),
        "lora-r8-compiled": Times([1.0] * 3, [0.5] * 3),
        "aroma-0-compiled": Times([0.75] * 3, [0.0] * 3),
    }
    sizes = [Footprint(100 if "lora" in case.key else 50, 0, 0, None) for case in cases]
    results = {found.key: found for found in case_results(cases, list(times.values()), sizes)}
    assert list(results) == list(times)
    assert results["lora-r8"].forward_backward_ratio == Spread(2.0, 2.0, 2.0)
    assert results["lora-r8"].step_ratio == Spread(3.0, 3.0, 3.0)
    assert results["aroma-0"].forward_backward_ratio.median == 1.5
    assert results["aroma-0-compiled"].forward_backward_ratio.median == 1.5
    compared = {entry.key: entry for entry in comparisons(cases, list(results.values()))}
    assert list(compared) == ["aroma-0", "aroma-0-compiled"]
    assert compared["aroma-0"].other == "lora-r8"
    assert compared["aroma-0"].forward_backward_ratio == Spread(0.75, 0.625, 0.875)
    assert compared["aroma-0"].step_ratio.median == pytest.approx(0.6667, abs=1e-4)
    assert compared["aroma-0"].kept_ratio == 0.5
    assert compared["aroma-0-compiled"].forward_backward_ratio.median == 0.75


# The whole -----------------------------------------------------------------------------------------------------------


def test_the_result_has_everything_and_survives_json(result):
    assert [case.key for case in result.cases] == ["floor", *SETTINGS.only]
    assert all(len(case.times.rest) == len(case.times.forward_backward) == 2 for case in result.cases)
    assert result.cases[0].forward_backward_ratio == Spread(1.0, 1.0, 1.0)
    assert [(entry.key, entry.other) for entry in result.comparisons] == [
        ("aroma-8", "lora-r8"),
        ("aroma-8-dropout", "lora-r8-dropout"),
    ]
    assert {"versions", "git_revision", "threads", "wait_policy", "cpu_model"} <= set(result.provenance)
    assert result.model["adapted_modules"] == 12
    content = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert BenchResult.from_dict(content) == result


def test_the_controller_was_driven(result):
    cost = result.growth
    assert cost.check_interval == 10
    assert 0 < cost.uncheck_ms < cost.check_ms
    assert cost.amortised_ms == pytest.approx(0.9 * cost.uncheck_ms + 0.1 * cost.check_ms)
    assert cost.outer_ms > cost.check_ms
    assert cost.outer_fraction == cost.outer_ms / cost.step_ms


def test_every_case_is_in_tables_and_picture(result):
    for table in (time_table(result), size_table(result)):
        assert list(table.columns[0].cells) == [case.key for case in result.cases]
    assert list(comparison_table(result.comparisons).columns[0].cells) == ["aroma-8", "aroma-8-dropout"]
    times, kept = draw_bench(result).axes
    assert [label.get_text() for label in times.get_yticklabels()] == [case.name for case in result.cases]
    circles = [(line.get_xdata()[0], line.get_ydata()[0]) for line in times.lines if line.get_marker() == "o"]
    for row, case in enumerate(result.cases):
        assert (case.forward_backward_ratio.median, row) in circles
        assert (case.step_ratio.median, row) in circles
    assert [bar.get_width() for bar in kept.patches] == [case.footprint.kept_bytes / 2**20 for case in result.cases]


def test_a_peak_that_was_not_measured_is_said_to_be_missing(result):
    first = result.cases[0]
    measured = replace(first, footprint=replace(first.footprint, peak_bytes=2**20))
    peaks = draw_bench(replace(result, cases=[measured, *result.cases[1:]])).axes[2]
    assert [bar.get_width() for bar in peaks.patches] == [1.0]
    assert len(peaks.texts) == len(result.cases) - 1


def test_the_lines_below_name_machine_and_versions(result):
    text = " ".join([*growth_lines(result), *machine_lines(result)])
    assert result.provenance["cpu_model"] in text
    assert f"torch {torch.__version__}" in text
    assert "One outer step" in text


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command_leaves_results_and_picture(tmp_path, capsys):
    out = tmp_path / "tiny.json"
    options = ["--model", "tiny", "--batch-size", "2", "--length", "8", "--rounds", "1", "--warmup-rounds", "0"]
    assert main(["bench", *options, "--no-peak", "--only", "aroma-0", "lora-r8", "--out", str(out)]) == 0
    saved = BenchResult.from_dict(json.loads(out.read_text()))
    assert [case.key for case in saved.cases] == ["floor", "lora-r8", "aroma-0"]
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert "AROMA over LoRA r=8" in printed.out
    assert "taking turns" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "lora-r9"], "error: only='lora-r9': no such case; choose from floor, head, lora-r1"),
        (["--model", "absent/shape"], "error: model='absent/shape': neither a shape (roberta-base, minilm, tiny) nor"),
        (["--rounds", "0"], "error: rounds=0: give 1 or more"),
        (["--model", "tiny", "--length", "65"], "error: length=65: the model takes at most 64 tokens"),
        (["--out", "there.json"], "error: --out='there.json': there.json exists; give another name"),
        (["--out", "pictured.json"], "error: --out='pictured.json': pictured.png exists; give another name"),
        (["--out", "results.csv"], "error: --out='results.csv': the name of the results must end in .json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_is_one_line_and_nothing_is_written(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("there.json", "pictured.png"):
        (tmp_path / name).write_text("kept")
    assert main(["bench", *arguments]) == 2
    output = capsys.readouterr()
    assert output.err.startswith(message)
    assert output.err.count("\n") == 1
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys(
        ("there.json", "pictured.png"), "kept"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--model", "tiny", "--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("error: device='cuda': PyTorch finds no GPU; use cpu")


def test_help_needs_no_torch():
    program = (
        "import sys\nfrom aroma.cli import main\n"
        "try:\n    main(['bench', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'matplotlib', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    examples = done.stdout.partition("\nexamples:\n")[2].splitlines()[:-1]
    assert len(examples) >= 2
    for line in examples:
        assert make_parser().parse_args(line.split()[1:]).run
