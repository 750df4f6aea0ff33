"""The Python provider: the operators of schemas.def for torch 2.0 and later, where the binary
cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import _defs
from .._guards import isolated
from . import attention, flash_attn_api, kvcache, mlp

_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        attention._flash_attn_forward,
        attention._flash_attn_backward,
        kvcache._flash_attn_kvcache_,
        mlp._bias_activation_forward,
        mlp._bias_activation_backward,
        mlp._fused_mlp_forward,
        mlp._fused_mlp_backward,
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


def register(library: torch.library.Library) -> None:
    """Defines every operator of schemas.def, those of attention with kernels on the keys of all
    devices; the others have theirs from _operators/, whichever provider runs.

    Raises:
        RuntimeError: an operator of that name exists already.
    """
    for operator in _defs.operators():
        library.define(operator.schema)
        if operator.where == "everywhere":
            kernel = isolated(_IMPLEMENTATIONS[operator.name])
            for key in _defs.device_keys():
                library.impl(operator.name, kernel, key)
