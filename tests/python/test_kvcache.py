"""Attention over a key/value cache: append, rotary, pages, batch index, padding, garbage rows."""

# ruff: noqa: E501  (one case, one line)

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import pytest
import torch
from support import ROUTES, has_attention_kernels

import anyflash
from anyflash.testing import DTYPES, assert_close, reference_kvcache

pytestmark = pytest.mark.providers


@dataclass(frozen=True)
class CacheCase:
    name: str
    lengths: tuple[int, ...] | None = (9, 30, 0)
    seqlen_q: int = 1
    new: int = 0  # rows to append; 0 appends nothing
    capacity: int = 48
    heads: int = 4
    heads_k: int = 4
    head_dim: int = 32
    dtype: str = "fp32"
    page: int = 0
    rotary_dim: int = 0
    interleaved: bool = True
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    batch_idx: tuple[int, ...] | None = None
    leftpad: tuple[int, ...] | None = None
    strides: str = "contiguous"


CASES = [
    CacheCase("decode"),
    CacheCase("decode_causal_gqa_bf16", causal=True, heads_k=2, dtype="bf16", head_dim=64),
    CacheCase("no_lengths", lengths=None, seqlen_q=5, causal=True),
    CacheCase("append_one", new=1, causal=True),
    CacheCase("append_many", new=7, seqlen_q=7, causal=True),
    CacheCase("append_fewer_than_q", new=2, seqlen_q=6, causal=True),
    CacheCase("append_more_than_q", new=9, seqlen_q=3, window=(6, 1)),
    CacheCase("append_fills_cache", lengths=(44, 41), new=4, seqlen_q=4, causal=True),
    CacheCase("append_fp16", new=3, seqlen_q=3, dtype="fp16", head_dim=64, causal=True),
    CacheCase("rotary_full", new=4, seqlen_q=4, rotary_dim=32, causal=True),
    CacheCase("rotary_partial_neox", new=4, seqlen_q=4, rotary_dim=16, interleaved=False, causal=True),
    CacheCase("rotary_one_position", new=4, seqlen_q=4, rotary_dim=32),
    CacheCase("rotary_window_bf16", new=2, seqlen_q=2, rotary_dim=64, head_dim=64, dtype="bf16", window=(8, 0)),
    CacheCase("rotary_wide_window_is_none", new=4, seqlen_q=4, rotary_dim=32, window=(48, 60)),
    CacheCase("rotary_leftpad", lengths=(9, 30), new=4, seqlen_q=4, rotary_dim=32, leftpad=(3, 11), causal=True),
    CacheCase("rotary_paged", new=4, seqlen_q=4, rotary_dim=32, page=16, causal=True, interleaved=False),
    CacheCase("rotary_q_longer", new=1, seqlen_q=5, rotary_dim=16, causal=True),
    CacheCase("batch_idx", lengths=(9, 30), batch_idx=(4, 1)),
    CacheCase("batch_idx_append_leftpad", lengths=(9, 30), batch_idx=(4, 1), new=3, seqlen_q=3, leftpad=(2, 7), causal=True),
    CacheCase("batch_idx_repeated", lengths=(9, 30, 4), batch_idx=(2, 2, 0)),
    CacheCase("leftpad", lengths=(9, 30), leftpad=(9, 4), seqlen_q=2, causal=True),
    CacheCase("paged_1", page=1, new=3, seqlen_q=3, causal=True),
    CacheCase("paged_7", page=7, new=3, seqlen_q=3, causal=True),
    CacheCase("paged_16_gqa_bf16", page=16, new=2, seqlen_q=2, heads_k=1, dtype="bf16", head_dim=64),
    CacheCase("paged_256", page=256, capacity=512, lengths=(255, 300), new=2, seqlen_q=2, causal=True),
    CacheCase("paged_one_page", page=48, window=(10, 3), seqlen_q=4),
    CacheCase("softcap_alibi_sinks", new=2, seqlen_q=2, softcap=3.0, alibi=True, sinks=True, causal=True),
    CacheCase("transposed_caches", strides="transposed", new=2, seqlen_q=2, causal=True),
    CacheCase("one_buffer_for_k_and_v", strides="interleaved", new=2, seqlen_q=2, causal=True),
    CacheCase("paged_one_buffer", strides="interleaved", page=16, new=2, seqlen_q=2, causal=True),
    CacheCase("odd_head_dim", head_dim=59, new=2, seqlen_q=2, dtype="fp16", causal=True),
    CacheCase("longer_q_than_keys", lengths=(0, 3), new=2, seqlen_q=6, causal=True),
]  # fmt: skip


def _caches(case: CacheCase, rows: int, length: int) -> list[torch.Tensor]:
    """Two caches (rows, length, heads_k, head_dim) full of NaN."""
    dtype, nan = DTYPES[case.dtype], float("nan")
    h, d = case.heads_k, case.head_dim
    if case.strides == "transposed":
        return [torch.full((rows, h, length, d), nan, dtype=dtype).transpose(1, 2) for _ in "kv"]
    if case.strides == "interleaved":
        return list(torch.full((rows, length, 2, h, d), nan, dtype=dtype).unbind(2))
    return [torch.full((rows, length, h, d), nan, dtype=dtype) for _ in "kv"]


def _make(case: CacheCase, device: str):
    """(q, k_cache, v_cache, k, v), options; NaN wherever no key is."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    lengths = case.lengths or (case.capacity,) * 3
    batch, dtype = len(lengths), DTYPES[case.dtype]

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    options = {"causal": case.causal, "window_size": case.window, "softcap": case.softcap}
    first = case.leftpad or (0,) * batch
    if case.page:
        each = -(-case.capacity // case.page)
        k_cache, v_cache = _caches(case, batch * each + 2, case.page)
        table = torch.randperm(batch * each + 2, generator=generator)[: batch * each]
        table = table.reshape(batch, each).to(torch.int32)
        for b, length in enumerate(lengths):
            for row in range(length):
                for cache in (k_cache, v_cache):
                    block = table[b, row // case.page]
                    cache[block, row % case.page] = randn(case.heads_k, case.head_dim)
            table[b, -(-(length + case.new) // case.page) :] = -1
        options["block_table"] = table
    else:
        rows = batch if case.batch_idx is None else max(case.batch_idx) + 2
        k_cache, v_cache = _caches(case, rows, case.capacity)
        for b, length in enumerate(lengths):
            row = b if case.batch_idx is None else case.batch_idx[b]
            for cache in (k_cache, v_cache):
                cache[row, first[b] : length] = randn(
                    length - first[b], case.heads_k, case.head_dim
                )
    if case.lengths is not None:
        options["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32)
    if case.batch_idx is not None:
        # Of a row used twice, the longer fill came last or not: make it hold for both lengths.
        options["cache_batch_idx"] = torch.tensor(case.batch_idx, dtype=torch.int32)
    if case.leftpad is not None:
        options["cache_leftpad"] = torch.tensor(case.leftpad, dtype=torch.int32)
    if case.rotary_dim:
        angle = torch.rand(case.capacity + 5, case.rotary_dim // 2, generator=generator) * 6.3
        options.update(rotary_cos=angle.cos().to(dtype), rotary_sin=angle.sin().to(dtype))
        options["rotary_interleaved"] = case.interleaved
    if case.alibi:
        options["alibi_slopes"] = torch.rand(case.heads, generator=generator) * 0.3
    if case.sinks:
        options["sinks"] = torch.randn(case.heads, generator=generator)
    q = randn(batch, case.seqlen_q, case.heads, case.head_dim)
    k = v = None
    if case.new:
        k, v = (randn(batch, case.new, case.heads_k, case.head_dim) for _ in "kv")
    tensors = [x if x is None else x.to(device) for x in (q, k_cache, v_cache, k, v)]
    options = {n: x.to(device) if torch.is_tensor(x) else x for n, x in options.items()}
    return tensors, options


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """NaN compares equal to itself as an integer."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(integer)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(
    "route", [None, "kernel", "aten_cpu", "aten_sdpa", "math"], ids=lambda r: r or "default"
)
def test_kvcache(case, route, device):
    if route not in (*ROUTES[device], "aten_sdpa") or (
        route == "kernel" and not has_attention_kernels(device)
    ):
        pytest.skip(f"{route} does not run on {device}")
    if route == "kernel" and device == "cuda" and case.dtype == "fp32":
        case = replace(case, dtype="fp16")
    is_aten = route in ("aten_cpu", "aten_sdpa")
    if is_aten and (case.softcap or case.alibi or case.sinks):
        with pytest.raises(RuntimeError, match=f"{route}: does not support softcap"):
            (q, *caches), options = _make(case, device)
            anyflash.attention_kvcache(q, *caches, **options, backend=route)
        return
    (q, k_cache, v_cache, k, v), options = _make(case, device)
    exact = reference_kvcache(q, k_cache, v_cache, k, v, **options)
    low = reference_kvcache(q, k_cache, v_cache, k, v, compute=DTYPES[case.dtype], **options)
    before = k_cache.clone()
    has_lse = route != "aten_sdpa"
    found = anyflash.attention_kvcache(
        q, k_cache, v_cache, k, v, **options, return_lse=has_lse, backend=route
    )
    out, lse = found if has_lse else (found, None)
    # Without rotary the rows are copied, with it k is computed in fp32 and rounded once.
    assert torch.equal(_bits(v_cache), _bits(exact[3]))
    if case.rotary_dim:
        changed = _bits(exact[2]) != _bits(before)
        assert torch.equal(_bits(k_cache)[~changed], _bits(before)[~changed])
        eps = torch.finfo(k_cache.dtype).eps
        torch.testing.assert_close(k_cache[changed], exact[2][changed], atol=2 * eps, rtol=2 * eps)
        assert changed.any()
    else:
        assert torch.equal(_bits(k_cache), _bits(exact[2]))
    assert_close(out, exact[0], low[0], f"{case.name} out")
    if has_lse:
        assert_close(lse, exact[1], low[1], f"{case.name} lse")


def test_a_refused_call_leaves_the_caches_alone(device):
    (q, k_cache, v_cache, k, v), options = _make(CacheCase("refused", new=2, seqlen_q=2), device)
    before = k_cache.clone(), v_cache.clone()
    with pytest.raises(RuntimeError, match="no back end"):
        anyflash.attention_kvcache(q, k_cache, v_cache, k, v, **options, backend="aten_cudnn")
    assert torch.equal(_bits(k_cache), _bits(before[0]))
    assert torch.equal(_bits(v_cache), _bits(before[1]))


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32", "fp64"])
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
def test_append_agrees_with_operators(dtype, interleaved, device):
    """Whoever appends writes the same rows and no other, also from a k whose columns lie apart."""
    case = CacheCase("agree", new=5, seqlen_q=5, rotary_dim=26, head_dim=40, causal=True)
    case = replace(case, dtype=dtype, interleaved=interleaved, page=7)
    (q, k_cache, v_cache, k, v), options = _make(case, device)
    k = k.transpose(-1, -2).contiguous().transpose(-1, -2)
    results = []
    for backend in ("kernel,math", "math"):
        caches = [x.clone() for x in (k_cache, v_cache)]
        with anyflash.backend(backend):
            out = anyflash.attention_kvcache(q, *caches, k, v, **options)
        results.append((out, *caches))
    eps = torch.finfo(DTYPES[dtype]).eps
    torch.testing.assert_close(*results, equal_nan=True, atol=8 * eps, rtol=8 * eps)


def test_int_and_missing_lengths(device):
    (q, k_cache, v_cache, k, v), _ = _make(CacheCase("ints", lengths=(20, 20), new=2), device)
    filled = torch.full((2,), 20, dtype=torch.int32, device=device)
    caches = [(k_cache.clone(), v_cache.clone()) for _ in range(2)]
    a = anyflash.attention_kvcache(q, *caches[0], k, v, cache_seqlens=20, causal=True)
    b = anyflash.attention_kvcache(q, *caches[1], k, v, cache_seqlens=filled, causal=True)
    assert torch.equal(a, b)


def test_decoding_step_by_step_equals_one_pass(device):
    """A sequence appended token by token attends like the whole sequence at once."""
    torch.manual_seed(0)
    batch, length, heads, dim = 2, 13, 2, 32
    q, k, v = (torch.randn(batch, length, heads, dim, device=device) for _ in range(3))
    caches = [torch.full((batch, 16, heads, dim), float("nan"), device=device) for _ in "kv"]
    steps = [
        anyflash.attention_kvcache(
            *(q[:, t : t + 1], *caches, k[:, t : t + 1], v[:, t : t + 1]),
            cache_seqlens=t,
            causal=True,
        )
        for t in range(length)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), anyflash.attention(q, k, v, causal=True))


def test_lengths_are_not_changed(device):
    (q, k_cache, v_cache, k, v), options = _make(CacheCase("kept", new=1), device)
    lengths = options["cache_seqlens"].clone()
    anyflash.attention_kvcache(q, k_cache, v_cache, k, v, **options)
    assert torch.equal(lengths, options["cache_seqlens"])
