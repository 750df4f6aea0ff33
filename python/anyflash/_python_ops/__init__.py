"""The Python provider: the operators of schemas.def for torch 2.0 and later, where the binary
cannot be used."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .. import _defs
from .._guards import BelowAutograd, WithoutAutocast
from . import attention, flash_attn_api, kvcache, mlp

_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        attention.attention_forward,
        attention.attention_backward,
        kvcache.attention_kvcache_,
        mlp.bias_activation,
        mlp.bias_activation_backward,
        mlp.fused_mlp_forward,
        mlp.fused_mlp_backward,
        attention.refuse_gradient,
        flash_attn_api.flash_attn_func,
        flash_attn_api.flash_attn_kvpacked_func,
        flash_attn_api.flash_attn_qkvpacked_func,
        flash_attn_api.flash_attn_varlen_func,
        flash_attn_api.flash_attn_varlen_kvpacked_func,
        flash_attn_api.flash_attn_varlen_qkvpacked_func,
        flash_attn_api.flash_attn_with_kvcache,
        flash_attn_api.fused_mlp,
    )
}


def _isolated(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a kernel: what it calls is neither recorded by autograd nor touched by
    autocast."""

    @functools.wraps(function)
    def kernel(*args: Any) -> Any:
        with BelowAutograd(), WithoutAutocast():
            return function(*args)

    return kernel


def register(library: torch.library.Library) -> None:
    """Defines every operator of schemas.def with kernels on the CPU and CUDA keys.

    Raises:
        RuntimeError: an operator of that name exists already.
    """
    for operator in _defs.operators():
        library.define(operator.schema)
        kernel = _isolated(_IMPLEMENTATIONS[operator.name])
        for key in ("CPU", "CUDA"):
            library.impl(operator.name, kernel, key)
