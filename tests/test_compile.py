"""torch.compile of whole models: neither growing nor freezing makes new graphs, and the graph is whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from aroma import AromaCallback, AromaController, aroma_layers, attach
from aroma.compat import is_compiled
from models import adapted, base, batch, ranks, train, trainable, unlike
from trainer_runs import adapted as adapted_bert
from trainer_runs import growth, tiny_bert, trainer_for

ALWAYS_GROW: dict[str, Any] = {"inner_tolerance": None, "max_inner_steps": 1, "outer_tolerance": None}
"""A component every optimizer step."""

FREEZE_APART: dict[str, Any] = {
    "inner_tolerance": 0.5,
    "max_inner_steps": 2,
    "outer_tolerance": 0.012,
    "max_components": 3,
}
"""Modules that freeze after different numbers of components."""


class Graphs:
    """A backend that counts what it is given and runs it as it is."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        counters.clear()
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward

    @property
    def breaks(self) -> dict[str, int]:
        return dict(counters["graph_break"])


def run(
    model: nn.Module, steps: int, compile_it: Callable[[nn.Module], nn.Module] = lambda model: model
) -> tuple[Any, list[float], list[int]]:
    """Train in a plain loop; return the attachment, the losses, and how many modules trained after each step."""
    shown = compile_it(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    attachment = attach(shown, optimizer, total_steps=steps)
    losses, active = [], []
    for _ in range(steps):
        losses += train(shown, batch("llama"), optimizer, 1)
        active.append(attachment.controller.active_modules)
    return attachment, losses, active


def shallow(**method: Any) -> Any:
    """A growing model of one layer: tracing takes as long as the model is deep."""
    return adapted("llama", base("llama", num_hidden_layers=1), **method)


@pytest.mark.slow
@pytest.mark.parametrize("r", [1, 4])
def test_ten_growths_take_two_graphs_and_no_break(r: int) -> None:
    graphs = Graphs()
    method = {**ALWAYS_GROW, "r": r}
    attachment, losses, _ = run(shallow(**method), 11, lambda model: torch.compile(model, backend=graphs))
    assert attachment.controller.outer_number == 12
    assert set(ranks(attachment.controller.matrices.model).values()) == {11 * r}
    assert len(graphs.graphs) == 2
    assert graphs.breaks == {}
    _, expected, _ = run(shallow(**method), 11)
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_modules_that_freeze_at_different_times_make_no_new_graph() -> None:
    graphs = Graphs()
    attachment, losses, active = run(
        unlike(adapted("llama", **FREEZE_APART)), 8, lambda model: torch.compile(model, backend=graphs)
    )
    assert len(set(active)) == 4, "they freeze at three outer steps"
    assert len(graphs.graphs) == 1
    assert graphs.breaks == {}
    plain, expected, frozen_apart = run(unlike(adapted("llama", **FREEZE_APART)), 8)
    assert active == frozen_apart
    assert losses == pytest.approx(expected, rel=1e-5)
    for module, other in zip(attachment.controller.modules, plain.controller.modules, strict=True):
        assert module.name == other.name
        assert module.is_frozen == other.is_frozen
        if module.is_frozen:
            assert not any(parameter.any() for parameter in module.pair)
        for one, two in zip(module.finished, other.finished, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


# Who is compiled -----------------------------------------------------------------------------------------------------


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_block(model: Any) -> nn.Module:
    layers = model.base_model.model.model.layers
    layers[1] = torch.compile(layers[1], backend="eager")
    return model


@pytest.mark.parametrize(
    "compile_it",
    [lambda model: torch.compile(model, backend="eager"), compiled_in_place, compiled_block],
    ids=["wrapped", "in place", "a block"],
)
def test_a_compiled_model_is_seen_through(compile_it: Callable[[nn.Module], nn.Module]) -> None:
    plain = adapted("llama")
    names = [*aroma_layers(plain)]
    assert not is_compiled(plain)
    model = compile_it(adapted("llama"))
    assert is_compiled(model)
    controller = AromaController(model, torch.optim.AdamW(trainable(model)), total_steps=8)
    assert [module.name for module in controller.modules] == names
    assert all(module.layer.stays_in_graph for module in controller.modules)


@pytest.mark.slow
def test_the_trainer_compiles(tmp_path: Path) -> None:
    runs = []
    for changes in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        torch._dynamo.reset()
        counters.clear()
        # Set, as BERT's first forward would set it, which is a graph of BERT's own making.
        model = adapted_bert(tiny_bert(problem_type="single_label_classification"), **ALWAYS_GROW)
        trainer = trainer_for(
            model, tmp_path / str(len(runs)), AromaCallback(), max_steps=10, save_strategy="no", **changes
        )
        trainer.train()
        runs.append(growth(trainer).controller.total_rank)
    assert runs[0] == runs[1] > 100
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
