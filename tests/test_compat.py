"""Names of other packages that AROMA overrides are there."""

from __future__ import annotations

import pytest
from peft.tuners.lora import LoraModel
from torch import nn

from aroma.tuner.finished import FinishedComponents
from aroma.tuner.model import _OVERRIDDEN, AromaModel, register


def test_all_private_methods_that_are_overridden_are_known() -> None:
    private = {name for name in vars(AromaModel) if name.startswith("_") and not name.startswith(("__", "_abc"))}
    assert private & {*dir(LoraModel)} == {*_OVERRIDDEN}


@pytest.mark.parametrize("name", _OVERRIDDEN)
def test_a_peft_without_one_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renamed there, AROMA's own would never be called."""
    for owner in LoraModel.__mro__:
        if name in vars(owner):
            monkeypatch.delattr(owner, name)
    with pytest.raises(ImportError, match=rf"^peft [0-9.]+: LoraModel has no {name}; pip install 'peft>="):
        register()


def test_torch_asks_modules_for_their_state_by_the_names_that_are_overridden() -> None:
    names = ("_save_to_state_dict", "_load_from_state_dict")
    assert all(name in vars(FinishedComponents) and hasattr(nn.Module, name) for name in names)
