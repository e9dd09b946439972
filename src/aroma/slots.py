"""Matrices that grow by evidence: components in slots of one pair, and directions that every backward is asked about.

G v, uᵀ G and ⟨G, Δ_k⟩ come out of the backward of the layer as gradients of leaves that have no effect (`Probe`). So
micro-batches add up as everywhere, no hook is needed, and no m×n matrix is formed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .algorithm.duels import Reading
from .algorithm.evidence import UNUSED
from .directions import Directions, orthonormalise, singular_directions
from .errors import AromaWarning, bad_value
from .evaluation import evaluating, require_loss
from .events import ModuleSummary
from .matrices import GrowingMatrices, GrowingMatrix
from .measures import Pair, group_by_shape
from .reset import SlotStart, component_generator, start_slots
from .sharding import is_distributed, rank, refuse_together, world_size
from .spectra import effective_rank, singular_values
from .tuner import AromaLinear
from .tuner.fused import Probe
from .tuner.live import LiveAdapter


class SlotMatrix(GrowingMatrix):
    """One matrix whose components sit in the slots of its pair; see `aroma.algorithm.rule.EvidenceMatrix`.

    Attributes:
        born: Number of the birth in every slot, counted over the matrix; None where the slot is not in use.
        heads: Batches since its start on which an unused direction won, by direction.
        flips: Batches since its start on which it was judged, likewise.
        log_evidence: log E.
        steepness: z of the last batch; None before the first.
    """

    def __init__(self, name: str, index: int, layer: AromaLinear, adapter_name: str, live: LiveAdapter) -> None:
        super().__init__(name, index, layer, adapter_name, live)
        self.born: list[int | None] = [None] * layer.r[adapter_name]
        self.births = 0
        self.heads = [0] * UNUSED
        self.flips = [0] * UNUSED
        self.log_evidence = 0.0
        self.steepness: float | None = None

    @property
    def slots(self) -> list[int]:
        """The slots in use."""
        return [slot for slot, born in enumerate(self.born) if born is not None]

    @property
    def leading_slots(self) -> int:
        """Number of slots up to the last in use."""
        return max(self.slots, default=-1) + 1

    @property
    def component_count(self) -> int:
        """Number of its components, those that train included."""
        return self.rank + len(self.slots)

    def occupy(self, slot: int) -> None:
        """Note that a component was born in `slot`."""
        self.born[slot] = self.births
        self.births += 1
        self.evaluate_slots()

    def occupy_first(self, count: int) -> None:
        """Note that new components are in the first `count` slots, and in no others."""
        self.born = [None] * len(self.born)
        for slot in range(count):
            self.occupy(slot)
        self.evaluate_slots()

    def evaluate_slots(self, least: int = 0) -> None:
        """Let the layer evaluate the slots up to the last in use, and at least so many."""
        used = self.layer.slots_in_use[self._adapter_name] = max(least, self.leading_slots)
        self.layer.empty_slots[self._adapter_name] = used - len(self.slots)

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

    def pair_tensors(self, draw: int, pair: Pair) -> dict[str, Tensor]:
        """Return the slots in use by name: the plain adapter holds only those that have moved, scaled.

        Args:
            draw: Not used.
            pair: The slots, b (m, S) and a (S, n), whole.
        """
        count = self.leading_slots
        b, a = pair
        return {
            f"pair.{self.index}.b": b.detach()[:, :count].clone(),
            f"pair.{self.index}.a": a.detach()[:count].clone(),
        }

    def restore(self, state: dict[str, Any], tensors: Mapping[str, Tensor], draw: int, pair: Pair) -> None:
        """Restore `state()`, and take what trained out of the finished components, where it was loaded there.

        Args:
            state: What `state()` returned.
            tensors: All tensors of the checkpoint's state.
            draw: Not used.
            pair: The slots as they are now, b (m, S) and a (S, n), whole.

        Raises:
            CheckpointError: The loaded adapter has another rank than the state says.
        """
        self._restore_noted(state)
        b, a = tensors[f"pair.{self.index}.b"], tensors[f"pair.{self.index}.a"]
        moved = len(self.layer.moved_slots(self._adapter_name, b)) if b.shape[1] else 0
        if self.rank == state["rank"]:
            moved = 0  # torch or DeepSpeed has loaded the slots themselves, and no adapter
        self.require_loaded_rank(state["rank"] + moved)
        self.layer.finished(self._adapter_name).pop(moved)
        if state["frozen"]:
            self.layer.freeze(self._adapter_name)
            return
        self.layer.unfreeze(self._adapter_name)
        whole_b, whole_a = torch.zeros_like(pair[0]), torch.zeros_like(pair[1])
        whole_b[:, : b.shape[1]], whole_a[: a.shape[0]] = b.to(whole_b), a.to(whole_a)
        self.layer.start_pair(self._adapter_name, whole_a, whole_b)
        self.evaluate_slots()


class SlotMatrices(GrowingMatrices):
    """All matrices that grow by evidence; `aroma.algorithm.rule.EvidenceMatrices`.

    Where parameters are sharded, all ranks call the methods that read components, together.

    Args:
        model: The model, unwrapped.
        adapter_name: The adapter that grows.
        live: Its live state.
        optimizer: Optimizer that holds the pairs; wrapped by accelerate or not, or DeepSpeed's.

    Attributes:
        memory: β, with which unused directions follow the gradient; the rule sets it.
    """

    matrix_class = SlotMatrix
    _all: list[SlotMatrix]  # type: ignore[assignment]

    def __init__(self, model: nn.Module, adapter_name: str, live: LiveAdapter, optimizer: Any) -> None:
        super().__init__(model, adapter_name, live, optimizer)
        self.memory = 0.0
        self._asks = True
        self._is_answered = False
        self._has_warned = False
        self._strength = 1.0
        self._is_following = True
        self._groups: list[Directions] = []
        self._noted: list[list[int | None]] = [[*matrix.born] for matrix in self._all]
        self._pending = [False] * len(self._all)
        self._readings: list[tuple[list[Tensor], list[bool]]] = []
        self._whole: dict[int, list[Tensor]] = {}  # slots of which a part is halved

    @property
    def known_rank(self) -> int:
        """Sum of the components of all matrices, those that train included; no device is asked."""
        return sum(matrix.component_count for matrix in self._all)

    @property
    def _scale(self) -> float:
        return self._live.config.scale

    def norms(self, matrices: Sequence[GrowingMatrix], *, alone: bool = False) -> list[float]:
        """Return ‖b a‖_F of what trains; NaN where what the directions of a matrix follow is not finite."""
        broken = {group.rows[row] for group in self._groups for row in group.broken_rows()}
        found = super().norms(matrices, alone=alone)
        return [math.nan if matrix.index in broken else norm for matrix, norm in zip(matrices, found, strict=True)]

    # The beginning ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self) -> None:
        """Empty the slots, what has moved in them apart, and begin to look for the first directions."""
        for matrix, (b, a) in zip(self._all, self.pairs(self._all), strict=True):
            moved = matrix.layer.moved_slots(self._adapter_name, b)
            if moved:  # trained without a controller
                matrix.layer.finished(self._adapter_name).append(b[:, moved] * self._scale, a[moved])
            if not matrix.is_frozen:
                matrix.layer.start_pair(self._adapter_name, torch.zeros_like(a))
                matrix.occupy_first(0)
        self.release_pairs()
        self._make_groups()
        first = self._live.config.trial_components
        for group in self._groups:
            m, n = group.b.shape[2], group.a.shape[2]
            group.follow(self._random_rows(group, "u", first, m), self._random_rows(group, "v", first, n))
        self._ask()

    def _make_groups(self) -> None:
        """Stack the matrices of one shape, dtype and device."""
        shapes = []
        for matrix in self._all:
            a = matrix.pair[1]
            dtype = torch.promote_types(a.dtype, torch.float32)
            shapes.append((matrix.layer.out_features, matrix.layer.in_features, self.sharding.device(a), dtype))
        for (m, n, device, dtype), rows in group_by_shape(shapes).items():
            like = torch.empty(0, dtype=dtype, device=device)
            group = Directions(rows, m, n, len(self._all[rows[0]].born), like)
            beneath = [self._all[row].layer.components_beneath(self._adapter_name) for row in rows]
            if most := max(len(A) for _, A in beneath):
                pad = nn.functional.pad
                group.stay_off(
                    torch.stack([pad(B, (0, most - B.shape[1])) for B, _ in beneath]),
                    torch.stack([pad(A, (0, 0, 0, most - len(A))) for _, A in beneath]),
                )
            self._groups.append(group)

    def _rows(self) -> list[tuple[Directions, int, int]]:
        """Return group, row in it, and place among all, of every matrix."""
        return [(group, row, place) for group in self._groups for row, place in enumerate(group.rows)]

    def _random_directions(self, group: Directions) -> tuple[Tensor, Tensor]:
        """Return u (L, P, m) and v (L, P, n) of unused directions to begin with; P is less in a small matrix."""
        m, n = group.b.shape[2], group.a.shape[2]
        count = min(UNUSED, min(m, n) - group.b.shape[1])
        return self._random_rows(group, "next u", count, m), self._random_rows(group, "next v", count, n)

    def _random_rows(self, group: Directions, purpose: str, count: int, size: int) -> Tensor:
        """Return random orthonormal rows, (L, count, size), drawn on the CPU from the seed of the run."""
        drawn = [
            torch.randn(count, size, generator=component_generator(self._live.seed, 1, row, purpose))
            for row in group.rows
        ]
        rows = torch.stack(drawn).to(group.u)
        orthonormalise(rows.clone(), rows)
        return rows

    # What is asked ---------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """Give every layer its leaves; none where no direction is followed.

        A matrix that is not asked evaluates one slot at least. Of a pair that is in no graph DistributedDataParallel
        would wait for a gradient, and a model without any could go no step backward; an empty slot gets zeros.
        """
        self._is_answered = False
        for group, row, place in self._rows():
            matrix = self._all[place]
            if matrix.is_frozen or not self._asks or not group.v.shape[1]:
                matrix.layer.probes.pop(self._adapter_name, None)
                matrix.evaluate_slots(least=1)
                continue
            matrix.evaluate_slots()
            u, v, gate = group.leaves_of(row)
            matrix.layer.probes[self._adapter_name] = Probe(
                u, v, gate, group.move_b[row].mT, group.move_a[row], self._strength
            )

    def stop_asking(self) -> None:
        """Ask no backward any more."""
        self._asks = False
        self._ask()

    @torch.no_grad()
    def absorb(self, *, record: bool, loss_scale: float) -> None:
        """Take what the backwards of an optimizer step answered, the mean over all processes.

        Args:
            record: Whether the step's batch is evidence: it was not trained on before.
            loss_scale: By what its loss was multiplied. A duel would not notice, but averages over steps would.

        Raises:
            ConfigError: As `require_answers`, which a loop calls before the step if it can.
        """
        if not self._is_asking:
            return
        self.require_answers()
        for group in self._groups:
            self._collect(group)
            _average(group.answers.div_(loss_scale))
        if record:
            self._record([group.answers for group in self._groups])
        for group in self._groups:
            if self._is_following:
                group.turn(group.answers, self.memory)
            group.answers.zero_()

    def discard(self) -> None:
        """Forget what the backwards of a skipped optimizer step answered."""
        for group in self._groups:
            self._collect(group)
            group.answers.zero_()

    @property
    def _is_asking(self) -> bool:
        return self._asks and any(group.v.shape[1] for group in self._groups)

    def require_answers(self) -> None:
        """Refuse a model that gives no answer, until it has given the first one.

        Raises:
            ConfigError: No backward has reached a growing layer since it was asked.
        """
        if self._is_answered or not self._is_asking or not self.active():
            return
        reached = {place for group in self._groups for place in self._collect(group)}
        with refuse_together(self.device):
            if not reached:
                raise bad_value(
                    "model",
                    type(self.model).__name__,
                    "no gradient has reached a growing layer in this optimizer step, so nothing can be learnt of "
                    "directions: keep the adapter active, call loss.backward() (not torch.autograd.grad or "
                    "torch.func) before optimizer.step(), and let the graph reach the layers (with a frozen embedding "
                    "and reentrant gradient checkpointing: model.enable_input_require_grads(), or "
                    "use_reentrant=False)",
                )
        self._is_answered = True
        self._warn_of_unreached(reached)

    def _warn_of_unreached(self, reached: Collection[int]) -> None:
        """Name, once, the matrices that are asked and are not among those `reached` by a gradient."""
        if self._has_warned or rank() > 0:
            return
        asked = {place for group in self._groups for place, _, _ in self._asked(group, group.answers)}
        names = [self._all[place].name for place in sorted(asked.difference(reached))]
        if names:
            self._has_warned = True
            warnings.warn(
                f"No gradient reaches {len(names)} of {len(asked)} matrices, the first of them {names[0]}, so that "
                "they learn nothing. Let the graph reach them, or leave them out by target_modules or exclude_modules",
                AromaWarning,
                stacklevel=3,
            )

    def _collect(self, group: Directions) -> set[int]:
        """Bring gradients that autograd has put elsewhere into the answers, and let it use those from now on.

        It does so at the first backward, and with create_graph at every one.

        Returns:
            The places of the matrices of which a leaf had a gradient.
        """
        reached = set()
        for place, leaf, gradient in self._asked(group, group.answers):
            found = leaf.grad
            if found is not None:
                reached.add(place)
            if found is None or found.data_ptr() != gradient.data_ptr():
                gradient.zero_() if found is None else gradient.copy_(found.detach())
                leaf.grad = gradient
        return reached

    def _asked(self, group: Directions, answers: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield a matrix's place, each leaf (any shape) that its layer has, and its part of `answers`, (entries,)."""
        for place, parts in zip(group.rows, group.answers_by_row(answers), strict=True):
            probe = self._all[place].layer.probes.get(self._adapter_name)
            if probe is not None:
                for leaf, part in zip(probe[:3], parts, strict=True):
                    yield place, leaf, part

    @torch.no_grad()
    def weigh_held_out(self, losses: Iterable[Tensor]) -> None:
        """Ask a batch of held-out examples; they train nothing. If its loss is not finite, it says nothing.

        Args:
            losses: The loss of each of its micro-batches, a scalar, at the model as it is. They count alike. One is
                asked before the next is computed.
        """
        answers = [torch.zeros_like(group.answers) for group in self._groups]
        asked = [
            (leaf, part)
            for group, own in zip(self._groups, answers, strict=True)
            for _, leaf, part in self._asked(group, own)
        ]
        if not asked:
            return
        values = []
        with torch.enable_grad(), evaluating(self.model):
            for value in losses:
                with refuse_together(self.device):
                    require_loss(value)
                # Not backward(): hooks of DistributedDataParallel and gradients of what trains must not notice.
                found = torch.autograd.grad(value.reshape(()), [leaf for leaf, _ in asked], allow_unused=True)
                with refuse_together(self.device):
                    _require_reached(found)
                values.append(value.detach().reshape(()))
                for (_, part), gradient in zip(asked, found, strict=True):
                    if gradient is not None:
                        part.add_(gradient)
        # A loss may overflow where its gradient does not.
        is_broken = ~torch.stack(values).isfinite().all()
        for own in answers:
            _average(own.div_(len(values)).masked_fill_(is_broken.to(own.device), torch.nan))
        self._record(answers)

    def _record(self, answers: Sequence[Tensor]) -> None:
        """Note the steepness of every direction and move; stays on the device. `answers` (any shape) are by group."""
        most = max(group.v.shape[1] for group in self._groups)
        values = []
        for group, own in zip(self._groups, answers, strict=True):
            unused, moves = group.steepness(own, of_reached=self._is_following)
            # A small matrix has fewer unused directions, and fewer slots.
            unused = nn.functional.pad(unused, (0, most - unused.shape[1]), value=-math.inf)
            moves = nn.functional.pad(moves, (0, self._most_slots - moves.shape[1]), value=math.nan)
            values.append(torch.cat([unused, moves], 1))
        self._readings.append((values, [*self._pending]))

    @property
    def _most_slots(self) -> int:
        """Slots of the matrix that has most."""
        return max(group.gate.shape[1] for group in self._groups)

    def _take(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return what was recorded since the last call: numbers, (matrices, P + S), and pending; one transfer."""
        readings, self._readings = self._readings, []
        if not readings:
            return []
        order = [place for group in self._groups for place in group.rows]
        device = readings[0][0][0].device
        rows = torch.stack([torch.cat([own.to(device, torch.float64) for own in values]) for values, _ in readings])
        numbers = np.empty(tuple(rows.shape))
        numbers[:, order] = rows.cpu().numpy()
        return [(numbers[step], np.array(pending)) for step, (_, pending) in enumerate(readings)]

    def take_readings(self) -> list[Reading]:
        """Return what the batches since the last call said of the unused directions; one transfer to the host."""
        readings = []
        for numbers, pending in self._take():
            unused = np.full((len(numbers), UNUSED), -np.inf)
            found = numbers.shape[1] - self._most_slots
            unused[:, :found] = numbers[:, :found]
            readings.append(Reading(unused, numbers[:, found:], pending))
        return readings

    # The trial -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def take_apart(self) -> np.ndarray:
        """Take the updates apart into singular directions; return σ_k, (matrices, K), NaN where there is none."""
        pairs = self.pairs(self._all)
        most = max(matrix.leading_slots for matrix in self._all)  # those of `combine` may be more than a trial has
        for group in self._groups:
            b, a = self._stacked(group, pairs, max(most, self._live.config.trial_components))
            u, sizes, v = singular_directions(b, a)
            group.follow(u, v, sizes)
        return self._sizes

    @property
    def _sizes(self) -> np.ndarray:
        """σ_k of the directions that are asked about, (matrices, K); NaN where there is none."""
        sizes = np.zeros((len(self._all), max(group.sizes.shape[1] for group in self._groups)))
        for group in self._groups:  # a small matrix has fewer slots
            sizes[group.rows, : group.sizes.shape[1]] = group.sizes.double().cpu().numpy()
        return np.where(sizes > 0, sizes, np.nan)

    def ask_at(self, strength: float) -> None:
        """From now on ask about these directions, which turn no more, with all updates at `strength`."""
        self._strength, self._is_following, self._readings = strength, False, []
        self._ask()

    def take_credits(self) -> list[np.ndarray]:
        """Return credit_k = −s σ_k u_kᵀ G v_k by batch since the last call, (matrices, K); NaN where σ_k is 0.

        Infinite where a batch overflowed.
        """
        size = self._scale * self._sizes
        return [np.nan_to_num(numbers[:, : size.shape[1]], nan=np.inf) * size for numbers, _ in self._take()]

    @torch.no_grad()
    def keep(self, kept: np.ndarray, share: float = 1.0) -> None:
        """Keep `share` of these singular directions, (matrices, K), and ask about the others at strength 0.

        A direction that stays is split as at its birth: a = ℓ v, b = share σ u / ℓ, with ℓ = √(2/3K) where K stay in
        the matrix.
        """
        self._strength, self._readings = 1.0, []
        pairs = self.pairs(self._all)
        starts: list[SlotStart] = []
        for group, row, place in self._rows():
            if not self._all[place].is_frozen:
                stays = kept[place].nonzero()[0].tolist()
                starts += self._split_anew(group, row, stays, share, pairs[place])
                group.sizes[row, stays] = 0
        start_slots(self._optimizer, starts)
        self.release_pairs()
        self._ask()

    def _split_anew(
        self, group: Directions, row: int, kept: Sequence[int], share: float, pair: Pair
    ) -> list[SlotStart]:
        """Fill the slots of a matrix with these of its singular directions; return how the optimizer is to begin.

        Args:
            group: The group of the matrix.
            row: Its row there.
            kept: The directions.
            share: By which they are multiplied.
            pair: The slots, b (m, S) and a (S, n).
        """
        matrix = self._all[group.rows[row]]
        self._put(group, row, kept, torch.full((len(kept),), share), pair)
        starts = _starts(matrix, range(len(matrix.born)), matrix.slots)
        matrix.occupy_first(len(kept))
        return starts

    def _put(self, group: Directions, row: int, kept: Sequence[int], shares: Tensor, pair: Pair) -> None:
        """Write singular directions of a matrix, `shares` (K,) of each, into its slots, b (m, S) and a (S, n)."""
        b, a = torch.zeros_like(pair[0]), torch.zeros_like(pair[1])
        length = row_length(len(kept))
        sizes = shares.to(group.sizes) * group.sizes[row, kept]
        b[:, : len(kept)] = (sizes / length * group.u[row, kept].mT).to(b)
        a[: len(kept)] = (length * group.v[row, kept]).to(a)
        self._all[group.rows[row]].layer.start_pair(self._adapter_name, a, b)

    # The end of growth -----------------------------------------------------------------------------------------------

    def set_aside(self) -> None:
        """Keep what is followed for `put_back`."""
        for group in self._groups:
            group.set_aside()

    @torch.no_grad()
    def halve(self, halved: np.ndarray) -> None:
        """Put these singular directions, (matrices, K), at half strength, and ask about all of them."""
        pairs, exists = self.pairs(self._all), np.isfinite(self._sizes)
        for group, row, place in self._rows():
            if halved[place].any():
                self._whole[place] = [x.detach().clone() for x in pairs[place]]
                every = exists[place].nonzero()[0].tolist()
                shares = torch.from_numpy(np.where(halved[place, every], 0.5, 1.0))
                self._put(group, row, every, shares, pairs[place])
        self.release_pairs()
        self.ask_at(1.0)

    @torch.no_grad()
    def drop(self, dropped: np.ndarray) -> None:
        """Take the `dropped` directions away, (matrices, K); matrices without any are as they were before `halve`."""
        pairs, stays = self.pairs(self._all), np.isfinite(self._sizes) & ~dropped
        starts: list[SlotStart] = []
        for group, row, place in self._rows():
            if dropped[place].any():
                starts += self._split_anew(group, row, stays[place].nonzero()[0].tolist(), 1.0, pairs[place])
                self._whole.pop(place, None)
        self.put_back()
        start_slots(self._optimizer, starts)
        self.release_pairs()

    @torch.no_grad()
    def put_back(self) -> None:
        """Let the matrices that are halved still, and what is followed, be as they were; no collective is called."""
        for place, (b, a) in self._whole.items():
            self._all[place].layer.start_pair(self._adapter_name, a, b)
        self._whole = {}
        for group in self._groups:
            group.take_up()
        self._strength, self._is_following, self._readings = 1.0, True, []
        self._ask()

    @torch.no_grad()
    def shorten(self, share: float) -> None:
        """Multiply what trains by `share`."""
        for matrix, (b, a) in zip(self._all, self.pairs(self._all), strict=True):
            if not matrix.is_frozen:
                matrix.layer.start_pair(self._adapter_name, a.detach().clone(), b.detach() * share)
        self.release_pairs()

    # Unused directions -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def follow_unused(self, taken: Sequence[tuple[SlotMatrix, int]]) -> None:
        """Follow unused directions: the first that were dropped and are not among the `taken`, then random ones."""
        gone = {(matrix.index, direction) for matrix, direction in taken}
        for group in self._groups:
            u, v = self._random_directions(group)
            for row, (place, sizes) in enumerate(zip(group.rows, group.sizes.tolist(), strict=True)):
                left = [k for k, size in enumerate(sizes) if size and (place, k) not in gone][: u.shape[1]]
                u[row, : len(left)], v[row, : len(left)] = group.u[row, left], group.v[row, left]
            group.follow(u, v)
        self._is_following, self._readings = True, []
        self._ask()

    # Births ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def bear(self, births: Sequence[tuple[SlotMatrix, int]]) -> list[SlotMatrix]:
        """Start a component of each matrix along a direction that is followed: a = v √(2/3K), b = 0.

        K is the number of components that the matrix then trains. The optimizer's averages for the slot begin at zero,
        its averages of squares at those of the slots that were in use.

        Args:
            births: The matrices, and the number of the direction.

        Returns:
            The matrices whose oldest component was merged to make room, once for each.
        """
        where = {place: (group, row) for group, row, place in self._rows()}
        merged = []
        starts: list[SlotStart] = []
        directions: dict[int, list[int]] = {}
        for matrix, direction in births:
            directions.setdefault(matrix.index, []).append(direction)
        matrices = [self._all[place] for place in directions]
        for matrix, (b, a) in zip(matrices, self.pairs(matrices), strict=True):
            group, row = where[matrix.index]
            b, a = b.detach().clone(), a.detach().clone()
            before, new = matrix.slots, []
            together = len(before) + len(directions[matrix.index])
            length = row_length(min(together, len(matrix.born)))
            for direction in directions[matrix.index]:
                slot, is_taken = matrix.slot_for_birth()
                if is_taken:
                    oldest = slice(slot, slot + 1)
                    matrix.layer.finished(self._adapter_name).append(b[:, oldest] * self._scale, a[oldest])
                    merged.append(matrix)
                b[:, slot] = 0
                a[slot] = (length * group.v[row, direction]).to(a)
                matrix.occupy(slot)
                new.append(slot)
                group.forget(row, direction)
            starts += _starts(matrix, new, before)
            matrix.layer.start_pair(self._adapter_name, a, b)
        start_slots(self._optimizer, starts)
        self.release_pairs()
        return merged

    def stop_following(self) -> None:
        """Ask about nothing while the slots train in the trial, at full strength."""
        self._strength, self._readings = 1.0, []
        for group in self._groups:
            group.follow(group.u[:, :0], group.v[:, :0])
        self._ask()

    def follow_anew(self) -> None:
        """Follow unused directions again, from random ones on."""
        for group in self._groups:
            group.follow(*self._random_directions(group))
        self._is_following, self._readings = True, []
        self._ask()

    @torch.no_grad()
    def note_moves(self) -> None:
        """Note how every component has moved since the last call."""
        pairs = self.pairs(self._all)
        known = [
            [born is not None and born == noted for born, noted in zip(matrix.born, self._noted[place], strict=True)]
            for place, matrix in enumerate(self._all)
        ]
        for group in self._groups:
            used = max(self._all[place].leading_slots for place in group.rows)
            rows = [known[place][:used] for place in group.rows]
            mask = torch.tensor(rows, dtype=torch.bool, device=group.b.device)
            group.note_moves(*self._stacked(group, pairs, used), mask, self._scale)
        self._noted = [[*matrix.born] for matrix in self._all]
        self._pending = [sum(known[matrix.index]) < len(matrix.slots) for matrix in self._all]

    def _stacked(self, group: Directions, pairs: Sequence[Pair], count: int) -> Pair:
        """Return the first slots of a group of all `pairs`, b (m, S) and a (S, n): bᵀ (L, K, m) and a (L, K, n)."""
        own = [pairs[place] for place in group.rows]
        return torch.stack([b.detach()[:, :count].mT.to(group.b) for b, _ in own]), torch.stack(
            [a.detach()[:count].to(group.a) for _, a in own]
        )

    # Saved and restored ----------------------------------------------------------------------------------------------

    def state(self, draw: int, pairs: Sequence[Pair]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what an exact resume needs of the matrices; see `GrowingMatrices.state`.

        Args:
            draw: Not used.
            pairs: The slots of all matrices, b (m, S) and a (S, n), whole.
        """
        state, tensors = super().state(draw, pairs)
        for index, group in enumerate(self._groups):
            tensors.update({f"directions.{index}.{name}": tensor for name, tensor in group.state().items()})
            for step, (values, _) in enumerate(self._readings):
                tensors[f"reading.{step}.{index}"] = values[index].clone()
        state["strength"], state["is_following"] = self._strength, self._is_following
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
        for index, group in enumerate(self._groups):
            group.restore({name: tensors[f"directions.{index}.{name}"] for name in group.KEPT}, self._scale)
        self._strength = state["strength"]
        self._is_following = state["is_following"]
        self._noted = [[*noted] for noted in state["noted"]]
        self._pending = [*state["pending"]]
        self._readings = [
            ([tensors[f"reading.{step}.{index}"].to(group.b) for index, group in enumerate(self._groups)], [*pending])
            for step, pending in enumerate(state["readings"])
        ]
        self._ask()


def row_length(components: int) -> float:
    """Return the length of a that a component begins with, √(2 / 3K), where a matrix trains K `components`.

    Adam moves every b as far as any other, whatever its gradient. So K components along directions that are orthogonal
    would move a matrix √K times as far as one does, and a learning rate that suits one would be too large for many.
    For K = 2 the entries of a are as large as Kaiming's.
    """
    return math.sqrt(2 / (3 * max(components, 1)))


def _starts(matrix: SlotMatrix, slots: Sequence[int], others: Sequence[int]) -> list[SlotStart]:
    """Return `slots` of both factors, with which the optimizer is to begin anew; `others` were in use."""
    return [SlotStart(parameter, slots, dim, others) for parameter, dim in zip(matrix.pair, (1, 0), strict=True)]


def _require_reached(gradients: Sequence[Tensor | None]) -> None:
    """Raise if no leaf got a gradient, of any shape, from a held-out batch."""
    if all(gradient is None for gradient in gradients):
        raise bad_value(
            "checkpoint",
            "use_reentrant=True",
            "no gradient of held-out examples reaches a growing layer: the model checkpoints activations by itself, "
            "and a reentrant backward cannot be asked; call checkpoint with use_reentrant=False",
        )


def _average(numbers: Tensor) -> None:
    """Replace numbers, any shape, by their mean over all processes: what DistributedDataParallel does to gradients."""
    if is_distributed():
        dist.all_reduce(numbers.div_(world_size()))
