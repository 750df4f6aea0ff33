"""cuDNN's attention in PyTorch: dense, without a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from . import math
from .arguments import AttentionArgs, BackwardArgs, Gradients
from .results import empty_results, promised_gradients


def _is_for_math(args: AttentionArgs) -> bool:
    """Nothing to compute, or a scale that does not keep the order of the scores."""
    return args.empty or args.softmax_scale <= 0


def forward(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """out and lse of schemas.def."""
    if _is_for_math(args):
        return math.forward(args)
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(x.transpose(1, 2) for x in (args.q, args.k, args.v)),
        None,
        True,
        0.0,
        False,
        False,
        scale=args.softmax_scale,
    )[:2]
    out = out.transpose(1, 2)
    promised, _ = empty_results(args)
    shape = (args.q.shape[0], args.heads, args.q.shape[1])
    out = out if out.stride() == promised.stride() else promised.copy_(out)
    return out, lse.reshape(shape).contiguous()


def backward(args: AttentionArgs, grad: BackwardArgs) -> Gradients:
    """dq, dk, dv of schemas.def."""
    if _is_for_math(args):
        return math.backward(args, grad)
    state = torch.zeros((), dtype=torch.int64, device=args.q.device)
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(x.transpose(1, 2) for x in (grad.dout, args.q, args.k, args.v, grad.out)),
        grad.lse.unsqueeze(-1),
        state,
        state,
        None,
        None,
        None,
        args.q.shape[1],
        args.k.shape[1],
        0.0,
        False,
        scale=args.softmax_scale,
    )
    return promised_gradients(args, tuple(gradient.transpose(1, 2) for gradient in gradients))
