"""What torch.utils.flop_counter counts for the operators: matrix products, as it counts those of
scaled_dot_product_attention: a mask hides nothing, packed sequences count by their lengths."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._after_import import AfterImport
from ._operators.attention import AttentionCall, BackwardCall
from ._operators.kvcache import KVCacheCall
from ._operators.mlp import FusedMLPCall

_MODULE = "torch.utils.flop_counter"


def _lengths(of: Tensor | None, longest: int, batch: int) -> list[int]:
    """Lengths on the host; those of a tensor without numbers are the longest."""
    from torch._subclasses.fake_tensor import FakeTensor

    if of is None or of.is_meta or isinstance(of, FakeTensor):
        return [longest] * batch
    return of.tolist()


def _pairs(call: AttentionCall | BackwardCall, capacity: int | None) -> int:
    """How many (query, key) pairs the sequences of a call have."""
    cu_seqlens_q, cu_seqlens_k, used = call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_k
    if cu_seqlens_q is None:
        batch, rows = call.q.shape[:2]
        queries = [rows] * batch
    else:
        batch = cu_seqlens_q.shape[0] - 1
        queries = _lengths(cu_seqlens_q.diff(), call.max_seqlen_q, batch)
    if used is None and cu_seqlens_k is not None:
        used = cu_seqlens_k.diff()
    longest = call.k.shape[1] if cu_seqlens_k is None else call.max_seqlen_k
    keys = _lengths(used, longest if capacity is None else capacity, batch)
    return sum(a * b for a, b in zip(queries, keys))


def forward_flops(call: AttentionCall) -> int:
    """q k^T and p v."""
    table = call.block_table
    pairs = _pairs(call, None if table is None else table.shape[1] * call.k.shape[1])
    return 2 * call.q.shape[-2] * pairs * (call.q.shape[-1] + call.v.shape[-1])


def backward_flops(call: AttentionCall | BackwardCall) -> int:
    """q k^T again, dout v^T, p^T dout, ds k and ds^T q."""
    pairs = _pairs(call, None)
    return 2 * call.q.shape[-2] * pairs * (3 * call.q.shape[-1] + 2 * call.v.shape[-1])


def _forward(*arguments: Any, out_val: Any = None, **named: Any) -> int:
    return forward_flops(AttentionCall(*arguments, **named))


def _backward(*arguments: Any, out_val: Any = None, **named: Any) -> int:
    return backward_flops(BackwardCall(*arguments, **named))


def _kvcache(*arguments: Any, out_val: Any = None, **named: Any) -> int:
    call = KVCacheCall(*arguments, **named)
    batch, rows, heads, head_dim = call.q.shape
    pages = 1 if call.block_table is None else call.block_table.shape[1]
    capacity = pages * call.k_cache.shape[1]
    new = 0 if call.k is None else call.k.shape[1]
    keys = sum(_lengths(call.cache_seqlens, capacity - new, batch)) + batch * new
    return 2 * heads * rows * keys * (head_dim + call.v_cache.shape[-1])


def _fused_mlp(*arguments: Any, out_val: Any = None, **named: Any) -> int:
    call = FusedMLPCall(*arguments, **named)
    rows = call.x.shape[:-1].numel()
    return 2 * rows * (call.weight1.numel() + call.weight2.numel())


def _fused_mlp_backward(
    dout: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    hidden: Tensor,
    *_: Any,
    out_val: Any = None,
) -> int:
    again = weight1.numel() if hidden.numel() == 0 else 0
    return 2 * x.shape[:-1].numel() * (2 * weight1.numel() + 2 * weight2.numel() + again)


FORMULAS: dict[str, Callable[..., int]] = {
    "_flash_attn_forward": _forward,
    "_flash_attn_backward": _backward,
    "_flash_attn_kvcache_": _kvcache,
    "_fused_mlp_forward": _fused_mlp,
    "_fused_mlp_backward": _fused_mlp_backward,
}
_waiting: list[tuple[Any, Callable[..., int]]] = []


def register_operators() -> None:
    """Those of this library."""
    for name, formula in FORMULAS.items():
        register(getattr(torch.ops.anyflash, name), formula)


def register(packet: Any, formula: Callable[..., int]) -> None:
    """Gives torch.utils.flop_counter the formula of an operator, at once or when it is imported.

    Args:
        packet: torch.ops.NAMESPACE.NAME.
        formula: FLOPs of (*arguments, out_val, **named).
    """
    _waiting.append((packet, formula))
    if len(_waiting) == 1:
        AfterImport(_MODULE, _hand_over)


def _hand_over(flop_counter: ModuleType) -> None:
    """To the module, if it is of torch 2.2 or later: before, formulas saw shapes alone."""
    register: Any = getattr(flop_counter, "register_flop_formula", None)
    takes_tensors = register and "get_raw" in inspect.signature(register).parameters
    while _waiting:
        packet, formula = _waiting.pop()
        if takes_tensors and packet not in flop_counter.flop_registry:
            register(packet, get_raw=True)(formula)
