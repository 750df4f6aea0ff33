"""Attention over a key/value cache: _flash_attn_kvcache_, which has no derivative."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._autograd import call_operator, forward_only
from .attention import is_sdpa_replaced, lse_like, out_like

_ops = torch.ops.anyflash
_NO_GRADIENT = (
    "q, k, v: attention over a key/value cache has no gradient, but a backward went through its "
    "result; expected a call under torch.no_grad(), or anyflash.attention without a cache"
)


class KVCacheCall(NamedTuple):
    """What _flash_attn_kvcache_ is called with, in its order. Meaning: schemas.def."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None
    v: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    cache_seqlens: Tensor | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    block_table: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    softmax_scale: float
    causal: bool
    window_size_left: int
    window_size_right: int
    softcap: float
    rotary_interleaved: bool
    return_lse: bool
    backend: int


def _fake(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
    call = KVCacheCall(*arguments, **named)
    return out_like(call.q, call.v_cache), lse_like(call.q, False)


FAKES = {"_flash_attn_kvcache_": _fake}

_without_gradient = forward_only(_ops._flash_attn_kvcache_.default, _NO_GRADIENT)
DIFFERENTIABLE = {"_flash_attn_kvcache_": _without_gradient}


def attend_over_cache(call: KVCacheCall) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse) of a public function's call."""
    if is_sdpa_replaced():
        from .context_parallel import refuse_in_region

        refuse_in_region("attention_kvcache")
    tensors = (x for x in call if isinstance(x, Tensor))
    return call_operator(_ops._flash_attn_kvcache_.default, _without_gradient, call, *tensors)
