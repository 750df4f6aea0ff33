"""Bad input as a table: each entry an exception whose text names argument, value and expectation.

The texts of both providers are the same, word for word. Where flash-attn has a text, ours begins
with it. Run as a program, this file prints what each entry raised: how the other provider is asked.
"""

# ruff: noqa: E501  (one entry of the table, one line)

from __future__ import annotations

import ctypes
import json
import sys
from dataclasses import dataclass
from typing import Callable

import pytest
import torch
from support import REPOSITORY, run_python

import anyflash
from anyflash import _core, _records

pytestmark = pytest.mark.providers


@dataclass(frozen=True)
class Bad:
    name: str
    call: Callable[[], object]
    error: type
    fragments: tuple[str, ...]


def _t(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype)


def _ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def _dense(q=None, k=None, v=None, **options):
    """q (2, 7, 4, 16), k and v (2, 9, 2, 16) unless said otherwise."""
    q, k = _t(2, 7, 4, 16) if q is None else q, _t(2, 9, 2, 16) if k is None else k
    return anyflash.attention(q, k, _t(2, 9, 2, 16) if v is None else v, **options)


def _packed(cu_q=(0, 3, 7), cu_k=(0, 4, 9), q=None, **options):
    """Two sequences: q (7, 4, 16), k and v (9, 2, 16)."""
    cu = [c if c is None or torch.is_tensor(c) else _ints(*c) for c in (cu_q, cu_k)]
    given = {"max_seqlen_q": 4, "max_seqlen_k": 5, "cu_seqlens_q": cu[0], "cu_seqlens_k": cu[1]}
    q = _t(7, 4, 16) if q is None else q
    return anyflash.attention(q, _t(9, 2, 16), _t(9, 2, 16), **{**given, **options})


def _paged(table=((0, 1), (2, 3)), used=(5, 8), **options):
    """Pages of 4 keys: k and v (4, 4, 2, 16)."""
    table = torch.tensor(table, dtype=torch.int32) if not torch.is_tensor(table) else table
    given = {"block_table": table, "seqused_k": _ints(*used)}
    pages = _t(4, 4, 2, 16)
    return anyflash.attention(_t(2, 7, 4, 16), pages, pages, **{**given, **options})


def _cache(q=None, k=None, v=None, caches=None, **options):
    """Caches (2, 12, 2, 16) holding 4 and 9 keys."""
    k_cache, v_cache = caches or (_t(2, 12, 2, 16), _t(2, 12, 2, 16))
    given = {"cache_seqlens": _ints(4, 9), **options}
    return anyflash.attention_kvcache(
        _t(2, 3, 4, 16) if q is None else q, k_cache, v_cache, k, v, **given
    )


def _append(new=3, **options):
    kv = _t(2, new, 2, 16)
    return _cache(k=kv, v=kv, **options)


def _rotary(rows=12, half=8, dtype=torch.float32, **options):
    tables = {"rotary_cos": _t(rows, half, dtype=dtype), "rotary_sin": _t(rows, half, dtype=dtype)}
    return _append(**{**tables, **options})


def _mlp(x=None, weight1=None, bias1=None, weight2=None, bias2=None, **options):
    x = _t(3, 6) if x is None else x
    weight1 = _t(10, 6) if weight1 is None else weight1
    weight2 = _t(5, 10) if weight2 is None else weight2
    return anyflash.fused_mlp(x, weight1, bias1, weight2, bias2, **options)


def _meta(*shape):
    return torch.ones(*shape, device="meta")


nan = float("nan")
R, V, T = RuntimeError, ValueError, TypeError

TABLE = [
    # Ranks and shapes.
    Bad("q_rank", lambda: _dense(q=_t(7, 16)), R, ("q: expected (batch, seqlen_q, heads, head_dim)", "(7, 16)")),
    Bad("q_rank_5", lambda: _dense(q=_t(1, 2, 7, 4, 16)), R, ("q: expected", "(1, 2, 7, 4, 16)")),
    Bad("k_rank", lambda: _dense(k=_t(2, 9, 16)), R, ("k must have shape (batch_size, seqlen_k, num_heads_k, head_size)", "(2, 9, 16)")),
    Bad("k_head_dim", lambda: _dense(k=_t(2, 9, 2, 24)), R, ("k must have shape", "k: expected (batch, seqlen_k, heads_k, 16)", "(2, 9, 2, 24)")),
    Bad("k_batch", lambda: _dense(k=_t(3, 9, 2, 16)), R, ("k must have shape", "(3, 9, 2, 16)", "(2, 7, 4, 16)")),
    Bad("v_length", lambda: _dense(v=_t(2, 8, 2, 16)), R, ("v must have shape", "(2, 9, 2, 16)", "(2, 8, 2, 16)")),
    Bad("v_heads", lambda: _dense(v=_t(2, 9, 4, 16)), R, ("v must have shape", "(2, 9, 4, 16)")),
    Bad("heads_do_not_divide", lambda: _dense(k=_t(2, 9, 3, 16), v=_t(2, 9, 3, 16)), R, ("Number of heads in key/value must divide number of heads in query", "3", "4")),
    Bad("heads_of_keys_zero", lambda: _dense(k=_t(2, 9, 0, 16), v=_t(2, 9, 0, 16)), R, ("Number of heads in key/value must divide", "0")),
    Bad("no_heads", lambda: _dense(_t(2, 7, 0, 16), _t(2, 9, 0, 16), _t(2, 9, 0, 16)), R, ("Number of heads in key/value must divide", "0 heads in k and 0 in q")),
    Bad("head_dim_513", lambda: _dense(_t(2, 7, 4, 513), _t(2, 9, 2, 513), _t(2, 9, 2, 513)), R, ("FlashAttention forward only supports head dimension at most 256", "512", "513")),
    Bad("head_dim_v_600", lambda: _dense(v=_t(2, 9, 2, 600)), R, ("head dimension at most 256", "v", "600")),
    Bad("head_dim_0", lambda: _dense(_t(2, 7, 4, 0), _t(2, 9, 2, 0), _t(2, 9, 2, 0), softmax_scale=1.0), R, ("head_dim", "1 to 512", "0")),
    Bad("three_dimensions_and_four", lambda: _dense(q=_t(7, 4, 16)), R, ("(7, 4, 16)", "(2, 9, 2, 16)")),
    # dtypes and devices.
    Bad("integer_q", lambda: _dense(_t(2, 7, 4, 16, dtype=torch.int64)), R, ("FlashAttention only support fp16 and bf16 data type", "q", "int64")),
    Bad("dtype_of_k", lambda: _dense(k=_t(2, 9, 2, 16, dtype=torch.float16)), R, ("query and key must have the same dtype", "fp32", "fp16")),
    Bad("dtype_of_v", lambda: _dense(v=_t(2, 9, 2, 16, dtype=torch.float64)), R, ("query and value must have the same dtype", "fp32", "fp64")),
    # Numbers.
    Bad("dropout_1", lambda: _dense(dropout_p=1.0), R, ("dropout_p: expected 0 <= dropout_p < 1", "got 1")),
    Bad("dropout_negative", lambda: _dense(dropout_p=-0.5), R, ("dropout_p", "-0.5")),
    Bad("dropout_nan", lambda: _dense(dropout_p=nan), R, ("dropout_p", "nan")),
    Bad("dropout_and_softcap", lambda: _dense(dropout_p=0.1, softcap=5.0), R, ("Softcapping does not support dropout for now", "5", "0.1")),
    Bad("scale_nan", lambda: _dense(softmax_scale=nan), R, ("softmax_scale: expected a finite number", "nan")),
    Bad("scale_inf", lambda: _dense(softmax_scale=float("inf")), R, ("softmax_scale", "inf")),
    Bad("softcap_nan", lambda: _dense(softcap=nan), R, ("softcap", "nan")),
    Bad("softcap_negative", lambda: _dense(softcap=-1.0), R, ("softcap", "-1")),
    Bad("window_of_three", lambda: _dense(window_size=(1, 2, 3)), (R, V), ("window_size: expected (left, right)", "3")),
    Bad("rng_state_dtype", lambda: _dense(dropout_p=0.5, rng_state=_ints(1, 2)), R, ("rng_state: expected", "int64", "int32")),
    Bad("rng_state_shape", lambda: _dense(dropout_p=0.5, rng_state=_ints(1, 2, 3, dtype=torch.int64)), R, ("rng_state", "(2,)", "(3,)")),
    # Other tensors.
    Bad("alibi_dtype", lambda: _dense(alibi_slopes=_t(4, dtype=torch.float16)), R, ("ALiBi slopes must have dtype fp32", "fp16")),
    Bad("alibi_shape", lambda: _dense(alibi_slopes=_t(3)), R, ("alibi_slopes: expected (heads,) or (batch, heads)", "(2, 4)", "(3,)")),
    Bad("bias_shape", lambda: _dense(bias=_t(2, 4, 7, 8)), R, ("bias: expected a shape that broadcasts", "(2, 4, 7, 9)", "(2, 4, 7, 8)")),
    Bad("bias_dtype", lambda: _dense(bias=_t(7, 9, dtype=torch.int32)), R, ("bias", "bool", "int32")),
    Bad("sinks_shape", lambda: _dense(sinks=_t(2)), R, ("sinks: expected (heads,)", "4", "(2,)")),
    Bad("sinks_dtype", lambda: _dense(sinks=_t(4, dtype=torch.int32)), R, ("sinks", "int32")),
    # Packed sequences.
    Bad("cu_seqlens_dtype", lambda: _packed(cu_q=_ints(0, 3, 7, dtype=torch.int64)), R, ("cu_seqlens_q must have dtype int32", "int64")),
    Bad("cu_seqlens_k_dtype", lambda: _packed(cu_k=_ints(0, 4, 9, dtype=torch.int64)), R, ("cu_seqlens_k must have dtype int32", "int64")),
    Bad("cu_seqlens_start", lambda: _packed(cu_q=(1, 3, 7)), R, ("cu_seqlens_q: expected to start at 0", "got 1")),
    Bad("cu_seqlens_decrease", lambda: _packed(cu_k=(0, 5, 4)), R, ("cu_seqlens_k: must not decrease", "5", "4")),
    Bad("cu_seqlens_beyond_q", lambda: _packed(cu_q=(0, 3, 8), max_seqlen_q=9), R, ("cu_seqlens_q: ends at 8", "7")),
    Bad("cu_seqlens_beyond_k", lambda: _packed(cu_k=(0, 4, 12), max_seqlen_k=9), R, ("cu_seqlens_k: ends at 12", "9")),
    Bad("cu_seqlens_lengths", lambda: _packed(cu_k=(0, 9)), R, ("cu_seqlens_k must have shape (batch_size + 1)", "(3,)", "(2,)")),
    Bad("cu_seqlens_strided", lambda: _packed(cu_q=_ints(0, 9, 3, 9, 7)[::2]), R, ("cu_seqlens_q must be contiguous", "2")),
    Bad("cu_seqlens_k_missing", lambda: _packed(cu_k=None), R, ("cu_seqlens_k: missing",)),
    Bad("cu_seqlens_q_missing", lambda: _dense(cu_seqlens_k=_ints(0, 4, 9)), R, ("cu_seqlens_q: missing",)),
    Bad("cu_seqlens_empty", lambda: _packed(cu_q=_ints(), cu_k=_ints()), R, ("cu_seqlens_q must have shape (batch_size + 1)", "(0,)")),
    Bad("max_seqlen_q_small", lambda: _packed(max_seqlen_q=3), R, ("max_seqlen_q: expected at least 4", "got 3")),
    Bad("max_seqlen_k_small", lambda: _packed(max_seqlen_k=2), R, ("max_seqlen_k: expected at least 4", "got 2")),
    Bad("max_seqlen_negative", lambda: _packed(max_seqlen_q=-1), R, ("max_seqlen_q", "-1")),
    Bad("packed_q_rank", lambda: _packed(q=_t(1, 7, 4, 16)), R, ("q: expected (total_q, heads, head_dim) with cu_seqlens_q", "(1, 7, 4, 16)")),
    Bad("seqused_dtype", lambda: _dense(seqused_k=_ints(1, 2, dtype=torch.int64)), R, ("seqused_k must have dtype int32", "int64")),
    Bad("seqused_shape", lambda: _dense(seqused_k=_ints(1, 2, 3)), R, ("seqused_k must have shape (batch_size)", "(2,)", "(3,)")),
    Bad("seqused_too_long", lambda: _dense(seqused_k=_ints(1, 10)), R, ("seqused_k: expected 0 to 9", "10")),
    Bad("seqused_negative", lambda: _dense(seqused_k=_ints(-1, 3)), R, ("seqused_k", "-1")),
    Bad("seqused_beyond_k", lambda: _packed(seqused_k=_ints(4, 6), max_seqlen_k=6), R, ("seqused_k: expected 0 to 5", "from 4 on", "got 6 for sequence 1")),
    Bad("seqused_longer_than_max", lambda: _packed(seqused_k=_ints(4, 3), max_seqlen_k=3), R, ("max_seqlen_k: expected at least 4", "sequence 0 in seqused_k", "got 3")),
    Bad("keys_begin_before_k", lambda: _packed(cu_k=(-1, 4, 9), seqused_k=_ints(3, 3)), R, ("cu_seqlens_k: expected 0 to 9", "got -1 for sequence 0")),
    Bad("shared_keys_backward", lambda: _packed(cu_k=(0, 2, 9), seqused_k=_ints(4, 3), q=_t(7, 4, 16).requires_grad_()).sum().backward(), R, ("cu_seqlens_k: the backward needs sequences in the order of their rows", "rows 0 to 4", "from 2 on")),
    Bad("leftpad_shape", lambda: _dense(leftpad_k=_ints(1)), R, ("leftpad_k must have shape (batch_size)", "(1,)")),
    Bad("leftpad_negative", lambda: _dense(leftpad_k=_ints(0, -2)), R, ("leftpad_k", "-2")),
    # Pages.
    Bad("block_table_dtype", lambda: _paged(table=torch.zeros(2, 2, dtype=torch.int64)), R, ("block_table must have dtype torch.int32", "int64")),
    Bad("block_table_rank", lambda: _paged(table=_ints(0, 1)), R, ("block_table must have shape", "(2, max_blocks)", "(2,)")),
    Bad("block_table_batch", lambda: _paged(table=((0, 1),)), R, ("block_table must have shape", "(1, 2)")),
    Bad("block_table_too_large", lambda: _paged(table=((0, 1), (2, 4))), R, ("block_table: expected pages 0 to 3", "got 4")),
    Bad("block_table_negative", lambda: _paged(table=((0, -1), (2, 3))), R, ("block_table", "-1")),
    Bad("paged_too_long", lambda: _paged(used=(9, 8)), R, ("seqused_k: expected 0 to 8", "9")),
    Bad("paged_and_leftpad", lambda: _paged(leftpad_k=_ints(0, 1)), R, ("We don't support Paged KV and leftpad_k running at the same time yet",)),
    Bad("paged_gradient", lambda: _paged_backward(), R, ("block_table: paged attention has no gradient", "torch.no_grad()")),
    # KV cache.
    Bad("cache_overflow", lambda: _append(4, cache_seqlens=_ints(4, 9)), R, ("cache_seqlens: expected at most 8", "got 9")),
    Bad("cache_length_above_capacity", lambda: _cache(cache_seqlens=_ints(4, 13)), R, ("cache_seqlens", "12", "13")),
    Bad("cache_length_negative", lambda: _cache(cache_seqlens=_ints(4, -1)), R, ("cache_seqlens", "-1")),
    Bad("cache_paged_overflow", lambda: _append(caches=(_t(4, 4, 2, 16),) * 2, block_table=_ints(0, 1, 2, 3).reshape(2, 2), cache_seqlens=_ints(4, 6)), R, ("Paged KV cache: max(seqlens_k)", "exceeds the capacity addressable by block_table", "9", "8")),
    Bad("cache_seqlens_dtype", lambda: _cache(cache_seqlens=_ints(4, 9, dtype=torch.int64)), R, ("cache_seqlens must have dtype int32", "int64")),
    Bad("cache_seqlens_shape", lambda: _cache(cache_seqlens=_ints(4)), R, ("cache_seqlens must have shape (batch_size)", "(1,)")),
    Bad("cache_k_without_v", lambda: _cache(k=_t(2, 3, 2, 16)), R, ("If key is supplied, value must also be passed in",)),
    Bad("cache_v_without_k", lambda: _cache(v=_t(2, 3, 2, 16)), R, ("v: given without k",)),
    Bad("cache_k_without_lengths", lambda: _append(cache_seqlens=None), R, ("If key is supplied, seqlens_k must also be passed in",)),
    Bad("cache_k_shape", lambda: _cache(k=_t(2, 3, 4, 16), v=_t(2, 3, 4, 16)), R, ("k must have shape (batch_size, seqlen_knew, num_heads_k, head_size)", "(2, 3, 4, 16)")),
    Bad("cache_v_shape", lambda: _cache(k=_t(2, 3, 2, 16), v=_t(2, 2, 2, 16)), R, ("v must have shape", "(2, 2, 2, 16)")),
    Bad("cache_k_dtype", lambda: _cache(k=_t(2, 3, 2, 16, dtype=torch.float16), v=_t(2, 3, 2, 16)), R, ("key must have the same dtype", "fp16", "fp32")),
    Bad("cache_k_too_long", lambda: _append(13), R, ("If key is supplied, it must have seqlen <= the seqlen of the KV cache", "13", "12")),
    Bad("cache_batch_idx_dtype", lambda: _cache(cache_batch_idx=_ints(0, 1, dtype=torch.int64)), R, ("cache_batch_idx must have dtype int32", "int64")),
    Bad("cache_batch_idx_range", lambda: _cache(cache_batch_idx=_ints(0, 2)), R, ("cache_batch_idx: expected 0 to 1", "2")),
    Bad("cache_batch_idx_paged", lambda: _cache(caches=(_t(4, 4, 2, 16),) * 2, block_table=_ints(0, 1, 2, 3).reshape(2, 2), cache_seqlens=_ints(4, 6), cache_batch_idx=_ints(0, 1)), R, ("Paged KVcache does not support cache_batch_idx",)),
    Bad("cache_leftpad_paged", lambda: _cache(caches=(_t(4, 4, 2, 16),) * 2, block_table=_ints(0, 1, 2, 3).reshape(2, 2), cache_seqlens=_ints(4, 6), cache_leftpad=_ints(0, 1)), R, ("We don't support Paged KV and leftpad_k running at the same time yet",)),
    Bad("cache_leftpad_negative", lambda: _cache(cache_leftpad=_ints(0, -1)), R, ("cache_leftpad", "-1")),
    Bad("cache_leftpad_negative_alone", lambda: _cache(cache_seqlens=None, cache_leftpad=_ints(0, -1)), R, ("cache_leftpad", "-1")),
    Bad("cache_stride", lambda: _cache(caches=(_t(2, 12, 16, 2).transpose(2, 3), _t(2, 12, 2, 16))), (R, AssertionError), ("contiguous last dimension", "k_cache")),
    Bad("cache_dtype", lambda: _cache(caches=(_t(2, 12, 2, 16, dtype=torch.float16), _t(2, 12, 2, 16))), R, ("query and key must have the same dtype", "k_cache", "fp16")),
    Bad("cache_backward", lambda: _cache(q=_t(2, 3, 4, 16).requires_grad_()).sum().backward(), R, ("attention over a key/value cache has no gradient", "torch.no_grad()")),
    Bad("rotary_without_k", lambda: _cache(rotary_cos=_t(12, 8), rotary_sin=_t(12, 8)), R, ("If rotary cos/sin are provided, new key / value to be appended to KV cache must also be provided",)),
    Bad("rotary_without_sin", lambda: _append(rotary_cos=_t(12, 8)), R, ("If rotary cos is provided, rotary sin must also be provided",)),
    Bad("rotary_dtype", lambda: _rotary(dtype=torch.float16), R, ("rotary_cos must have the same dtype as query", "fp16", "fp32")),
    Bad("rotary_rows", lambda: _rotary(rows=11), R, ("cos/sin seqlen must be at least the seqlen of KV cache", "11", "12")),
    Bad("rotary_dim", lambda: _rotary(half=16), R, ("rotary_dim must be <= headdim", "32", "16")),
    # Bias + activation and the MLP.
    Bad("mlp_weight1", lambda: _mlp(weight1=_t(10, 7)), R, ("weight1: expected (hidden, 6)", "(10, 7)")),
    Bad("mlp_weight2", lambda: _mlp(weight2=_t(5, 11)), R, ("weight2: expected (out, 10)", "(5, 11)")),
    Bad("mlp_bias1", lambda: _mlp(bias1=_t(9)), R, ("bias1: expected (10,)", "(9,)")),
    Bad("mlp_bias2", lambda: _mlp(bias2=_t(1)), R, ("bias2: expected (5,)", "(1,)")),
    Bad("mlp_dtype", lambda: _mlp(weight1=_t(10, 6, dtype=torch.float16)), R, ("weight1: expected x's dtype fp32", "fp16")),
    Bad("mlp_gate_odd", lambda: _mlp(weight1=_t(9, 6), activation="silu_gate"), R, ("weight1", "even", "(9, 6)")),
    Bad("mlp_activation", lambda: _mlp(activation="swish"), V, ("activation", "swish", "gelu_tanh", "silu_gate")),
    Bad("activation_bias", lambda: anyflash.bias_activation(_t(3, 6), _t(5), activation="relu"), R, ("bias: expected (6,)", "(5,)")),
    Bad("activation_gate_odd", lambda: anyflash.bias_activation(_t(3, 5), activation="silu_gate"), R, ("x", "even", "(3, 5)")),
    Bad("activation_integer", lambda: anyflash.bias_activation(_t(3, 6, dtype=torch.int32), activation="relu"), R, ("x", "int32")),
    # The operators that C++ and TorchScript call, and the backward's own arguments.
    Bad("operator_window", lambda: _public("flash_attn_func", _t(2, 7, 4, 16), _t(2, 9, 2, 16), _t(2, 9, 2, 16), 0.0, None, False, [1]), R, ("window_size: expected (left, right)", "1")),
    Bad("operator_kv_parts", lambda: _public("flash_attn_kvpacked_func", _t(2, 7, 4, 16), _t(2, 9, 3, 2, 16)), R, ("kv: expected (batch, seqlen, 2, heads, head_dim)", "(2, 9, 3, 2, 16)")),
    Bad("operator_qkv_rank", lambda: _public("flash_attn_qkvpacked_func", _t(2, 3, 4, 16)), R, ("qkv: expected (batch, seqlen, 3, heads, head_dim)", "(2, 3, 4, 16)")),
    Bad("operator_packed_qkv_rank", lambda: _public("flash_attn_varlen_qkvpacked_func", _t(2, 7, 3, 4, 16), _ints(0, 7), 7), R, ("qkv: expected (total, 3, heads, head_dim)", "(2, 7, 3, 4, 16)")),
    Bad("operator_num_splits", lambda: _public("flash_attn_with_kvcache", _t(2, 3, 4, 16), _t(2, 12, 2, 16), _t(2, 12, 2, 16), num_splits=129), R, ("num_splits > 128 not supported", "129")),
    Bad("operator_activation", lambda: _public("fused_mlp", _t(3, 6), _t(10, 6), None, _t(5, 10), None, "swish"), (R, V), ("activation", "swish", "gelu_tanh")),
    Bad("operator_dropout_without_state", lambda: _backward(dropout_p=0.5), R, ("rng_state: missing", "0.5")),
    Bad("backward_lse_shape", lambda: _backward(lse=_t(2, 7, 4)), R, ("softmax_lse: expected (batch, heads, seqlen_q)", "(2, 7, 4)")),
    Bad("backward_lse_dtype", lambda: _backward(lse=_t(2, 4, 7, dtype=torch.float16)), R, ("softmax_lse: expected fp32", "fp16")),
    Bad("backward_dout_shape", lambda: _backward(dout=_t(2, 7, 4, 8)), R, ("dout must have shape", "(2, 7, 4, 8)")),
    Bad("backward_dout_dtype", lambda: _backward(dout=_t(2, 7, 4, 16, dtype=torch.float64)), R, ("query and dout must have the same dtype", "fp64")),
    Bad("backward_out_shape", lambda: _backward(out=_t(2, 4, 7, 16)), R, ("out must have shape", "(2, 4, 7, 16)")),
    Bad("backward_dlse_shape", lambda: _backward(dlse=_t(2, 4, 8)), R, ("dsoftmax_lse: expected (2, 4, 7)", "(2, 4, 8)")),
    # Names, types.
    Bad("unknown_backend", lambda: _dense(backend="cutlass"), V, ("unknown back end 'cutlass'", "kernel", "sdpa", "math")),
    Bad("unknown_backend_in_context", lambda: anyflash.backend("math,fast"), V, ("unknown back end 'fast'",)),
    Bad("backend_not_a_string", lambda: _dense(backend=3), T, ("backend", "int")),
    Bad("backend_bad_digit", lambda: _forward(backend=0x9), V, ("backend", "9")),
    Bad("only_a_cuda_route", lambda: _dense(backend="aten_cudnn"), R, ('anyflash: no back end of "aten_cudnn" can run this attention', "aten_cudnn: runs on cuda only")),
    Bad("list_for_q", lambda: _dense(q=[[1.0]]), T, ("q", "Tensor", "list")),
    Bad("none_for_k", lambda: anyflash.attention(_t(2, 7, 4, 16), None, _t(2, 9, 2, 16)), T, ("k", "Tensor", "NoneType")),
    Bad("array_for_v", lambda: _dense(v=_t(2, 9, 2, 16).numpy()), T, ("v", "Tensor", "ndarray")),
    Bad("list_for_cu_seqlens", lambda: anyflash.attention(_t(7, 4, 16), _t(9, 2, 16), _t(9, 2, 16), cu_seqlens_q=[0, 7], cu_seqlens_k=[0, 9], max_seqlen_q=7, max_seqlen_k=9), (R, T), ("cu_seqlens_q", "Tensor", "list")),
    Bad("string_for_mlp", lambda: _mlp(x="x"), T, ("x", "Tensor", "str")),
    Bad("string_for_scale", lambda: _dense(softmax_scale="big"), T, ("softmax_scale: expected a number", "big")),
    Bad("two_scales", lambda: _dense(softmax_scale=_t(2)), T, ("softmax_scale: expected", "(2,)")),
    Bad("two_learned_scales", lambda: _dense(softmax_scale=_t(2).requires_grad_()), T, ("softmax_scale: expected", "(2,)")),
    Bad("string_for_dropout", lambda: _dense(dropout_p="half"), T, ("dropout_p: expected a number", "half")),
    Bad("none_for_softcap", lambda: _dense(softcap=None), T, ("softcap: expected a number", "None")),
    Bad("floats_for_window", lambda: _dense(window_size=(4.0, 0.0)), T, ("window_size: expected an int", "4.0")),
    Bad("float_for_max_seqlen", lambda: anyflash.attention(_t(7, 4, 16), _t(9, 2, 16), _t(9, 2, 16), cu_seqlens_q=_ints(0, 7), cu_seqlens_k=_ints(0, 9), max_seqlen_q=7.5, max_seqlen_k=9), T, ("max_seqlen_q: expected an int", "7.5")),
    Bad("float_for_cache_seqlens", lambda: _cache(cache_seqlens=4.5), T, ("cache_seqlens: expected an int", "4.5")),
]  # fmt: skip


def _paged_backward():
    """Gradients through a paged cache: the call runs, backward() is refused."""
    pages = _t(4, 4, 2, 16).requires_grad_()
    table = _ints(0, 1, 2, 3).reshape(2, 2)
    q = _t(2, 7, 4, 16).requires_grad_()
    out = anyflash.attention(q, pages, pages, block_table=table, seqused_k=_ints(5, 8))
    out.sum().backward()


def _public(name, *arguments, **options):
    return getattr(torch.ops.anyflash, name)(*arguments, **options)


def _forward(dropout_p=0.0, backend=0):
    q = _t(1, 3, 2, 8)
    return torch.ops.anyflash._flash_attn_forward(
        q, q, q, None, None, 0, 0, None, None, None, None, None, None, None, dropout_p, 1.0, False,
        -1, -1, 0.0, False, True, backend,
    )  # fmt: skip


def _backward(dout=None, out=None, lse=None, dlse=None, dropout_p=0.0):
    q, k = _t(2, 7, 4, 16), _t(2, 9, 2, 16)
    given = [q if dout is None else dout, q, k, k, q if out is None else out]
    return torch.ops.anyflash._flash_attn_backward(
        *given, _t(2, 4, 7) if lse is None else lse, dlse, None, None, 0, 0, None, None, None, None,
        None, None, dropout_p, 1.0, False, -1, -1, 0.0, False, False, False, 0,
    )  # fmt: skip


def _raised(call) -> tuple[str, str]:
    try:
        call()
    except Exception as error:  # noqa: BLE001  (whatever it is, it is looked at)
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name)
def test_bad_input(bad):
    with pytest.raises(bad.error) as caught:
        bad.call()
    text = str(caught.value)
    for fragment in bad.fragments:
        assert fragment in text, f"{fragment!r} is not in: {text}"
    assert "/" not in text.replace("key/value", "").replace("key / value", "").replace(
        "cos/sin", ""
    ).replace("rotary_dim / 2", ""), f"a path in: {text}"


def test_names_are_unique():
    assert len({bad.name for bad in TABLE}) == len(TABLE)


def test_both_providers_say_the_same(provider):
    if provider != "binary":
        pytest.skip("compared in the run of the binary")
    code = f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')"
    python = json.loads(run_python(code, ANYFLASH_PROVIDER="python").splitlines()[-1])
    different = []
    for bad in TABLE:
        ours = list(_raised(bad.call))
        if python[bad.name] != ours:
            different.append(f"{bad.name}:\n  binary {ours}\n  python {python[bad.name]}")
    assert not different, "\n".join(different)


def test_device_mix(device):
    """With a GPU through the operators; without one the core, which sees a meta tensor."""
    if device == "cuda":
        kind, text = _raised(lambda: _dense(q=_t(2, 7, 4, 16).cuda()))
        assert kind == "RuntimeError"
        assert text == "k must be on CUDA: expected cuda:0 like q, got cpu"
        return
    call, choice = _records.new(_records.AttentionCall), _records.Choice()
    for name, x in (("q", _t(2, 7, 4, 16)), ("k", _t(2, 7, 4, 16)), ("v", _meta(2, 7, 4, 16))):
        _records.put(call, name, x)
    records = [ctypes.byref(x) for x in (call, _core.caller(0), choice)]
    prepare = _core.loaded().anyflash_prepare_attention
    kind, text = _raised(lambda: _core.raise_for(prepare(records[0], None, False, *records[1:])))
    expected = "v must be on cpu: expected cpu like q, got another device"
    assert (kind, text) == ("RuntimeError", expected)


ZERO_SIZES = [(0, 7, 9, 4), (2, 0, 9, 4), (2, 7, 0, 4), (0, 0, 0, 4)]


@pytest.mark.parametrize("sizes", ZERO_SIZES, ids=str)
@pytest.mark.parametrize("route", [None, "math"], ids=str)
def test_zero_sizes_compute(sizes, route, device):
    """Nothing to do is not an error: empty results, no gradients of NaN."""
    batch, seqlen_q, seqlen_k, heads = sizes
    q = torch.randn(batch, seqlen_q, heads, 16, device=device, requires_grad=True)
    k, v = (
        torch.randn(batch, seqlen_k, heads, 16, device=device, requires_grad=True) for _ in "kv"
    )
    out, lse = anyflash.attention(q, k, v, return_lse=True, backend=route)
    assert out.shape == q.shape and lse.shape == (batch, heads, seqlen_q)
    if seqlen_k == 0:
        assert (out == 0).all() and (lse == float("inf")).all()
    out.sum().backward()
    assert all((x.grad == 0).all() or seqlen_k > 0 for x in (q, k, v))


def test_a_refused_append_leaves_the_cache_alone():
    k_cache, v_cache = _t(2, 12, 2, 16), _t(2, 12, 2, 16)
    kind, _ = _raised(lambda: _append(4, caches=(k_cache, v_cache), cache_seqlens=_ints(0, 9)))
    assert kind == "RuntimeError"
    assert (k_cache == 1).all() and (v_cache == 1).all()


def test_the_library_works_after_errors():
    for bad in TABLE:
        _raised(bad.call)
    out = _dense()
    torch.testing.assert_close(out, torch.ones_like(out))


def test_every_text_names_an_argument_or_back_end():
    """A message that is only a text of PyTorch or of Python helps nobody."""
    for bad in TABLE:
        kind, text = _raised(bad.call)
        assert kind != "nothing", bad.name
        assert "Internal" not in text and "dispatch" not in text.lower(), f"{bad.name}: {text}"
        assert len(text.split("\n")[0]) < 400, f"{bad.name}: {text}"


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY / "tests/python"))
    print(json.dumps({bad.name: _raised(bad.call) for bad in TABLE}))
