"""The function of upstream's extension ``rotary_emb`` (1.x), for every device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def apply_rotary(
    x1: Tensor, x2: Tensor, cos: Tensor, sin: Tensor, out1: Tensor, out2: Tensor, conj: bool
) -> None:
    """Turns pairs by an angle: out1 = x1 cos - x2 sin, out2 = x1 sin + x2 cos.

    Args:
        x1: (..., seqlen, heads, rotary_dim / 2), the first members of the pairs.
        x2: the second members, x1's shape and dtype.
        cos: broadcasts to x1, as (seqlen, 1, rotary_dim / 2) does. The arithmetic is fp32, fp64 for
            fp64.
        sin: cos' shape.
        out1: x1's shape, may be x1.
        out2: x1's shape, may be x2.
        conj: turn backwards.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together. Nothing has been written
            then.
    """
    for name, tensor in (("x2", x2), ("out1", out1), ("out2", out2)):
        same = tensor.shape == x1.shape and tensor.dtype == x1.dtype and tensor.device == x1.device
        if not same:
            raise RuntimeError(
                f"{name}: expected x1's {tuple(x1.shape)}, {x1.dtype} on {x1.device}, got "
                f"{tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}"
            )
    if sin.shape != cos.shape:
        raise RuntimeError(f"sin: expected cos' {tuple(cos.shape)}, got {tuple(sin.shape)}")
    broadcasts = all(size in (1, n) for size, n in zip(cos.shape[::-1], x1.shape[::-1]))
    if cos.dim() > x1.dim() or not broadcasts:
        raise RuntimeError(
            f"cos: expected a shape that broadcasts to x1 {tuple(x1.shape)}, got {tuple(cos.shape)}"
        )
    dtype = torch.promote_types(x1.dtype, torch.float32)
    a, b, c, s = (tensor.to(dtype) for tensor in (x1, x2, cos, sin))
    if conj:
        s = -s
    first, second = a * c - b * s, a * s + b * c
    out1.copy_(first)
    out2.copy_(second)
