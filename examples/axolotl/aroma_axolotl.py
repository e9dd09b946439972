"""AROMA in Axolotl: the adapter `aroma`, and the callback that lets it grow.

Put this file where Python finds it (PYTHONPATH, or beside the configuration), and write into the configuration:

    plugins: [aroma_axolotl.AromaPlugin]
    adapter: aroma
    aroma:              # any fields of AromaConfig
      inner_tolerance: 0.1
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel

from aroma import AromaCallback, AromaConfig


class AromaArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration: the fields of AromaConfig, which checks them itself."""

    aroma: dict[str, Any] | None = None


class AromaPlugin(BasePlugin):
    """Makes the growing adapter where the configuration says `adapter: aroma`."""

    def get_input_args(self) -> str:
        """Return where Axolotl finds the fields of the configuration."""
        return f"{__name__}.AromaArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Return the adapter's name, so that Axolotl accepts it."""
        return [AdapterCapabilities(name="aroma")]

    def load_adapter(self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False) -> Any:
        """Return the model with its adapter, and the adapter's configuration; None for other adapters."""
        if cfg.adapter != "aroma":
            return None
        config = AromaConfig(**{"task_type": "CAUSAL_LM", **(cfg.aroma or {})})
        if config_only:
            return None, config
        if cfg.lora_model_dir and inference:
            return PeftModel.from_pretrained(model, cfg.lora_model_dir), config
        growing = get_peft_model(model, config)
        if cfg.lora_model_dir:  # grow it further
            growing.load_adapter(cfg.lora_model_dir, "default", is_trainable=True)
        return growing, config

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """Return the callback that steps the growth."""
        return [AromaCallback()] if cfg.adapter == "aroma" else []
