"""Rotary position embedding (RoFormer, arXiv 2104.09864): pairs of columns, each turned by an angle
that grows with the row's position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from .. import _core, _records, _threads
from .._autograd import (
    applier,
    below_autograd,
    call_operator,
    is_compiling,
    needs_autograd,
    wants_operations,
)
from . import can_check, check, expect, record_of

_ops = torch.ops.anyflash


def _record(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: Tensor | None,
    seqlen_offset: int,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    interleaved: bool,
    conjugate: bool,
    *,
    in_place: bool,
) -> _records.RotaryCall:
    tensors = {
        "x": x,
        "cos": cos,
        "sin": sin,
        "seqlen_offsets": seqlen_offsets,
        "cu_seqlens": cu_seqlens,
    }
    return record_of(
        _records.RotaryCall,
        tensors,
        seqlen_offset=seqlen_offset,
        max_seqlen=max_seqlen,
        interleaved=interleaved,
        conjugate=conjugate,
        in_place=in_place,
    )


def _check(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: Tensor | None,
    seqlen_offset: int,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    *layout: bool,
    in_place: bool,
) -> None:
    numbers = (seqlen_offsets, seqlen_offset, cu_seqlens, max_seqlen)
    if can_check(x, cos, sin, seqlen_offsets, cu_seqlens):
        check("rotary", _record(x, cos, sin, *numbers, *layout, in_place=in_place))
        return
    expect(x.is_floating_point() and x.dim() == (4 if cu_seqlens is None else 3), "x", x)
    tables_fit = cos.dim() == 2 and sin.shape == cos.shape and 2 * cos.shape[1] <= x.shape[-1]
    expect(tables_fit, "cos and sin", cos, sin, x)
    batch, longest = x.shape[0], max_seqlen
    if cu_seqlens is None:
        longest = x.shape[1]
    else:
        expect(cu_seqlens.dim() == 1 and cu_seqlens.shape[0] > 0, "cu_seqlens", cu_seqlens)
        batch = cu_seqlens.shape[0] - 1
    expect(seqlen_offset >= 0, "seqlen_offset")
    is_long_enough = seqlen_offset + longest <= cos.shape[0]
    if cu_seqlens is not None and is_compiling():  # max_seqlen may be known when the graph runs
        torch._check(is_long_enough)
    else:
        expect(is_long_enough, "cos and sin", cos, x)
    if seqlen_offsets is not None:
        expect(seqlen_offsets.shape == (batch,), "seqlen_offsets", seqlen_offsets, x)


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
    _check(
        x, cos, sin, seqlen_offsets, seqlen_offset, cu_seqlens, max_seqlen, interleaved, conjugate,
        in_place=False,
    )  # fmt: skip
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
    _check(x, *arguments, in_place=True)
    tables = arguments[:2]
    x.copy_(rotate(x.clone() if needs_autograd(*tables) else x, *arguments))  # they need the old x


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
        # All who record see the operator: a batch of gradients hides them from the short way.
        turn = _ops.rotary.default if torch.is_grad_enabled() else rotary
        dx = turn(
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
    elif needs_autograd(x) or wants_operations():
        x.copy_(rotary(x, cos, sin, *rest))
    else:
        below_autograd(_ops.rotary_.default, x, cos, sin, *rest)


def _rotary_math(x: Tensor, *rest: Any) -> Tensor:
    return _layout_like(x).copy_(rotate(x, *rest))


# ---- By the core.


class _Rotation:
    """One call, checked, with what has to be converted for the kernel."""

    def __init__(self, x: Tensor, cos: Tensor, sin: Tensor, *rest: Any, in_place: bool) -> None:
        self.call = _record(x, cos, sin, *rest, in_place=in_place)
        self.kernel = _core.prepare("rotary", self.call, finds_kernel=True)
        is_like_x = cos.dtype == sin.dtype == x.dtype
        self.tables = [
            _core.contiguous_rows(table if is_like_x else table.float()) for table in (cos, sin)
        ]
        for name, table in zip(("cos", "sin"), self.tables):
            _records.put(self.call, name, table)

    def run(self, x: Tensor, y: Tensor) -> None:
        """y = x turned, both with rows that the kernel can read; y may be x."""
        if x.numel() == 0:
            return
        _records.put(self.call, "x", x)
        written = _records.new(_records.OneTensor)
        _records.put(written, "x", y)
        _threads.run("rotary", self.kernel, x, self.call, written)


def _rotary_kernel(x: Tensor, *rest: Any) -> Tensor:
    rotation = _Rotation(x, *rest, in_place=False)
    readable = _core.contiguous_rows(x)
    y = _layout_like(readable)
    rotation.run(readable, y)
    return y


def _rotary_kernel_(x: Tensor, *rest: Any) -> None:
    rotation = _Rotation(x, *rest, in_place=True)
    readable = _core.contiguous_rows(x)
    rotation.run(readable, readable)
    if readable is not x:
        x.copy_(readable)


# ---- For _ops.register().


def _fake(x: Tensor, *rest: Any) -> Tensor:
    if can_check(x, *rest):
        check("rotary", _record(x, *rest, in_place=False))
    return _layout_like(x)


def _fake_(x: Tensor, *rest: Any) -> None:
    if can_check(x, *rest):
        check("rotary", _record(x, *rest, in_place=True))


MATH: dict[str, Callable[..., Any]] = {"rotary": _rotary_math, "rotary_": rotate_}
KERNELS: dict[str, Callable[..., Any]] = {"rotary": _rotary_kernel, "rotary_": _rotary_kernel_}
FAKES = {"rotary": _fake, "rotary_": _fake_}
DIFFERENTIABLE = {"rotary": _recorded, "rotary_": rotary_}
