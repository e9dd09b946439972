"""Names of other packages that AROMA overrides are there, and functions that take tensors say their shapes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from peft.tuners.lora import LoraModel
from torch import nn

import aroma
from aroma.tuner.finished import FinishedComponents

SOURCE = Path(aroma.__file__).parent


OVERRIDDEN = [
    (aroma.AromaModel, LoraModel, ("_create_new_module", "_check_target_module_exists", "_cast_adapter_dtype")),
    (aroma.AromaModel, LoraModel, ("_check_merge_allowed", "_get_adapter_state_dict")),
    (aroma.AromaModel, LoraModel, ("_remap_adapter_state_dict_for_load",)),
    (FinishedComponents, nn.Module, ("_save_to_state_dict", "_load_from_state_dict")),
]


@pytest.mark.parametrize(("kind", "base", "names"), OVERRIDDEN)
def test_a_private_method_that_is_overridden_is_still_there(kind: type, base: type, names: tuple[str, ...]) -> None:
    """Renamed in the other package, it would never be called."""
    assert all(name in vars(kind) and hasattr(base, name) for name in names)


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
