"""torch.compile: full graphs, both directions, one graph for all lengths, caches in a graph."""

from __future__ import annotations

import pytest
import torch

import anyflash

pytestmark = pytest.mark.providers

NO_MORE_GRAPHS = torch._dynamo.config.patch(error_on_recompile=True)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _qkv(device, seqlen=24, heads=2, dim=16):
    return [torch.randn(2, seqlen, heads, dim, device=device, requires_grad=True) for _ in "qkv"]


def _block(q, k, v):
    out, lse = anyflash.attention(q * 1.5, k, v, causal=True, return_lse=True)
    return out.sin() + lse.transpose(1, 2)[..., None]


def _compare(function, compiled, tensors, **tolerance):
    tolerance = tolerance or {"atol": 1e-5, "rtol": 1e-5}
    out, expected = compiled(*tensors), function(*tensors)
    torch.testing.assert_close(out, expected, **tolerance)
    dout = torch.randn_like(expected)
    found = torch.autograd.grad(out, tensors, dout)
    for a, b in zip(found, torch.autograd.grad(expected, tensors, dout)):
        torch.testing.assert_close(a, b, **tolerance)


def test_inductor_forward_and_backward(device):
    compiled = torch.compile(_block, fullgraph=True)
    _compare(_block, compiled, _qkv(device))


def test_dynamic_lengths_are_one_graph(device):
    compiled = torch.compile(_block, fullgraph=True, dynamic=True, backend="aot_eager")
    _compare(_block, compiled, _qkv(device, 24))
    with NO_MORE_GRAPHS:
        for seqlen in (31, 48, 7):
            _compare(_block, compiled, _qkv(device, seqlen))


def test_lengths_become_dynamic_by_themselves(device):
    compiled = torch.compile(_block, fullgraph=True, backend="aot_eager")
    for seqlen in (24, 31):
        _compare(_block, compiled, _qkv(device, seqlen))
    with NO_MORE_GRAPHS:
        for seqlen in (48, 7, 100):
            _compare(_block, compiled, _qkv(device, seqlen))


def test_changing_options_are_new_graphs(device):
    """Guards the tests above: a new graph is an error there."""
    compiled = torch.compile(anyflash.attention, fullgraph=True, backend="aot_eager")
    compiled(*_qkv(device), causal=True)
    with NO_MORE_GRAPHS, pytest.raises(RuntimeError, match="[Rr]ecompil"):
        compiled(*_qkv(device), causal=False)


def test_packed_with_changing_batches(device):
    def packed(q, k, v, cu, longest: int):
        return anyflash.attention(
            q,
            k,
            v,
            cu_seqlens_q=cu,
            cu_seqlens_k=cu,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=True,
            window_size=(8, 0),
        )

    compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend="aot_eager")

    def check(*lengths):
        total, longest = sum(lengths), max(lengths)
        tensors = [torch.randn(total, 2, 16, device=device, requires_grad=True) for _ in "qkv"]
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
        _compare(
            lambda q, k, v, cu=cu, m=longest: packed(q, k, v, cu, m),
            lambda q, k, v, cu=cu, m=longest: compiled(q, k, v, cu, m),
            tensors,
        )

    check(5, 9)
    with NO_MORE_GRAPHS:
        check(12, 3, 20)
        check(30, 2, 2, 9)


def test_public_operators(device):
    def attend(q, k, v):
        return torch.ops.anyflash.flash_attn_func(q, k, v, 0.0, None, True).cos()

    _compare(attend, torch.compile(attend, fullgraph=True, backend="aot_eager"), _qkv(device))


def test_every_option_in_one_graph(device):
    slopes, sinks = torch.rand(2, device=device), torch.randn(2, device=device, requires_grad=True)
    bias = torch.randn(1, 2, 24, 24, device=device, requires_grad=True)

    def attend(q, k, v, bias, sinks):
        return anyflash.attention(
            *(q, k, v),
            alibi_slopes=slopes,
            bias=bias,
            sinks=sinks,
            window_size=(9, 3),
            softcap=4.0,
            softmax_scale=0.3,
        )

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    _compare(attend, compiled, [*_qkv(device), bias, sinks])


def test_dropout_in_a_graph(device):
    state = torch.tensor([4, 2], device=device)

    def attend(q, k, v):
        return anyflash.attention(q, k, v, dropout_p=0.3, rng_state=state)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    _compare(attend, compiled, _qkv(device))

    def draws(q, k, v):
        return anyflash.attention(q, k, v, dropout_p=0.3)

    drawn = torch.compile(draws, fullgraph=True, backend="aot_eager")
    q, k, v = _qkv(device)
    assert not torch.equal(drawn(q, k, v), drawn(q, k, v))


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_cache_is_updated_inside_a_graph(backend, device):
    def step(q, k, v, k_cache, v_cache, lengths):
        out = anyflash.attention_kvcache(
            q * 2, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True
        )
        return out + 1, lengths + 1

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    states = []
    for function in (step, compiled):
        torch.manual_seed(0)
        caches = [torch.zeros(2, 8, 2, 16, device=device) for _ in "kv"]
        lengths = torch.zeros(2, dtype=torch.int32, device=device)
        outs = []
        for _ in range(3):
            q, k, v = (torch.randn(2, 1, 2, 16, device=device) for _ in "qkv")
            out, lengths = function(q, k, v, *caches, lengths)
            outs.append(out)
        states.append([*outs, *caches, lengths])
    for a, b in zip(*states):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert states[1][3][:, :3].abs().sum() > 0


def test_fused_mlp(device):
    torch.manual_seed(0)
    shapes = [(2, 6, 8), (32, 8), (32,), (8, 16), (8,)]
    tensors = [torch.randn(s, device=device, requires_grad=True) for s in shapes]

    def mlp(*tensors):
        x = anyflash.fused_mlp(*tensors, activation="silu_gate")
        return anyflash.bias_activation(x, activation="squared_relu")

    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    _compare(mlp, compiled, tensors, atol=1e-3, rtol=1e-4)


def test_context_manager_around_a_compiled_function(device):
    compiled = torch.compile(_block, fullgraph=True, backend="aot_eager")
    with anyflash.backend("math"):
        _compare(_block, compiled, _qkv(device))


def test_activation_checkpoint_in_a_graph(device):
    from torch.utils.checkpoint import checkpoint

    def outer(q, k, v):
        return checkpoint(_block, q, k, v, use_reentrant=False)

    compiled = torch.compile(outer, fullgraph=True, backend="aot_eager")
    _compare(outer, compiled, _qkv(device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs")
def test_cuda_graph(device):
    if device != "cuda":
        pytest.skip("a CUDA graph needs CUDA")
    tensors = [x.detach().to(torch.bfloat16) for x in _qkv(device, 64, 4, 64)]
    cu = torch.tensor([0, 30, 128], dtype=torch.int32, device=device)
    packed = [x.reshape(128, 4, 64) for x in tensors]

    def work():
        dense = anyflash.attention(*tensors, causal=True)
        options = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=98, max_seqlen_k=98)
        return dense, *(anyflash.attention(*packed, softcap=c, **options) for c in (0.0, 5.0))

    expected = work()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    graph.replay()
    for a, b in zip(results, expected):
        torch.testing.assert_close(a, b)
