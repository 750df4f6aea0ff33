"""Attention over a key/value cache: append, rotate, attend. Nothing here waits for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks, validate
from .attention import choose_forward, run_forward
from .checks import check, check_same_device, dtype_text, shape_text
from .problem import AttentionArgs


@dataclass
class KVCacheCall:
    """What _flash_attn_kvcache_ was called with. Shapes: schemas.def."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None
    v: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    cache_seqlens: Tensor | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    block_table: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    softmax_scale: float
    softcap: float
    rotary_interleaved: bool

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def seqlen_new(self) -> int:
        return 0 if self.k is None else self.k.shape[1]

    @property
    def capacity(self) -> int:
        page_size = self.k_cache.shape[1]
        return page_size if self.block_table is None else self.block_table.shape[1] * page_size

    def attention(self, window_left: int, window_right: int) -> AttentionArgs:
        """The caches as attention sees them.

        A cache whose rows are picked by cache_batch_idx is a paged one with one page per sequence.
        """
        k, v, table = self.k_cache, self.v_cache, self.block_table
        if table is None and self.cache_batch_idx is not None:
            table = self.cache_batch_idx.unsqueeze(1)
        elif table is None and k.shape[0] > self.batch:
            k, v = k[: self.batch], v[: self.batch]
        return AttentionArgs(
            q=self.q,
            k=k,
            v=v,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            max_seqlen_q=0,
            max_seqlen_k=0,
            seqused_k=self.cache_seqlens,
            leftpad_k=self.cache_leftpad,
            block_table=table,
            alibi_slopes=self.alibi_slopes,
            bias=None,
            sinks=self.sinks,
            rng_state=None,
            dropout_p=0.0,
            softmax_scale=self.softmax_scale,
            window_left=window_left,
            window_right=window_right,
            softcap=self.softcap,
        )


def _check_new_keys(call: KVCacheCall, k: Tensor) -> None:
    q, v = call.q, call.v
    check(v is not None, "If key is supplied, value must also be passed in, got k without v")
    check(
        call.cache_seqlens is not None,
        "If key is supplied, seqlens_k must also be passed in, got k without cache_seqlens",
    )
    assert v is not None
    for tensor, name, word in ((k, "k", "key"), (v, "v", "value")):
        check(
            tensor.dtype == q.dtype,
            f"{word} must have the same dtype as query, got {name} of {dtype_text(tensor)} ",
            f"and q of {dtype_text(q)}",
        )
    check_same_device(q, "q", k, "k")
    check_same_device(q, "q", v, "v")
    heads_k = call.k_cache.shape[2]
    seqlen: object = "seqlen_new"
    for tensor, name, cache in ((k, "k", call.k_cache), (v, "v", call.v_cache)):
        want = (call.batch, seqlen, heads_k, cache.shape[3])
        fits = tensor.dim() == 4 and all(
            size == wanted for size, wanted in zip(tensor.shape, want) if wanted != "seqlen_new"
        )
        check(
            fits,
            f"{name} must have shape (batch_size, seqlen_knew, num_heads_k, head_size); ",
            f"{name}: expected ({', '.join(map(str, want))}), got {shape_text(tensor)}",
        )
        seqlen = k.shape[1]
    check(
        k.shape[1] <= call.capacity,
        "If key is supplied, it must have seqlen <= the seqlen of the KV cache, got ",
        f"{k.shape[1]} new keys for a cache of {call.capacity}",
    )


def _check_rotary(call: KVCacheCall) -> None:
    cos, sin, q = call.rotary_cos, call.rotary_sin, call.q
    if cos is None or sin is None:
        given, missing = ("cos", "sin") if sin is None else ("sin", "cos")
        check(False, f"If rotary {given} is provided, rotary {missing} must also be provided")
        return
    check(
        call.k is not None,
        "If rotary cos/sin are provided, new key / value to be appended to KV cache must also be ",
        "provided",
    )
    check(
        cos.dim() == 2,
        f"rotary_cos: expected (seqlen_rotary, rotary_dim / 2), got {shape_text(cos)}",
    )
    check(
        sin.shape == cos.shape,
        f"rotary_sin: expected the shape of rotary_cos, {shape_text(cos)}, got {shape_text(sin)}",
    )
    check(
        2 * cos.shape[1] <= q.shape[3],
        f"rotary_dim must be <= headdim, got rotary_dim {2 * cos.shape[1]} ",
        f"and head_dim {q.shape[3]}",
    )
    check(
        cos.shape[0] >= call.capacity,
        f"cos/sin seqlen must be at least the seqlen of KV cache, got {cos.shape[0]} rows ",
        f"for a cache of {call.capacity}",
    )
    for table, name in ((cos, "rotary_cos"), (sin, "rotary_sin")):
        check(
            table.dtype == q.dtype,
            f"{name} must have the same dtype as query, got {name} of {dtype_text(table)} ",
            f"and q of {dtype_text(q)}",
        )
        check_same_device(q, "q", table, name)


def _check_lengths(call: KVCacheCall) -> None:
    vectors = (
        (call.cache_seqlens, "cache_seqlens"),
        (call.cache_leftpad, "cache_leftpad"),
        (call.cache_batch_idx, "cache_batch_idx"),
    )
    for tensor, name in vectors:
        if tensor is None:
            continue
        paged = call.block_table is not None
        check(
            not (paged and name == "cache_leftpad"),
            "We don't support Paged KV and leftpad_k running at the same time yet, ",
            "got block_table and cache_leftpad",
        )
        check(
            not (paged and name == "cache_batch_idx"),
            "Paged KVcache does not support cache_batch_idx",
        )
        checks.check_index_vector(tensor, name, call.q, call.batch, "(batch_size)")


def _check_length(call: KVCacheCall, b: int, length: int) -> int:
    """The keys that sequence b uses, checked against the capacity."""
    capacity, added = call.capacity, call.seqlen_new
    check(length >= 0, f"cache_seqlens: expected 0 or more, got {length} for sequence {b}")
    used = length + added
    check(
        used <= capacity or call.block_table is None,
        f"Paged KV cache: max(seqlens_k) + seqlen_new = {used} exceeds the capacity addressable ",
        f"by block_table, {capacity} (cache_seqlens is {length} for sequence {b})",
    )
    check(
        used <= capacity,
        f"cache_seqlens: expected at most {capacity - added} (k_cache holds {capacity}, ",
        f"k adds {added}), got {length} for sequence {b}",
    )
    return used


def _check_values(call: KVCacheCall) -> None:
    def numbers(tensor: Tensor | None) -> list | None:
        return None if tensor is None else tensor.tolist()

    lengths, rows = numbers(call.cache_seqlens), numbers(call.cache_batch_idx)
    leftpad, table = numbers(call.cache_leftpad), numbers(call.block_table)
    num_rows, page_size = call.k_cache.shape[:2]
    for b in range(call.batch):
        used = call.capacity if lengths is None else _check_length(call, b, lengths[b])
        if rows is not None:
            check(
                0 <= rows[b] < num_rows,
                f"cache_batch_idx: expected 0 to {num_rows - 1}, the rows of k_cache, ",
                f"got {rows[b]} for sequence {b}",
            )
        if leftpad is not None:
            check(
                leftpad[b] >= 0,
                f"cache_leftpad: expected 0 or more, got {leftpad[b]} for sequence {b}",
            )
        if table is not None:
            checks.check_block_table_row(table[b], b, used, page_size, num_rows)


def validate_kvcache(call: KVCacheCall) -> None:
    """The checks of csrc/validate_kvcache.cpp."""
    # Shapes as the caller wrote them: cache_batch_idx picks rows from a cache of any size.
    paged = call.block_table is not None or call.cache_batch_idx is not None
    layout = validate.Layout(paged=paged, spare_rows=True, k="k_cache", v="v_cache")
    validate.check_query_and_keys(call.q, call.k_cache, call.v_cache, layout, False, "forward")
    if call.block_table is not None:
        checks.check_block_table(call.block_table, call.q, call.batch)
    _check_lengths(call)
    if call.k is not None:
        _check_new_keys(call, call.k)
    check(call.k is not None or call.v is None, "v: given without k")
    if call.rotary_cos is not None or call.rotary_sin is not None:
        _check_rotary(call)
    checks.check_window_and_scale(call.softmax_scale, call.softcap)
    heads = call.q.shape[2]
    if call.alibi_slopes is not None:
        checks.check_alibi_slopes(call.alibi_slopes, call.q, call.batch, heads)
    if call.sinks is not None:
        checks.check_sinks(call.sinks, call.q, heads)
    has_values = (call.cache_seqlens, call.cache_batch_idx, call.block_table, call.cache_leftpad)
    if any(x is not None for x in has_values) and checks.values_are_checked(call.q):
        _check_values(call)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x (batch, seqlen, heads, head_dim) turned by the angles of its positions.

    Args:
        x: any floating dtype; the arithmetic is fp32 (fp64 for fp64).
        cos: (seqlen_rotary, rotary_dim / 2).
        sin: like cos.
        positions: (batch, seqlen) int64; beyond the tables the last angle counts.
        interleaved: pairs are neighbours; otherwise half of rotary_dim apart.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = positions.clamp(max=cos.shape[0] - 1)
    cos, sin = (table[rows].unsqueeze(2).to(compute) for table in (cos, sin))
    half = cos.shape[-1]

    def members(of: Tensor) -> tuple[Tensor, Tensor]:
        rotated = of[..., : 2 * half]
        if interleaved:
            return rotated[..., 0::2], rotated[..., 1::2]
        return rotated[..., :half], rotated[..., half:]

    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    a, b = (member.to(compute) for member in members(x))
    y1, y2 = members(y)
    y1.copy_(a * cos - b * sin)
    y2.copy_(a * sin + b * cos)
    y[..., 2 * half :] = x[..., 2 * half :]
    return y


def _append(call: KVCacheCall, k: Tensor, v: Tensor, positions: Tensor) -> None:
    """Writes k and v (batch, seqlen_new, ...) to the rows ``positions`` of the caches."""
    if call.block_table is not None:
        page_size = call.k_cache.shape[1]
        page = torch.div(positions, page_size, rounding_mode="floor")
        where = (call.block_table.long().gather(1, page), positions % page_size)
    else:
        rows = call.cache_batch_idx
        rows = torch.arange(call.batch, device=call.q.device) if rows is None else rows.long()
        where = (rows.unsqueeze(1).expand_as(positions), positions)
    call.k_cache.index_put_(where, k)
    call.v_cache.index_put_(where, v)


def _append_and_rotate(call: KVCacheCall, args: AttentionArgs) -> None:
    """Appends the new keys and values; q comes back rotated where rotary tables are given."""
    k, v, first = call.k, call.v, call.cache_seqlens
    assert k is not None and v is not None and first is not None

    def positions_from(seqlen: int) -> Tensor:
        return first.long().unsqueeze(1) + torch.arange(seqlen, device=first.device)

    positions = positions_from(k.shape[1])
    if call.rotary_cos is not None and call.rotary_sin is not None:
        tables = (call.rotary_cos, call.rotary_sin)
        k = rotate(k, *tables, positions, call.rotary_interleaved)
        # Under a mask that moves with the query each row of q has its own position, else all stand
        # at the end of the cache.
        seqlen_q = call.q.shape[1]
        if args.window_left >= 0 or args.window_right >= 0:
            q_positions = positions_from(seqlen_q)
        else:
            q_positions = positions_from(1).expand(-1, seqlen_q)
        args.q = rotate(call.q, *tables, q_positions, call.rotary_interleaved)
    _append(call, k, v, positions)
    args.seqused_k = first + k.shape[1]


def _flash_attn_kvcache_(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    rotary_interleaved: bool,
    backend: int,
) -> tuple[Tensor, Tensor]:
    """schemas.def."""
    call = KVCacheCall(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx,
        cache_leftpad, block_table, alibi_slopes, sinks, softmax_scale, softcap,
        rotary_interleaved,
    )  # fmt: skip
    validate_kvcache(call)
    args = call.attention(window_left, window_right)
    args.normalise(causal)
    route = choose_forward(args, backend)  # who refuses leaves the caches alone
    if call.seqlen_new > 0 and call.batch > 0:
        _append_and_rotate(call, args)
    return run_forward(route, args)
