"""Matrices that grow by evidence: components in slots of one pair, and unused directions.

An unused direction u vᵀ follows the gradients by streaming power iteration. With G = ∂L/∂W of a step, summed over
micro-batches and processes,

.. code-block:: text

    p ← β p − (1 − β) G v          u ← p off span(b of the slots, earlier u of the matrix), normalised
    q ← β q − (1 − β) Gᵀ u         v ← q off span(a of the slots, earlier v of the matrix), normalised

G v, Gᵀ u and ⟨G, Δ_k⟩ come out of the backward of the layer as gradients of leaves that have no effect (`Probe`). So
micro-batches add up as everywhere, no hook is needed, and no m×n matrix is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .algorithm.evidence import PROBES, Reading
from .errors import bad_value
from .events import ModuleSummary
from .matrices import GrowingMatrices, GrowingMatrix
from .measures import Pair
from .reset import SlotStart, check_startable, component_generator, start_slots
from .sharding import is_distributed, refuse_together, world_size
from .spectra import effective_rank, singular_values
from .tuner import AromaLinear
from .tuner.fused import Probe
from .tuner.live import LiveAdapter

_RANK_TOLERANCE = 1e-6
"""A direction of a span counts where its squared singular value is above this share of the largest."""


class SlotMatrix(GrowingMatrix):
    """One matrix whose components sit in the slots of its pair; see `aroma.algorithm.evidence.EvidenceMatrix`.

    Attributes:
        born: Number of the birth in every slot, counted over the matrix; None where the slot is not in use.
        heads: Batches since its start on which an unused direction won, by direction.
        flips: Batches since its start on which it was judged, likewise.
        log_evidence: The largest log E among its directions.
        steepness: The largest z of the last batch; None before the first.
    """

    def __init__(self, name: str, index: int, layer: AromaLinear, adapter_name: str, live: LiveAdapter) -> None:
        super().__init__(name, index, layer, adapter_name, live)
        self.born: list[int | None] = [None] * live.config.slots
        self.births = 0
        self.heads = [0] * PROBES
        self.flips = [0] * PROBES
        self.log_evidence = 0.0
        self.steepness: float | None = None

    @property
    def slots(self) -> list[int]:
        """The slots in use."""
        return [slot for slot, born in enumerate(self.born) if born is not None]

    @property
    def component_count(self) -> int:
        """Number of its components, those that train included."""
        return self.rank + len(self.slots)

    def occupy(self, slot: int) -> None:
        """Note that a component was born in `slot`."""
        self.born[slot] = self.births
        self.births += 1
        self._evaluate_slots()

    def vacate(self, slot: int) -> None:
        """Note that `slot` is not in use any more."""
        self.born[slot] = None
        self._evaluate_slots()

    def _evaluate_slots(self) -> None:
        self.layer.slots_in_use[self._adapter_name] = max(self.slots, default=-1) + 1

    def slot_for_birth(self) -> tuple[int, bool]:
        """Return the slot of the next component, and whether its component must be merged first: the oldest one."""
        if None in self.born:
            return self.born.index(None), False
        return min(self.slots, key=lambda slot: self.born[slot] or 0), True

    def summary(self, pair: Pair) -> ModuleSummary:
        """Return rank, effective rank, state, evidence and steepness.

        Args:
            pair: The slots, b (m, S) and a (S, n), whole.
        """
        B, A = self.components(pair)
        return ModuleSummary(
            name=self.name,
            rank=A.shape[0],
            effective_rank=effective_rank(singular_values(B, A)),
            state="frozen" if self.is_frozen else "training",
            inner_value=None,
            outer_value=None,
            log_evidence=self.log_evidence,
            steepness=self.steepness,
        )

    # Saved and restored ----------------------------------------------------------------------------------------------

    _NOTED = ("born", "births", "heads", "flips", "log_evidence", "steepness")

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint says of the matrix, JSON-able."""
        noted = {name: getattr(self, name) for name in self._NOTED}
        return {"name": self.name, "rank": self.rank, "frozen": self.is_frozen, **noted}

    def pair_tensors(self, draw: int, pair: Pair) -> dict[str, Tensor]:
        """Return the slots in use by name: the plain adapter holds only those that have moved, scaled.

        Args:
            draw: Not used.
            pair: The slots, b (m, S) and a (S, n), whole.
        """
        count = self.layer.slots_in_use[self._adapter_name]
        b, a = pair
        return {
            f"pair.{self.index}.b": b.detach()[:, :count].clone(),
            f"pair.{self.index}.a": a.detach()[:count].clone(),
        }

    def restore(self, state: dict[str, Any], tensors: Mapping[str, Tensor], draw: int, pair: Pair) -> None:
        """Restore `state()`, and take the components that trained out of the loaded finished ones.

        Args:
            state: What `state()` returned.
            tensors: All tensors of the checkpoint's state.
            draw: Not used.
            pair: The slots as they are now, b (m, S) and a (S, n), whole.

        Raises:
            CheckpointError: The loaded adapter has another rank than the state says.
        """
        for name in self._NOTED:
            value = state[name]
            setattr(self, name, [*value] if isinstance(value, list) else value)
        b, a = tensors[f"pair.{self.index}.b"], tensors[f"pair.{self.index}.a"]
        moved = len(self.layer.moved_slots(self._adapter_name, b)) if b.shape[1] else 0
        self.require_loaded_rank(state["rank"] + moved)
        self.layer.finished(self._adapter_name).pop(moved)
        if state["frozen"]:
            self.layer.freeze(self._adapter_name)
            return
        self.layer.unfreeze(self._adapter_name)
        whole_b, whole_a = torch.zeros_like(pair[0]), torch.zeros_like(pair[1])
        whole_b[:, : b.shape[1]], whole_a[: a.shape[0]] = b.to(whole_b), a.to(whole_a)
        self.layer.start_pair(self._adapter_name, whole_a, whole_b)
        self._evaluate_slots()


@dataclass
class _Group:
    """Matrices of one shape, m×n, on one device: their unused directions and moves, stacked.

    Attributes:
        matrices: Which ones, L of them.
        u: Left directions, (L, m, P).
        v: Right directions, (L, P, n).
        p: Averages of −G v, (L, m, P).
        q: Averages of −uᵀ G, (L, P, n).
        gate: Zeros, (L, S).
        b: The slots at the last `note_moves`, (L, m, S).
        a: Likewise, (L, S, n).
        move_b: Δb, (L, m, S).
        move_a: Δa, (L, S, n).
        per_norm: 1 / ‖Δ_k‖_F, (L, S); NaN where there is no move, or none is known.
        span_b: Orthonormal basis of the columns of b, padded with zeros, (L, m, S).
        span_a: Orthonormal basis of the rows of a, padded with zeros, (L, S, n).
    """

    matrices: list[SlotMatrix]
    u: Tensor
    v: Tensor
    p: Tensor
    q: Tensor
    gate: Tensor
    b: Tensor
    a: Tensor
    move_b: Tensor
    move_a: Tensor
    per_norm: Tensor
    span_b: Tensor
    span_a: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """What gets gradients: u, v and gate of all matrices."""
        return self.u, self.v, self.gate

    def keep_moves(self, pairs: Sequence[Pair], known: Tensor, scale: float) -> None:
        """Take the slots as they are now; how they differ from the last ones is their move.

        Args:
            pairs: b (m, S) and a (S, n) of the matrices.
            known: Whether a slot holds the component that it held last time, (L, S).
            scale: s.
        """
        b, a = torch.stack([pair[0].to(self.b) for pair in pairs]), torch.stack([pair[1].to(self.a) for pair in pairs])
        self.move_b.copy_(torch.where(known[:, None, :], b - self.b, 0.0))
        self.move_a.copy_(torch.where(known[:, :, None], a - self.a, 0.0))
        self.b.copy_(b)
        self.a.copy_(a)
        self.settle(scale)

    def settle(self, scale: float) -> None:
        """Derive the norms of the moves and the spans from the slots and their moves."""
        move = (self.move_b.square().sum(1) * self.a.square().sum(2)) + (
            self.b.square().sum(1) * self.move_a.square().sum(2)
        )
        move += 2 * (self.move_b * self.b).sum(1) * (self.a * self.move_a).sum(2)
        norms = scale * move.clamp_min(0).sqrt()
        self.per_norm.copy_(torch.where(norms > 0, 1 / norms, torch.nan))
        # In use are the slots that have moved; before that, b is no direction.
        self.span_b.copy_(_orthonormal_rows(self.b.mT).mT)
        self.span_a.copy_(_orthonormal_rows(self.a))

    def turn(self, gu: Tensor, gv: Tensor, memory: float) -> None:
        """Let the directions follow a gradient.

        Args:
            gu: G v, (L, m, P).
            gv: uᵀ G, (L, P, n).
            memory: β.
        """
        self.p.mul_(memory).sub_(gu, alpha=1 - memory)
        self.q.mul_(memory).sub_(gv, alpha=1 - memory)
        self.aim()

    def aim(self) -> None:
        """Point the directions where p and q point outside of the spans; where that is nowhere, leave them."""
        free_p = self.p - self.span_b @ (self.span_b.mT @ self.p)
        free_q = self.q - (self.q @ self.span_a.mT) @ self.span_a
        _orthonormalise(free_p.mT, self.u.mT)
        _orthonormalise(free_q, self.v)


class SlotMatrices(GrowingMatrices):
    """All matrices that grow by evidence; `aroma.algorithm.evidence.EvidenceMatrices`.

    Where parameters are sharded, all ranks call the methods that read components, together.

    Args:
        model: The model, unwrapped.
        adapter_name: The adapter that grows.
        live: Its live state.
        optimizer: Optimizer that holds the pairs; wrapped by accelerate or not, or DeepSpeed's.
    """

    matrix_class = SlotMatrix
    _all: list[SlotMatrix]  # type: ignore[assignment]

    def __init__(self, model: nn.Module, adapter_name: str, live: LiveAdapter, optimizer: Any) -> None:
        super().__init__(model, adapter_name, live, optimizer)
        self._asks = True
        self._is_answered = False
        self._groups: list[_Group] = []
        self._gradients: list[Tensor] = []
        self._noted: list[list[int | None]] = [[*matrix.born] for matrix in self._all]
        self._pending = [False] * len(self._all)
        self._readings: list[tuple[list[tuple[Tensor, Tensor]], list[bool]]] = []

    @property
    def total_rank(self) -> int:
        """Sum of the components of all matrices, those that train included; no device is asked."""
        return sum(matrix.component_count for matrix in self._all)

    # The probe -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Empty the slots whose component has not moved, and begin to ask every backward."""
        pairs = self.pairs(self._all)
        for matrix, (b, a) in zip(self._all, pairs, strict=True):
            if matrix.is_frozen:
                continue
            moved = matrix.layer.moved_slots(self._adapter_name, b)
            kept = torch.zeros_like(a)
            kept[moved] = a[moved]
            matrix.layer.start_pair(self._adapter_name, kept, b)
            for slot in moved:
                matrix.occupy(slot)
            if not moved:
                matrix.layer.slots_in_use[self._adapter_name] = 0
        self.release_pairs()
        self._make_groups()
        self.note_moves()

    @torch.no_grad()
    def _make_groups(self) -> None:
        """Stack the unused directions of matrices of one shape, random ones to begin with, and ask for gradients."""
        shapes: dict[Any, list[SlotMatrix]] = {}
        for matrix in self._all:
            a = matrix.pair[1]
            device = self.sharding.device(a)
            dtype = torch.promote_types(a.dtype, torch.float32)
            shapes.setdefault((matrix.layer.out_features, matrix.layer.in_features, device, dtype), []).append(matrix)
        slots = self._live.config.slots
        for (m, n, device, dtype), matrices in shapes.items():

            def zeros(*shape: int, count: int = len(matrices), like: Any = (dtype, device)) -> Tensor:
                """Return zeros, (L, …)."""
                return torch.zeros(count, *shape, dtype=like[0], device=like[1])

            group = _Group(
                matrices=matrices,
                u=self._random_directions(matrices, "u", m, dtype).to(device).mT.contiguous(),
                v=self._random_directions(matrices, "v", n, dtype).to(device),
                p=zeros(m, PROBES),
                q=zeros(PROBES, n),
                gate=zeros(slots),
                b=zeros(m, slots),
                a=zeros(slots, n),
                move_b=zeros(m, slots),
                move_a=zeros(slots, n),
                per_norm=zeros(slots),
                span_b=zeros(m, slots),
                span_a=zeros(slots, n),
            )
            self._groups.append(group)
            # One buffer, so that processes add up their gradients in one collective.
            self._gradients.append(torch.zeros(sum(leaf.numel() for leaf in group.leaves), dtype=dtype, device=device))
        self._ask()

    def _random_directions(
        self, matrices: Sequence[SlotMatrix], purpose: str, size: int, dtype: torch.dtype
    ) -> Tensor:
        """Return random orthonormal rows, (L, P, size), drawn on the CPU from the seed of the run."""
        drawn = [
            torch.randn(PROBES, size, generator=component_generator(self._live.seed, 1, matrix.index, purpose))
            for matrix in matrices
        ]
        directions = torch.stack(drawn).to(dtype)
        _orthonormalise(directions.clone(), directions)
        return directions

    def _ask(self) -> None:
        """Give every layer its leaves, which share the memory of the stacked tensors."""
        self._is_answered = False
        for group in self._groups:
            for row, matrix in enumerate(group.matrices):
                if matrix.is_frozen or not self._asks:
                    matrix.layer.probes.pop(self._adapter_name, None)
                    continue
                u, v, gate = (leaf[row].detach().requires_grad_() for leaf in group.leaves)
                probe = Probe(u, v, gate, group.move_b[row], group.move_a[row])
                matrix.layer.probes[self._adapter_name] = probe

    def stop_asking(self) -> None:
        """Ask no backward any more."""
        self._asks = False
        for matrix in self._all:
            matrix.layer.probes.pop(self._adapter_name, None)

    @torch.no_grad()
    def absorb(self, *, record: bool) -> None:
        """Take what the backwards of an optimizer step answered, the mean over all processes.

        Args:
            record: Whether the step's batch is evidence: it was not trained on before.

        Raises:
            ConfigError: No backward has ever reached a growing layer.
        """
        self._collect_answers()
        answers = []
        for group, buffer in zip(self._groups, self._gradients, strict=True):
            _average(buffer)
            answers.append(_views(buffer, group.leaves))
        if record:
            self._record(answers)
        for group, (gu, gv, gate) in zip(self._groups, answers, strict=True):
            is_known = _is_finite(gu, gv, gate)[:, None, None]
            group.turn(gu.where(is_known, 0.0), gv.where(is_known, 0.0), self._live.config.probe_memory)
        for buffer in self._gradients:
            buffer.zero_()

    def discard(self) -> None:
        """Forget what the backwards of a skipped optimizer step answered."""
        for group, buffer in zip(self._groups, self._gradients, strict=True):
            self._collect(group, buffer)
            buffer.zero_()

    def _collect_answers(self) -> None:
        """Bring the gradients of all leaves into the buffers; at the first call, refuse a model that gives none."""
        found = [self._collect(group, buffer) for group, buffer in zip(self._groups, self._gradients, strict=True)]
        if self._is_answered or not self.active():
            return
        with refuse_together(self.device):
            if not any(found):
                raise bad_value(
                    "model",
                    type(self.model).__name__,
                    "no gradient has reached a growing layer in the first optimizer step, so nothing can be learnt "
                    "of unused directions: call loss.backward() (not torch.autograd.grad or torch.func) before "
                    "optimizer.step(), and let the graph reach the layers (with a frozen embedding and reentrant "
                    "gradient checkpointing: model.enable_input_require_grads(), or use_reentrant=False)",
                )
        self._is_answered = True

    def _collect(self, group: _Group, buffer: Tensor) -> bool:
        """Bring gradients that autograd has put elsewhere into `buffer`, any shape, and let it use that from now on.

        It does so at the first backward, and with create_graph at every one.

        Returns:
            Whether a leaf had a gradient.
        """
        is_answered = False
        for row, matrix in enumerate(group.matrices):
            probe = matrix.layer.probes.get(self._adapter_name)
            if probe is None:
                continue
            for leaf, gradient in zip(probe[:3], _views(buffer, group.leaves), strict=True):
                found = leaf.grad
                is_answered |= found is not None
                if found is None or found.data_ptr() != gradient[row].data_ptr():
                    gradient[row].copy_(found.detach()) if found is not None else gradient[row].zero_()
                    leaf.grad = gradient[row]
        return is_answered

    @torch.no_grad()
    def weigh_held_out(self, loss: Callable[[], Tensor]) -> None:
        """Ask held-out examples; they train nothing.

        Args:
            loss: Returns the loss of a batch of them, a scalar, at the model as it is.
        """
        asked = [
            leaf
            for group in self._groups
            for matrix in group.matrices
            if (probe := matrix.layer.probes.get(self._adapter_name)) is not None
            for leaf in probe[:3]
        ]
        with torch.enable_grad():
            # Not backward(): hooks of DistributedDataParallel and gradients of what trains must not notice.
            found = iter(torch.autograd.grad(loss(), asked, allow_unused=True))
        answers: list[tuple[Tensor, ...]] = []
        for group in self._groups:
            buffer = torch.zeros_like(self._gradients[len(answers)])
            views = _views(buffer, group.leaves)
            for row, matrix in enumerate(group.matrices):
                if self._adapter_name in matrix.layer.probes:
                    for view in views:
                        gradient = next(found)
                        if gradient is not None:
                            view[row].copy_(gradient)
            _average(buffer)
            answers.append(views)
        self._record(answers)

    def _record(self, answers: Sequence[tuple[Tensor, ...]]) -> None:
        """Note the steepness of every unused direction and move; stays on the device.

        NaN where an answer is not finite: in 16 bits a batch may overflow.

        Args:
            answers: G v (L, m, P), uᵀ G (L, P, n) and the slopes along the moves (L, S), by group.
        """
        values = []
        for group, (gu, gv, gate) in zip(self._groups, answers, strict=True):
            is_known = _is_finite(gu, gv, gate)[:, None]
            z, own = -(group.u * gu).sum(1), -gate * group.per_norm
            values.append((z.where(is_known, torch.nan), own.where(is_known, torch.nan)))
        self._readings.append((values, [*self._pending]))

    def take_readings(self) -> list[Reading]:
        """Return what was recorded since the last call, in order; one transfer to the host."""
        readings, self._readings = self._readings, []
        if not readings:
            return []
        order = [matrix.index for group in self._groups for matrix in group.matrices]
        device = readings[0][0][0][0].device
        rows = torch.stack(
            [
                torch.cat([torch.cat([z, own], 1).to(device, torch.float64) for z, own in values])
                for values, _ in readings
            ]
        )
        host = torch.empty_like(rows, device="cpu")
        host[:, order] = rows.cpu()
        numbers = host.numpy()
        return [
            Reading(numbers[step, :, :PROBES], numbers[step, :, PROBES:], _flags(pending))
            for step, (_, pending) in enumerate(readings)
        ]

    # Births ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def bear(self, births: Sequence[tuple[SlotMatrix, int]]) -> list[SlotMatrix]:
        """Start a component of each matrix along an unused direction: a = v/√3, b = 0.

        The entries of a are then as large as Kaiming's. The optimizer's averages for the slot begin at zero, its
        averages of squares at those of the other slots.

        Args:
            births: The matrices, and the number of the direction.

        Returns:
            The matrices whose oldest component was merged to make room, once for each.
        """
        where = {matrix.index: (group, row) for group in self._groups for row, matrix in enumerate(group.matrices)}
        merged = []
        starts: list[SlotStart] = []
        born: dict[int, list[int]] = {}
        for matrix, probe in births:
            born.setdefault(matrix.index, []).append(probe)
        matrices = [self._all[index] for index in born]
        for matrix, (b, a) in zip(matrices, self.pairs(matrices), strict=True):
            group, row = where[matrix.index]
            b, a = b.detach().clone(), a.detach().clone()
            new = []
            for probe in born[matrix.index]:
                slot, is_taken = matrix.slot_for_birth()
                if is_taken:
                    matrix.layer.finished(self._adapter_name).append(
                        b[:, slot : slot + 1] * self._live.config.scale, a[slot : slot + 1]
                    )
                    matrix.vacate(slot)
                    merged.append(matrix)
                b[:, slot] = 0
                a[slot] = (group.v[row, probe] / 3**0.5).to(a)
                matrix.occupy(slot)
                new.append(slot)
                group.p[row, :, probe], group.q[row, probe] = 0, 0
            others = [slot for slot in matrix.slots if slot not in new]
            starts += [
                SlotStart(parameter, slot, dim, others)
                for slot in new
                for parameter, dim in zip(matrix.pair, (1, 0), strict=True)
            ]
            matrix.layer.start_pair(self._adapter_name, a, b)
        start_slots(self._optimizer, starts)
        self.release_pairs()
        return merged

    @torch.no_grad()
    def note_moves(self) -> None:
        """Note how every component has moved since the last call."""
        pairs = self.pairs(self._all)
        known = [
            [
                born is not None and born == noted
                for born, noted in zip(matrix.born, self._noted[matrix.index], strict=True)
            ]
            for matrix in self._all
        ]
        for group in self._groups:
            mask = torch.tensor([known[m.index] for m in group.matrices], dtype=torch.bool, device=group.u.device)
            group.keep_moves([pairs[matrix.index] for matrix in group.matrices], mask, self._live.config.scale)
        self._noted = [[*matrix.born] for matrix in self._all]
        self._pending = [sum(known[matrix.index]) < len(matrix.slots) for matrix in self._all]

    def require_resettable(self) -> None:
        """Raise where a birth would fail for want of an optimizer state that is understood.

        Raises:
            ResetError: Naming the state.
        """
        for matrix in self.active():
            for parameter in matrix.pair:
                check_startable(self._optimizer, parameter)

    # Saved and restored ----------------------------------------------------------------------------------------------

    _KEPT = ("u", "v", "p", "q", "b", "a", "move_b", "move_a")

    def state(self, draw: int, pairs: Sequence[Pair]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what an exact resume needs of the matrices; see `GrowingMatrices.state`.

        Args:
            draw: Not used.
            pairs: The slots of all matrices, b (m, S) and a (S, n), whole.
        """
        state, tensors = super().state(draw, pairs)
        for group in self._groups:
            for row, matrix in enumerate(group.matrices):
                for name in self._KEPT:
                    tensors[f"probe.{matrix.index}.{name}"] = getattr(group, name)[row].clone()
        for step, (values, _) in enumerate(self._readings):
            for index, (z, own) in enumerate(values):
                tensors[f"reading.{step}.{index}"] = torch.cat([z, own], 1)
        state["noted"] = [[*noted] for noted in self._noted]
        state["pending"] = [*self._pending]
        state["readings"] = [pending for _, pending in self._readings]
        return state, tensors

    @torch.no_grad()
    def restore(
        self, state: Mapping[str, Any], tensors: Mapping[str, Tensor], draw: int, pairs: Sequence[Pair]
    ) -> None:
        """Restore `state()`, after `refuse_other`; `pairs`, b (m, S) and a (S, n), are the slots as they are."""
        super().restore(state, tensors, draw, pairs)
        for group, buffer in zip(self._groups, self._gradients, strict=True):
            buffer.zero_()
            for row, matrix in enumerate(group.matrices):
                for name in self._KEPT:
                    getattr(group, name)[row].copy_(tensors[f"probe.{matrix.index}.{name}"])
            group.settle(self._live.config.scale)
        self._noted = [[*noted] for noted in state["noted"]]
        self._readings = []
        self._pending = [*state["pending"]]
        for step, pending in enumerate(state["readings"]):
            found = [tensors[f"reading.{step}.{index}"].to(group.u) for index, group in enumerate(self._groups)]
            self._readings.append(([(rows[:, :PROBES], rows[:, PROBES:]) for rows in found], [*pending]))
        self._ask()


def _average(buffer: Tensor) -> None:
    """Replace numbers, any shape, by their mean over all processes, as DistributedDataParallel does with gradients."""
    if is_distributed():
        dist.all_reduce(buffer.div_(world_size()))


def _is_finite(gu: Tensor, gv: Tensor, gate: Tensor) -> Tensor:
    """Return which matrices have finite answers, (L,): gu (L, m, P), gv (L, P, n) and gate (L, S)."""
    parts = (gu.flatten(1), gv.flatten(1), gate)
    return torch.stack([part.isfinite().all(1) for part in parts]).all(0)


def _flags(values: Sequence[bool]) -> Any:
    return torch.tensor(values, dtype=torch.bool).numpy()


def _views(buffer: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the parts of `buffer`, (entries,), that are shaped as `leaves` (any shapes), one after the other."""
    parts = torch.split(buffer, [leaf.numel() for leaf in leaves])
    return tuple(part.view(leaf.shape) for part, leaf in zip(parts, leaves, strict=True))


def _orthonormal_rows(rows: Tensor) -> Tensor:
    """Return orthonormal bases, (L, S, n), of the spans of rows (L, S, n), padded with zeros.

    By the S×S matrix of inner products: a QR would invent directions for rows that are zero.
    """
    norms = torch.linalg.vector_norm(rows, dim=2, keepdim=True)
    unit = (rows / torch.where(norms > 0, norms, 1.0)).double()
    values, vectors = torch.linalg.eigh(unit @ unit.mT)
    counts = values > _RANK_TOLERANCE * values[:, -1:]
    weights = torch.where(counts, values.clamp_min(_RANK_TOLERANCE**2).rsqrt(), 0.0)
    basis: Tensor = ((vectors * weights[:, None, :]).mT @ unit).to(rows.dtype)
    return basis


def _orthonormalise(rows: Tensor, directions: Tensor) -> None:
    """Write the orthonormalised rows (L, P, n) into `directions`, in their order; leave those that have no length."""
    for row in range(rows.shape[1]):
        free = rows[:, row]
        for earlier in range(row):
            other = directions[:, earlier]
            free = free - (free * other).sum(1, keepdim=True) * other
        norm = torch.linalg.vector_norm(free, dim=1, keepdim=True)
        directions[:, row] = torch.where(norm > 0, free / norm, directions[:, row])
