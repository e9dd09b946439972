"""What Figure 4 compares: the components of two runs, from their saved adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from aroma.errors import CheckpointError, DataError, bad_value
from aroma.export import Update, read_adapter
from aroma.spectra import component_cosines

from ..report.records import Run
from .modules import matching_module

_PAPERS = "layer.10.attention.output.dense"
"""The module that Figure 4 shows."""


@dataclass(frozen=True)
class CosinePanel:
    """One module.

    Args:
        name: Module name in the base model.
        cosines: A row for each component of the first run, a column for each of the second.
    """

    name: str
    cosines: torch.Tensor

    def caption(self) -> str:
        """Return what Appendix E looks at: the diagonal, the components of the same place."""
        diagonal = self.cosines.diagonal()
        return f"mean |cosine| on the diagonal {float(diagonal.abs().mean()):.2f}"


def cosine_panels(first: Run, second: Run, modules: Sequence[str] | None = None) -> list[CosinePanel]:
    """Return the cosines of modules of two runs of the same model, from their saved adapters.

    Args:
        first: A run whose `adapter/` is a plain LoRA adapter, as AROMA's.
        second: Another.
        modules: Names of the modules, or ends of them; the paper's by default, or else the one that grew most in both.

    Raises:
        CheckpointError: An adapter is missing or damaged.
        ConfigError: An adapter is no plain LoRA adapter, a run trains nothing, or a module did not grow in both.
        DataError: The adapters have no module of the same shape in common that grew in both.
    """
    ours, others = _updates(first), _updates(second)
    shared = [name for name in ours if name in others and _comparable(ours[name], others[name])]
    if not shared:
        raise bad_value(
            "FOLDER",
            str(second.folder),
            f"its adapter has no grown module in common with that of {first.folder}, so there is nothing to compare; "
            "give runs of one model",
            DataError,
        )
    names = (
        [matching_module(module, shared) for module in modules]
        if modules is not None
        else [_default(shared, ours, others)]
    )
    return [
        CosinePanel(
            name,
            component_cosines(
                ours[name].B,
                ours[name].A,
                others[name].B,
                others[name].A,
                _component_rank(first),
                _component_rank(second),
            ),
        )
        for name in names
    ]


def _default(shared: Sequence[str], ours: Mapping[str, Update], others: Mapping[str, Update]) -> str:
    papers = [name for name in shared if name.endswith(_PAPERS)]
    return papers[0] if papers else max(shared, key=lambda name: min(_rank(ours[name]), _rank(others[name])))


def _updates(run: Run) -> dict[str, Update]:
    if not run.trains:
        raise bad_value("--methods", run.method, "it trains nothing, so it has no components; choose others")
    if not run.files.adapter.is_dir():  # records are often kept, and handed on, without what was trained
        raise bad_value(
            "FOLDER",
            str(run.folder),
            "the adapter of this run is not kept there, and cosines are of adapters; remove the folder and run the "
            "trial again, or run its grid again with another output",
            CheckpointError,
        )
    return read_adapter(run.files.adapter).updates


def _component_rank(run: Run) -> int:
    """Return r of a method that trains one component after the other; 1 for those that train all at once."""
    return int(run.options.get("r", 1)) if run.kind in ("aroma", "relora") else 1


def _rank(update: Update) -> int:
    return update.A.shape[0]


def _comparable(one: Update, other: Update) -> bool:
    """Whether two updates are of the same m×n and neither is zero: a module of rank 0 has nothing to compare."""
    same = one.B.shape[0] == other.B.shape[0] and one.A.shape[1] == other.A.shape[1]
    return same and bool(one.B.any()) and bool(other.B.any())
