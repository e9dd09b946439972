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
from .plan import Compression, Limits, Measured, conclude, to_measure
from .predictions import OutputFunction, Predictions, against_labels, divergence, predictions_of, pull
from .weights import Adapter, wide

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
    measured = None
    if batches is None:
        directions = [by_size(one) for one in found]
        sizes = limits.sizes(weights, [*map(worths, found, directions)])
    else:
        with distributed.refuse_together():
            examples = _Examples(adapter, _listed(batches, outputs), outputs, progress)
        with _measuring(adapter):
            directions = [by_effect(M, N) for M, N in examples.metric(found)]
            worth = map(worths, found, directions)
            sizes = limits.sizes(weights, [one / weight.cost for one, weight in zip(worth, weights, strict=True)])
            ladder = to_measure(weights, sizes)
            measured = examples.measure([[*map(cut, found, directions, ranks)] for ranks in ladder])
    result, ranks = conclude(limits, weights, sizes, measured, [weight.name for weight in adapter.others])
    for weight, one, order, after in zip(weights, found, directions, ranks, strict=True):
        weight.narrow(cut(one, order, after))
    adapter.describe({weight.name: after for weight, after in zip(weights, ranks, strict=True) if after})
    return result


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


class _Examples:
    """Calibration examples and the adapter that is measured on them, inside of `_measuring`.

    Args:
        adapter: The adapter.
        batches: Batches of this process.
        outputs: As for `compress`.
        progress: As for `compress`.
    """

    def __init__(
        self, adapter: Adapter, batches: Sequence[Any], outputs: OutputFunction | None, progress: bool
    ) -> None:
        self._model, self._weights = adapter.model, adapter.weights
        self._batches, self._outputs = batches, outputs
        self._dtypes = [weight.parameters[0].dtype for weight in self._weights]
        self._whole = [weight.shaped(weight.product(), torch.float64) for weight in self._weights]
        self._is_silent = not progress or distributed.rank() > 0
        self._count, self._kind = 0, ""

    def metric(self, found: Sequence[Spectrum]) -> list[tuple[Tensor, Tensor]]:
        """Return the means over batches of G Gᵀ and Gᵀ G of each weight, both (matrices, r, r)."""
        factors = [balanced(one) for one in found]
        trained = [weight.parameters[0].requires_grad_(True) for weight in self._weights]
        for weight, product, A in zip(self._weights, factors, trained, strict=True):
            weight.fill(weight.shaped(product, A.dtype))
        sums = [torch.zeros_like(torch.stack([product.A @ product.A.mT] * 2)) for product in factors]
        for module in self._model.modules():
            # Checkpointing needs its layer in training mode; dropout, in modules of its own, stays off.
            module.training = bool(getattr(module, "gradient_checkpointing", False))
        generators: dict[torch.device, torch.Generator] = {}
        with distributed.refuse_together():
            for batch in self._with_bar("gradients of the predictions", 1):
                answers = predictions_of(self._model, batch, self._outputs)
                if not answers.values.requires_grad:
                    remedy = "they do not depend on the adapter, or were detached; return what the model computes"
                    raise bad_value("outputs", "without gradient", remedy)
                device = answers.values.device
                generator = generators.setdefault(device, torch.Generator(device).manual_seed(distributed.rank()))
                for A in trained:
                    A.grad = None
                answers.values.backward(pull(answers, generator))
                self._count, self._kind = self._count + len(answers), answers.kind
                for weight, A, product, total in zip(self._weights, trained, factors, sums, strict=True):
                    if A.grad is not None:  # a layer may take no part in some batches
                        G = weight.rows(A.grad)[:, : product.A.shape[1]].to(product.A) @ product.A.mT
                        total += torch.stack([G @ G.mT, G.mT @ G])
                self._bar.update()
        self._model.eval()
        counts = torch.tensor([self._count, len(self._batches)], dtype=torch.float64)
        counts, *sums = _over_processes([counts, *sums])
        self._count = int(counts[0])
        if self._count < FEWEST:
            raise bad_value("batches", f"{self._count} examples", f"give {FEWEST} or more, better some hundreds")
        if not all(bool(part.isfinite().all()) for part in sums):
            raise bad_value("batches", "gradients", "they are NaN or infinite; load the model in float32 or bfloat16")
        return [tuple(part / counts[1]) for part in sums]

    @torch.no_grad()
    def measure(self, ladder: Sequence[Sequence[Product]]) -> Measured:
        """Return what each size of an adapter keeps.

        Args:
            ladder: The products of all weights at each size, ascending; the first are of rank 0.
        """
        versions = []
        for products in ladder:
            pairs = zip(self._weights, products, self._dtypes, strict=True)
            # As they will be saved, in however few bits.
            versions.append([weight.shaped(product, dtype) for weight, product, dtype in pairs])
        sums = torch.zeros(len(ladder), 5, dtype=torch.float64)
        judged = torch.zeros(len(ladder) + 1, 3, dtype=torch.float64)
        with distributed.refuse_together():
            for batch in self._with_bar("effect of each size", len(versions) + 1):
                whole = self._answers(batch, self._whole).detached()
                judged[-1] += against_labels(whole)
                changes: list[Tensor] = []
                for place, version in enumerate(versions):
                    answers = self._answers(batch, version)
                    judged[place] += against_labels(answers)
                    changes.append(divergence(whole, answers))
                    sums[place] += kept(changes[-1], changes[0])
        sums, judged = _over_processes([sums, judged])
        if not float(sums[0, 1]) > 0:
            raise bad_value("batches", "no effect", "the adapter changes no prediction of these examples; give others")
        return Measured(sums, judged, self._count, self._kind)

    def _answers(self, batch: Any, version: Sequence[Any]) -> Predictions:
        for weight, values in zip(self._weights, version, strict=True):
            weight.fill(values)
        self._bar.update()
        return predictions_of(self._model, batch, self._outputs)

    def _with_bar(self, what: str, passes: int) -> Iterator[Any]:
        """Yield the batches, under a progress bar of all passes over them."""
        with tqdm(desc=what, total=passes * len(self._batches), disable=self._is_silent) as self._bar:
            yield from self._batches


def _over_processes(parts: Sequence[Tensor]) -> list[Tensor]:
    """Return the sums over all processes of tensors (any shapes, on one device but for the first)."""
    if not distributed.is_distributed():
        return [*parts]
    flat = torch.cat([part.flatten().to(parts[-1].device) for part in parts])
    device = torch.device("cpu") if dist.get_backend() == "gloo" else torch.device("cuda", torch.cuda.current_device())
    flat = flat.to(device)
    dist.all_reduce(flat)
    pieces = flat.split([part.numel() for part in parts])
    return [piece.view(part.shape).to(part.device) for piece, part in zip(pieces, parts, strict=True)]


@contextmanager
def _measuring(adapter: Adapter) -> Iterator[None]:
    """Let a model compute as when it is used, its adapter in float32 or more; afterwards all is as before."""
    model, parameters = adapter.model, [*adapter.model.parameters()]
    factors = [parameter for weight in adapter.weights for parameter in weight.parameters]
    before = [(parameter, parameter.data, parameter.grad) for parameter in factors]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    is_loaded = "torch._dynamo" in sys.modules  # importing it takes a second
    eagerly = torch.compiler.set_stance("force_eager") if is_loaded else nullcontext()
    with torch.random.fork_rng([*{p.device for p in parameters if p.is_cuda}]), eagerly:
        try:
            model.eval()
            for parameter in parameters:
                parameter.requires_grad_(False)
            for parameter in factors:
                parameter.data = wide(parameter.data.clone())  # every size is written into it
            for weight in adapter.weights:
                weight.layer.scaling[adapter.name] = 1.0
            yield
        finally:
            model.eval()
            for parameter, values, gradient in before:
                parameter.data, parameter.grad = values, gradient
            for weight in adapter.weights:
                weight.layer.scaling[adapter.name] = weight.scale
            for parameter in parameters:
                parameter.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)
            for module in training:
                module.training = True
