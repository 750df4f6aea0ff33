"""PyTorch's CUDA flash attention, through the operators that know packed sequences, windows and
bottom-right causal masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import math
from .arguments import AttentionArgs, BackwardArgs, Gradients
from .results import empty_results, promised_gradients


def _one_sided(args: AttentionArgs) -> bool:
    """A left window without a right end, which this attention closes at the key length.

    Where a sequence has more queries than keys that hides keys; lengths are on the device, so it
    cannot be known here.
    """
    return args.window_left >= 0 and args.window_right < 0


def _is_for_math(args: AttentionArgs) -> bool:
    """This attention looks for the largest score before it scales: the scale must be positive. And
    it refuses empty problems."""
    return _one_sided(args) or args.empty or args.softmax_scale <= 0


def _options(args: AttentionArgs) -> dict[str, Any]:
    causal = args.purely_causal
    windowed = not causal and (args.window_left >= 0 or args.window_right >= 0)
    return {
        "scale": args.softmax_scale,
        "window_size_left": args.window_left if windowed else None,
        "window_size_right": args.window_right if windowed else None,
    }


def forward(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """out and lse of schemas.def."""
    if _is_for_math(args):
        return math.forward(args)
    options = _options(args)
    if args.seqused_k is not None:
        options["seqused_k"] = args.seqused_k
    if args.alibi_slopes is not None:
        options["alibi_slopes"] = args.alibi_slopes
    out, lse = torch.ops.aten._flash_attention_forward(
        args.q,
        args.k,
        args.v,
        args.cu_seqlens_q,
        args.cu_seqlens_k,
        args.longest_q,
        args.longest_k,
        0.0,
        args.purely_causal,
        False,
        **options,
    )[:2]
    promised, _ = empty_results(args)
    if out.stride() != promised.stride():
        out = promised.copy_(out)
    return out, lse.contiguous()


def backward(args: AttentionArgs, grad: BackwardArgs) -> Gradients:
    """dq, dk, dv of schemas.def."""
    if _is_for_math(args):
        return math.backward(args, grad)
    no_state = torch.zeros(2, dtype=torch.int64, device=args.q.device)
    gradients = torch.ops.aten._flash_attention_backward(
        grad.dout,
        args.q,
        args.k,
        args.v,
        grad.out,
        grad.lse.contiguous(),
        args.cu_seqlens_q,
        args.cu_seqlens_k,
        args.longest_q,
        args.longest_k,
        0.0,
        args.purely_causal,
        no_state,
        no_state,
        **_options(args),
    )
    return promised_gradients(args, gradients)
