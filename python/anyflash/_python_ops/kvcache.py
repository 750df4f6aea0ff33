"""Attention over a key/value cache: append, rotate, attend. Nothing here waits for the device."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _core, _records, _threads
from .._guards import BelowWriteCounts, count_write
from . import without_core
from .arguments import AttentionArgs
from .attention import ROUTES, run_forward, take_options


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
    return_lse: bool
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
            return_lse=self.return_lse,
        )


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
    for cache, new in ((call.k_cache, k), (call.v_cache, v)):
        count_write(cache)
        with BelowWriteCounts():
            cache.index_put_(where, new)


def _append_by_kernel(
    choice: _records.Choice,
    call: KVCacheCall,
    record: _records.KVCacheCall,
    args: AttentionArgs,
    options: _records.AttentionOptions,
) -> None:
    """By the kernel: one launch. q comes back rotated where rotary tables are given."""
    count_write(call.k_cache)
    count_write(call.v_cache)
    args.seqused_k = call.q.new_empty(call.batch, dtype=torch.int32)
    results = _records.new(_records.AppendResults)
    _records.put(results, "seqused_k", args.seqused_k)
    if call.rotary_cos is not None and call.rotary_cos.shape[1] > 0:
        args.q = torch.empty_like(call.q, memory_format=torch.contiguous_format)
        _records.put(results, "q_rotated", args.q)
    records = tuple(map(ctypes.byref, (record, options, results)))
    with _threads.launch_on(call.q) as where:
        _core.raise_for(
            _core.loaded().anyflash_run_kvcache_append(choice.instance, *records, where)
        )


def _append_by_operators(call: KVCacheCall, args: AttentionArgs) -> None:
    """By plain operators; q comes back rotated where rotary tables are given."""
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
    return_lse: bool,
    backend: int,
) -> tuple[Tensor, Tensor]:
    """schemas.def."""
    call = KVCacheCall(
        q, k_cache, v_cache, _readable(k), _readable(v), _readable(rotary_cos),
        _readable(rotary_sin), cache_seqlens, cache_batch_idx, cache_leftpad, block_table,
        alibi_slopes, sinks, softmax_scale, softcap, return_lse, rotary_interleaved,
    )  # fmt: skip
    if _core.library is None:
        args = call.attention(window_left, window_right)
        route = without_core.prepare(args, None, causal, backend)
        if call.seqlen_new > 0 and call.batch > 0:
            _append_by_operators(call, args)
        return ROUTES[route].forward(args)
    copies: list[Tensor] = []
    record = _views_of(call, copies)
    record.options.window_left, record.options.window_right = window_left, window_right
    attention_call = _records.new(_records.AttentionCall)
    choice, append_choice = _records.Choice(), _records.Choice()
    _core.raise_for(
        _core.loaded().anyflash_prepare_kvcache(
            ctypes.byref(record),
            causal,
            ctypes.byref(_core.caller(backend)),
            ctypes.byref(attention_call),
            ctypes.byref(choice),
            ctypes.byref(append_choice),
        )
    )
    args = call.attention(window_left, window_right)
    take_options(args, attention_call.options)
    if append_choice.route != "none":
        if append_choice.route == "kernel":
            _append_by_kernel(append_choice, call, record, args, attention_call.options)
        else:
            _append_by_operators(call, args)
        _records.put(attention_call, "q", args.q)
        _records.put(attention_call, "seqused_k", args.seqused_k)
    return run_forward(choice, args, attention_call)


def _readable(x: Tensor | None) -> Tensor | None:
    return None if x is None else _core.contiguous_rows(x)


def _views_of(call: KVCacheCall, copies: list[Tensor]) -> _records.KVCacheCall:
    """The arguments as the core sees them; ``copies`` lives as long as the views."""
    record = _records.new(_records.KVCacheCall)
    for name, kind in record._fields_:
        if kind is _records.TensorView:
            _core.put_with_values(record, name, getattr(call, name), copies)
    record.options.softmax_scale = call.softmax_scale
    record.options.softcap = call.softcap
    record.options.return_lse = call.return_lse
    record.rotary_interleaved = call.rotary_interleaved
    return record
