"""PyTorch's memory-efficient attention on CUDA: old GPUs, fp32, biases.

Key heads are repeated for their query heads; its log-sum-exp has one entry per sequence, padded to
a multiple of 32 rows. The operators have changed from torch 2.0 on: each call names what it says,
and says what the operator of this torch asks for.
"""

from __future__ import annotations

import functools
import math as numbers
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
_ALIGNMENT = 16  # bytes, of every row of q, k and v
_BIAS_ALIGNMENT = 16  # elements of a row of the bias


@functools.cache
def _parameters(operator: Any) -> tuple[str, ...]:
    """Their names, in order."""
    return tuple(argument.name for argument in operator.default._schema.arguments)


def _call(operator: Any, **arguments: Any) -> tuple[Any, ...]:
    """The operator with those of the arguments that it has in this torch."""
    known = _parameters(operator)
    return operator(**{name: arguments[name] for name in known if name in arguments})


def _is_first_generation() -> bool:
    """torch 2.0: always scaled by head_dim ** -0.5, causal masks start in the top left corner."""
    return "scale" not in _parameters(torch.ops.aten._efficient_attention_forward)


def _query_factor(args: AttentionArgs) -> float:
    """What q has to be multiplied by, for want of a scale."""
    if not _is_first_generation():
        return 1.0
    factor = args.softmax_scale * args.head_dim**0.5
    return 1.0 if numbers.isclose(factor, 1.0) else factor


def _has_causal_mask(args: AttentionArgs) -> bool:
    """A bias carries the causal mask, so that it alone tells which rows see nothing."""
    return args.purely_causal and args.bias is None


def _is_mask_right(args: AttentionArgs) -> bool:
    """Whether the kernels know this causal mask.

    Where a sequence has more queries than keys, they miscount them (the difference is unsigned).
    The lengths of packed sequences are on the device: all that can be known here is that queries
    and keys have the same.
    """
    if args.packed:
        assert args.cu_seqlens_q is not None and args.cu_seqlens_k is not None
        return args.cu_seqlens_q.data_ptr() == args.cu_seqlens_k.data_ptr()
    if _is_first_generation():
        return args.max_seqlen_q == args.max_seqlen_k
    return args.max_seqlen_q <= args.max_seqlen_k


def _is_beyond_first_generation(args: AttentionArgs) -> bool:
    """A factor that fp16 queries may not bear, or heads too wide for the shared memory of sm_86 to
    sm_89, which that torch does not look at."""
    if args.q.dtype == torch.float16 and _query_factor(args) > 1.0:
        return True
    if max(args.head_dim, args.head_dim_v) <= 64:
        return False
    major, minor = torch.cuda.get_device_capability(args.q.device)
    return major == 8 and minor > 0


def _is_for_math(args: AttentionArgs) -> bool:
    """Nothing to compute, a scale that does not keep the order of the scores, a bias beside packed
    sequences, or what the kernels get wrong."""
    if args.empty or args.softmax_scale <= 0 or (args.packed and args.bias is not None):
        return True
    if _has_causal_mask(args) and not _is_mask_right(args):
        return True
    return _is_first_generation() and _is_beyond_first_generation(args)


def _are_bounds_ambiguous(args: AttentionArgs) -> bool:
    """torch 2.1 declares the backward's longest lengths in the order k, q; what runs is known to
    be right where they are equal."""
    if not args.packed or args.longest_q == args.longest_k:
        return False
    known = _parameters(torch.ops.aten._efficient_attention_backward)
    return known.index("max_seqlen_k") < known.index("max_seqlen_q")


def _operand(args: AttentionArgs, x: Tensor) -> Tensor:
    """A tensor as the kernels read it: packed ones as one batch entry, rows at aligned addresses,
    each head with its own (a stride of 0 is taken for something else)."""
    x = x.unsqueeze(0) if args.packed else x
    if _is_first_generation():
        x = x.contiguous()
    steps = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1]))
    is_aligned = all(step % _ALIGNMENT == 0 for step in steps) and x.stride(2) != 0
    return x if is_aligned else x.clone(memory_format=torch.contiguous_format)


def _repeated(args: AttentionArgs, x: Tensor) -> Tensor:
    """Every key head repeated for its query heads."""
    group = args.heads // args.heads_k
    return x if group == 1 else x.repeat_interleave(group, dim=-2)


def _summed(args: AttentionArgs, gradient: Tensor) -> Tensor:
    """The gradient of what _repeated() did."""
    if args.heads == args.heads_k:
        return gradient
    return gradient.unflatten(-2, (args.heads_k, -1)).sum(-2)


def _hidden_by_causality(args: AttentionArgs) -> Tensor:
    """bool (seqlen_q, seqlen_k)"""
    row = torch.arange(args.max_seqlen_q, device=args.q.device)
    column = torch.arange(args.max_seqlen_k, device=args.q.device)
    return column > row[:, None] + (args.max_seqlen_k - args.max_seqlen_q)


def _bias(args: AttentionArgs) -> Tensor | None:
    """Bias and causal mask in q's dtype: (batch, heads, seqlen_q, seqlen_k), expanded, rows at
    aligned distances."""
    if args.bias is None:
        return None
    bias = args.bias[(None,) * (4 - args.bias.dim())]
    rows = args.max_seqlen_q if args.purely_causal else bias.shape[2]
    width = -(-args.max_seqlen_k // _BIAS_ALIGNMENT) * _BIAS_ALIGNMENT
    storage = args.q.new_zeros((*bias.shape[:2], rows, width))
    result = storage[..., : args.max_seqlen_k]
    if bias.dtype == torch.bool:
        result.masked_fill_(~bias, -INFINITY)
    else:
        result.copy_(bias)
    if args.purely_causal:
        result.masked_fill_(_hidden_by_causality(args), -INFINITY)
    return result.expand(args.batch, args.heads, args.max_seqlen_q, -1)


def _problem(args: AttentionArgs, bias: Tensor | None) -> dict[str, Any]:
    """What both directions are told."""
    factor = _query_factor(args)
    is_causal = _has_causal_mask(args)
    return {
        "query": _operand(args, args.q if factor == 1.0 else args.q * factor),
        "key": _operand(args, _repeated(args, args.k)),
        "value": _operand(args, _repeated(args, args.v)),
        "bias": bias,
        "cu_seqlens_q": args.cu_seqlens_q,
        "cu_seqlens_k": args.cu_seqlens_k,
        "dropout_p": 0.0,
        "custom_mask_type": _BOTTOM_RIGHT if is_causal else _NO_MASK,
        "scale": args.softmax_scale,
    }


def _padded_storage(cu_seqlens: Tensor, total: int, rows: int) -> RowMap:
    bounds = cu_seqlens.long()
    return RowMap(total, bounds, bounds[:-1], bounds.diff(), rows)


def _lse_storage(args: AttentionArgs) -> RowMap:
    assert args.cu_seqlens_q is not None
    rows = -(-args.longest_q // _LSE_ROWS) * _LSE_ROWS
    return _padded_storage(args.cu_seqlens_q, args.q.shape[0], rows)


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
    padded = torch.nn.functional.pad(lse, (0, rows - lse.shape[2]), value=INFINITY)
    return padded.contiguous()


def _by_row(args: AttentionArgs, x: Tensor) -> Tensor:
    """(batch, heads, seqlen_q) or (heads, total_q) -> broadcastable to out."""
    return (x.transpose(0, 1) if args.packed else x.transpose(1, 2)).unsqueeze(-1)


def _clear_empty_rows(
    args: AttentionArgs, bias: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows that see no key, or that do not exist: out 0, lse +inf, whatever the kernel left."""
    if bias is None:
        empty = lse.abs() > torch.finfo(lse.dtype).max / 2
    else:
        empty = bias.amax(-1) == -INFINITY
    return out.masked_fill(_by_row(args, empty), 0.0), lse.masked_fill(empty, INFINITY)


def _clear_unreached(args: AttentionArgs, lse: Tensor, result: Gradients) -> None:
    """The kernel leaves gradients unwritten where it has no block of queries and keys: those of
    sequences without keys or queries, and beyond the last one."""
    assert args.cu_seqlens_q is not None and args.cu_seqlens_k is not None
    result.dq.masked_fill_(_by_row(args, lse == INFINITY), 0.0)
    storage = _padded_storage(args.cu_seqlens_k, args.k.shape[0], args.longest_k)
    queries = args.cu_seqlens_q.diff()[:, None].expand(-1, storage.seqlen)
    unreached = (storage.scatter(queries, 0) == 0)[:, None, None]
    result.dk.masked_fill_(unreached, 0.0)
    result.dv.masked_fill_(unreached, 0.0)


def forward(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """out and lse of schemas.def."""
    if _is_for_math(args):
        return math.forward(args)
    bias = _bias(args)
    out, lse = _call(
        torch.ops.aten._efficient_attention_forward,
        **_problem(args, bias),
        max_seqlen_q=args.longest_q if args.packed else None,
        max_seqlen_k=args.longest_k if args.packed else None,
        compute_log_sumexp=True,
        causal=_has_causal_mask(args),
    )[:2]
    out = out.squeeze(0) if args.packed else out
    out, lse = _clear_empty_rows(args, bias, out, _our_lse(args, lse))
    promised, _ = empty_results(args)
    return (out if out.stride() == promised.stride() else promised.copy_(out)), lse


def backward(args: AttentionArgs, grad: BackwardArgs) -> Gradients:
    """dq, dk, dv of schemas.def."""
    if _is_for_math(args) or _are_bounds_ambiguous(args):
        return math.backward(args, grad)
    state = torch.zeros((), dtype=torch.int64, device=args.q.device)
    dq, dk, dv = _call(
        torch.ops.aten._efficient_attention_backward,
        **_problem(args, _bias(args)),
        grad_out_=_operand(args, grad.dout),
        out=_operand(args, grad.out).contiguous(),
        logsumexp=_their_lse(args, grad.lse),
        max_seqlen_q=args.longest_q,
        max_seqlen_k=args.longest_k,
        philox_seed=state,
        philox_offset=state,
        is_causal=_has_causal_mask(args),
        bias_requires_grad=False,
    )[:3]
    if args.packed:
        dq, dk, dv = (gradient.squeeze(0) for gradient in (dq, dk, dv))
    factor = _query_factor(args)
    dq = dq if factor == 1.0 else dq * factor
    result = promised_gradients(args, (dq, _summed(args, dk), _summed(args, dv)))
    if args.packed:
        _clear_unreached(args, grad.lse, result)
    return result
