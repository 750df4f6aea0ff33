"""flash_attn._missing: what anyflash cannot provide is absent, and asking says what works."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

import pytest
from flash_attn._missing import absent
from test_surface import OFFERED, SURFACE

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


KERNELS = [(module, name) for module in OFFERED for name in SURFACE[module]["triton_kernels"]]
PRIVATE = [
    ("flash_attn.flash_attn_triton", "_flash_attn_forward"),
    ("flash_attn.ops.layer_norm", "_dropout_add_layer_norm_subset_backward"),
    ("flash_attn.ops.triton.layer_norm", "_layer_norm_fwd_impl"),
    ("flash_attn.ops.triton.linear", "get_configs_io_bound"),
    ("flash_attn", "cute"),
]


@pytest.mark.parametrize("module, name", KERNELS + PRIVATE)
def test_upstream_names_that_anyflash_lacks(module, name):
    """The activations of k_activations are functions here; every other kernel is absent."""
    if module == "flash_attn.ops.triton.k_activations":
        assert callable(getattr(importlib.import_module(module), name))
        return
    assert not hasattr(importlib.import_module(module), name)
    with pytest.raises(ImportError, match=f"{name}: anyflash does not provide it: .*on every dev"):
        exec(f"from {module} import {name}", {})


def test_clients_probe_for_flash_attention_4():
    assert importlib.util.find_spec("flash_attn.cute") is None
    with pytest.raises(ModuleNotFoundError, match="flash_attn.cute"):
        importlib.import_module("flash_attn.cute")
