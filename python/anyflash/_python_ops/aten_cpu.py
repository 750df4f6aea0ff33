"""PyTorch's CPU flash attention. It knows square causal masks and explicit ones; everything else
is cut into pieces."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _core, _records
from . import math
from .arguments import AttentionArgs, BackwardArgs, Gradients
from .batches import batches_of, covers_everything
from .dense_mask import INFINITY
from .far_rows import far_rows
from .results import empty_results
from .runs import Run

_CAUSAL, _INTERVAL = 1, 2  # Piece::Mask of core/pieces.h
_FORWARD, _BACKWARD, _EXPLICIT = range(3)  # PlanFor
_NATIVE_GQA = 210  # torch that takes fewer key heads than query heads


def _computable(x: Tensor) -> Tensor:
    """fp16 GEMMs are emulated on most CPUs (a hundred times slower): computed in fp32."""
    return x.float() if x.dtype == torch.float16 else x


def _expanded(x: Tensor, heads: int) -> Tensor:
    """Key heads repeated for their query heads, for a torch that cannot share them."""
    if x.shape[2] == heads or _core.torch_version() >= _NATIVE_GQA:
        return x
    return x.repeat_interleave(heads // x.shape[2], dim=2)


def _summed(gradient: Tensor, heads_k: int) -> Tensor:
    """The gradient of what _expanded() repeated."""
    if gradient.shape[2] == heads_k:
        return gradient
    return gradient.unflatten(2, (heads_k, -1)).sum(3)


class Block(NamedTuple):
    """out (batch, rows, heads, head_dim) and lse (batch, heads, rows)."""

    out: Tensor
    lse: Tensor


class RunProblem:
    """One run of a problem, where lengths are plain numbers."""

    def __init__(self, args: AttentionArgs, run: Run, purpose: int) -> None:
        self.scale = args.softmax_scale
        # PyTorch's causal mask comes before the scale: -inf times 0 or a negative number.
        explicit_masks = run.bias is not None or args.softmax_scale <= 0
        self.seqlen_q, self.seqlen_k = run.seqlen_q, run.seqlen_k
        self.window_left, self.window_right = args.window_left, args.window_right
        lengths = (run.seqlen_q, run.seqlen_k, args.window_left, args.window_right)
        plan = _core.plan_pieces(*lengths, _EXPLICIT if explicit_masks else purpose)
        self.row_begin, self.row_end, self.pieces = plan
        self.q = _computable(run.q)
        self.k = _expanded(_computable(run.k), args.heads)
        self.v = _expanded(_computable(run.v), args.heads)
        # PyTorch takes a mask of q's dtype or fp32, but reads fp32 wrongly beside fp64.
        self.mask_dtype = torch.promote_types(self.q.dtype, torch.float32)
        self.bias = None if run.bias is None else self._additive(run.bias)

    @property
    def covers_all_rows(self) -> bool:
        return (self.row_begin, self.row_end) == (0, self.seqlen_q)

    def is_whole(self, piece: _records.Piece) -> bool:
        rows, keys = (piece.row_begin, piece.row_end), (piece.key_begin, piece.key_end)
        return rows == (0, self.seqlen_q) and keys == (0, self.seqlen_k)

    def _additive(self, bias: Tensor) -> Tensor:
        if bias.dtype == torch.bool:
            mask = torch.full(bias.shape, -INFINITY, dtype=self.mask_dtype)
            return mask.masked_fill_(bias, 0.0)
        return bias if bias.dtype == self.q.dtype else bias.to(self.mask_dtype)

    def _explicit_mask(self, piece: _records.Piece) -> Tensor | None:
        mask = None
        if piece.mask == _INTERVAL:
            mask = self._interval_mask(piece)
        if self.bias is None:
            return mask
        bias = self.bias
        if bias.shape[2] > 1:
            bias = bias[:, :, piece.row_begin : piece.row_end]
        if bias.shape[3] > 1:
            bias = bias[..., piece.key_begin : piece.key_end]
        return bias if mask is None else bias + mask.to(bias.dtype)

    def _interval_mask(self, piece: _records.Piece) -> Tensor:
        rows = torch.arange(piece.row_begin, piece.row_end).unsqueeze(1)
        rows += self.seqlen_k - self.seqlen_q
        keys = torch.arange(piece.key_begin, piece.key_end)
        hidden = torch.zeros((), dtype=torch.bool)
        if self.window_left >= 0:
            hidden = keys < rows - self.window_left
        if self.window_right >= 0:
            hidden = hidden | (keys > rows + self.window_right)
        mask = torch.zeros((len(rows), len(keys)), dtype=self.mask_dtype)
        return mask.masked_fill_(hidden, -INFINITY)

    def _cut(self, piece: _records.Piece) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of a piece as (batch, heads, seqlen, head_dim)."""
        q = self.q[:, piece.row_begin : piece.row_end].transpose(1, 2)
        keys = slice(piece.key_begin, piece.key_end)
        return q, self.k[:, keys].transpose(1, 2), self.v[:, keys].transpose(1, 2)

    def attend(self, piece: _records.Piece) -> Block:
        mask = self._explicit_mask(piece)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *self._cut(piece),
            0.0,
            piece.mask == _CAUSAL,
            **({} if mask is None else {"attn_mask": mask}),
            scale=self.scale,
        )
        if self.bias is not None and mask is not None:
            # PyTorch gives a row whose keys are all at -inf the log-sum-exp 0.
            dead = mask.amax(-1) == -INFINITY
            lse = lse.masked_fill(dead, INFINITY)
            out = out.masked_fill(dead.unsqueeze(-1), 0.0)
        return Block(out.transpose(1, 2), lse)

    def differentiate(
        self, piece: _records.Piece, dout: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of one piece; ``out`` and ``lse`` are those of the whole rows."""
        mask = self._explicit_mask(piece)
        rows = slice(piece.row_begin, piece.row_end)
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout[:, rows].transpose(1, 2),
            *self._cut(piece),
            out[:, rows].transpose(1, 2),
            lse[:, :, rows],
            0.0,
            piece.mask == _CAUSAL,
            **({} if mask is None else {"attn_mask": mask}),
            scale=self.scale,
        )
        dq, dk, dv = (gradient.transpose(1, 2) for gradient in gradients)
        return dq, dk, dv


def _merge(a: Block, b: Block) -> Block:
    """The result of two pieces of the same rows."""
    dtype = a.lse.dtype
    weight = torch.sigmoid(b.lse - a.lse).transpose(1, 2).unsqueeze(-1)
    out = torch.lerp(a.out.to(dtype), b.out.to(dtype), weight)
    return Block(out, torch.logaddexp(a.lse, b.lse))


def _as_promised(x: Tensor, like: Tensor) -> Tensor:
    """x with the dtype and strides of empty_like(like); a copy only where they differ."""
    if x.dtype == like.dtype and like.is_contiguous() and x.stride() == like.stride():
        return x
    result = torch.empty_like(like)
    return x if x.dtype == like.dtype and x.stride() == result.stride() else result.copy_(x)


def _forward_run(problem: RunProblem, out: Tensor, lse: Tensor) -> None:
    if not problem.covers_all_rows or not problem.pieces:
        out.zero_()
        lse.fill_(INFINITY)
    previous: Block | None = None
    for piece in problem.pieces:
        block = problem.attend(piece)
        if piece.merges and previous is not None:
            block = _merge(previous, block)
        out[:, piece.row_begin : piece.row_end].copy_(block.out)
        lse[:, :, piece.row_begin : piece.row_end].copy_(block.lse)
        previous = block


def forward(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """out and lse of schemas.def."""
    dense = covers_everything(args)
    if dense:
        (run,) = batches_of(args)
        problem = RunProblem(args, run, _FORWARD)  # type: ignore[arg-type]
        if len(problem.pieces) == 1 and problem.covers_all_rows:
            block = problem.attend(problem.pieces[0])
            return _as_promised(block.out, args.q), block.lse.contiguous()
    out, lse = empty_results(args)
    if args.packed:  # rows that belong to no sequence
        out.zero_()
        lse.fill_(INFINITY)
    for run in batches_of(args):
        _forward_run(RunProblem(args, run, _FORWARD), run.rows(out), run.stats(lse))  # type: ignore[arg-type]
    return out, lse


def _backward_run(
    args: AttentionArgs, grad: BackwardArgs, run: Run, targets: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Writes the gradients of one run into views of dq, dk and dv."""
    problem = RunProblem(args, run, _BACKWARD)
    dout, out = (_computable(run.rows(tensor)) for tensor in (grad.dout, grad.out))
    lse = run.stats(grad.lse)
    heads_k = run.k.shape[2]
    first = problem.pieces[0] if len(problem.pieces) == 1 else None
    if first is not None and problem.is_whole(first):
        dq, dk, dv = problem.differentiate(first, dout, out, lse)
        gradients: tuple[Tensor, ...] = (dq, _summed(dk, heads_k), _summed(dv, heads_k))
    else:
        gradients = tuple(
            torch.zeros(target.shape, dtype=lse.dtype) for target in targets
        )  # sums of pieces, not rounded to half precision between them
        for piece in problem.pieces:
            dq, dk, dv = problem.differentiate(piece, dout, out, lse)
            keys = slice(piece.key_begin, piece.key_end)
            gradients[0][:, piece.row_begin : piece.row_end].add_(dq)
            gradients[1][:, keys].add_(_summed(dk, heads_k))
            gradients[2][:, keys].add_(_summed(dv, heads_k))
    for target, gradient in zip(targets, gradients):
        target.copy_(gradient)


def backward(args: AttentionArgs, grad: BackwardArgs) -> Gradients:
    """dq, dk, dv of schemas.def, from the out and lse that are given."""
    if far_rows(grad.lse) is not None:
        return math.backward(args, grad)
    dq, dk, dv = (torch.empty_like(x) for x in (args.q, args.k, args.v))
    if not covers_everything(args):
        for gradient in (dq, dk, dv):
            gradient.zero_()
    for run in batches_of(args):
        assert isinstance(run, Run)
        targets = (run.rows(dq), run.keys(dk), run.keys(dv))
        _backward_run(args, grad, run, targets)
    return Gradients(dq, dk, dv)
