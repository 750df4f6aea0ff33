"""PyTorch's public attention, which picks what the device is good at. It knows square causal masks
and explicit ones, and returns no log-sum-exp.

Everything here is differentiable: on devices without a backward of this library's the public
functions leave it to autograd.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .. import _core
from .arguments import AttentionArgs
from .batches import batches_of, covers_everything
from .dense_mask import INFINITY, Chunk, DenseBatch, DenseMask, chunks
from .results import empty_results


def _compute_dtype(args: AttentionArgs) -> torch.dtype:
    """What a call computes in. A finite bias must stay finite when it is added; fp16 products are
    emulated on most CPUs (a hundred times slower)."""
    adds_bias = args.bias is not None and args.bias.dtype != torch.bool
    is_emulated = args.q.device.type == "cpu" and args.q.dtype == torch.float16
    return args.compute_dtype if adds_bias or is_emulated else args.q.dtype


def _call(
    args: AttentionArgs, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
) -> Tensor:
    """(n, rows, heads, head_dim_v), in the dtype of computation. ``mask``: (n or 1, heads or 1,
    rows, keys)."""
    dtype, group = _compute_dtype(args), args.heads // args.heads_k
    if group > 1:
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    scale, default = args.softmax_scale, args.head_dim**-0.5
    named: dict[str, Any] = {}
    if scale > 0 and scale != default and _core.torch_version() >= 201:
        named["scale"] = scale
    elif scale != default:  # negative ones too: -inf of a mask comes before the scale
        q = q * (scale / default)
    return scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, **named).transpose(1, 2)


def _mask(masks: DenseMask, chunk: Chunk) -> tuple[Tensor | None, Tensor | None]:
    """The mask of a chunk, and which rows see no key, (n or 1, heads or 1, rows, 1): their mask
    hides nothing, since it would give NaN."""
    visible, bias = masks.visible(chunk), masks.batch.bias
    if bias is not None:
        bias = masks.bias(bias, chunk)
    if bias is not None and bias.dtype != torch.bool:
        added = bias.to(_compute_dtype(masks.args))
        if visible is not None:
            added = added.masked_fill(~visible, -INFINITY)
        dead = added.detach().amax(-1, keepdim=True) == -INFINITY
        mask = added.masked_fill(dead, 0.0)
    else:
        if bias is not None:
            visible = bias if visible is None else visible & bias
        if visible is None:
            return None, None
        dead = ~visible.any(-1, keepdim=True)
        mask = visible | dead
    return mask.expand(*mask.shape[:2], len(chunk.rows), len(chunk.columns)), dead


def _attend_chunk(args: AttentionArgs, masks: DenseMask, chunk: Chunk) -> Tensor:
    batch, b, rows, columns = masks.batch, *chunk
    q = batch.q[b.start : b.stop, rows.start : rows.stop]
    if len(columns) == 0:
        return q.new_zeros((*q.shape[:3], args.head_dim_v))
    k, v = (x[b.start : b.stop, columns.start : columns.stop] for x in (batch.k, batch.v))
    mask, dead = _mask(masks, chunk)
    out = _call(args, q, k, v, mask, False)
    return out if dead is None else out.masked_fill(dead.transpose(1, 2), 0.0)


def _attend_batch(args: AttentionArgs, batch: DenseBatch) -> Tensor:
    """(batch, seqlen_q, heads, head_dim_v), in one call where PyTorch knows the mask."""
    if batch.bias is None and batch.len_q is None and batch.len_k is None and batch.seqlen_k > 0:
        is_square = args.purely_causal and batch.seqlen_q == batch.seqlen_k
        if is_square or (args.window_left < 0 and args.window_right < 0):
            return _call(args, batch.q, batch.k, batch.v, None, is_square)
    masks = DenseMask(args, batch)
    sequences = [
        torch.cat([_attend_chunk(args, masks, chunk) for chunk in group], dim=1)
        for _, group in itertools.groupby(chunks(args, batch), lambda chunk: chunk.sequences)
    ]
    if not sequences:
        return batch.q.new_zeros((*batch.q.shape[:3], args.head_dim_v))
    return torch.cat(sequences)


def attend(args: AttentionArgs) -> Tensor:
    """out of schemas.def."""
    out, _ = empty_results(args)
    if not covers_everything(args):
        out.zero_()
    for batch in batches_of(args):
        value = _attend_batch(args, batch).to(out.dtype)
        if covers_everything(args) and value.stride() == out.stride():
            return value
        batch.put_rows(out, value)
    return out


def forward(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """out of schemas.def, and NaN for the lse (routes.def)."""
    _, lse = empty_results(args)
    return attend(args), lse.fill_(math.nan)
