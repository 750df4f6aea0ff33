"""What every route agrees on: the tensors that the operators return."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import AttentionArgs, Gradients


def empty_results(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """Uninitialised out and lse with the strides that callers and fakes expect."""
    q = args.q
    if args.head_dim_v == args.head_dim:
        out = torch.empty_like(q)
    else:
        out = q.new_empty((*q.shape[:-1], args.head_dim_v))
    shape = (args.heads, q.shape[0]) if args.packed else (q.shape[0], args.heads, q.shape[1])
    return out, q.new_empty(shape, dtype=args.compute_dtype)


def promised_gradients(args: AttentionArgs, gradients: tuple[Tensor, ...]) -> Gradients:
    """Gradients with the strides of empty_like(q), empty_like(k), empty_like(v)."""
    results = []
    for x, gradient in zip((args.q, args.k, args.v), gradients):
        promised = torch.empty_like(x)
        fits = gradient.stride() == promised.stride() and gradient.dtype == x.dtype
        results.append(gradient if fits else promised.copy_(gradient))
    return Gradients(*results)


def four_dims(x: Tensor) -> Tensor:
    """(keys) -> (1, 1, 1, keys), ..."""
    return x[(None,) * (4 - x.dim())]
