"""flash_attn.utils.testing and benchmark: masks element by element, attention against anyflash."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from flash_attn.bert_padding import unpad_input
from flash_attn.utils import benchmark, testing

import anyflash

BATCH, SEQLEN_Q, SEQLEN_K, HEADS, HEADS_K, HEAD_DIM = 3, 5, 7, 4, 2, 8
LENGTHS_Q, LENGTHS_K = [5, 2, 4], [7, 3, 2]


def _mask(lengths, seqlen):
    return torch.arange(seqlen) < torch.tensor(lengths)[:, None]


PADDED = {
    "query_padding_mask": _mask(LENGTHS_Q, SEQLEN_Q),
    "key_padding_mask": _mask(LENGTHS_K, SEQLEN_K),
}


def _places():
    """(sequence, row, column, the row's diagonal, keys of the sequence) with padding."""
    for b, row, column in itertools.product(range(BATCH), range(SEQLEN_Q), range(SEQLEN_K)):
        yield b, row, column, row + LENGTHS_K[b] - LENGTHS_Q[b], LENGTHS_K[b]


@pytest.mark.parametrize("window", [(2, 1), (0, 0), (None, 2), (1, None), (None, None)], ids=str)
@pytest.mark.parametrize("sinks", [0, 2])
def test_local_mask(window, sinks):
    got = testing.construct_local_mask(SEQLEN_Q, SEQLEN_K, window, sinks, **PADDED)
    got = got.expand(BATCH, 1, SEQLEN_Q, SEQLEN_K)
    left, right = window
    for b, row, column, diagonal, keys in _places():
        far_right = right is not None and column > diagonal + right
        far_left = left is not None and column < diagonal - left and column >= sinks
        if column < keys:  # others are hidden by the padding mask
            assert got[b, 0, row, column] == (far_right or far_left), (b, row, column)


def test_chunk_mask():
    got = testing.construct_chunk_mask(SEQLEN_Q, SEQLEN_K, 3, **PADDED)
    for b, row, column, diagonal, _ in _places():
        assert got[b, 0, row, column] == (column // 3 != diagonal // 3), (b, row, column)


def test_leading_places_without_a_key():
    leftpad = torch.tensor([0, 2])
    got = testing.construct_local_mask(4, 6, (1, 0), key_leftpad=leftpad)
    plain = testing.construct_local_mask(4, 6, (1, 0))
    assert torch.equal(got[0, 0], plain)
    assert got[1, 0, :, :2].all() and torch.equal(got[1, 0, :, 2:], plain[:, :4])
    chunks = testing.construct_chunk_mask(4, 6, 2, key_leftpad=leftpad)
    assert torch.equal(chunks[0, 0], testing.construct_chunk_mask(4, 6, 2))
    assert chunks[1, 0, :, :2].all()


def _qkv(dtype=torch.float64, head_dim_v=HEAD_DIM):
    torch.manual_seed(0)
    q = torch.randn(BATCH, SEQLEN_Q, HEADS, HEAD_DIM, dtype=dtype, requires_grad=True)
    k = torch.randn(BATCH, SEQLEN_K, HEADS_K, HEAD_DIM, dtype=dtype, requires_grad=True)
    v = torch.randn(BATCH, SEQLEN_K, HEADS_K, head_dim_v, dtype=dtype, requires_grad=True)
    return q, k, v


CALLS = [
    ({}, {}),
    ({"causal": True}, {"causal": True}),
    ({"window_size": (2, 1), "softcap": 3.0}, {"window_size": (2, 1), "softcap": 3.0}),
    ({"attn_bias": torch.randn(HEADS, SEQLEN_Q, SEQLEN_K).double()}, "bias"),
    ({"learnable_sink": torch.randn(HEADS).double()}, "sinks"),
    ({"reorder_ops": True}, {}),
]


@pytest.mark.parametrize("options, theirs", CALLS, ids=str)
def test_attention_is_anyflash_attention(options, theirs):
    q, k, v = _qkv()
    if isinstance(theirs, str):
        theirs = {theirs: next(iter(options.values()))}
    out, probabilities = testing.attention_ref(q, k, v, **options)
    expected = anyflash.attention(q, k, v, backend="math", **theirs)
    torch.testing.assert_close(out, expected)
    assert probabilities.shape == (BATCH, HEADS, SEQLEN_Q, SEQLEN_K)
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), dout)
    torch.testing.assert_close(got, torch.autograd.grad(expected, (q, k, v), dout))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (1, 1)}], ids=str)
def test_padded_attention_is_that_of_the_sequences(options):
    q, k, v = _qkv()
    out, _ = testing.attention_ref(q, k, v, **PADDED, **options)
    for b, (m, n) in enumerate(zip(LENGTHS_Q, LENGTHS_K)):
        alone = anyflash.attention(q[b : b + 1, :m], k[b : b + 1, :n], v[b : b + 1, :n], **options)
        torch.testing.assert_close(out[b, :m], alone[0])
        assert not out[b, m:].any()
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v)), "rows without a key"


def test_more_of_attention():
    """Dropout, scales per head, another product in the scores."""
    q, k, v = _qkv(head_dim_v=6)
    mask = torch.rand(BATCH, HEADS, SEQLEN_Q, SEQLEN_K) > 0.3
    out, probabilities = testing.attention_ref(q, k, v, dropout_p=0.3, dropout_mask=mask)
    values = v.repeat_interleave(2, dim=2)
    kept = probabilities * mask / 0.7
    torch.testing.assert_close(out, torch.einsum("bhts,bshd->bthd", kept, values))
    scales = [torch.rand(BATCH, HEADS_K) for _ in range(3)]
    out, _ = testing.attention_ref(
        q, k, v, q_descale=scales[0], k_descale=scales[1], v_descale=scales[2]
    )
    qs, ks, vs = (s.double()[:, None, :, None] for s in scales)
    expected, _ = testing.attention_ref(q * qs.repeat_interleave(2, 2), k * ks, v * vs)
    torch.testing.assert_close(out, expected)
    qv = torch.randn(BATCH, SEQLEN_Q, HEADS, 6, dtype=torch.float64)
    _, probabilities = testing.attention_ref(q, k, v, qv=qv)
    keys = k.repeat_interleave(2, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q, keys) + torch.einsum("bthd,bshd->bhts", qv, values)
    torch.testing.assert_close(probabilities, (scores / (HEAD_DIM + 6) ** 0.5).softmax(-1))


@pytest.mark.parametrize("upcast", [False, True])
def test_attention_in_half_precision(upcast):
    q, k, v = (x.detach().bfloat16() for x in _qkv())
    out, probabilities = testing.attention_ref(q, k, v, upcast=upcast)
    assert out.dtype == probabilities.dtype == torch.bfloat16
    exact, _ = testing.attention_ref(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), exact, atol=3e-2, rtol=3e-2)
    rounded, _ = testing.attention_ref(
        q.float(), k.float(), v.float(), intermediate_dtype=torch.bfloat16
    )
    assert not torch.equal(rounded, exact.float())


def test_padding_masks():
    for mode, shortest in (("full", 30), ("random", 10), ("third", 10)):
        mask = testing.generate_random_padding_mask(30, 200, "cpu", mode)
        lengths = mask.sum(1)
        assert mask.shape == (200, 30) and int(lengths.min()) == shortest, mode
        assert torch.equal(mask, torch.arange(30) < lengths[:, None])
    assert testing.generate_random_padding_mask(4, 500, "cpu").sum(1).min() == 1
    lengths = testing.generate_random_padding_mask(9, 8, "cpu", "full", zero_lengths=True).sum(1)
    assert lengths.tolist() == [0, 9, 9, 9, 9, 0, 9, 0]
    with pytest.raises(ValueError, match="mode: expected 'full', 'random' or 'third', got 'half'"):
        testing.generate_random_padding_mask(4, 2, "cpu", "half")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("packed", ["", "kvpacked", "qkvpacked"])
def test_packed_inputs(packed, padded):
    q, k, v = _qkv()
    if packed == "qkvpacked":
        q = k = v = q
    masks = dict(PADDED) if padded else {}
    if packed == "qkvpacked" and padded:
        masks["key_padding_mask"] = masks["query_padding_mask"]
    found = testing.generate_qkv(q, k, v, **masks, **({packed: True} if packed else {}))
    tokens = sum(LENGTHS_Q) if padded else BATCH * SEQLEN_Q
    if packed == "qkvpacked":
        qkv_unpad, cu_seqlens, longest, qkv, pad, pad_gradient = found
        assert qkv_unpad.shape == (tokens, 3, HEADS, HEAD_DIM) and longest == SEQLEN_Q
        padding = masks.get("query_padding_mask", torch.ones(BATCH, SEQLEN_Q, dtype=torch.bool))
        expected = torch.stack([q, q, q], 2) * padding[:, :, None, None, None]
        assert torch.equal(pad_gradient(qkv_unpad), expected) and qkv.is_leaf
        assert cu_seqlens.dtype == torch.int32 and int(cu_seqlens[-1]) == tokens
        assert torch.equal(pad(qkv_unpad[:, 0]), expected[:, :, 0])
    elif packed == "kvpacked":
        q_unpad, kv_unpad, cu_q, cu_k, longest_q, longest_k, _, kv, pad, _, pad_kv = found
        assert (longest_q, longest_k, int(cu_q[-1])) == (SEQLEN_Q, SEQLEN_K, tokens)
        assert int(cu_k[-1]) == len(kv_unpad) and kv.shape == (*k.shape[:2], 2, *k.shape[2:])
        if not padded:
            assert torch.equal(pad(q_unpad), q) and torch.equal(pad_kv(kv_unpad), kv)
    else:
        assert len(found) == 17
        q_unpad, k_unpad, v_unpad, qv_unpad, cu_q, cu_k, used_q, used_k = found[:8]
        assert all(x.is_leaf and x.requires_grad for x in (q_unpad, k_unpad, v_unpad))
        assert qv_unpad is None and (used_k is None) == (not padded)
        if padded:
            assert torch.equal(k_unpad, unpad_input(k, PADDED["key_padding_mask"])[0])
            assert used_q.tolist() == LENGTHS_Q and cu_k.tolist() == [0, 7, 10, 12]


def test_unused_tokens_are_packed_but_not_used():
    q, k, v = _qkv()
    unused = torch.zeros(BATCH, SEQLEN_K, dtype=torch.bool)
    unused[1, 3] = True
    qv = torch.randn_like(q)
    found = testing.generate_qkv(q, k, v, **PADDED, qv=qv, key_unused_mask=unused)
    assert found[1].shape[0] == sum(LENGTHS_K) + 1 and found[7].tolist() == LENGTHS_K
    assert torch.equal(found[3], qv[PADDED["query_padding_mask"]]) and not found[3].requires_grad
    assert found[9] == SEQLEN_K


def test_inputs_that_do_not_fit():
    q, k, v = _qkv()
    for options, message in (
        ({"kvpacked": True, "qkvpacked": True}, "expected at most one"),
        ({"kvpacked": True, "key_unused_mask": PADDED["key_padding_mask"]}, "expected None"),
        ({"qkvpacked": True}, "expected one shape and one padding mask"),
    ):
        with pytest.raises(ValueError, match=message):
            testing.generate_qkv(q, k, v, **options)


# ---- benchmark ----


def _product(x, y, scale=1.0):
    return x @ y * scale, "a second result"


def test_timers(capsys):
    x, y = torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    timings = benchmark.benchmark_all(_product, x, y, scale=2.0, repeats=2, desc="product")
    assert [m.number_per_run for _, m in timings] == [2, 2, 2]
    printed = capsys.readouterr().out
    for what in ("Forward pass", "Backward pass", "Forward + Backward pass"):
        assert f"product - {what}" in printed
    benchmark.benchmark_backward(_product, x, y, grad=torch.ones(8, 8), repeats=3, verbose=False)
    torch.testing.assert_close(x.grad, y.detach().sum(1).expand(8, 8))  # they do not add up
    assert len(benchmark.benchmark_fwd_bwd(_product, x, y, repeats=1, verbose=False)) == 2
    assert capsys.readouterr().out == ""
    with pytest.raises(RuntimeError, match="Grad shape does not match output shape"):
        benchmark.benchmark_combined(_product, x, y, grad=torch.ones(3))


def test_autocast_is_that_of_the_inputs():
    seen = []

    def product(x, y):
        seen.append((x @ y).dtype)
        return x @ y

    x = torch.randn(4, 4, requires_grad=True)
    benchmark.benchmark_forward(product, x, x, repeats=1, verbose=False)
    benchmark.benchmark_forward(
        product, x, x, repeats=1, verbose=False, amp=True, amp_dtype=torch.bfloat16
    )
    assert set(seen) == {torch.float32, torch.bfloat16} and seen[-1] == torch.bfloat16


def test_profiler(tmp_path, capsys):
    x = torch.randn(4, 4, requires_grad=True)
    trace = tmp_path / "trace.json"
    benchmark.pytorch_profiler(_product, x, x, backward=True)
    assert "aten::mm" in capsys.readouterr().out
    benchmark.pytorch_profiler(_product, x, x, verbose=False, trace_filename=str(trace))
    assert capsys.readouterr().out == ""
    assert any(e.get("name") == "aten::mm" for e in json.loads(trace.read_text())["traceEvents"])


def test_memory_is_counted_on_cuda_alone():
    with pytest.raises(RuntimeError, match="expected tensors on CUDA, .* got cpu"):
        benchmark.benchmark_memory(_product, torch.ones(2, 2), torch.ones(2, 2))
