"""The float64 reference of `anyflash.testing`: attention and the KV cache in their plainest form.

One sequence at a time, differentiable by autograd, dropout bits from a Philox in Python ints, and
no operator of the library.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox-4x32 with 7 rounds in plain integers: four 32-bit words in, four out."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(7):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & mask, (p0 >> 32) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


@functools.lru_cache(maxsize=1 << 15)
def _halves(c0: int, c1: int, c2: int, c3: int, seed: int) -> tuple[int, ...]:
    words = philox((c0, c1, c2, c3), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return tuple((word >> shift) & 0xFFFF for word in words for shift in (0, 16))


def dropout_half(seed: int, offset: int, head: int, row: int, column: int) -> int:
    """The 16 random bits of one element; `head` is sequence * heads + head."""
    halves = _halves(
        column // 16 * 4 + column % 8 // 2,
        row // 16 * 8 + row % 8,
        head,
        offset & 0xFFFFFFFF,
        seed,
    )
    return halves[row % 16 // 8 * 4 + column % 16 // 8 * 2 + column % 2]


def keep_mask(
    rng_state: Tensor, dropout_p: float, sequence: int, heads: int, seqlen_q: int, seqlen_k: int
) -> Tensor:
    """Which elements of one sequence survive dropout: bool (heads, seqlen_q, seqlen_k)."""
    seed, offset = rng_state.tolist()
    threshold = min(round(dropout_p * 65536), 65535)
    kept = [
        dropout_half(seed, offset, sequence * heads + h, i, j) >= threshold
        for h in range(heads)
        for i in range(seqlen_q)
        for j in range(seqlen_k)
    ]
    return torch.tensor(kept, dtype=torch.bool).reshape(heads, seqlen_q, seqlen_k)


@dataclass
class _Masking:
    """What is the same for all sequences of a call."""

    softmax_scale: float
    window: tuple[int, int]
    softcap: float = 0.0
    dropout_p: float = 0.0
    extra: dict[str, Tensor | None] = field(default_factory=dict)


def _attend(q: Tensor, k: Tensor, v: Tensor, how: _Masking, sequence: int) -> tuple[Tensor, Tensor]:
    """One sequence: q (sq, heads, d), k (sk, heads_k, d), v (sk, heads_k, dv) -> out and lse.

    out is (sq, heads, dv), lse (heads, sq).
    """
    (seqlen_q, heads, _), seqlen_k = q.shape, k.size(0)
    group = heads // k.size(1)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * how.softmax_scale
    if how.softcap > 0:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    diagonal = torch.arange(seqlen_q, device=q.device)[:, None] + seqlen_k - seqlen_q
    column = torch.arange(seqlen_k, device=q.device)[None, :]
    left, right = how.window
    visible = torch.ones(heads, seqlen_q, seqlen_k, dtype=torch.bool, device=q.device)
    if left >= 0:
        visible = visible & (column >= diagonal - left)
    if right >= 0:
        visible = visible & (column <= diagonal + right)
    slopes, bias = how.extra.get("alibi_slopes"), how.extra.get("bias")
    if slopes is not None:
        slope = (slopes[sequence] if slopes.dim() == 2 else slopes).to(q.dtype)[:, None, None]
        purely_causal = left < 0 and right == 0
        scores = scores + slope * (column if purely_causal else -(diagonal - column).abs())
    if bias is not None:
        bias = bias[sequence, :, :seqlen_q, :seqlen_k]
        if bias.dtype == torch.bool:
            visible = visible & bias
        else:
            visible = visible & (bias != float("-inf"))
            scores = scores + bias.to(q.dtype)
    row_sees = visible.any(-1, keepdim=True)
    # Rows without keys are computed with scores of 0 and then set, so that autograd meets no NaN.
    scores = torch.where(
        row_sees, scores.masked_fill(~visible, float("-inf")), torch.zeros_like(scores)
    )
    sinks = how.extra.get("sinks")
    logits = scores
    if sinks is not None:
        column_of_sinks = sinks.to(q.dtype)[:, None, None].expand(heads, seqlen_q, 1)
        logits = torch.cat([scores, column_of_sinks], -1)
    elif seqlen_k == 0:
        logits = scores.new_zeros(heads, seqlen_q, 1)
    # Neither torch.logsumexp, whose derivative is exp(logits - lse), nor exp(scores - lse) below:
    # far from 0 the log-sum-exp does not hold the sum.
    largest = logits.detach().amax(-1, keepdim=True)
    log_sum = (logits - largest).exp().sum(-1, keepdim=True).log()
    lse = largest + log_sum
    weights = torch.where(row_sees, (scores - largest - log_sum).exp(), torch.zeros_like(scores))
    if how.dropout_p > 0:
        state = how.extra["rng_state"]
        if state is None:
            raise ValueError("rng_state: dropout needs the (seed, offset) that drew it, got None")
        keep = keep_mask(state, how.dropout_p, sequence, heads, seqlen_q, seqlen_k)
        weights = weights * keep.to(q) / (1 - how.dropout_p)
    out = torch.einsum("hij,jhd->ihd", weights, v)
    return out, torch.where(row_sees, lse, torch.full_like(lse, float("inf"))).squeeze(-1)


def _keys(tensor: Tensor, sequence: int, begin: int, end: int, where: dict[str, Any]) -> Tensor:
    """Rows begin..end of a sequence's keys or values, wherever they are stored."""
    table, cu_seqlens = where.get("block_table"), where.get("cu_seqlens_k")
    if table is not None:
        rows = torch.arange(begin, end, device=tensor.device)
        return tensor[table[sequence].long()[rows // tensor.size(1)], rows % tensor.size(1)]
    if cu_seqlens is not None:
        return tensor[int(cu_seqlens[sequence]) + begin : int(cu_seqlens[sequence]) + end]
    return tensor[sequence, begin:end]


def _longest(x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> int:
    if cu_seqlens is None:
        return x.size(1)
    return x.size(0) if max_seqlen is None else int(max_seqlen)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    compute: torch.dtype = torch.float64,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    **tensors: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention as `schemas.def` defines it, in `compute` precision.

    Arguments have the names and shapes of `anyflash.attention`.

    Returns:
        (out, lse) in `compute`: out (batch, seqlen_q, heads, head_dim_v) and lse (batch, heads,
        seqlen_q); packed (total_q, heads, head_dim_v) and (heads, total_q). Rows after the last
        packed sequence hold 0 and +inf.
    """
    cu_q, cu_k = tensors.get("cu_seqlens_q"), tensors.get("cu_seqlens_k")
    table, used, leftpad = (tensors.get(n) for n in ("block_table", "seqused_k", "leftpad_k"))
    batch, heads = q.size(0) if cu_q is None else cu_q.numel() - 1, q.size(-2)
    longest_k = table.size(1) * k.size(1) if table is not None else _longest(k, cu_k, max_seqlen_k)
    left, right = (-1 if int(w) >= longest_k else int(w) for w in window_size)
    scale = q.size(-1) ** -0.5 if softmax_scale is None else softmax_scale
    extra = {n: tensors.get(n) for n in ("alibi_slopes", "bias", "sinks", "rng_state")}
    if extra["bias"] is not None:
        longest_q = _longest(q, cu_q, max_seqlen_q)
        extra["bias"] = extra["bias"].expand(batch, heads, longest_q, longest_k)
    how = _Masking(scale, (left, 0 if causal else right), softcap, dropout_p, extra)

    outs, lses = [], []
    for b in range(batch):
        rows = q[b] if cu_q is None else q[int(cu_q[b]) : int(cu_q[b + 1])]
        end = longest_k
        if used is not None:
            end = int(used[b])
        elif cu_k is not None:
            end = int(cu_k[b + 1] - cu_k[b])
        begin = 0 if leftpad is None else int(leftpad[b])
        key, value = (_keys(x, b, begin, max(begin, end), tensors).to(compute) for x in (k, v))
        out, lse = _attend(rows.to(compute), key, value, how, b)
        outs.append(out)
        lses.append(lse)
    if cu_q is None:
        return torch.stack(outs), torch.stack(lses)
    slack = q.size(0) - int(cu_q[-1])
    outs.append(outs[0].new_zeros(slack, heads, v.size(-1)))
    lses.append(lses[0].new_full((heads, slack), float("inf")))
    return torch.cat(outs), torch.cat(lses, 1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of x (rows, heads, head_dim) at absolute positions (rows,)."""
    half = cos.size(1)
    angle_cos, angle_sin = (table.to(x)[positions][:, None, :] for table in (cos, sin))
    pairs = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    first, second = pairs if interleaved else (slice(0, half), slice(half, 2 * half))
    rotated = x.clone()
    rotated[..., first] = x[..., first] * angle_cos - x[..., second] * angle_sin
    rotated[..., second] = x[..., first] * angle_sin + x[..., second] * angle_cos
    return rotated


def reference_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    compute: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`anyflash.attention_kvcache` in `compute` precision; the caches given are left as they are.

    Returns:
        (out, lse, k_cache, v_cache); the caches after the append, in their own dtype.
    """
    q, keys, values = q.to(compute), k_cache.clone(), v_cache.clone()
    batch, page = q.size(0), k_cache.size(1)
    capacity = page if block_table is None else page * block_table.size(1)
    if (k is None) != (v is None) or (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("k and v, rotary_cos and rotary_sin: expected both of them or neither")
    window = options.get("window_size", (-1, -1))
    bounded = options.get("causal", False) or any(0 <= int(w) < capacity for w in window)
    lengths = [capacity] * batch if cache_seqlens is None else cache_seqlens.tolist()
    for b in range(batch):
        row = b if cache_batch_idx is None else int(cache_batch_idx[b])
        if k is None or v is None:
            continue
        new = torch.arange(k.size(1), device=q.device) + lengths[b]
        new_key = k[b].to(compute)
        if rotary_cos is not None and rotary_sin is not None:
            at = lengths[b] + torch.arange(q.size(1), device=q.device) * int(bounded)
            q = q.clone()
            q[b] = _rotate(q[b], rotary_cos, rotary_sin, at, rotary_interleaved)
            # The table's dtype is the operator's; q is rounded to it as the operator rounds.
            q[b] = q[b].to(rotary_cos.dtype).to(compute)
            new_key = _rotate(new_key, rotary_cos, rotary_sin, new, rotary_interleaved)
        if block_table is None:
            keys[row, new], values[row, new] = new_key.to(keys.dtype), v[b].to(values.dtype)
        else:
            blocks = block_table[b].long()[new // page]
            keys[blocks, new % page] = new_key.to(keys.dtype)
            values[blocks, new % page] = v[b].to(values.dtype)
        lengths[b] += k.size(1)
    rows = slice(None) if cache_batch_idx is None else cache_batch_idx.long()
    options |= {"block_table": block_table, "leftpad_k": cache_leftpad, "compute": compute}
    options["seqused_k"] = torch.tensor(lengths, dtype=torch.int32, device=q.device)
    stored = (keys, values) if block_table is not None else (keys[rows], values[rows])
    out, lse = reference(q, *stored, **options)
    return out, lse, keys, values
