"""What the benchmark found, as JSON holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..methods import Aroma, Lora
from .cases import FLOOR, Case
from .growth_cost import GrowthCost
from .roofline import Roofline
from .settings import BenchSettings
from .timing import Spread, Times


@dataclass(frozen=True)
class Footprint:
    """Sizes of one case.

    Args:
        kept_bytes: What a forward pass keeps for the backward pass, parameters and buffers not counted.
        optimizer_bytes: State of the optimizer.
        trainable_parameters: Numbers that train, the head's included.
        peak_bytes: Peak resident memory of a process that trains this case alone, or peak of its GPU memory; None
            where it was not measured.
    """

    kept_bytes: int
    optimizer_bytes: int
    trainable_parameters: int
    peak_bytes: int | None


@dataclass(frozen=True)
class CaseResult:
    """What was found of one case.

    Args:
        key: Key of the case.
        name: Name of the case.
        compiled: Whether it was compiled.
        forward_backward: Seconds of forward and backward.
        step: Seconds of the whole step.
        forward_backward_ratio: Forward and backward over forward and backward of the floor, round by round.
        step_ratio: The whole step over forward and backward of the floor, round by round.
        footprint: Its sizes.
        times: All times.
    """

    key: str
    name: str
    compiled: bool
    forward_backward: Spread
    step: Spread
    forward_backward_ratio: Spread
    step_ratio: Spread
    footprint: Footprint
    times: Times


@dataclass(frozen=True)
class Comparison:
    """An AROMA case against LoRA r=8 with the same dropout.

    Args:
        key: Key of the AROMA case.
        other: Key of the LoRA case.
        forward_backward_ratio: AROMA's time over LoRA's, round by round.
        step_ratio: The same for the whole step.
        kept_ratio: Bytes kept for backward, AROMA's over LoRA's.
    """

    key: str
    other: str
    forward_backward_ratio: Spread
    step_ratio: Spread
    kept_ratio: float


@dataclass(frozen=True)
class BenchResult:
    """All that the benchmark found.

    Args:
        settings: What was measured.
        model: Kind and sizes of the model.
        provenance: Versions, revision, machine, threads.
        cases: The cases, in the order in which they took turns.
        comparisons: AROMA against LoRA r=8.
        growth: Cost of the controller.
        roofline: Speeds of the machine, and the least that an update must move.
    """

    settings: BenchSettings
    model: dict[str, Any]
    provenance: dict[str, Any]
    cases: list[CaseResult]
    comparisons: list[Comparison]
    growth: GrowthCost
    roofline: Roofline

    def as_dict(self) -> dict[str, Any]:
        """Return everything, JSON-able; the quotients of the controller's cost are written out."""
        cost = {name: getattr(self.growth, name) for name in ("amortised_ms", "amortised_fraction", "outer_fraction")}
        content = asdict(self)
        return content | {"growth": content["growth"] | cost}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> BenchResult:
        """Return what `as_dict` was made of."""
        settings = content["settings"]
        only = settings["only"]
        growth = content["growth"]
        return cls(
            settings=BenchSettings(**settings | {"only": None if only is None else tuple(only)}),
            model=content["model"],
            provenance=content["provenance"],
            cases=[_case_from(case) for case in content["cases"]],
            comparisons=[_with_spreads(Comparison, entry) for entry in content["comparisons"]],
            growth=GrowthCost(**{name: growth[name] for name in GrowthCost.__dataclass_fields__}),
            roofline=Roofline(**content["roofline"]),
        )


def case_results(cases: Sequence[Case], times: Sequence[Times], footprints: Sequence[Footprint]) -> list[CaseResult]:
    """Put together what was found of every case; the floor of compiled cases is the compiled one."""
    floors = {
        case.compiled: found.forward_backward
        for case, found in zip(cases, times, strict=True)
        if case.key.split("-compiled")[0] == FLOOR
    }
    return [
        CaseResult(
            key=case.key,
            name=case.name,
            compiled=case.compiled,
            forward_backward=Spread.of(found.forward_backward),
            step=Spread.of(found.step),
            forward_backward_ratio=Spread.of_ratios(found.forward_backward, floors[case.compiled]),
            step_ratio=Spread.of_ratios(found.step, floors[case.compiled]),
            footprint=footprint,
            times=found,
        )
        for case, found, footprint in zip(cases, times, footprints, strict=True)
    ]


def comparisons(cases: Sequence[Case], results: Sequence[CaseResult]) -> list[Comparison]:
    """Return every AROMA case against LoRA r=8 of the same dropout, compiled like it, where both were measured."""
    found = {result.key: result for result in results}
    rivals = {
        (case.method.dropout, case.compiled): case.key
        for case in cases
        if isinstance(case.method, Lora) and case.method.r == 8
    }
    return [
        _compare(found[case.key], found[rivals[case.method.dropout, case.compiled]])
        for case in cases
        if isinstance(case.method, Aroma) and (case.method.dropout, case.compiled) in rivals
    ]


def _compare(ours: CaseResult, theirs: CaseResult) -> Comparison:
    return Comparison(
        key=ours.key,
        other=theirs.key,
        forward_backward_ratio=Spread.of_ratios(ours.times.forward_backward, theirs.times.forward_backward),
        step_ratio=Spread.of_ratios(ours.times.step, theirs.times.step),
        kept_ratio=ours.footprint.kept_bytes / theirs.footprint.kept_bytes,
    )


def _case_from(content: dict[str, Any]) -> CaseResult:
    parts = {"footprint": Footprint(**content["footprint"]), "times": Times(**content["times"])}
    return _with_spreads(CaseResult, content | parts)


def _with_spreads(kind: Any, content: dict[str, Any]) -> Any:
    """Return a `kind` of `content`, its dictionaries being spreads."""
    return kind(**{name: Spread(**value) if isinstance(value, dict) else value for name, value in content.items()})
