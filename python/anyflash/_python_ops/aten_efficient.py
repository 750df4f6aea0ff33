"""PyTorch's memory-efficient attention on CUDA: old GPUs, fp32, biases.

Key heads are repeated for their query heads, and its log-sum-exp is padded to multiples of 32
rows, one row of blocks per sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import math
from .arguments import AttentionArgs, BackwardArgs, Gradients
from .dense_mask import INFINITY
from .padded import RowMap
from .results import empty_results, promised_gradients

_NO_MASK, _BOTTOM_RIGHT = 0, 2
_LSE_ROWS = 32
_BIAS_ALIGNMENT = 16  # elements of a row of the bias


def _expanded(args: AttentionArgs, x: Tensor) -> Tensor:
    group = args.heads // args.heads_k
    return x if group == 1 else x.repeat_interleave(group, dim=-2)


def _batched(args: AttentionArgs, x: Tensor) -> Tensor:
    """Packed tensors as one batch entry."""
    return x.unsqueeze(0) if args.packed else x


def _bias(args: AttentionArgs) -> Tensor | None:
    """The bias in q's dtype, (batch, heads, seqlen_q, seqlen_k), rows padded to an aligned
    length."""
    bias = args.bias
    if bias is None:
        return None
    shape = (args.batch, args.heads, args.max_seqlen_q, args.max_seqlen_k)
    width = -(-shape[3] // _BIAS_ALIGNMENT) * _BIAS_ALIGNMENT
    if bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=args.q.dtype).masked_fill_(~bias, -INFINITY)
    padded = args.q.new_zeros((*shape[:3], width))[..., : shape[3]]
    return padded.copy_(bias)


def _mask_type(args: AttentionArgs) -> int:
    return _BOTTOM_RIGHT if args.purely_causal else _NO_MASK


def _lse_storage(args: AttentionArgs) -> RowMap:
    assert args.cu_seqlens_q is not None
    bounds = args.cu_seqlens_q.long()
    rows = -(-args.longest_q // _LSE_ROWS) * _LSE_ROWS
    return RowMap(args.q.shape[0], bounds, bounds[:-1], bounds.diff(), rows)


def _our_lse(args: AttentionArgs, lse: Tensor) -> Tensor:
    """(batch, heads, padded rows) -> schemas.def."""
    if args.packed:
        flat = _lse_storage(args).scatter(lse.transpose(1, 2), INFINITY)
        return flat.transpose(0, 1).contiguous()
    return lse[..., : args.q.shape[1]].contiguous()


def _their_lse(args: AttentionArgs, lse: Tensor) -> Tensor:
    """The inverse; rows that do not exist see nothing."""
    if args.packed:
        storage = _lse_storage(args)
        padded = storage.gather(lse.transpose(0, 1)).transpose(1, 2)
        beyond = torch.arange(storage.seqlen, device=lse.device) >= storage.length[:, None]
        return padded.masked_fill(beyond[:, None], INFINITY).contiguous()
    rows = -(-lse.shape[2] // _LSE_ROWS) * _LSE_ROWS
    return torch.nn.functional.pad(lse, (0, rows - lse.shape[2]), value=INFINITY)


def _cut_empty_rows(
    args: AttentionArgs, bias: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows that see no key: out 0, lse +inf, whatever the kernel left there."""
    if bias is None:
        hidden = ~torch.isfinite(lse) | (lse < torch.finfo(lse.dtype).min / 2)
    else:
        hidden = bias.amax(-1) == -INFINITY
    rows = hidden.transpose(0, 1) if args.packed else hidden.transpose(1, 2)
    out = out.masked_fill(rows.unsqueeze(-1), 0.0)
    return out, lse.masked_fill(hidden, INFINITY)


def _is_for_math(args: AttentionArgs) -> bool:
    """Nothing to compute, or a scale that does not keep the order of the scores."""
    nothing = args.max_seqlen_k == 0 or args.q.numel() == 0 or args.k.numel() == 0
    return nothing or args.softmax_scale <= 0


def forward(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """out and lse of schemas.def."""
    if _is_for_math(args):
        return math.forward(args)
    bias = _bias(args)
    out, lse = torch.ops.aten._efficient_attention_forward(
        *(_batched(args, x) for x in (args.q, _expanded(args, args.k), _expanded(args, args.v))),
        bias,
        args.cu_seqlens_q,
        args.cu_seqlens_k,
        args.longest_q if args.packed else None,
        args.longest_k if args.packed else None,
        0.0,
        _mask_type(args),
        True,
        scale=args.softmax_scale,
    )[:2]
    out = out.squeeze(0) if args.packed else out
    out, lse = _cut_empty_rows(args, bias, out, _our_lse(args, lse))
    promised, _ = empty_results(args)
    return (out if out.stride() == promised.stride() else promised.copy_(out)), lse


def _summed(args: AttentionArgs, gradient: Tensor) -> Tensor:
    """The gradient of what _expanded() repeated."""
    if args.heads == args.heads_k:
        return gradient
    return gradient.unflatten(-2, (args.heads_k, -1)).sum(-2)


def backward(args: AttentionArgs, grad: BackwardArgs) -> Gradients:
    """dq, dk, dv of schemas.def."""
    if _is_for_math(args):
        return math.backward(args, grad)
    state: Any = torch.zeros((), dtype=torch.int64, device=args.q.device)
    dq, dk, dv = torch.ops.aten._efficient_attention_backward(
        _batched(args, grad.dout),
        *(_batched(args, x) for x in (args.q, _expanded(args, args.k), _expanded(args, args.v))),
        _bias(args),
        _batched(args, grad.out),
        args.cu_seqlens_q,
        args.cu_seqlens_k,
        args.longest_q,
        args.longest_k,
        _their_lse(args, grad.lse),
        0.0,
        state,
        state,
        _mask_type(args),
        False,
        scale=args.softmax_scale,
    )[:3]
    if args.packed:
        dq, dk, dv = (gradient.squeeze(0) for gradient in (dq, dk, dv))
    return promised_gradients(args, (dq, _summed(args, dk), _summed(args, dv)))
