"""accelerate_sdpa() inside context_parallel: torch's ring over anyflash's operators.

PyTorch brings rings for CUDA's routines. What a CPU tensor's scaled_dot_product_attention ends in
has none, and is an error there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from ._operators.attention import AttentionCall
from ._operators.context_parallel import ring_backward, ring_forward


class RingOverride:
    """Entries in torch's table of rings, until remove(): a region takes them when it begins.

    Args:
        module: torch's, with the table.
        operators: aten's forward and backward.
        call: a dense call without tensors, on any back end.
    """

    def __init__(self, module: ModuleType, operators: tuple[Any, Any], call: AttentionCall) -> None:
        self.table: dict[Any, Callable[..., Any]] = getattr(module, "custom_ops", {})
        self.operators = operators
        for operator, ring in zip(operators, (_forward, _backward)):
            self.table[operator] = functools.partial(ring, module, call)

    def remove(self) -> None:
        for operator in self.operators:
            self.table.pop(operator, None)


def _ring_call(
    call: AttentionCall,
    qkv: tuple[Any, ...],
    dropout_p: float,
    is_causal: bool,
    attn_mask: Any,
    scale: float | None,
) -> AttentionCall:
    if attn_mask is not None or dropout_p != 0.0:
        raise NotImplementedError(
            "scaled_dot_product_attention inside context_parallel: expected attn_mask=None and "
            "dropout_p=0, which is what the ring computes"
        )
    q, k, v = _local(*qkv)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return call._replace(q=q, k=k, v=v, causal=is_causal, softmax_scale=scale)


def _local(*tensors: Any) -> tuple[Tensor, ...]:
    """Shards of DTensors, (batch, seqlen, heads, head_dim)."""
    return tuple(x.to_local().transpose(1, 2) for x in tensors)


def _distributed(mesh: Any, *tensors: Tensor) -> tuple[Any, ...]:
    """DTensors of (batch, heads, seqlen, ...) shards."""
    from torch.distributed.tensor import DTensor, Shard

    return tuple(DTensor.from_local(x, mesh, [Shard(2)], run_check=False) for x in tensors)


def _forward(
    module: ModuleType, call: AttentionCall, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """aten's forward of DTensors, as torch's table has it: (operator, args, kwargs)."""

    def ring(
        query: Any,
        key: Any,
        value: Any,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Any = None,
        scale: float | None = None,
    ) -> tuple[Any, Any]:
        options = (dropout_p, is_causal, attn_mask, scale)
        mesh = query.device_mesh
        out, lse = ring_forward(module, mesh, _ring_call(call, (query, key, value), *options))
        return _distributed(mesh, out.transpose(1, 2), lse)

    return ring(*args, **kwargs)


def _backward(
    module: ModuleType, call: AttentionCall, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """aten's backward of DTensors."""

    def ring(
        grad_out: Any,
        query: Any,
        key: Any,
        value: Any,
        out: Any,
        logsumexp: Any,
        dropout_p: float,
        is_causal: bool,
        *,
        attn_mask: Any = None,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        options = (dropout_p, is_causal, attn_mask, scale)
        mesh = query.device_mesh
        ours = _ring_call(call, (query, key, value), *options)
        results = (*_local(grad_out, out), logsumexp.to_local())
        gradients = ring_backward(module, mesh, ours, *results)
        return _distributed(mesh, *(x.transpose(1, 2) for x in gradients))

    return ring(*args, **kwargs)
