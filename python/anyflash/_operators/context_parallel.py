"""Attention inside a region of torch's context_parallel, where each process has a shard of the
sequence: torch's ring, with this library's operators for its blocks.

The region replaces F.scaled_dot_product_attention alone. Any other attention inside it would attend
to the keys of its own process, and nothing would tell.
"""

from __future__ import annotations

import functools
import inspect
import sys
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from .._autograd import first_derivative_only, is_distributed
from .attention import AttentionCall, BackwardCall

_SEQUENCE = 2  # the dimension, of (batch, heads, seqlen, head_dim)
_EXPERIMENTAL = "torch.distributed.tensor.experimental"
_MODULES = (f"{_EXPERIMENTAL}._context_parallel._attention", f"{_EXPERIMENTAL}._attention")
_NOT_IN_THE_RING = (
    *("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "leftpad_k", "block_table"),
    *("alibi_slopes", "bias", "sinks"),
)
_OUTSIDE = (
    "the backward of attention inside context_parallel ran outside of it, where the processes no "
    "longer know how the sequence is shared out; expected backward() in the region"
)
_LSE = (
    "the log-sum-exp of attention inside context_parallel has no gradient, but a backward went "
    "through it; expected out alone in the loss"
)


class Region(NamedTuple):
    """An active context_parallel."""

    module: ModuleType  # torch's, with the ring
    mesh: Any

    @property
    def is_balanced(self) -> bool:
        """Whether a shard is two chunks, one from each end of the sequence."""
        return self.module._cp_options.enable_load_balance


def active_region() -> Region | None:
    """The region that is active now, in any thread."""
    replaced = F.scaled_dot_product_attention
    for name in _MODULES:
        module = sys.modules.get(name)
        if module is not None and replaced in getattr(module, "_replaced_functions", ()):
            mesh = inspect.getclosurevars(replaced).nonlocals.get("device_mesh")
            ring = getattr(module, "_templated_ring_attention", None)
            if mesh is None or ring is None or "group" not in inspect.signature(ring).parameters:
                raise RuntimeError(
                    f"context_parallel of torch {torch.__version__} has no ring that anyflash "
                    "knows; expected torch 2.9 or newer, or scaled_dot_product_attention there"
                )
            return Region(module, mesh)
    return None


def refuse_in_region(what: str) -> None:
    """RuntimeError inside a region, for what the ring does not compute."""
    if active_region() is not None:
        raise RuntimeError(
            f"{what}: not inside context_parallel, where it would see the shard of one process; "
            "call it outside, with whole sequences"
        )


def refuse_shards_of_sequence(q: Any) -> None:
    """RuntimeError for a DTensor sharded along its rows while torch's dispatcher for modules with
    context parallelism is on: their rows may be in another order, which a mask would not know."""
    sharded = any(placement.is_shard(q.dim() - 3) for placement in q.placements)
    module = sys.modules.get(_MODULES[0])
    if not sharded or module is None:
        return
    handlers = module.DTensor._op_dispatcher._custom_op_handlers
    if handlers is not module.existing_custom_ops:
        raise RuntimeError(
            "q: expected no shards of the sequence while the dispatcher of context parallelism is "
            f"on, got {q.placements}: use context_parallel() with tensors, or "
            "scaled_dot_product_attention"
        )


def _check(call: AttentionCall) -> None:
    asked = [name for name in _NOT_IN_THE_RING if getattr(call, name) is not None]
    asked += ["dropout_p"] if call.dropout_p > 0.0 else []
    asked += ["window_size"] if max(call.window_size_left, call.window_size_right) >= 0 else []
    if asked:
        raise RuntimeError(
            f"{', '.join(asked)}: expected none inside context_parallel, whose ring knows dense "
            "attention, causal or not; call it outside, with whole sequences"
        )
    if is_distributed(call.q):
        raise RuntimeError(
            "q, k, v: expected tensors inside context_parallel, each process its shard of the "
            "sequence, got DTensors: call it with to_local()"
        )


def _forward(
    call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor]:
    q, k, v = _transposed(query, key, value)
    block = call._replace(q=q, k=k, v=v, causal=is_causal, return_lse=True)
    out, softmax_lse, _ = torch.ops.anyflash._flash_attn_forward.default(*block)
    return out.transpose(1, 2), softmax_lse


def _backward(
    call: AttentionCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    grad_out: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of one block, with what the whole ring has as out and log-sum-exp."""
    q, k, v, out, dout = _transposed(query, key, value, out, grad_out)
    given = {**call._asdict(), "bias_requires_grad": False, "sinks_requires_grad": False}
    given.update(dout=dout, q=q, k=k, v=v, out=out, causal=is_causal)
    given.update(softmax_lse=logsumexp, dsoftmax_lse=None)
    block = BackwardCall(**{name: given[name] for name in BackwardCall._fields})
    gradients = torch.ops.anyflash._flash_attn_backward.default(*block)[:3]
    return _transposed(*gradients)


def _transposed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Between (batch, seqlen, heads, head_dim) and the ring's (batch, heads, seqlen, head_dim)."""
    return tuple(x.transpose(1, 2) for x in tensors)


def ring_forward(module: ModuleType, mesh: Any, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse) of this process's rows, by torch's ring.

    Args:
        module: torch's, with the ring.
        mesh: of the processes that share the sequence.
        call: with this process's rows of q, k and v.
    """
    out, softmax_lse = module._templated_ring_attention(
        mesh.get_group(),
        _SEQUENCE,
        functools.partial(_forward, call),
        **dict(zip(("query", "key", "value"), _transposed(call.q, call.k, call.v))),
        is_causal=call.causal,
    )
    return out.transpose(1, 2), softmax_lse


def ring_backward(
    module: ModuleType,
    mesh: Any,
    call: AttentionCall,
    dout: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of this process's rows of q, k and v."""
    names = ("query", "key", "value", "out", "grad_out")
    gradients = module._templated_ring_attention_backward(
        mesh.get_group(),
        _SEQUENCE,
        functools.partial(_backward, call),
        grad_out_name="grad_out",
        **dict(zip(names, _transposed(call.q, call.k, call.v, out, dout))),
        logsumexp=softmax_lse,
        is_causal=call.causal,
    )
    return _transposed(*gradients)


class RingFunction(Function):
    """(out, softmax_lse) of this process's rows; (q, k, v, the call, the region)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, region: Region
    ) -> tuple[Tensor, Tensor]:
        out, softmax_lse = ring_forward(*region, call)
        ctx.save_for_backward(q, k, v, out, softmax_lse)
        unsaved: dict[str, Any] = dict.fromkeys("qkv")
        ctx.call = call._replace(**unsaved)
        ctx.is_balanced = region.is_balanced
        ctx.set_materialize_grads(False)
        return out, softmax_lse

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dout: Tensor | None, dsoftmax_lse: Tensor | None) -> tuple[Any, ...]:
        if dsoftmax_lse is not None:
            raise RuntimeError(_LSE)
        if dout is None:
            return (None,) * 5
        region = active_region()
        if region is None or region.is_balanced != ctx.is_balanced:
            raise RuntimeError(_OUTSIDE)
        q, k, v, *results = ctx.saved_tensors
        call = ctx.call._replace(q=q, k=k, v=v)
        return (*ring_backward(*region, call, dout, *results), None, None)


def attend(call: AttentionCall, region: Region) -> tuple[Tensor, Tensor, Tensor]:
    """(out, softmax_lse, rng_state) of a public function's call in a region.

    Raises:
        RuntimeError: what the ring does not know.
    """
    _check(call)
    out, softmax_lse = RingFunction.apply(call.q, call.k, call.v, call, region)
    return out, softmax_lse, out.new_empty(0)
