"""What must never stand in the source, and what must never come out of a file: code. SECURITY.md promises it."""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from aroma.cli import main
from aroma.errors import AromaError
from aroma.export import load_with_adapter
from models import base
from trainer_runs import Run, adapted, tiny_bert, train

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for folder in ("src", "examples") for path in (ROOT / folder).rglob("*.py"))

PICKLES = {
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "marshal",
    "shelve",
    "joblib",
    "jsonpickle",
    "hickle",
}
RUN_TEXT = {"eval", "exec", "compile", "__import__"}
UNSAFE_CALLS = {
    **dict.fromkeys(("system", "popen", "getoutput", "getstatusoutput"), "a shell"),
    **dict.fromkeys(("read_pickle", "to_pickle", "load_pickle"), "pickle"),
    **dict.fromkeys(("unsafe_load", "unsafe_load_all", "full_load", "full_load_all"), "unsafe YAML"),
    **dict.fromkeys(("UnsafeLoader", "FullLoader", "Loader", "CLoader"), "unsafe YAML"),
}
UNSAFE_OPTIONS = {"shell": "a shell", "trust_remote_code": "a model's own code", "allow_pickle": "pickle"}


@cache
def nodes(path: Path) -> list[ast.AST]:
    return [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]


def faults(found: Iterable[ast.AST]) -> Iterator[str]:
    """Yield what must not stand in a source."""
    for node in found:
        match node:
            case ast.Import(names=names) if found := {name.name.split(".")[0] for name in names} & PICKLES:
                yield f"import of {', '.join(found)}"
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in PICKLES:
                yield f"import of {module}"
            case ast.Call(func=ast.Name(id=name)) if name in RUN_TEXT:
                yield f"{name}(...)"
            case ast.Call(func=ast.Attribute(attr="eval" | "exec"), args=[_, *_]):
                yield "eval or exec of a text"
            case ast.Call(func=ast.Attribute(value=ast.Name(id="yaml"), attr="load" | "load_all")):
                yield "unsafe YAML"
            case ast.Attribute(value=ast.Name(id="yaml"), attr=name) if name in UNSAFE_CALLS:
                yield UNSAFE_CALLS[name]
            case ast.Call(func=ast.Attribute(attr=name)) if name in UNSAFE_CALLS:
                yield UNSAFE_CALLS[name]
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=options):
                if not any(one.arg == "weights_only" and _is(one.value, True) for one in options):
                    yield "torch.load without weights_only"
            case ast.keyword(arg="weights_only", value=value) if not _is(value, True):
                yield "weights_only that is not True"
            case ast.keyword(arg=str(name), value=value) if name in UNSAFE_OPTIONS and not _is(value, False):
                yield f"{name}: {UNSAFE_OPTIONS[name]}"
            case ast.Constant(value="trust_remote_code" | "allow_pickle" as name):  # a key of options
                yield f"{name}: {UNSAFE_OPTIONS[name]}"


def _is(value: ast.expr, wanted: bool) -> bool:
    return isinstance(value, ast.Constant) and value.value is wanted


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_can_run_what_a_file_says(path: Path) -> None:
    assert list(faults(nodes(path))) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from cloudpickle import loads",
        "eval(text)",
        "__import__(name)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "class Mine(yaml.FullLoader): pass",
        "os.system('ls')",
        "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "torch.load(path)",
        "load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_a_fault_is_found(text: str) -> None:
    assert list(faults(ast.walk(ast.parse(text))))


# Payloads ------------------------------------------------------------------------------------------------------------


class Payload:
    """Unpickled without restriction, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


SHORT = Run(training={"max_steps": 4, "save_steps": 2})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(out, SHORT)
    return out


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_payload_in_a_checkpoint_is_not_run(name: str, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert (checkpoint / name).is_file()
    torch.save(Payload(tmp_path / "mark"), checkpoint / name)
    with pytest.raises(Exception, match=r"(?i)weights.?only|sha256|digest|whole|edited"):
        train(tmp_path / "run", SHORT, resume=str(checkpoint))
    assert not (tmp_path / "mark").exists()


def test_a_payload_in_place_of_weights_is_not_run(tmp_path: Path) -> None:
    model = adapted(tiny_bert())
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({**tensors, "payload": Payload(tmp_path / "mark")}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.?only"):
        PeftModel.from_pretrained(base("bert"), tmp_path / "adapter")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir ['MARK']", "!!python/name:os.system"])
def test_a_payload_in_a_recipe_is_not_run(tag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tag.replace('MARK', str(tmp_path / 'mark'))}\n")
    assert main(["train", str(recipe)]) == 2
    assert "not YAML" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()


def test_a_base_model_with_code_of_its_own_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers asks for trust_remote_code, and AROMA does not answer."""
    code = f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\n"
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mine.py").write_text(code)
    config = {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.C", "AutoModelForSequenceClassification": "mine.M"},
    }
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    adapted(tiny_bert()).save_pretrained(tmp_path / "adapter")
    with pytest.raises((AromaError, ValueError), match="trust_remote_code"):
        load_with_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    assert not (tmp_path / "mark").exists()
