"""Private names of other packages: all are listed in `aroma.compat`, and one that vanishes is a clear error."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import aroma
import aroma.integrations.callback
import aroma.tuner
from aroma import compat
from aroma.compat import DEEPSPEED_NAMES, NAMES, TRAINER_NAMES, TUNER_NAMES, PrivateName
from aroma.errors import AromaError, IncompatibleError
from aroma.sharding import refuse_sharding
from aroma.tuner.finished import FinishedComponents

SOURCE = Path(aroma.__file__).parent
LISTED = {name.name for name in NAMES}
CHECKED = [name for name in NAMES if name.how != "at use"]


def label(name: PrivateName) -> str:
    return f"{name.package}-{name.name}"


# A name that vanishes ------------------------------------------------------------------------------------------------


def remove(name: PrivateName, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a name away from the package that defines it, as a new release might."""
    module, _, path = name.where.partition(":")
    *parents, last = path.split(".") if path else [""]
    parent: Any = import_module(module)
    for part in parents:
        parent = getattr(parent, part)
    if name.how == "read by":
        monkeypatch.setattr(parent, last, lambda: None)
        return
    holder = getattr(parent, last) if last else parent
    if name.how == "instance" or holder is torch.Tensor:  # whose attributes cannot be deleted
        monkeypatch.setattr(parent, last, type(last, (), {}))
        return
    for owner in inspect.getmro(holder) if isinstance(holder, type) else [holder]:
        if name.name in vars(owner):
            monkeypatch.delattr(owner, name.name)


@pytest.mark.parametrize("name", CHECKED, ids=label)
def test_a_name_that_vanishes_is_named(name: PrivateName, monkeypatch: pytest.MonkeyPatch) -> None:
    compat.require_names([name])
    with monkeypatch.context() as patch:
        remove(name, patch)
        with pytest.raises(IncompatibleError) as error:
            compat.require_names([name])
    said = str(error.value)
    version = compat.metadata.version(name.package)
    for words in (f"{name.package} {version}: ", repr(name.name), name.use, f"a version that works: {name.package}>="):
        assert words in said


def test_the_error_is_one_of_aroma_and_of_an_import() -> None:
    assert issubclass(IncompatibleError, AromaError)
    assert issubclass(IncompatibleError, ImportError)


@pytest.mark.parametrize(
    ("names", "module"), [(TUNER_NAMES, aroma.tuner), (TRAINER_NAMES, aroma.integrations.callback)]
)
def test_the_names_are_checked_at_import(
    names: tuple[PrivateName, ...], module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[PrivateName] = []
    monkeypatch.setattr(compat, "require_names", checked.extend)
    spec = importlib.util.find_spec(module.__name__)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))  # a second one; the first stays as it is
    assert checked == [*names]


def test_a_wrapper_of_torch_compile_without_its_module_is_named() -> None:
    model = nn.Linear(2, 2)
    assert compat.compiled_module(model) is None
    wrapped = torch.compile(model)
    assert compat.compiled_module(wrapped) is model
    wrapped._modules["_other"] = wrapped._modules.pop("_orig_mod")
    with pytest.raises(IncompatibleError, match=r"^torch .* has no '_orig_mod'"):
        compat.compiled_module(wrapped)


# DeepSpeed, which is no dependency -----------------------------------------------------------------------------------


def zero_run(stage: int) -> tuple[nn.Module, Any, dict[str, Any]]:
    """A model and an optimizer with what DeepSpeed gives them, and everything in it that carries names."""
    model = nn.Linear(3, 2, bias=False)
    weight: Any = model.weight
    base = type("ZeROOptimizer", (), {})
    optimizer: Any = type(f"DeepSpeedZeroOptimizer{'_Stage3' if stage == 3 else ''}", (base,), {})()
    optimizer.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if stage == 3:
        optimizer.get_param_id = lambda parameter: 0
        optimizer.grad_position = {0: (0, 0, 6)}
        optimizer.fp32_partitioned_groups_flat = [torch.zeros(6)]
        weight.ds_tensor, weight.ds_numel, weight.ds_shape = torch.zeros(6), 6, (2, 3)
        weight.ds_status, weight.ds_process_group, weight._z3_optimizer = SimpleNamespace(name=""), None, optimizer
        return model, optimizer, {"optimizer": optimizer, "parameter": weight}
    mapping = SimpleNamespace(
        lp_fragment_address=SimpleNamespace(start=0, numel=6),
        hp_fragment_address=SimpleNamespace(start=0, numel=6),
        param_group_index=0,
        get_hp_fragment=lambda: torch.zeros(6),
    )
    weight._hp_mapping = mapping
    optimizer.single_partition_of_fp32_groups = [torch.zeros(6)]
    return model, optimizer, {"optimizer": optimizer, "parameter": weight, "mapping": mapping}


ZERO = [
    *((2, "optimizer", name) for name in compat.ZERO_2_OPTIMIZER),
    *((2, "parameter", name) for name in compat.ZERO_2_PARAMETER),
    *((2, "mapping", name) for name in compat.ZERO_2_MAPPING),
    *((3, "optimizer", name) for name in compat.ZERO_3_OPTIMIZER),
    *((3, "parameter", name) for name in compat.ZERO_3_PARAMETER),
]


@pytest.mark.parametrize(("stage", "holder", "name"), ZERO, ids=lambda value: getattr(value, "name", str(value)))
def test_a_name_of_deepspeed_that_vanishes_is_named(
    stage: int, holder: str, name: PrivateName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat.metadata, "requires", lambda _: ['deepspeed>=0.19; extra == "deepspeed"'])
    model, optimizer, holders = zero_run(stage)
    refuse_sharding(model, optimizer)
    delattr(holders[holder], name.name)
    with pytest.raises(IncompatibleError, match=rf"^deepspeed .*: .* has no '{name.name}'.* works: deepspeed>=0.19$"):
        refuse_sharding(model, optimizer)


# The table is whole, and holds nothing else --------------------------------------------------------------------------


def is_private(name: str) -> bool:
    return name.isidentifier() and name.startswith("_") and not name.startswith("__") and name != "_"


def trees(*but: str) -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted(SOURCE.rglob("*.py")):
        if path.name not in but:
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def defined(tree: ast.AST) -> Iterator[str]:
    """Names that a file defines: functions, classes, arguments, variables, and attributes of its own objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if ast.unparse(node.value) == "self" else ()


def used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Private names, and those of ZeRO-3, that a file reads, sets, imports or spells out, with their lines."""
    for node in ast.walk(tree):
        names: list[Any] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        yield from ((node.lineno, name) for name in names if is_private(name) or name.startswith("ds_"))


def test_every_private_name_of_another_package_is_listed() -> None:
    own = {name for _, tree in trees() for name in defined(tree)}
    # Modules whose names are private, and a named tuple's own field names.
    allowed = {"_C", "_functorch", "_fields"}
    seen = 0
    for path, tree in trees("compat.py"):
        for line, name in used(tree):
            seen += 1
            assert name in own | LISTED | allowed, f"{path}:{line}: {name} is not listed in aroma.compat"
    assert seen > 50


def test_every_private_method_that_is_overridden_is_listed() -> None:
    overridden = set()
    for kind in (
        aroma.AromaModel,
        aroma.tuner.AromaLinear,
        aroma.AromaConfig,
        aroma.AromaCallback,
        FinishedComponents,
    ):
        foreign = [base for base in kind.__mro__ if not base.__module__.startswith("aroma")]
        overridden |= {
            name
            for base in kind.__mro__
            if base.__module__.startswith("aroma")
            for name in vars(base)
            if is_private(name) and name != "_abc_impl" and any(name in vars(other) for other in foreign)
        }
    assert overridden <= LISTED
    assert {"_create_new_module", "_apply", "_save_to_state_dict"} <= overridden


def test_nothing_is_listed_that_is_not_used() -> None:
    spelled = set()
    for _, tree in trees("compat.py"):
        for node in ast.walk(tree):
            for attribute in ("attr", "value", "name", "id"):
                found = getattr(node, attribute, None)
                if isinstance(found, str):
                    spelled.add(found)
    _, _, readers_text = Path(compat.__file__).read_text(encoding="utf-8").partition("# Readers -")
    readers = ast.parse(f"#{readers_text}")
    spelled |= {node.attr for node in ast.walk(readers) if isinstance(node, ast.Attribute)}
    spelled |= {node.value for node in ast.walk(readers) if isinstance(node, ast.Constant)}
    assert spelled >= LISTED, LISTED - spelled


def test_every_name_has_one_check() -> None:
    assert len({(name.where, name.name) for name in NAMES}) == len(NAMES)
    assert all(name.how == "at use" for name in DEEPSPEED_NAMES)
    assert {name.package for name in NAMES} == {"torch", "peft", "accelerate", "transformers", "trl", "deepspeed"}


def test_every_function_that_takes_a_tensor_says_its_shape() -> None:
    silent, seen = [], 0
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg]
            kinds = [ast.unparse(one.annotation) for one in given if one is not None and one.annotation is not None]
            if any(re.search(r"\b(Tensor|Pair|Factors)\b", kind) for kind in kinds):
                seen += 1
                if not re.search(
                    r"\([^()]*[mnrRTkd×…]\b[^()]*\)|\((batches|directions|sizes),|any shape|shape|scalar",
                    ast.get_docstring(node) or "",
                ):
                    silent.append(f"{file.relative_to(SOURCE)}:{node.lineno} {node.name}")
    assert seen > 80
    assert not silent
