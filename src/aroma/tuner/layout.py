"""The plain LoRA form of a growing adapter: how it is written at any moment, and how it is read back.

Ranks differ between modules, so the plain form names every module with a rank above 0 as a target and gives its rank.
The scale is folded into B, so alpha equals the rank everywhere, and an engine that reads only `r` and `lora_alpha`
scales by 1.

The matrices of experts have one rank for each parameter in PEFT: the largest, the others are padded with zeros. A
module of experts is left out where all its ranks are 0. Parts of a fused weight are joined to one update.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from torch import Tensor

from ..errors import CheckpointError
from ..files import tensors_digest
from ..sharding import Factors
from .experts import MATRICES, experts_of, pack, peft_stems, unpack
from .forms import LINEAR, Form, is_component
from .parts import join, parts_of, split

if TYPE_CHECKING:
    from .config import AromaConfig
    from .layer import AromaLinear

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class PlainAdapter:
    """What the files beside an adapter's collected tensors need to know of them.

    Args:
        ranks: Rank of every matrix that has an update, by its name; of experts without padding.
        shapes: (m, n) of every growing matrix, also with rank 0.
        forms: Form of every growing matrix.
        trained: Whether any component in training has moved from its start.
        digest: `components_digest` of the tensors.
        fan_in_fan_out: Whether a base layer stores its weight as (n, m).
        modules: Rank of every module that has tensors, by its name.
        experts: Parameters that grow, by module of experts, in the order in which PEFT wraps them.
        padded: Rank of every parameter of experts that has tensors, by its name.
        parts: Number of the parts that grow, by module.
    """

    ranks: dict[str, int]
    shapes: dict[str, tuple[int, int]]
    forms: dict[str, Form]
    trained: bool
    digest: str
    fan_in_fan_out: bool
    modules: dict[str, int]
    experts: dict[str, list[str]]
    padded: dict[str, int]
    parts: dict[str, int]

    def lora_config(self, config: AromaConfig) -> LoraConfig:
        """Return the plain LoRA configuration of the adapter whose live configuration is `config`."""
        return plain_config(config, self.modules, self.padded, self.fan_in_fan_out)


def plain_config(
    config: AromaConfig, modules: Mapping[str, int], parameters: Mapping[str, int], fan_in_fan_out: bool
) -> LoraConfig:
    """Return a plain LoRA configuration.

    Args:
        config: The live one.
        modules: Rank of every module that has tensors, by its name.
        parameters: Rank of every parameter of experts that has tensors, padding included, by its name.
        fan_in_fan_out: Whether a base layer stores its weight as (n, m).
    """
    ranks = {**modules, **parameters}
    r = min(ranks.values())
    patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
    return LoraConfig(
        r=r,
        lora_alpha=r,
        lora_dropout=config.lora_dropout,
        target_modules=sorted(modules),
        target_parameters=sorted(parameters) or None,
        rank_pattern=dict(patterns),
        alpha_pattern=dict(patterns),
        fan_in_fan_out=fan_in_fan_out,
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=config.inference_mode,
    )


def plain_tensors(
    layers: Mapping[str, AromaLinear], adapter_name: str, state_dict: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], PlainAdapter]:
    """Collect the plain LoRA tensors of an adapter.

    Args:
        layers: Growing layers by their name in the state dict.
        adapter_name: Adapter to collect.
        state_dict: State dict of the whole model, from which pairs and finished components are taken; nothing that
            trains may be sharded in it.

    Returns:
        Tensors `<layer>.lora_A.<adapter>.weight` (R, n) and `<layer>.lora_B.<adapter>.weight` (m, R), or what the form
        of the layer has instead, of every module with R > 0, those of experts as PEFT packs them; and what is known of
        them. If all have rank 0, one module gets a zero component.
    """
    experts, parts = experts_of(layers), parts_of(layers)
    updates = {key: _whole_update(key, layer, adapter_name, state_dict) for key, layer in layers.items()}
    form = packed(updates, {key: layer.kind.form for key, layer in layers.items()}, experts, parts)
    tensors: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    for stem, (own, B, A) in form.held.items():
        tensors |= own.tensors(stem, B, A, adapter_name)
        saved |= own.tensors(stem, B, A)
    of_experts = {key for parameters in experts.values() for keys in parameters.values() for key in keys}
    return tensors, PlainAdapter(
        {matrix_name(key): len(A) for key, (_, A) in updates.items() if len(A)},
        {matrix_name(key): (layer.out_features, layer.in_features) for key, layer in layers.items()},
        {matrix_name(key): layer.kind.form for key, layer in layers.items()},
        any(bool(state_dict[f"{key}.lora_B.{adapter_name}.weight"].any()) for key in layers),
        components_digest(saved),
        any(layer.fan_in_fan_out for key, layer in layers.items() if key not in of_experts),
        {_module_name(key): rank for key, rank in form.modules.items()},
        {_module_name(module): [*parameters] for module, parameters in experts.items()},
        {_module_name(name): rank for name, rank in form.parameters.items()},
        {_module_name(module): len(keys) for module, keys in parts.items()},
    )


@dataclass(frozen=True)
class Packed:
    """The updates of matrices as a plain adapter holds them.

    Args:
        held: Form, B (m, R) and A (R, n) of every pair of tensors, by what their names begin with.
        modules: Rank of every module, by its name.
        parameters: Rank of every parameter of experts, padding included, by its name.
    """

    held: dict[str, tuple[Form, Tensor, Tensor]]
    modules: dict[str, int]
    parameters: dict[str, int]


def packed(
    updates: Mapping[str, Factors],
    forms: Mapping[str, Form],
    experts: Mapping[str, Mapping[str, Sequence[str]]],
    parts: Mapping[str, Sequence[str]],
    rank: int | None = None,
) -> Packed:
    """Put the updates of matrices into the form of a plain adapter; all names are as the caller has them.

    Args:
        updates: B (m, R) and A (R, n) of every matrix, also with R = 0.
        forms: Form of every matrix that is neither an expert's nor a part.
        experts: Names of the matrices of every parameter, by module of experts, both in PEFT's order.
        parts: Names of the parts of every module.
        rank: Rank that all modules and parameters get, padded with zeros. None: each has its own, and those of rank 0
            are left out; if all are, one gets a zero component, since PEFT refuses an adapter without targets.
    """
    within = {key for parameters in experts.values() for keys in parameters.values() for key in keys}
    within |= {key for keys in parts.values() for key in keys}
    whole = {key: (forms[key], *update) for key, update in updates.items() if key not in within}
    whole |= {module: (LINEAR, *join([updates[key] for key in keys])) for module, keys in parts.items()}
    held = {
        key: (form, B, A) if rank is None else (form, *padded(B, A, rank))
        for key, (form, B, A) in whole.items()
        if rank is not None or len(A)
    }
    stacks = [module for module in experts if rank is not None or _has_rank(experts[module], updates)]
    if not held and not stacks:
        stacks = [*experts][:1]
    if not held and not stacks:
        key, (form, B, A) = next(iter(whole.items()))
        held[key] = (form, *padded(B, A, 1))
    modules, parameters = {key: len(A) for key, (_, _, A) in held.items()}, {}
    for module in stacks:
        stems = peft_stems(module, [*experts[module]])
        for name, keys in experts[module].items():
            B, A = pack([updates[key] if rank is None else padded(*updates[key], rank) for key in keys])
            parameters[f"{module}.{name}"], held[stems[name]] = len(A) // len(keys), (LINEAR, B, A)
    return Packed(held, modules, parameters)


def _has_rank(parameters: Mapping[str, Sequence[str]], updates: Mapping[str, Factors]) -> bool:
    """Return whether a matrix of a module of experts, whose keys are given, has an update B (m, R), A (R, n)."""
    return any(len(updates[key][1]) for keys in parameters.values() for key in keys)


def pairs_of(layers: Mapping[str, AromaLinear], adapter_name: str, state_dict: Mapping[str, Tensor]) -> list[Factors]:
    """Return the components in training, b (m, r) and a (r, n), that a state dict of the whole model holds."""
    return [
        (state_dict[f"{key}.lora_B.{adapter_name}.weight"], state_dict[f"{key}.lora_A.{adapter_name}.weight"])
        for key in layers
    ]


def padded(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return B (m, R) and A (R, n) with components of zero up to `rank`: (m, rank) and (rank, n)."""
    wide, tall = B.new_zeros(B.shape[0], rank), A.new_zeros(rank, A.shape[1])
    wide[:, : B.shape[1]], tall[: A.shape[0]] = B, A
    return wide, tall


def uniform_config(
    config: Mapping[str, Any], names: Iterable[str], parameters: Iterable[str], rank: int
) -> dict[str, Any]:
    """Return the configuration of an adapter whose modules and parameters all have one rank, and the scale 1.

    Args:
        config: Its configuration with ranks of their own, as `adapter_config.json` has it.
        names: The modules.
        parameters: The parameters of experts.
        rank: The rank.
    """
    return {
        **config,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "target_modules": sorted(names),
        "target_parameters": sorted(parameters) or None,
        "use_rslora": False,
        "inference_mode": True,
    }


def components_digest(saved: Mapping[str, Tensor]) -> str:
    """Return a digest of the components (any shapes) in an adapter file; trained heads do not count."""
    return tensors_digest({_module_name(name): saved[name] for name in saved if is_component(name)})


def finished_tensors(
    layers: Mapping[str, AromaLinear], adapter_name: str, plain: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Turn the plain tensors of a saved adapter into the state-dict entries of a growing one.

    Everything saved becomes finished components, and the pair starts anew at b = 0. A resumed controller takes the
    component that was in training out again (`FinishedComponents.pop`). A module without tensors has rank 0.

    Args:
        layers: Growing layers by their name in the state dict.
        adapter_name: Adapter to load.
        plain: Saved tensors, A (R, n) and B (m, R) of linear layers, by their name in the file, with or without the
            `base_model.model.` prefix.

    Raises:
        CheckpointError: The tensors of a module do not fit it.
    """
    entries: dict[str, Tensor] = {}
    packed = _experts_updates(layers, plain) | _parts_updates(layers, plain)
    for key, layer in layers.items():
        b, a = layer.pair(adapter_name)
        B, A = packed[key] if key in packed else _saved_update(key, layer, plain)
        if not A.any() and not B.any():
            A, B = A[:0], B[:, :0]  # the placeholder of an adapter whose ranks are all 0
        entries[f"{key}.lora_finished.{adapter_name}.A"] = A.to(a.dtype)
        entries[f"{key}.lora_finished.{adapter_name}.B"] = B.to(a.dtype)
        entries[f"{key}.lora_A.{adapter_name}.weight"] = a.detach()
        entries[f"{key}.lora_B.{adapter_name}.weight"] = torch.zeros_like(b)
    return entries


def _experts_updates(layers: Mapping[str, AromaLinear], plain: Mapping[str, Tensor]) -> dict[str, Factors]:
    """Return the updates B_e (m, R_e), A_e (R_e, n) of experts' matrices in the plain tensors, by their keys."""
    found: dict[str, Factors] = {}
    for module, parameters in experts_of(layers).items():
        for name, stem in peft_stems(module, [*parameters]).items():
            A, B = _saved(plain, f"{stem}.lora_A.weight"), _saved(plain, f"{stem}.lora_B.weight")
            if A is None or B is None:
                continue
            keys = parameters[name]
            m, n = layers[keys[0]].out_features, layers[keys[0]].in_features
            if A.shape != (len(A), n) or B.shape != (m, len(A)) or len(A) % len(keys):
                raise CheckpointError(
                    f"{_module_name(module)}.{name}: components B {tuple(B.shape)}, A {tuple(A.shape)} do not fit "
                    f"{len(keys)} experts with {m} outputs and {n} inputs; make the adapter with the "
                    "target_parameters of the saved one"
                )
            found.update(zip(keys, unpack(B, A, len(keys)), strict=True))
    return found


def _parts_updates(layers: Mapping[str, AromaLinear], plain: Mapping[str, Tensor]) -> dict[str, Factors]:
    """Return the updates B_p (m_p, R_p), A_p (R_p, n) of parts of modules in the plain tensors, by their keys."""
    found: dict[str, Factors] = {}
    for module, keys in parts_of(layers).items():
        A, B = _saved(plain, f"{module}.lora_A.weight"), _saved(plain, f"{module}.lora_B.weight")
        if A is None or B is None or not (A.any() or B.any()):
            continue
        sizes, n = [layers[key].out_features for key in keys], layers[keys[0]].in_features
        updates = split(B, A, sizes) if A.shape == (len(A), n) and B.shape == (sum(sizes), len(A)) else None
        if updates is None:
            raise CheckpointError(
                f"{_module_name(module)}: components B {tuple(B.shape)}, A {tuple(A.shape)} are not those of parts "
                f"with {sizes} outputs; make the adapter with the split_modules of the saved one"
            )
        found.update(zip(keys, updates, strict=True))
    return found


def saved_stems(layers: Mapping[str, AromaLinear]) -> set[str]:
    """Return the keys under which a saved adapter holds the updates of `layers`."""
    experts, parts = experts_of(layers), parts_of(layers)
    stems = {stem for module, names in experts.items() for stem in peft_stems(module, [*names]).values()}
    return {key for key in layers if f".{MATRICES}." not in key} | stems | {*parts}


def _whole_update(
    key: str, layer: AromaLinear, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return B (m, R) and A (R, n) of one layer, the pair last if it has moved."""
    a = state_dict[f"{key}.lora_A.{adapter_name}.weight"]
    b = state_dict[f"{key}.lora_B.{adapter_name}.weight"]
    A = state_dict[f"{key}.lora_finished.{adapter_name}.A"].to(a)
    B = state_dict[f"{key}.lora_finished.{adapter_name}.B"].to(b)
    if not b.any():
        return B, A
    return torch.cat([B, b * layer.own_scaling[adapter_name]], dim=1), torch.cat([A, a], dim=0)


def matrix_name(key: str) -> str:
    """Return the name of a growing matrix for its key in a state dict."""
    return _module_name(key).replace(f".{MATRICES}.", ".")


def _saved_update(key: str, layer: AromaLinear, plain: Mapping[str, Tensor]) -> Factors:
    """Return B (m, R) and A (R, n) of one layer from saved tensors, any shape by name; R = 0 where there are none."""
    form = layer.kind.form
    A, B = (_saved(plain, f"{key}.{form.name(side)}") for side in "AB")
    if A is None or B is None:
        return torch.zeros(layer.out_features, 0), torch.zeros(0, layer.in_features)
    factors = form.read(A, B)
    if factors is None:
        raise CheckpointError(
            f"{_module_name(key)}: the saved components, A {tuple(A.shape)} and B {tuple(B.shape)}, are not those of "
            f"this {type(layer.get_base_layer()).__name__}; load the adapter into the model that it was trained on"
        )
    return factors


def _module_name(key: str) -> str:
    return key.removeprefix(PEFT_PREFIX)


def _saved(plain: Mapping[str, Tensor], name: str) -> Tensor | None:
    """Return a saved tensor of any shape by its name, with or without PEFT's prefix."""
    for candidate in (name, PEFT_PREFIX + name, _module_name(name)):
        if candidate in plain:
            return plain[candidate]
    return None
