"""Rotary position embedding (RoFormer, arXiv 2104.09864): pairs of columns, each turned by an angle
that grows with the row's position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from .._autograd import applier, below_autograd, call_operator, is_compiling, needs_autograd

_ops = torch.ops.anyflash
_DTYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


def _dtype_name(tensor: Tensor) -> str:
    return _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype).replace("torch.", ""))


def _check(condition: bool, *parts: object) -> None:
    if not condition:
        raise RuntimeError("".join(str(part) for part in parts))


def _check_shapes(x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None) -> None:
    layout = "(batch, seqlen, heads, head_dim)"
    if cu_seqlens is not None:
        layout = "(total, heads, head_dim) with cu_seqlens"
    rank = 4 if cu_seqlens is None else 3
    _check(x.dtype in _DTYPE_NAMES, "x: expected fp16, bf16, fp32 or fp64, got ", _dtype_name(x))
    _check(x.dim() == rank, "x: expected ", layout, ", got ", tuple(x.shape))
    for name, table in (("cos", cos), ("sin", sin)):
        is_floating = table.dtype in _DTYPE_NAMES
        _check(is_floating, name, ": expected a floating dtype, got ", _dtype_name(table))
        _check(table.device == x.device, name, ": expected x's ", x.device, ", got ", table.device)
        _check(
            table.dim() == 2,
            f"{name}: expected (seqlen_rotary, rotary_dim / 2), got {tuple(table.shape)}",
        )
    _check(
        sin.shape == cos.shape, "sin: expected cos' ", tuple(cos.shape), ", got ", tuple(sin.shape)
    )
    _check(
        2 * cos.shape[1] <= x.shape[-1],
        "rotary_dim must be <= headdim, got cos with ",
        f"rotary_dim / 2 = {cos.shape[1]} for x {tuple(x.shape)}",
    )


def _check_index(name: str, index: Tensor, x: Tensor) -> None:
    integers = (torch.int32, torch.int64)
    _check(index.dtype in integers, name, ": expected int32 or int64, got ", _dtype_name(index))
    _check(index.device == x.device, name, ": expected x's ", x.device, ", got ", index.device)
    _check(index.dim() == 1, name, ": expected one dimension, got ", tuple(index.shape))


def _check_values(
    x: Tensor, seqlen_offsets: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int
) -> None:
    """What can only be read from index tensors; they are read on the CPU alone."""
    if seqlen_offsets is not None:
        for sequence, offset in enumerate(seqlen_offsets.tolist()):
            _check(
                offset >= 0,
                f"seqlen_offsets: expected 0 or more, got {offset} for sequence {sequence}",
            )
    if cu_seqlens is None:
        return
    ends = cu_seqlens.tolist()
    _check(ends[0] == 0, "cu_seqlens: expected to start at 0, got ", ends[0])
    for i, (begin, end) in enumerate(zip(ends, ends[1:])):
        _check(
            end >= begin,
            f"cu_seqlens: must not decrease, got {begin} and then {end} at index {i + 1}",
        )
        _check(
            end - begin <= max_seqlen,
            f"max_seqlen: expected at least {end - begin}, the length of sequence {i} in ",
            f"cu_seqlens, got {max_seqlen}",
        )
    _check(
        ends[-1] <= x.shape[0],
        f"cu_seqlens: ends at {ends[-1]}, but x has {x.shape[0]} rows",
    )


def _check_arguments(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: Tensor | None,
    seqlen_offset: int,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
) -> None:
    """The checks of csrc/rotary.cpp, in its words."""
    _check_shapes(x, cos, sin, cu_seqlens)
    if cu_seqlens is None:
        batch, seqlen = x.shape[0], x.shape[1]
    else:
        _check_index("cu_seqlens", cu_seqlens, x)
        _check(cu_seqlens.shape[0] > 0, "cu_seqlens: expected (batch + 1,), got (0,)")
        batch, seqlen = cu_seqlens.shape[0] - 1, max_seqlen
        _check(seqlen >= 0, "max_seqlen: expected 0 or more, got ", seqlen)
    _check(seqlen_offset >= 0, "seqlen_offsets: expected 0 or more, got ", seqlen_offset)
    if seqlen_offsets is not None:
        _check_index("seqlen_offsets", seqlen_offsets, x)
        _check(
            seqlen_offsets.shape[0] == batch,
            f"seqlen_offsets: expected (batch,) = ({batch},), got {tuple(seqlen_offsets.shape)}",
        )
    _check(
        seqlen_offset + seqlen <= cos.shape[0],
        f"seqlen_ro must be >= seqlen: cos and sin have {cos.shape[0]} rows, ",
        f"x takes {seqlen} from row {seqlen_offset} on",
    )
    if x.device.type == "cpu" and not is_compiling():
        _check_values(x, seqlen_offsets, cu_seqlens, max_seqlen)


def _angles(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: Tensor | None,
    seqlen_offset: int,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of every row of x, to be broadcast over its heads: (..., seqlen, 1, pairs).

    A row without an angle is not turned: one beyond the tables or of no sequence.
    """
    rows = x.shape[-3]
    if seqlen_offsets is None and cu_seqlens is None:
        picked = slice(seqlen_offset, seqlen_offset + rows)
        return cos[picked].unsqueeze(-2), sin[picked].unsqueeze(-2)
    if cos.shape[0] == 0 or (cu_seqlens is not None and cu_seqlens.shape[0] == 1):
        zeros = cos.new_zeros(rows, 1, cos.shape[1])
        return zeros + 1, zeros
    positions = torch.arange(rows, device=x.device) + seqlen_offset
    has_angle = torch.ones_like(positions, dtype=torch.bool)
    if cu_seqlens is not None:
        ends = cu_seqlens[1:].long()
        sequence = torch.searchsorted(ends, torch.arange(rows, device=x.device), right=True)
        has_angle = sequence < ends.shape[0]
        sequence = sequence.clamp(max=ends.shape[0] - 1)
        positions = positions - cu_seqlens[sequence]
        if seqlen_offsets is not None:
            positions = positions + seqlen_offsets[sequence]
    elif seqlen_offsets is not None:
        positions = positions + seqlen_offsets.unsqueeze(1)
    has_angle = (has_angle & (positions >= 0) & (positions < cos.shape[0]))[..., None, None]
    positions = positions.clamp(0, cos.shape[0] - 1)
    return (
        torch.where(has_angle, cos[positions].unsqueeze(-2), 1.0),
        torch.where(has_angle, sin[positions].unsqueeze(-2), 0.0),
    )


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: Tensor | None,
    seqlen_offset: int,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    interleaved: bool,
    conjugate: bool,
) -> Tensor:
    """The operator ``rotary`` in PyTorch operations, differentiable in x, cos and sin."""
    _check_arguments(x, cos, sin, seqlen_offsets, seqlen_offset, cu_seqlens, max_seqlen)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = _angles(x, cos, sin, seqlen_offsets, seqlen_offset, cu_seqlens)
    cos, sin = cos.to(dtype), sin.to(dtype)
    if conjugate:
        sin = -sin
    pairs = cos.shape[-1]
    turned = x[..., : 2 * pairs].to(dtype)
    if interleaved:
        a, b = turned.unflatten(-1, (pairs, 2)).unbind(-1)
        y = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :pairs], turned[..., pairs:]
        y = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    y = y.to(x.dtype)
    return y if 2 * pairs == x.shape[-1] else torch.cat((y, x[..., 2 * pairs :]), dim=-1)


def rotate_(x: Tensor, *arguments: Any) -> None:
    """The operator ``rotary_``: the same in place."""
    tables = arguments[:2]
    y = rotate(x.clone() if needs_autograd(*tables) else x, *arguments)  # they need the old x
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride())):
        _check(
            stride != 0 or size <= 1,
            f"x: expected memory of its own for every element, got stride 0 in dimension {dim}",
        )
    x.copy_(y)


def _layout_like(x: Tensor) -> Tensor:
    """Room for the result: x's strides where its columns lie side by side, there and in what
    empty_like makes of x (another order where elements of x overlap)."""
    if x.shape[-1] > 1 and (x.stride(-1) != 1 or torch.empty_like(x).stride(-1) != 1):
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty_like(x)


class RotaryFunction(Function):
    """The operator ``rotary`` on its arguments. Its derivative turns the gradient backwards, and
    has one itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _ops.rotary.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, cos, sin, seqlen_offsets, offset, cu_seqlens, max_seqlen, interleaved, conjugate = inputs
        ctx.save_for_backward(cos, sin, seqlen_offsets, cu_seqlens)
        ctx.options = (offset, max_seqlen, interleaved, conjugate)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        cos, sin, seqlen_offsets, cu_seqlens = ctx.saved_tensors
        offset, max_seqlen, interleaved, conjugate = ctx.options
        dx = rotary(
            dy, cos, sin, seqlen_offsets, offset, cu_seqlens, max_seqlen, interleaved, not conjugate
        )
        return (dx, *(None,) * 8)


_apply_rotary = applier(RotaryFunction)


def _recorded(x: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> Tensor:
    """The operator ``rotary`` as autograd records it; a gradient of the tables goes through the
    math."""
    if needs_autograd(cos, sin):
        return rotate(x, cos, sin, *rest)
    return _apply_rotary(x, cos, sin, *rest)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> Tensor:
    """The operator ``rotary`` for a public function's call."""
    return call_operator(_ops.rotary.default, _recorded, (x, cos, sin, *rest), x, cos, sin)


def rotary_(x: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> None:
    """The operator ``rotary_``, recorded as PyTorch's own in-place operations are."""
    if needs_autograd(cos, sin):
        rotate_(x, cos, sin, *rest)
    elif needs_autograd(x):
        x.copy_(_apply_rotary(x, cos, sin, *rest))
    else:
        below_autograd(_ops.rotary_.default, x, cos, sin, *rest)


def _rotary_math(x: Tensor, *rest: Any) -> Tensor:
    return _layout_like(x).copy_(rotate(x, *rest))


def _fake(x: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> Tensor:
    _check_shapes(x, cos, sin, rest[2])
    return _layout_like(x)


def _fake_(x: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> None:
    _check_shapes(x, cos, sin, rest[2])


MATH = {"rotary": _rotary_math, "rotary_": rotate_}
FAKES = {"rotary": _fake, "rotary_": _fake_}
DIFFERENTIABLE = {"rotary": _recorded, "rotary_": rotary_}
