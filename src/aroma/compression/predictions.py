"""What a model answers, how far apart two answers lie, and random gradients of its Fisher information."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical
from torch.nn import functional as F

from ..errors import NonFiniteError, bad_value

CHUNK = 2**24
"""Numbers that are computed in float32 at a time: of large vocabularies a part of the positions."""
_IGNORED = -100
"""Label of a position that does not count."""

OutputFunction = Callable[[nn.Module, Any], Any]
"""Maps a model and a batch to a tensor (examples, …), whose squared distance counts, or to a `Categorical` or
`Bernoulli` distribution of torch."""


@dataclass(frozen=True)
class Predictions:
    """A model's answers to a batch.

    Args:
        kind: `"classes"`, of which one is right at each position (KL divergence); `"labels"`, each right or wrong
            (that of Bernoulli variables); `"values"`, numbers (half the squared distance: the divergence of Gaussians
            of unit variance).
        values: Logits (examples, …, classes) or (examples, …, labels), or numbers (examples, …).
        counts: Which positions count, (examples, …) as `values` without its last axis; None for all.
        labels: The right classes (examples, …), labels or numbers (as `values`); None where none are given.
    """

    kind: Literal["classes", "labels", "values"]
    values: Tensor
    counts: Tensor | None = None
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    def detached(self) -> Predictions:
        """Return a copy that keeps no graph and no memory that the model may reuse."""
        return replace(self, values=self.values.detach().clone())


# Of a model ----------------------------------------------------------------------------------------------------------


def predictions_of(model: nn.Module, batch: Any, outputs: OutputFunction | None = None) -> Predictions:
    """Return what a model answers to a batch, on whatever device the batch is.

    Raises:
        ConfigError: What the outputs mean cannot be told.
        NonFiniteError: An output is NaN or infinite.
    """
    # Weights that are offloaded are on the meta device, and their hooks bring inputs to where they compute.
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    batch = send_to_device(copy.copy(batch), device)
    found = _told(model, batch) if outputs is None else _given(outputs(model, batch))
    if not bool(found.values.detach().isfinite().all()):
        raise NonFiniteError("outputs: they are NaN or infinite; look at the adapter and the data")
    return found


def _given(output: Any) -> Predictions:
    if isinstance(output, Categorical):
        return Predictions("classes", output.logits)
    if isinstance(output, Bernoulli):
        return Predictions("labels", output.logits)
    if isinstance(output, Tensor) and output.dim() and output.is_floating_point():
        return Predictions("values", output)
    remedy = "it must return a tensor (examples, …), or a Categorical or Bernoulli of torch.distributions"
    raise bad_value("outputs", type(output).__name__, remedy)


def _told(model: nn.Module, batch: Mapping[str, Any]) -> Predictions:
    """Return the answers of a model of transformers, by its configuration and head."""
    config, base = getattr(model, "config", None), getattr(model, "get_base_model", lambda: model)()
    inputs = dict(batch)
    labels = inputs.get("labels")
    if not getattr(config, "is_encoder_decoder", False):  # else they are what the decoder reads
        inputs.pop("labels", None)
    output = model(**inputs)
    if isinstance(start := getattr(output, "start_logits", None), Tensor):  # of question answering
        return Predictions("classes", torch.stack([start, output.end_logits], 1))
    mask, logits = inputs.get("attention_mask"), getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        hidden = getattr(output, "last_hidden_state", None)
        if not isinstance(hidden, Tensor):
            raise bad_value("outputs", type(output).__name__, "what it means is not known; " + _FUNCTION)
        return Predictions("values", hidden, _as_counts(mask, hidden))
    if logits.dim() == 2:
        problem = getattr(config, "problem_type", None)
        if problem == "multi_label_classification":
            return Predictions("labels", logits, None, labels)
        if problem == "regression" or logits.shape[1] == 1:
            return Predictions("values", logits, None, None if labels is None else labels.reshape(logits.shape))
        return Predictions("classes", logits, None, labels)
    if logits.dim() != 3:
        raise bad_value("outputs", tuple(logits.shape), "what logits of this shape mean is not known; " + _FUNCTION)
    if type(base).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        labels, mask = _following(labels, _IGNORED, logits.shape[1]), _following(mask, 0, logits.shape[1])
    counts = _as_counts(mask, logits) if labels is None else labels != _IGNORED
    return Predictions("classes", logits, counts, labels)


_FUNCTION = "give outputs=, a function of model and batch"


def _as_counts(mask: Any, values: Tensor) -> Tensor | None:
    """Return an attention mask (examples, tokens) as the positions of `values` that count; None if it does not fit."""
    return mask.bool() if isinstance(mask, Tensor) and mask.shape == values.shape[:2] else None


def _following(tokens: Any, last: int, positions: int) -> Tensor | None:
    """Return what a causal model predicts at each position: the next token's label or mask, and `last` after the last.

    `tokens`: (examples, tokens), or None; `positions`: of the logits, which may be those of the last tokens only.
    """
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        return None
    return F.pad(tokens[:, 1:], (0, 1), value=last)[:, -positions:]


# Of arrays -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def pull(found: Predictions, generator: torch.Generator) -> Tensor:
    """Return a random gradient by `found.values`, with the covariance that the score has by the predictions.

    The score is the gradient of the negative log likelihood of answers drawn from the predictions, so products of it
    estimate the Fisher information. Drawn answers of a confident classifier say almost nothing, but for a few that say
    all. Normal noise of the same covariance estimates the same with far fewer examples.

    It is divided by the root of the number of examples, so that its products are those of one example, whatever the
    size of the batch. `generator` is on the device of the predictions.
    """
    values = found.values.detach()
    pulled = torch.empty_like(values).normal_(generator=generator)
    if found.kind == "labels":
        share = values.float().sigmoid()
        pulled *= (share * (1 - share)).sqrt()
    elif found.kind == "classes":
        for place, logits in _chunks(values):  # of covariance diag(p) − p pᵀ
            shares, noise = logits.softmax(-1), pulled.flatten(0, -2)[place]
            roots = shares.sqrt() * noise
            noise.copy_(roots - shares * roots.sum(-1, keepdim=True))
    pulled /= len(found) ** 0.5
    return pulled if found.counts is None else pulled.mul_(found.counts.unsqueeze(-1))


@torch.no_grad()
def divergence(whole: Predictions, other: Predictions) -> Tensor:
    """Return KL(whole ‖ other) of each example, summed over what counts, (examples,) in float64 on the CPU."""
    if whole.kind == "classes":
        pairs = zip(_chunks(whole.values), _chunks(other.values), strict=True)
        apart = torch.cat([_between(one.log_softmax(-1), two.log_softmax(-1)) for (_, one), (_, two) in pairs])
        apart = apart.view(whole.values.shape[:-1])
    elif whole.kind == "labels":
        one, two = whole.values.double(), other.values.double()
        logs = [torch.stack([F.logsigmoid(values), F.logsigmoid(-values)], -1) for values in (one, two)]
        apart = _between(*logs).sum(-1)
    else:
        apart = (whole.values.double() - other.values.double()).square() / 2
        apart = apart.sum(-1) if apart.dim() > 1 else apart
    return _per_example(apart, whole.counts)


def _between(one: Tensor, two: Tensor) -> Tensor:
    """Return KL(one ‖ two) of log shares, over the last axis."""
    return (one.exp() * (one - two)).sum(-1)


@torch.no_grad()
def against_labels(found: Predictions) -> Tensor:
    """Return sums over a batch: loss, right answers, and how many are judged, (3,) in float64; zeros without labels.

    The loss is the mean negative log likelihood of a class or label, of numbers the mean square of the error. Right
    answers of numbers are not counted: NaN.
    """
    if found.labels is None:
        return torch.zeros(3, dtype=torch.float64)
    labels, values = found.labels.to(found.values.device), found.values
    if found.kind == "values":
        return torch.tensor([float((values.double() - labels).square().sum()), math.nan, labels.numel()]).double()
    if found.kind == "labels":
        loss = F.binary_cross_entropy_with_logits(values.double(), labels.double(), reduction="sum")
        return torch.tensor([float(loss), int(((values > 0) == (labels > 0.5)).sum()), labels.numel()]).double()
    sums = torch.zeros(3, dtype=torch.float64)
    for place, logits in _chunks(values):
        part = labels.flatten()[place]
        loss = F.cross_entropy(logits, part, ignore_index=_IGNORED, reduction="sum")
        sums += torch.tensor([float(loss), int((logits.argmax(-1) == part).sum()), int((part != _IGNORED).sum())])
    return sums


def _chunks(values: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield a part of the positions of logits (…, classes) at a time, (positions, classes) in float32 or more."""
    flat = values.flatten(0, -2)
    step = max(CHUNK // flat.shape[-1], 1)
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        yield slice(start, start + step), part if part.dtype == torch.float64 else part.float()


def _per_example(values: Tensor, counts: Tensor | None) -> Tensor:
    """Return the sum over what counts of each example, (examples,)."""
    if counts is not None:
        values = values * counts
    return values.reshape(len(values), -1).sum(1).double().cpu()
