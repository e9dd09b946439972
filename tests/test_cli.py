"""The command line: light, helpful, and clear about errors."""

import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from aroma import __version__
from aroma.cli import main, make_parser, parse

HEAVY = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "sklearn",
    "scipy",
    "matplotlib",
    "jsonargparse",
    "rich",
    "numpy",
)
COMMANDS = (
    *("demo", "train", "report", "eval", "inspect", "export"),
    *("bench", "lab"),
)
LAB_COMMANDS = ("run", "table", "figure", "collect")


def test_help_imports_nothing_heavy():
    program = (
        "import sys\nfrom aroma.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(f"\n    {command} " in done.stdout for command in COMMANDS)


def test_inspect_loads_no_pytorch(tmp_path):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    factors = {"lora_A": np.eye(2, 4, dtype=np.float32), "lora_B": np.eye(3, 2, dtype=np.float32) * [1, 0]}
    named = {f"base_model.model.layer.0.query.{name}.weight": factor for name, factor in factors.items()}
    save_file(named, tmp_path / "adapter_model.safetensors")
    program = (
        "import sys\nfrom aroma.cli import main\n"
        f"assert main(['inspect', {str(tmp_path)!r}]) == 0\n"
        "assert not {'torch', 'peft', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "1 matrix · ranks 1 to 1, 1 in all · effective 1.0 · 7 parameters" in done.stdout


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"aroma {__version__}\n"


@pytest.mark.parametrize(
    "command",
    [[], *([name] for name in COMMANDS), *(["lab", name] for name in LAB_COMMANDS)],
    ids=lambda command: " ".join(command) or "-",
)
def test_each_help_ends_with_examples_that_parse(command, capsys):
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    examples = capsys.readouterr().out.partition("\nexamples:\n")[2].splitlines()
    assert len(examples) >= 2
    for line in examples:
        program, *arguments = shlex.split(line, comments=True)
        if program == "torchrun":
            program, arguments = "aroma", arguments[arguments.index("aroma") + 1 :]
        assert program == "aroma"
        assert make_parser().parse_args(arguments).run


def test_mistakes_are_told_before_pytorch_is_loaded(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\na,b\n")
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": "a", "label": "b"}\n')
    (tmp_path / "model").mkdir()
    (tmp_path / "r.yaml").write_text(f"model: {{name: {tmp_path}/model}}\noutput: {tmp_path}/out\nadapter: {{r: 1}}\n")
    train = ["train", str(tmp_path / "r.yaml"), "data.train={}/train.csv"]
    wrong = {
        ("train", "absent.yaml"): "recipe='absent.yaml': cannot be read",
        (*train, "adapter.inner_tol=3"): "a recipe has no such key; the nearest is 'adapter.inner_tolerance'",
        (*train, "data.kind=causal_lm", "data.label=null", "data.text=txt"): "name its columns messages, or prompt",
        (*train, "data.source=bbc-news", "data.train=trian"): "it has train and test",
        (*train, "data.text=txt"): "it has no column 'txt'; its columns are 'text', 'label'",
        (*train, "data.train={}/train.jsonl", "data.label=lab"): "it has no column 'lab'",
        (*train, "data.reported.test={}/absent.csv"): "absent.csv': no such file",
        (*train, "model.name={}/absent"): "absent': no such folder",
        (*train, "model.name=robertta-base"): "model.name='robertta-base': no such folder, nor a model",
        ("inspect", "{}/absent"): "absent': no such folder",
        ("export", "{}/absent", "{}/out", "--merged"): "absent': no such folder",
        ("eval", "{}/absent", "--data", "x.csv"): "absent': no such folder",
        ("eval", "{}/model", "--data", "absent.csv"): "data='absent.csv': no such file",
        ("compress", "{}", "--data", "x.csv", "--out", "{}/out", "--batch-size", "0"): "--batch-size=0: give 1",
        ("lab", "run", "absent.yaml"): "grid='absent.yaml': cannot be read",
        ("train", "[bold]absent[/bold].yaml"): "recipe='[bold]absent[/bold].yaml'",
        ("demo", "--steps", "0"): "training.max_steps=0: give 1 or more",
        ("demo", "--out", "{}"): "it is not an empty folder, and nothing is overwritten",
    }
    program = (
        "import sys, json, io, contextlib\n"
        "from aroma.cli import main\n"
        "for argv in json.loads(sys.stdin.read()):\n"
        "    said = io.StringIO()\n"
        "    with contextlib.redirect_stderr(said):\n"
        "        assert main(argv) == 2, argv\n"
        "    assert 'torch' not in sys.modules, argv\n"
        "    print(said.getvalue(), end='')\n"
    )
    asked = [[text.replace("{}", str(tmp_path)) for text in argv] for argv in wrong]
    said = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(asked),
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.splitlines()
    for line, message in zip(said, wrong.values(), strict=True):  # one line each
        assert line.startswith("error: ")
        assert message in line


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["train", "r.yaml"], "lab"),
        (["eval", "a", "--data", "x.csv"], "lab"),
        (["demo"], "demo"),
        (["lab", "run", "g.yaml"], "lab"),
        (["lab", "table", "f"], "lab"),
        (["inspect", "a", "--plot", "x.png"], "plot"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_missing_extra_is_named(arguments, extra, capsys, monkeypatch):
    monkeypatch.setattr("aroma.cli.extras.is_installed", lambda name: False)
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.endswith(f"not installed; run: pip install 'aroma-peft[{extra}]'\n")
    assert "matplotlib" in message


@pytest.mark.parametrize(
    "arguments", [["export", "a", "b"], ["export", "a", "b", "--uniform", "--merged"], ["fly"], []]
)
def test_wrong_arguments_end_with_usage_and_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: aroma" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["train", "r.yaml"], ["lab", "run", "g.yaml"]])
def test_overrides_may_stand_behind_options(command):
    option = "--resume" if command[0] == "train" else "--list"
    arguments = parse([*command, "a=1", option, "b=2", "c=3"])
    assert arguments.overrides == ["a=1", "b=2", "c=3"]


@pytest.mark.parametrize("argv", [["lab", "run", "g.yaml", "--lst", "a=1"], ["inspect", "x", "a=1"]])
def test_what_is_no_override_is_refused(argv, capsys):
    with pytest.raises(SystemExit) as raised:
        parse(argv)
    assert raised.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err
