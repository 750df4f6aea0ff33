"""flash_attn._missing: what anyflash cannot provide is absent, and asking says what works."""

from __future__ import annotations

import sys
import types

import pytest
from flash_attn._missing import absent

NAMES = {"rotary_kernel": "a Triton kernel; apply_rotary computes the same on every device"}


@pytest.fixture
def module(monkeypatch):
    module = types.ModuleType("flash_attn_stand_in")
    module.__getattr__ = absent(module.__name__, NAMES)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_absent_names_are_absent(module):
    assert not hasattr(module, "rotary_kernel") and not hasattr(module, "other")
    assert getattr(module, "rotary_kernel", 7) == 7
    exec("from flash_attn_stand_in import *", {})


def test_asking_says_what_works(module):
    with pytest.raises(AttributeError, match="rotary_kernel.*apply_rotary computes the same"):
        module.rotary_kernel  # noqa: B018
    with pytest.raises(
        ImportError, match="rotary_kernel.*apply_rotary computes the same"
    ) as caught:
        from flash_attn_stand_in import rotary_kernel  # noqa: F401
    assert caught.value.name == "flash_attn_stand_in"


def test_other_names_fail_as_ever(module):
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        module.other  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'other'"):
        from flash_attn_stand_in import other  # noqa: F401
