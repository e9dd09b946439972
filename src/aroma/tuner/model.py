"""The PEFT tuner: puts growing layers into a model, and writes and reads them as a plain LoRA adapter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import peft
import torch
from peft import mapping as peft_mapping
from peft.tuners.lora import LoraModel
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..about import about_model
from ..errors import ConfigError
from ..reset import fresh_component
from ..sharding import gathered, is_partitioned, is_sharded, shard_like
from ..state import STATE_FORMAT, is_component, module_name
from .config import PEFT_TYPE, AromaConfig, Collected
from .finished import with_pair
from .graph import GraphKeeper, hide_from_ddp
from .layer import AromaLinear, LiveAdapter, live_adapter
from .layout import components_in, finished_tensors, plain_factors

HEADS = {"SEQ_CLS": SEQ_CLS_HEAD_NAMES, "TOKEN_CLS": SEQ_CLS_HEAD_NAMES, "QUESTION_ANS": ["qa_outputs"]}
"""Names of the heads that PEFT trains whole, by task type."""
_OVERRIDDEN = (
    *("_check_target_module_exists", "_create_new_module", "_cast_adapter_dtype", "_check_merge_allowed"),
    *("_get_adapter_state_dict", "_remap_adapter_state_dict_for_load"),
)
"""Private methods of LoraModel; renamed there, those here would never be called."""
REFERENCE = "ref"
"""What TRL's trainers call the adapter that they keep as it was before the training."""


class AromaModel(LoraModel):
    """Tuner whose adapters grow; made by `peft.get_peft_model(model, AromaConfig(...))`.

    `add_adapter` puts further ones beside the first, over the same frozen weights. Each has components, head, seed and
    controller of its own. The active one (`set_adapter`) computes and trains, and the others rest.

    Args:
        model: Model to adapt; its weights are frozen and never written.
        config: An `AromaConfig`.
        adapter_name: Name of the adapter.

    Raises:
        ConfigError: A target of a kind that cannot grow.
    """

    tuner_layer_cls = AromaLinear

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put growing layers into `model`.

        Raises:
            ConfigError: A module that `target_modules` matches cannot grow; the model is as it was.
        """
        config = self.peft_config[adapter_name]
        # TRL's trainers keep the adapter as it was before the training, made of the same configuration object, and
        # copy its parameters. They know nothing of finished components.
        same = [name for name, other in self.peft_config.items() if other is config and name != adapter_name]
        original = same[0] if same and adapter_name == REFERENCE else None
        if original is not None:
            self.peft_config[adapter_name] = replace(config, inference_mode=True)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except ConfigError:
            _remove_adapter(model, adapter_name)
            raise
        self._bring_to_life(model, adapter_name)
        if original is not None:
            _copy_adapter(model, original, adapter_name)

    def _bring_to_life(self, model: nn.Module, adapter_name: str) -> None:
        """Give the new layers of an adapter their live state and their first pair."""
        live = LiveAdapter(self.peft_config[adapter_name])
        for index, layer in enumerate(aroma_layers(model, adapter_name).values()):
            layer.live[adapter_name] = live
            _, a = layer.pair(adapter_name)
            if not a.is_meta:
                layer.start_pair(adapter_name, _first_component(live, index, a))
        if not hasattr(self, "_graph_keeper"):
            self._graph_keeper = GraphKeeper()
            # PEFT calls one or the other, depending on the task.
            for module in (self, model):
                module.register_forward_hook(self._graph_keeper)
        self._graph_keeper.layers = [*aroma_layers(model).values()]
        hide_from_ddp(model, _layers_by_key(model, None))

    @staticmethod
    def _check_target_module_exists(config: AromaConfig, key: str) -> Any:
        # Of these tasks PEFT makes the head trainable when the other layers grow already.
        if {*key.split(".")}.intersection(HEADS.get(config.task_type, ())):
            return False
        return LoraModel._check_target_module_exists(config, key)

    @staticmethod
    def _create_new_module(lora_config: AromaConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        is_conv1d = isinstance(target, Conv1D)
        return AromaLinear(target, adapter_name, config=lora_config, is_target_conv_1d_layer=is_conv1d, **kwargs)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Once, when the adapter is made. PEFT casts again at every load_adapter, which would replace the parameters
        # that the optimizer holds.
        live = live_adapter(self, adapter_name)
        if not live.dtype_is_chosen:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            for layer in aroma_layers(self, adapter_name).values():
                # PEFT casts parameters only; the storage, still empty, has the dtype of the base layer.
                layer.finished(adapter_name).to(layer.pair(adapter_name)[1].dtype)
            live.dtype_is_chosen = True

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for name, layer in aroma_layers(self.model).items():
            if layer.is_quantised or is_sharded(layer.get_base_layer().weight):
                raise ConfigError(
                    f"{name}: its weight is quantised or sharded, and cannot be merged in place; save the adapter and "
                    "merge it in one process in 16 or 32 bits (aroma export --merged)"
                )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: AromaConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Return the plain LoRA tensors, A (R, n) and B (m, R), of every module with R > 0.

        All ranks call this.
        """
        layers = _layers_by_key(model, adapter_name)
        live = live_adapter(model, adapter_name)
        _make_whole(model, state_dict)
        parts = {key: components_in(state_dict, key, layer, adapter_name) for key, layer in layers.items()}
        updates = {key: with_pair(*part, config.scale) for key, part in parts.items()}
        saved: dict[str, Tensor] = {}
        for key, (B, A) in plain_factors(updates).items():
            saved |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
        run: dict[str, Any] = {"state": None, "tensors": {}}
        if live.controller is not None:
            # Now, while all ranks are here and the pairs are whole: rank 0 alone writes the configuration.
            run = live.controller.state_dict([pair for _, pair in parts.values()])
        modules = {
            module_name(key): {"shape": (layer.out_features, layer.in_features), "rank": len(updates[key][1])}
            for key, layer in layers.items()
        }
        state = {
            "format": STATE_FORMAT,
            "config": live.method(),
            "modules": modules,
            "about": about_model(model, config.task_type),
            "controller": run["state"],
        }
        fan_in_fan_out = any(layer.fan_in_fan_out for layer in layers.values())
        names = {module_name(key).replace(".base_layer", "") for key, _ in model.named_modules()}
        # An A: PEFT replaces tensors that are not contiguous.
        config.collect(Collected(state, run["tensors"], names, fan_in_fan_out), next(iter(saved.values())))
        # PEFT next adds what it finds of a target that is an embedding or an output layer: its base layer alone.
        for name in [name for name in state_dict if name.rpartition(".lora_")[0] in layers]:
            del state_dict[name]
        return {name.removesuffix("weight") + f"{adapter_name}.weight": tensor for name, tensor in saved.items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: AromaConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the state-dict entries of a growing adapter for plain LoRA tensors, of any shape by name."""
        layers = _layers_by_key(model, adapter_name)
        live = live_adapter(model, adapter_name)
        entries = finished_tensors(layers, adapter_name, state_dict)
        for index, (key, layer) in enumerate(layers.items()):
            b, a = layer.pair(adapter_name)
            if a.is_meta:  # low_cpu_mem_usage: the pair starts now
                entries[f"{key}.lora_A.{adapter_name}.weight"] = _first_component(live, index, a)
                entries[f"{key}.lora_B.{adapter_name}.weight"] = torch.zeros(b.shape)
        # Loaded components are finished, until a controller takes one back into the pair.
        for layer in layers.values():
            layer.unfreeze(adapter_name)
        if live.controller is not None:
            live.controller.invalidate()
        parameters = dict(model.named_parameters())
        others = {
            key: shard_like(value, parameters.get(key, value))
            for key, value in state_dict.items()
            if not is_component(key)
        }
        return {**others, **entries}

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: raises ConfigError."""
        raise ConfigError(
            "add_weighted_adapter: a growing adapter cannot be combined; save it, and combine it in plain PEFT"
        )


def aroma_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, AromaLinear]:
    """Return the growing layers of `model` by the names their modules have in the base model, in module order.

    Args:
        model: A PeftModel, an AromaModel, or a model with injected layers, wrapped or not.
        adapter_name: Only layers that have this adapter.
    """
    return {module_name(key): layer for key, layer in _layers_by_key(model, adapter_name).items()}


def _first_component(live: LiveAdapter, index: int, a: Tensor) -> Tensor:
    """Return the a (r, n) that a new adapter begins with; `a` is its pair's."""
    return fresh_component(live.seed, 1, index, (len(a), a.shape[1]))


def _layers_by_key(model: nn.Module, adapter_name: str | None) -> dict[str, AromaLinear]:
    """Return the growing layers by the names that they have in the state dict of `model`."""
    return {
        key: module
        for key, module in model.named_modules()
        if isinstance(module, AromaLinear) and (adapter_name is None or adapter_name in module.lora_A)
    }


def _make_whole(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Gather, in place, sharded parameters that train: pairs, and heads, which PEFT reads after us; any shape."""
    sharded: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name in state_dict and (parameter.requires_grad or ".lora_" in name):
            held = state_dict[name]
            if is_sharded(held):
                sharded[name] = held
            # Only if it is the parameter itself, which ZeRO-3 may hold whole temporarily; DeepSpeed collects copies.
            elif is_partitioned(parameter) and held.data_ptr() == parameter.data_ptr():
                sharded[name] = parameter
    state_dict.update(zip(sharded, gathered([*sharded.values()]), strict=True))


def _remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Put the layers as they were in the places of those that have no other adapter."""
    for key, layer in _layers_by_key(model, adapter_name).items():
        layer.delete_adapter(adapter_name)
        if not layer.lora_A:
            parent, _, name = key.rpartition(".")
            setattr(model.get_submodule(parent), name, layer.get_base_layer())


def _copy_adapter(model: nn.Module, original: str, copy: str) -> None:
    """Give the adapter `copy` the components of `original`; its pairs do not train."""
    live = live_adapter(model, copy)
    live.seed, live.ever_controlled = live_adapter(model, original).seed, live_adapter(model, original).ever_controlled
    for layer in aroma_layers(model, copy).values():
        finished = layer.finished(original)
        layer.finished(copy).append(finished.B, finished.A)
        b, a = layer.pair(original)
        layer.start_pair(copy, a.detach(), b.detach())


def register() -> None:
    """Enter the tuner in PEFT's mappings; their keys are strings, so no enum is changed.

    Raises:
        ImportError: This PEFT lacks a method that the tuner overrides.
    """
    if missing := [name for name in _OVERRIDDEN if not hasattr(LoraModel, name)]:
        raise ImportError(f"peft {peft.__version__}: LoraModel has no {missing[0]}; pip install 'peft>=0.21,<0.22'")
    peft_mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = AromaConfig
    peft_mapping.PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = AromaModel
    peft_mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = "lora_"
