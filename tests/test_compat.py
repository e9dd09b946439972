"""Private names of other packages: all are listed in `aroma.compat`, and one that vanishes is a clear error."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import aroma
import aroma.tuner
from aroma import compat
from aroma.errors import IncompatibleError
from aroma.tuner.finished import FinishedComponents

SOURCE = Path(aroma.__file__).parent
TABLES = (compat.TUNER_NAMES, compat.NAMES_AT_USE)
LISTED = {name for table in TABLES for names in table.values() for name in names}


# A name that vanishes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", compat.TUNER_NAMES)
def test_a_name_that_vanishes_is_named(where: str) -> None:
    package = re.split("[.:]", where)[0]
    with pytest.raises(IncompatibleError) as error:
        compat.require_names({where: ("_vanished",)})
    for words in (f"{package} {compat.metadata.version(package)}: ", "'_vanished'", "--upgrade aroma-peft"):
        assert words in str(error.value)


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
    allowed = {"_C", "_functorch", "_fields", "_asdict"}
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
    assert {"_create_new_module", "_save_to_state_dict"} <= overridden


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
