"""The command line: light, helpful, and clear about errors."""

import shlex
import subprocess
import sys

import pytest

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
    *("demo", "train", "report", "eval", "predict", "inspect", "export"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "absent.yaml"], "error: recipe='absent.yaml': cannot be read ([Errno 2] No such file"),
        (["inspect", "absent"], "error: adapter='absent': no such folder"),
        (["eval", "absent", "--data", "x.csv"], "error: adapter='absent': no such folder"),
        (["export", "absent", "out", "--uniform"], "error: adapter='absent': no such folder"),
        (["lab", "run", "absent.yaml"], "error: grid='absent.yaml': cannot be read ([Errno 2] No such file"),
        (["demo", "--threads", "0"], "error: training.threads=0: give 1 or more"),
        (["demo", "--out", "/"], "error: --out='/': it is not an empty folder, and nothing is overwritten"),
        (["train", "[bold]absent[/bold].yaml"], "error: recipe='[bold]absent[/bold].yaml'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_error_is_one_line_and_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.err.startswith(message)
    assert output.err.count("\n") == 1
    assert "Traceback" not in output.err
    assert list(tmp_path.iterdir()) == []


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
