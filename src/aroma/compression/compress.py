"""Compressing a LoRA adapter: measure what each direction does, and keep the fewest that give the same answers."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import distributed
from ..errors import bad_value
from .metric import Product, Spectrum, balanced, by_effect, by_size, cut, kept, spectrum, worths
from .plan import Compression, Limits, Measured, Weight
from .predictions import OutputFunction, Predictions, against_labels, divergence, drawn, predictions_of, pull
from .weights import Adapter

FEWEST = 16
"""Fewest examples that decide anything."""


def compress(
    model: nn.Module,
    batches: Iterable[Any] | None,
    *,
    keep: float | None = None,
    size: float | None = None,
    rank: int | None = None,
    outputs: OutputFunction | None = None,
    progress: bool = False,
) -> Compression:
    """Keep the directions of a LoRA adapter that carry its answers, and give each weight the rank that it then has.

    .. code-block:: python

        model = PeftModel.from_pretrained(base, "adapter")
        print(aroma.compress(model, batches))
        model.save_pretrained("smaller")

    The result is plain LoRA with `rank_pattern`, whose scale is folded into B. A weight that keeps nothing is no
    longer adapted. An optimizer made before no longer fits the adapter. If an error is raised, nothing was changed.

    Under DDP every process calls this with batches of its own; all keep the same directions.

    Args:
        model: A `PeftModel` with one active LoRA adapter, wrapped in DDP or not.
        batches: A list of batches, or a DataLoader, which is read once: at least 16 examples, of those that the
            adapter was trained on or others, as mappings that the model takes. Labels are not needed. None, with
            `size` or `rank`: the largest singular directions stay (PARA, arXiv 2604.27796).
        keep: Share of the effect to keep, in (0, 1]: the smallest size that keeps as much stays. The effect is the
            divergence between the predictions with the adapter and without it. By default 0.998, or, if `size` or
            `rank` is given, as much as they allow.
        size: Most that stays, as a share of the adapter's parameters, in (0, 1].
        rank: Largest rank of any weight, 1 or more. If several are given, all of them hold.
        outputs: What the model answers to a batch, if its configuration does not say it: a function of model and batch
            that returns a tensor (examples, …), of which squared distances count, or a `Categorical` or `Bernoulli`
            distribution of torch.
        progress: Whether a progress bar is shown.

    Raises:
        ConfigError: A value out of range, no adapter that can be cut (merged, disabled, sharded or without updates),
            too few examples, or outputs whose meaning is not known.
        NonFiniteError: An update or an output is NaN or infinite.
    """
    limits = Limits(keep, size, rank)
    limits.require_valid(has_examples=batches is not None)
    adapter = Adapter(distributed.unwrapped(model))
    weights, found = adapter.weights, [spectrum(weight.product()) for weight in adapter.weights]
    facts = [Weight(one.name, one.r, one.cost, one.parameters[0].element_size(), one.is_pinned) for one in weights]
    if batches is None:
        directions, measured = [by_size(one) for one in found], None
        plan = limits.plan(facts, [*map(worths, found, directions)])
    else:
        with _Calibration(adapter, _listed(batches, outputs), outputs, progress) as calibration:
            directions = [by_effect(M, N) for M, N in calibration.metric(found)]
            worth = map(worths, found, directions)
            plan = limits.plan(facts, [one / fact.cost for one, fact in zip(worth, facts, strict=True)])
            measured = calibration.measure([[*map(cut, found, directions, ranks)] for ranks in plan.ladder])
    curve = plan.curve(measured)
    chosen, reason = plan.choose(curve)
    ranks = plan.ranks(chosen)
    for weight, one, order, rank_ in zip(weights, found, directions, ranks, strict=True):
        if rank_:
            weight.narrow(cut(one, order, rank_))
        else:
            weight.remove()
    adapter.describe({weight.name: rank_ for weight, rank_ in zip(weights, ranks, strict=True) if rank_})
    return Compression(
        curve=curve,
        chosen=chosen,
        reason=reason,
        ranks={fact.name: (fact.r, rank_) for fact, rank_ in zip(facts, ranks, strict=True)},
        examples=0 if measured is None else measured.examples,
        outputs=None if measured is None else measured.kind,
        left_alone=[weight.name for weight in adapter.others],
    )


def _listed(batches: Any, outputs: OutputFunction | None) -> list[Any]:
    """Return the batches; ConfigError unless they are batches that the model, or `outputs`, may take."""
    if isinstance(batches, str | bytes | Mapping | Tensor) or not isinstance(batches, Iterable):
        raise bad_value("batches", type(batches).__name__, "give a list of batches, or a DataLoader")
    listed = [*batches]
    if not listed:
        raise bad_value("batches", [], f"there are none; give {FEWEST} examples or more")
    for batch in listed if outputs is None else ():
        if not isinstance(batch, Mapping):
            remedy = "a batch is a mapping that the model takes, as a tokenizer or collator gives it; or give outputs="
            raise bad_value("batches", type(batch).__name__, remedy)
        if not all(isinstance(value, Tensor) or not isinstance(value, list | str) for value in batch.values()):
            remedy = 'its values must be tensors: tokenizer(texts, padding=True, return_tensors="pt")'
            raise bad_value("batches", {name: type(value).__name__ for name, value in batch.items()}, remedy)
    return listed


class _Calibration:
    """Measures an adapter on examples, in float32, and leaves the model as it was: a context."""

    def __init__(
        self, adapter: Adapter, batches: Sequence[Any], outputs: OutputFunction | None, progress: bool
    ) -> None:
        self._model, self._weights = adapter.model, adapter.weights
        self._batches, self._outputs, self._progress = batches, outputs, progress
        self._examples, self._kind = 0, ""

    def __enter__(self) -> _Calibration:
        self._stored = [tuple(parameter.data for parameter in weight.parameters) for weight in self._weights]
        self._needed = [(parameter, parameter.requires_grad) for parameter in self._model.parameters()]
        self._training = [module for module in self._model.modules() if module.training]
        self._gradients = [(p, p.grad) for weight in self._weights for p in weight.parameters]
        cuda = {p.device for p in self._model.parameters() if p.is_cuda}
        self._contexts = [torch.random.fork_rng([*cuda]), _eagerly()]
        for context in self._contexts:
            context.__enter__()
        self._model.eval()
        for parameter, _ in self._needed:
            parameter.requires_grad_(False)
        for weight in self._weights:
            for parameter in weight.parameters:
                if parameter.dtype in (torch.float16, torch.bfloat16):
                    parameter.data = parameter.data.float()
        return self

    def __exit__(self, *error: Any) -> None:
        for weight, stored in zip(self._weights, self._stored, strict=True):
            for parameter, values in zip(weight.parameters, stored, strict=True):
                parameter.data = values
        for parameter, needed in self._needed:
            parameter.requires_grad_(needed)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        for module in self._training:
            module.training = True
        for context in reversed(self._contexts):
            context.__exit__(None, None, None)

    def metric(self, found: Sequence[Spectrum]) -> list[tuple[Tensor, Tensor]]:
        """Return the means over batches of G Gᵀ and Gᵀ G of each weight, both (matrices, r, r)."""
        rows = [weight.parameters[0] for weight in self._weights]
        factors = [balanced(one) for one in found]
        for weight, product, A in zip(self._weights, factors, rows, strict=True):
            weight.fill(weight.shaped(product, A.dtype))
            A.requires_grad_(True)
        sums = [(torch.zeros_like(p.A @ p.A.mT), torch.zeros_like(p.A @ p.A.mT)) for p in factors]
        generators: dict[torch.device, torch.Generator] = {}
        with _checkpointing(self._model):
            for batch in self._bar("gradients of drawn answers", 1):
                answers = predictions_of(self._model, batch, self._outputs)
                if not answers.values.requires_grad:
                    remedy = "they do not depend on the adapter, or were detached; return what the model computes"
                    raise bad_value("outputs", "without gradient", remedy)
                device = answers.values.device
                if device not in generators:
                    generators[device] = torch.Generator(device).manual_seed(distributed.rank())
                for A in rows:
                    A.grad = None
                answers.values.backward(pull(answers, drawn(answers, generators[device])))
                self._examples, self._kind = self._examples + len(answers), answers.kind
                for weight, A, product, (M, N) in zip(self._weights, rows, factors, sums, strict=True):
                    if A.grad is not None:
                        rank = product.A.shape[1]
                        G = weight.rows(A.grad)[:, :rank].to(M) @ product.A.mT
                        M += G @ G.mT
                        N += G.mT @ G
        for A in rows:
            A.requires_grad_(False)
        totals = [torch.tensor([self._examples, len(self._batches)], dtype=torch.float64)]
        counts, *flat = self._over_processes([*totals, *(part for pair in sums for part in pair)])
        if counts[0] < FEWEST:
            raise bad_value("batches", f"{int(counts[0])} examples", f"give {FEWEST} or more, better some hundreds")
        self._examples = int(counts[0])
        if not all(bool(part.isfinite().all()) for part in flat):
            raise bad_value("batches", "gradients", "they are NaN or infinite; load the model in float32 or bfloat16")
        return [(M / counts[1], N / counts[1]) for M, N in zip(flat[::2], flat[1::2], strict=True)]

    @torch.no_grad()
    def measure(self, ladder: Sequence[Sequence[Product]]) -> Measured:
        """Return what each size of an adapter keeps.

        Args:
            ladder: The products of all weights at each size, ascending; the first are of rank 0.
        """
        versions = []
        for products in ladder:
            pairs = zip(self._weights, products, self._stored, strict=True)
            versions.append([weight.shaped(product, A.dtype) for weight, product, (A, _) in pairs])
        sums = torch.zeros(len(ladder), 5, dtype=torch.float64)
        judged = torch.zeros(len(ladder) + 1, 3, dtype=torch.float64)
        for batch in self._bar("effect of each size", len(versions) + 1, repeat=False):
            whole = self._answers(batch, self._stored).detached()
            judged[-1] += against_labels(whole)
            changes: list[Tensor] = []
            for place, version in enumerate(versions):
                answers = self._answers(batch, version)
                judged[place] += against_labels(answers)
                changes.append(divergence(whole, answers))
                sums[place] += kept(changes[-1], changes[0])
        sums, judged = self._over_processes([sums, judged])
        if not float(sums[0, 1]) > 0:
            raise bad_value("batches", "no effect", "the adapter changes no prediction of these examples; give others")
        return Measured(sums, judged, self._examples, self._kind)

    def _answers(self, batch: Any, version: Sequence[Any]) -> Predictions:
        for weight, values in zip(self._weights, version, strict=True):
            weight.fill(values)
        self._count.update()
        return predictions_of(self._model, batch, self._outputs)

    def _bar(self, what: str, passes: int, repeat: bool = True) -> Iterator[Any]:
        """Yield the batches, with a progress bar of all their passes."""
        is_hidden = not self._progress or distributed.rank() > 0
        with tqdm(desc=what, total=passes * len(self._batches), disable=is_hidden) as bar:
            self._count = bar
            for batch in self._batches:
                yield batch
                if repeat:
                    bar.update()

    def _over_processes(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums over all processes of tensors (any shapes)."""
        if not distributed.is_distributed():
            return [*parts]
        device = self._weights[0].parameters[0].device
        flat = torch.cat([part.flatten().to(device) for part in parts])
        dist.all_reduce(flat)
        pieces = flat.split([part.numel() for part in parts])
        return [piece.view(part.shape).to(part.device) for piece, part in zip(pieces, parts, strict=True)]


@contextmanager
def _checkpointing(model: nn.Module) -> Iterator[None]:
    """Let layers with gradient checkpointing, which they use in training mode only, use it; dropout stays off."""
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def _eagerly() -> Any:
    """Return a context in which compiled modules run as they are: each size would be compiled anew."""
    is_loaded = "torch._dynamo" in sys.modules  # importing it takes a second
    return torch.compiler.set_stance("force_eager") if is_loaded else nullcontext()
