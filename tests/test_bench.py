"""`aroma bench`: what is counted, how cases take turns, what is made of it."""

import json
from importlib.metadata import version

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from aroma import AromaConfig, aroma_layers
from aroma.cli import main
from aroma_lab.bench.cases import select_cases
from aroma_lab.bench.measure import case_result, kept_bytes, measure
from aroma_lab.bench.models import BenchSettings

SETTINGS = BenchSettings(
    model="tiny",
    batch_size=2,
    length=8,
    rounds=2,
    only=("lora-r1", "lora-r8", "aroma-0", "aroma-8", "lora-r8-dropout", "aroma-8-dropout", "compress"),
)
TARGETS = ["linear"]


@pytest.fixture(scope="module")
def result():
    return measure(SETTINGS)


# Bytes kept for backward ---------------------------------------------------------------------------------------------

TOKENS, N, M = 4, 5, 3
X_BYTES = 4 * TOKENS * N


class OneLinear(nn.Module):
    def __init__(self, n=N, m=M):
        super().__init__()
        self.linear = nn.Linear(n, m)

    def forward(self, x):
        return self.linear(x)


def kept_of(model, requires_grad=False):
    x = torch.ones(TOKENS, N, requires_grad=requires_grad)
    return kept_bytes(lambda: model(x).sum(), model)


def test_what_one_layer_keeps():
    assert kept_of(OneLinear()) == X_BYTES
    assert kept_of(OneLinear().requires_grad_(False), requires_grad=True) == 0
    for dropout in (0.0, 0.5):
        lora = LoraConfig(r=2, lora_dropout=dropout, target_modules=TARGETS)
        assert kept_of(get_peft_model(OneLinear(), lora)) == X_BYTES + 4 * TOKENS * 2
        for finished in (0, 3, 9):
            config = AromaConfig(target_modules=TARGETS, component_seed=0, lora_dropout=dropout)
            model = get_peft_model(OneLinear(), config)
            (layer,) = aroma_layers(model).values()
            if finished:
                layer.finished("default").append(torch.ones(M, finished), torch.ones(finished, N))
            assert kept_of(model) == X_BYTES + 4 * TOKENS, "one number a token, however much is finished"


# Turns and times -----------------------------------------------------------------------------------------------------


def test_ratios_are_taken_round_by_round():
    cases = select_cases(["lora-r8", "aroma-0"])
    seconds = {
        "floor": ([1.0, 2.0, 4.0], [0.0] * 3),
        "lora-r8": ([2.0, 4.0, 8.0], [3.0, 6.0, 12.0]),
        "aroma-0": ([1.0, 3.0, 8.0], [1.5, 4.0, 8.0]),
    }
    assert [case.key for case in cases] == list(seconds)
    parts = ("forward_backward", "step")
    times = pd.DataFrame({(part, key): pair[i] for key, pair in seconds.items() for i, part in enumerate(parts)})
    results = {case.key: case_result(case, times) for case in cases}
    assert results["lora-r8"]["forward_backward_ratio"] == {"median": 2.0, "lower": 2.0, "upper": 2.0}
    assert results["lora-r8"]["step_ratio"]["median"] == 3.0
    assert results["aroma-0"]["forward_backward_ratio"] == {"median": 1.5, "lower": 1.25, "upper": 1.75}
    assert results["aroma-0"]["forward_backward_over_lora"] == {"median": 0.75, "lower": 0.625, "upper": 0.875}


# The whole -----------------------------------------------------------------------------------------------------------


def test_the_result_is_json_and_its_sizes_are_related_as_the_methods_are(result):
    content = json.loads(json.dumps(result, allow_nan=False))
    assert [case["key"] for case in content["cases"]] == ["floor", *SETTINGS.only]
    cases = {case["key"]: case for case in content["cases"]}
    kept = {key: case["kept_bytes"] for key, case in cases.items()}
    assert kept["floor"] < kept["aroma-0"]
    assert kept["aroma-0"] == kept["aroma-8"] == kept["aroma-8-dropout"] == kept["lora-r1"]
    assert kept["lora-r1"] < kept["lora-r8"] < kept["lora-r8-dropout"]
    trained = {key: case["trainable_parameters"] for key, case in cases.items()}
    assert trained["floor"] == 0 < trained["aroma-8"] == trained["lora-r1"] < trained["lora-r8"]
    assert cases["aroma-8"]["optimizer_bytes"] < cases["lora-r8"]["optimizer_bytes"]
    assert cases["floor"]["forward_backward_ratio"] == {"median": 1.0, "lower": 1.0, "upper": 1.0}
    assert cases["lora-r8-dropout"]["step_over_lora"] == {"median": 1.0, "lower": 1.0, "upper": 1.0}
    # Eight batches of two, each seen once with gradients and at a dozen sizes.
    assert cases["compress"]["forward_backward_ratio"]["median"] > 8
    assert cases["compress"]["optimizer_bytes"] == 0
    assert {"versions", "git_revision", "threads", "wait_policy", "cpu_model"} <= set(content["provenance"])


# The command --------------------------------------------------------------------------------------------------------


def test_the_command_leaves_its_results(tmp_path, capsys):
    out = tmp_path / "tiny.json"
    small = ["--model", "tiny", "--batch-size", "2", "--length", "9", "--rounds", "1", "--threads", "1"]
    assert main(["bench", *small, "--only", "aroma-0", "lora-r8", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    for part in ("× LoRA r=8", f"torch {version('torch')}"):
        assert part in printed.out
    assert "taking turns" in printed.err
    assert [case["key"] for case in json.loads(out.read_text())["cases"]] == ["floor", "lora-r8", "aroma-0"]
    for arguments, message in (
        (["--out", str(out)], "it exists, and nothing is overwritten; give another name, or --force"),
        (["--only", "lora-r9"], "error: only='lora-r9': no such case; choose from floor, head, adalora"),
        (["--model", "absent/shape"], "error: model='absent/shape': neither a shape (roberta-base, minilm, tiny) nor"),
        (["--rounds", "0"], "error: rounds=0: give 1 or more"),
    ):
        assert main(["bench", "--out", str(tmp_path / "new.json"), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == [out]
