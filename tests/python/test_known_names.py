"""Attention under the names that trainers know: checkpoint policies, save lists, FLOP counters."""

from __future__ import annotations

import functools

import pytest
import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func
from support import run_python, torch_version
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import anyflash

pytestmark = [
    pytest.mark.providers,
    pytest.mark.skipif(torch_version() < 204, reason="the names came with torch 2.4"),
]


class Watch(TorchDispatchMode):
    """Notes the operators of attention."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "flash_attn" in str(function):
            self.seen.append(str(function).removesuffix(".default"))
        return function(*args, **(kwargs or {}))


def _qkv(device, *shape, **options):
    torch.manual_seed(0)
    return [torch.randn(shape, device=device, **options) for _ in "qkv"]


def _cu(device, *ends):
    return torch.tensor([0, *ends], dtype=torch.int32, device=device)


def _dense(q, k, v, **options):
    return flash_attn_func(q, k, v, causal=True, **options)


def _packed(q, k, v, **options):
    cu = _cu(q.device, 5, 16)
    return flash_attn_varlen_func(q, k, v, cu, cu, 11, 11, causal=True, **options)


CALLS = {
    "dense": (_dense, (2, 9, 2, 16), "flash_attn._flash_attn_{}"),
    "packed": (_packed, (16, 2, 16), "flash_attn._flash_attn_varlen_{}"),
}
ELSEWHERE = {
    "a back end": {"backend": "math"},
    "deterministic": {"deterministic": True},
    "a bias": {"bias": torch.zeros(9, 9)},
    "sinks": {"sinks": torch.zeros(2)},
    "used keys": {"seqused_k": torch.tensor([4, 9], dtype=torch.int32)},
}


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("name", CALLS)
def test_a_mode_sees_the_names_and_the_same_numbers(device, name, p):
    call, shape, operator = CALLS[name]
    results = []
    for watch in (None, Watch()):
        leaves = _qkv(device, *shape, requires_grad=True)
        torch.manual_seed(3)
        if watch is None:
            out = call(*leaves, dropout_p=p)
            found = torch.autograd.grad(out.sin().sum(), leaves)
        else:
            with watch:
                out = call(*leaves, dropout_p=p)
                found = torch.autograd.grad(out.sin().sum(), leaves)
            assert watch.seen == [operator.format("forward"), operator.format("backward")]
        results.append((out, *found))
    for plain, watched in zip(*results):
        assert torch.equal(plain, watched)


@pytest.mark.parametrize("what", ELSEWHERE)
def test_what_the_names_cannot_say_goes_by_our_own(device, what):
    q, k, v = _qkv(device, 2, 9, 2, 16)
    options = {n: x.to(device) if torch.is_tensor(x) else x for n, x in ELSEWHERE[what].items()}
    with Watch() as watch:
        out = anyflash.attention(q, k, v, **options)
    assert watch.seen == ["anyflash._flash_attn_forward"]
    assert torch.equal(out, anyflash.attention(q, k, v, **options))


@pytest.mark.skipif(torch_version() < 207, reason="torch.compiler.is_exporting came with 2.7")
def test_what_goes_into_files_has_operators_that_cpp_has(device):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return flash_attn_func(q, k, v)

    tensors = tuple(_qkv(device, 2, 9, 2, 16, requires_grad=True))
    for strict in (False, True):
        program = torch.export.export(Module(), tensors, strict=strict)
        names = [str(node.target) for node in program.graph.nodes if "flash" in str(node.target)]
        assert names == ["anyflash._flash_attn_forward.default"]
    assert "anyflash::_flash_attn_forward" in str(torch.jit.trace(Module(), tensors).graph)


POLICIES = {
    "namespace": lambda op: op.namespace == "flash_attn",
    "substring": lambda op: "flash_attn" in str(op),
    "save list": lambda op: (
        op
        in (
            torch.ops.flash_attn._flash_attn_forward.default,
            torch.ops.flash_attn._flash_attn_varlen_forward.default,
        )
    ),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("preserve", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CALLS)
def test_selective_checkpoints_save_attention_and_its_dropout(
    device, name, policy, preserve, compiled
):
    """Attention is linear in v: with one mask sum(dv * v) is sum(out * dout)."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    if compiled and (not preserve or policy != "save list"):
        pytest.skip("torch.compile preserves the state always; one policy is enough")
    call, shape, operator = CALLS[name]
    q, v, dout = _qkv(device, *shape)
    v.requires_grad_()

    def decide(context, op, *args, **kwargs):
        keep = POLICIES[policy](op)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def region(q, v):
        return checkpoint(
            lambda q, v: call(torch.tanh(q), q, v, dropout_p=0.4), q, v, use_reentrant=False,
            preserve_rng_state=preserve,
            context_fn=functools.partial(create_selective_checkpoint_contexts, decide),
        )  # fmt: skip

    if compiled:
        torch._dynamo.reset()
        out = torch.compile(region, backend="aot_eager", fullgraph=True)(q, v)
        out.backward(dout)
    else:
        with Watch() as watch:
            out = region(q, v)
            out.backward(dout)
        assert watch.seen.count(operator.format("forward")) == 1
    torch.testing.assert_close((v.grad * v).sum(), (out * dout).sum(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", CALLS)
def test_selective_checkpoints_save_the_dropout_that_s_dmask_shows(device, name):
    """The same again, times a number that depends on S_dmask."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    call, shape, operator = CALLS[name]
    q, v, dout = _qkv(device, *shape)
    v.requires_grad_()

    def decide(context, op, *args, **kwargs):
        keep = POLICIES["namespace"](op)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def body(q, v):
        options = {"dropout_p": 0.4, "return_attn_probs": True}
        out, _, s_dmask = call(torch.tanh(q), q, v, **options)
        return out * s_dmask.sum()

    with Watch() as watch:
        out = checkpoint(
            body, q, v, use_reentrant=False, preserve_rng_state=False,
            context_fn=functools.partial(create_selective_checkpoint_contexts, decide),
        )  # fmt: skip
        out.backward(dout)
    assert watch.seen.count(operator.format("forward")) == 1
    torch.testing.assert_close((v.grad * v).sum(), (out * dout).sum(), atol=1e-3, rtol=1e-3)


# ---- FLOPs


def _count(call, leaves):
    """FLOPs of forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    with FlopCounterMode(display=False) as counter:
        out = call(*leaves)
    counts.append(counter.get_total_flops())
    if out.requires_grad:
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        counts.append(counter.get_total_flops())
    return counts


def test_flops_are_those_of_sdpa(device):
    leaves = _qkv(device, 2, 64, 4, 16, requires_grad=True)
    right = 4 * 2 * 4 * 64 * 64 * 16
    for call in (_dense, anyflash.attention):
        assert _count(call, leaves) == [right, right * 5 // 2]


def test_flops_of_packed_sequences_go_by_their_lengths(device):
    leaves = _qkv(device, 16, 2, 16, requires_grad=True)
    right = 4 * 2 * (5 * 5 + 11 * 11) * 16
    assert _count(_packed, leaves) == [right, right * 5 // 2]


def test_flops_of_used_keys_pages_and_caches(device):
    q, k, v = _qkv(device, 2, 6, 2, 16)
    used = torch.tensor([1, 4], dtype=torch.int32, device=device)
    per_pair = 4 * 2 * 16
    count = functools.partial(_count, leaves=(q, k, v))
    assert count(lambda q, k, v: anyflash.attention(q, k, v, seqused_k=used)) == [6 * 5 * per_pair]
    table = torch.tensor([[0], [1]], dtype=torch.int32, device=device)
    paged = functools.partial(anyflash.attention, block_table=table)
    assert count(lambda q, k, v: paged(q, k, v, seqused_k=used)) == [6 * 5 * per_pair]
    assert count(lambda q, k, v: paged(q, k, v)) == [6 * 12 * per_pair]
    one = q[:, :1].contiguous()
    cached = functools.partial(anyflash.attention_kvcache, one)
    assert count(lambda q, k, v: cached(k, v)) == [12 * per_pair]
    assert count(lambda q, k, v: cached(k, v, one, one, cache_seqlens=used)) == [7 * per_pair]


@pytest.mark.parametrize("recompute", [False, True])
def test_flops_of_the_mlp(device, recompute):
    x, w1, w2 = (
        torch.randn(s, device=device, requires_grad=True) for s in ((5, 8), (12, 8), (6, 12))
    )
    products = 2 * 5 * (8 * 12 + 12 * 6)
    again = 2 * 5 * 8 * 12 if recompute else 0
    call = functools.partial(anyflash.fused_mlp, recompute=recompute)
    assert _count(lambda *t: call(t[0], t[1], None, t[2], None), (x, w1, w2)) == [
        products,
        2 * products + again,
    ]


@pytest.mark.parametrize("first", ["anyflash", "torch.utils.flop_counter"])
def test_the_counter_costs_nothing_at_import(first, provider):
    second = "torch.utils.flop_counter" if first == "anyflash" else "anyflash"
    code = f"""
import sys, torch, {first}
assert ("torch.utils.flop_counter" in sys.modules) == ({first == "anyflash"} is False)
import {second}
from torch.utils.flop_counter import flop_registry
assert torch.ops.anyflash._flash_attn_forward in flop_registry
import flash_attn
assert torch.ops.flash_attn._flash_attn_varlen_backward in flop_registry
print("fine")
"""
    assert "fine" in run_python(code, ANYFLASH_PROVIDER=provider)
