"""anyflash.rotary."""

from __future__ import annotations

import operator

from torch import Tensor

from ._numbers import integer
from ._operators import rotary as family
from ._operators import runs_on_kernel


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | Tensor | None = None,
) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of the first rotary_dim columns of x.

    Row i of a sequence stands at position i + its offset. There each pair (a, b) of columns becomes
    (a cos - b sin, a sin + b cos); the columns behind rotary_dim stay. The arithmetic is fp32, fp64
    for fp64.

    Args:
        x: (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with cu_seqlens; any
            strides. fp16, bf16, fp32 or fp64.
        cos: (seqlen_rotary, rotary_dim / 2), row p for position p; floating, any strides.
        sin: the same.
        interleaved: pairs are neighbours (GPT-J); else column i belongs to column
            rotary_dim / 2 + i (GPT-NeoX).
        inplace: write into x, as PyTorch's own in-place operations do: recorded by autograd, an
            error for a leaf that requires a gradient.
        conjugate: turn backwards, which is the derivative and the inverse.
        seqlen_offsets: of all sequences, or (batch,) int32 or int64. With a tensor, rows may stand
            beyond the tables; these are not turned.
        cu_seqlens: (batch + 1,) int32 or int64, where each packed sequence begins, and the end.
            Rows behind the end are not turned.
        max_seqlen: with cu_seqlens, the length of the longest sequence.

    Returns:
        x's shape and dtype; with inplace x itself. Differentiable in x, cos and sin, any number of
        times.

    Raises:
        RuntimeError: arguments that do not fit together, tables that are too short, offsets below
            0. Nothing has been written then.
        TypeError: x, cos or sin is not a tensor; an offset is not an integer.
    """
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if cu_seqlens is not None and max_seqlen is None:
        raise RuntimeError(
            "If cu_seqlens is passed in, then max_seqlen must be passed: expected the length of "
            "the longest sequence, got None"
        )
    offsets: Tensor | None = None
    offset = 0
    if isinstance(seqlen_offsets, Tensor):
        offsets = seqlen_offsets
    elif isinstance(seqlen_offsets, float):
        raise TypeError(
            f"seqlen_offsets: expected an integer or (batch,) integers, got {seqlen_offsets}"
        )
    else:
        offset = operator.index(seqlen_offsets)
    longest = 0 if cu_seqlens is None else integer("max_seqlen", max_seqlen)
    arguments = (cos, sin, offsets, offset, cu_seqlens, longest, interleaved, conjugate)
    on_kernel = runs_on_kernel("rotary", x)
    if not inplace:
        return (family.rotary if on_kernel else family.rotate)(x, *arguments)
    (family.rotary_ if on_kernel else family.rotate_)(x, *arguments)
    return x
