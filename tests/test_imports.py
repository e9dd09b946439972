"""The houses of docs/architecture.md: nothing in `aroma` imports `aroma_lab`, and no packages import in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

SRC = Path(__file__).parent.parent / "src"


def imports(file):
    """Yield every module that a file imports, wherever in it, as an absolute name."""
    package = file.relative_to(SRC).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = [*base, *filter(None, [node.module])]
            yield from (".".join([*module, alias.name]) for alias in node.names)


def room(name):
    """Return the package of a module, or the module itself where it lies in no package but the top one."""
    parts = name.split(".")[:2]
    path = SRC.joinpath(*parts)
    return ".".join(parts) if path.is_dir() or path.with_suffix(".py").exists() else parts[0]


def arrows(top):
    """Return, of every room of a top package, the rooms that it imports."""
    found = {}
    for file in (SRC / top).rglob("*.py"):
        own = room(".".join(file.relative_to(SRC).with_suffix("").parts))
        found.setdefault(own, set()).update(
            room(name) for name in imports(file) if name.split(".")[0].startswith("aroma")
        )
    return {own: others - {own} for own, others in found.items()}


def test_the_library_knows_no_laboratory():
    seen = {other for others in arrows("aroma").values() for other in others}
    assert "aroma.tuner" in seen, "the test sees imports at all"
    assert not [name for name in seen if name.startswith("aroma_lab")]


def test_no_packages_import_in_a_circle():
    for top in ("aroma", "aroma_lab"):
        graph = arrows(top)
        graph.pop(f"{top}.__init__", None)
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            raise AssertionError(f"imported in a circle: {' <- '.join(error.args[1])}") from None
