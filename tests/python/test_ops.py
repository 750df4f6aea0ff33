"""The operators as torch sees them: schemas, fakes, autograd, TorchScript, export."""

from __future__ import annotations

import io
import re

import pytest
import torch
from support import REPOSITORY

import anyflash
from anyflash._operators.attention import AttentionCall, BackwardCall

pytestmark = pytest.mark.providers

TEXT = (REPOSITORY / "csrc/schemas.def").read_text()
GROUPS = {
    name: (name + schema.replace('\\"', '"'), group)
    for group, name, schema in re.findall(r'^OPERATOR\((\w+), \w+, (\w+), "(.*)"\)$', TEXT, re.M)
}
NAMES = list(GROUPS)
LEAVES = [name for name, (_, group) in GROUPS.items() if group == "leaf"]
PUBLIC = [name for name, (_, group) in GROUPS.items() if group == "public"]
# Their gradients are compared with float64 in the files of their families.
DIFFERENTIABLE = [name for name, (_, group) in GROUPS.items() if group == "differentiable"]


def _op(name):
    return getattr(torch.ops.anyflash, name).default


def _qkv(device, *, packed=False, d=16, dv=16, dtype=torch.float32, layout="contiguous"):
    torch.manual_seed(0)
    rows_q, rows_k = ((13,), (17,)) if packed else ((2, 7), (2, 9))
    shapes = [(*rows_q, 4, d), (*rows_k, 2, d), (*rows_k, 2, dv)]
    if layout == "transposed":
        shapes = [(*s[:-3], s[-2], s[-3], s[-1]) for s in shapes]
        return [torch.randn(s, device=device).to(dtype).transpose(-3, -2) for s in shapes]
    return [torch.randn(s, device=device).to(dtype) for s in shapes]


def _ints(*values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def _lengths(device):
    return _ints(0, 6, 13, device=device), _ints(0, 9, 17, device=device)


def _forward_samples(device):
    def sample(q, k, v, *, cu=(None, None), longest=(7, 9), used=None, leftpad=None, table=None,
               alibi=None, bias=None, sinks=None, rng=None, p=0.0, causal=True, window=(-1, -1),
               softcap=0.0, backend=0):  # fmt: skip
        return (q, k, v, *cu, *longest, used, leftpad, table, alibi, bias, sinks, rng, p, 0.25,
                causal, *window, softcap, False, True, backend)  # fmt: skip

    slopes, bias = torch.rand(4, device=device), torch.randn(2, 1, 7, 9, device=device)
    rng, sinks = torch.tensor([3, 4], device=device), torch.randn(4, device=device)
    pages = [torch.randn(6, 4, 2, 16, device=device) for _ in "kv"]
    table = _ints(0, 3, 5, 1, 2, 4, device=device).reshape(2, 3)
    return {
        "dense": sample(*_qkv(device)),
        "transposed_bf16": sample(*_qkv(device, dtype=torch.bfloat16, layout="transposed")),
        "head_dim_v": sample(*_qkv(device, dv=24, layout="transposed"), causal=False),
        "fp64": sample(*_qkv(device, dtype=torch.float64), backend=3),
        "packed": sample(*_qkv(device, packed=True), cu=_lengths(device)),
        "packed_transposed": sample(
            *_qkv(device, packed=True, layout="transposed"), cu=_lengths(device), window=(3, 2)
        ),
        "paged": sample(
            *(_qkv(device)[0], *pages),
            used=_ints(5, 11, device=device),
            table=table,
            longest=(7, 12),
        ),
        "everything": sample(
            *_qkv(device), used=_ints(9, 5, device=device), leftpad=_ints(1, 0, device=device),
            alibi=slopes, bias=bias, sinks=sinks, rng=rng, p=0.3, window=(4, 1), causal=False,
        ),
        "softcap": sample(*_qkv(device), softcap=3.0),
        "fallback": sample(*_qkv(device), backend=0x37 if device == "cpu" else 0x36),
    }  # fmt: skip


def _backward_samples(device):
    samples = {}
    for name, forward in _forward_samples(device).items():
        if name == "paged":
            continue
        call = AttentionCall(*forward)
        out, lse, _ = _op("_flash_attn_forward")(*forward)
        given = {n: x for n, x in call._asdict().items() if n in BackwardCall._fields}
        given.update(
            dout=torch.randn_like(out), out=out, softmax_lse=lse,
            dsoftmax_lse=torch.randn_like(lse) if name == "everything" else None,
            bias_requires_grad=call.bias is not None, sinks_requires_grad=call.sinks is not None,
            deterministic=name == "everything",
        )  # fmt: skip
        samples[name] = tuple(BackwardCall(**given))
    return samples


def _kvcache_samples(device):
    q = torch.randn(2, 3, 4, 16, device=device)
    k, v = (torch.randn(2, 3, 2, 16, device=device) for _ in "kv")
    angles = torch.rand(12, 8, device=device)
    common = dict(device=device)

    def sample(caches, k=None, v=None, rotary=(None, None), lengths=None, index=None, leftpad=None,
               table=None, causal=True):  # fmt: skip
        return (q, *caches, k, v, *rotary, lengths, index, leftpad, table, None, None, 0.25, causal,
                -1, -1, 0.0, True, True, 0)  # fmt: skip

    def caches(*shape):
        return [torch.randn(*shape, 2, 16, device=device) for _ in "kv"]

    lengths = _ints(4, 7, **common)
    table = _ints(0, 3, 5, 1, 2, 4, **common).reshape(2, 3)
    return {
        "read": sample(caches(2, 12), lengths=lengths),
        "append": sample(caches(2, 12), k, v, (angles.cos(), angles.sin()), lengths),
        "rows": sample(caches(5, 12), k, v, lengths=lengths, index=_ints(4, 1, **common),
                       leftpad=_ints(1, 2, **common)),
        "paged": sample(caches(6, 4), k, v, lengths=lengths, table=table),
    }  # fmt: skip


def _rotary_samples(device):
    x, packed = torch.randn(2, 7, 3, 10, device=device), torch.randn(13, 3, 10, device=device)
    tables = [torch.rand(15, 4, device=device) for _ in range(2)]
    return {
        "plain": (x, *tables, None, 2, None, 0, False, False),
        "offsets": (x, *tables, _ints(3, 9, device=device), 0, None, 0, True, True),
        "packed": (packed, *tables, None, 1, _lengths(device)[0], 7, False, True),
        "heads_first": (
            x.view(2, 3, 7, 10).transpose(1, 2), *tables, None, 0, None, 0, True, False
        ),
        "columns_apart": (
            x.view(2, 7, 10, 3).transpose(2, 3), *tables, None, 0, None, 0, False, False
        ),
    }  # fmt: skip


def _mlp_tensors(device, gate=False):
    torch.manual_seed(2)
    shapes = [(2, 3, 6), (20 if gate else 10, 6), (20 if gate else 10,), (5, 10), (5,)]
    return [torch.randn(s, device=device) for s in shapes]


def _cross_entropy_samples(name, device):
    torch.manual_seed(4)
    wide = torch.randn(5, 40, device=device)
    labels = torch.tensor([0, -100, 36, 7, 7], device=device)

    def sample(logits, *options, labels=labels, lse=None):
        if name == "cross_entropy_forward":
            return (logits, labels, lse, *options)
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        dlosses, lse = torch.randn(5, device=device).to(dtype), logits.to(dtype).logsumexp(1)
        return (dlosses, logits, labels, lse, *options)

    samples = {
        "plain": sample(wide, 0.0, 1.0, 0.0, -100, 0, 40),
        "strided": sample(wide[:, :37], 0.1, 0.7, 1e-3, 7, 0, 37, labels=labels.clamp(0)),
        "part": sample(wide.bfloat16(), 0.1, 1.0, 0.0, -100, 40, 80),
        "precomputed": sample(wide, 0.0, 1.0, 0.0, -100, 0, 40, lse=wide.logsumexp(1)),
    }
    if not name.endswith("_"):
        columns = wide.half().T.contiguous().T
        samples["columns"] = sample(columns, 0.0, 1.0, 0.0, -100, 0, 40)
    return samples


def _norm_forward_samples(device):
    def sample(x, weight, *, residual=None, x1=None, bias=None, weight1=None, bias1=None,
               rowscale=None, masks=(None, None), p=0.0, rms=False, zero=False, out=4,
               sums=4):  # fmt: skip
        return (x, residual, x1, weight, bias, weight1, bias1, rowscale, *masks, p, 1e-5, rms, zero,
                out, sums)  # fmt: skip

    torch.manual_seed(3)
    x, r, x1 = (torch.randn(3, 4, 24, device=device) for _ in "xr1")
    w, b, w1 = (torch.randn(24, device=device) for _ in "wb1")
    masks = [torch.rand(3, 4, 24, device=device) > 0.5 for _ in "01"]
    return {
        "plain": sample(x, w, sums=0),
        "stored": sample(x, w, bias=b, sums=4),
        "parallel": sample(
            x, w, residual=r, x1=x1, bias=b, weight1=w1, bias1=b, masks=masks, p=0.5, zero=True
        ),
        "scaled": sample(
            x.transpose(0, 1), w, residual=r.transpose(0, 1), rowscale=r[..., 0].T, rms=True
        ),
        "mixed": sample(x.bfloat16(), w, residual=r, bias=b.half(), out=2),
        "sum_unwanted": sample(x.bfloat16(), w, residual=r, sums=0),
    }


def _norm_backward_samples(device):
    def sample(z, weight, *, dy1=None, dz=None, bias=None, weight1=None, bias1=None, rowscale=None,
               masks=(None, None), x=None, p=0.0, rms=False, residual=True, dtype=4):  # fmt: skip
        mean = z.new_empty(0) if rms else z.float().mean(-1)
        rstd = (z.float().var(-1) + 1e-5).rsqrt()
        return (dy, dy1, dz, z, mean, rstd, weight, bias, weight1, bias1, rowscale, *masks, x, p,
                rms, False, residual, masks[1] is not None, dtype)  # fmt: skip

    torch.manual_seed(3)
    dy, dy1, z, x = (torch.randn(3, 4, 24, device=device) for _ in "01zx")
    w, b, w1 = (torch.randn(24, device=device) for _ in "wb1")
    masks = [torch.rand(3, 4, 24, device=device) > 0.5 for _ in "01"]
    return {
        "plain": sample(z, w, residual=False),
        "parallel": sample(
            z, w, dy1=dy1, dz=x, bias=b, weight1=w1, bias1=b.half(), masks=masks, p=0.5
        ),
        "scaled": sample(z, w, dz=dy1, rowscale=x[..., 0], x=x, rms=True),
        "mixed": sample(z.transpose(0, 1).bfloat16().transpose(0, 1), w.half(), bias=b),
    }


def samples_of(name: str, device: str) -> dict[str, tuple]:
    """Arguments for each operator of schemas.def."""
    x, w1, b1, w2, b2 = _mlp_tensors(device)
    gated = _mlp_tensors(device, gate=True)
    q, k, v = _qkv(device)
    packed = _qkv(device, packed=True)
    cu_q, cu_k = _lengths(device)
    hidden = torch.nn.functional.linear(x, w1)
    dout = torch.randn(2, 3, 5, device=device)
    qkv = torch.randn(2, 7, 3, 4, 16, device=device)
    slopes = torch.rand(4, device=device)
    cache = [torch.randn(2, 12, 2, 16, device=device) for _ in "kv"]
    new = [torch.randn(2, 7, 2, 16, device=device) for _ in "kv"]
    return {
        "_flash_attn_forward": lambda: _forward_samples(device),
        "_flash_attn_backward": lambda: _backward_samples(device),
        "_flash_attn_kvcache_": lambda: _kvcache_samples(device),
        "_bias_activation_forward": lambda: {
            "bias": (x, b1[:6], 0, 0),
            "gate": (x, None, 4, 0),
            "strided": (x.transpose(0, 1), b1[:6], 1, 0),
        },
        "_bias_activation_backward": lambda: {
            "bias": (torch.randn_like(x), x, b1[:6], 3, 0),
            "gate": (x[..., :3].contiguous(), x, None, 4, 0),
        },
        "_fused_mlp_forward": lambda: {
            "saved": (x, w1, b1, w2, b2, 0, True, 0),
            "recomputed": (x, w1, None, w2, None, 2, False, 0),
            "gate": (*gated, 4, True, 0),
        },
        "_fused_mlp_backward": lambda: {
            "saved": (dout, x, w1, b1, w2, hidden, True, 0, 0),
            "recomputed": (dout, x, w1, None, w2, hidden.new_empty(0), False, 2, 0),
        },
        "cross_entropy_forward": lambda: _cross_entropy_samples(name, device),
        "cross_entropy_backward": lambda: _cross_entropy_samples(name, device),
        "cross_entropy_backward_": lambda: _cross_entropy_samples(name, device),
        "rotary": lambda: _rotary_samples(device),
        "rotary_": lambda: _rotary_samples(device),
        "norm_forward": lambda: _norm_forward_samples(device),
        "norm_backward": lambda: _norm_backward_samples(device),
        "flash_attn_func": lambda: {
            "plain": (q, k, v),
            "options": (q, k, v, 0.0, 0.3, True, [4, 2], 2.0, slopes, True),
            "three_dimensions": (q[0], k[0], v[0]),
        },
        "flash_attn_kvpacked_func": lambda: {"plain": (q, torch.stack([k, v], 2), 0.0, None, True)},
        "flash_attn_qkvpacked_func": lambda: {"plain": (qkv, 0.0, None, True)},
        "flash_attn_varlen_func": lambda: {"plain": (*packed, cu_q, cu_k, 7, 9, 0.0, None, True)},
        "flash_attn_varlen_kvpacked_func": lambda: {
            "plain": (packed[0], torch.stack(packed[1:], 1), cu_q, cu_k, 7, 9, 0.0, None, True)
        },
        "flash_attn_varlen_qkvpacked_func": lambda: {
            "plain": (torch.randn(13, 3, 4, 16, device=device), cu_q, 7, 0.0, None, True)
        },
        "flash_attn_with_kvcache": lambda: {
            "append": (q, *cache, *new, None, None, _ints(2, 5, device=device))
        },
        "fused_mlp": lambda: {
            "plain": (x, w1, b1, w2, b2),
            "options": (x, w1, b1, w2, None, "squared_relu", True),
            "gate": (*gated, "silu_gate"),
        },
    }[name]()


#: Tensors whose gradient an operator refuses, or all of them.
WITHOUT_GRADIENT = {
    "rotary": ("cos", "sin"),
    "_flash_attn_forward": ("alibi_slopes",),
    "flash_attn_func": ("alibi_slopes",),
}


def _differentiable(name: str, arguments: tuple) -> tuple:
    """Leaves that ask for a gradient in place of the floating tensors."""
    names = [argument.name for argument in _op(name)._schema.arguments]
    refused = WITHOUT_GRADIENT.get(name, ())
    return tuple(
        a.detach().clone().requires_grad_()
        if torch.is_tensor(a) and a.is_floating_point() and n not in refused
        else a
        for n, a in zip(names, arguments)
    )


def test_the_list_of_operators_is_complete():
    assert len(GROUPS) == TEXT.count("\nOPERATOR(")
    assert LEAVES[0] == "_flash_attn_backward" and PUBLIC[0] == "flash_attn_func"


@pytest.mark.parametrize("name", NAMES)
def test_schema_is_the_one_of_the_list(name):
    written = torch._C.parse_schema("anyflash::" + GROUPS[name][0])
    assert str(_op(name)._schema) == str(written)


@pytest.mark.parametrize("name", [*LEAVES, *DIFFERENTIABLE])
def test_opcheck(name, device):
    for what, arguments in samples_of(name, device).items():
        found = torch.library.opcheck(_op(name), arguments, raise_exception=False)
        assert set(found.values()) == {"SUCCESS"}, f"{name} {what}: {found}"


@pytest.mark.parametrize("name", [*PUBLIC, *DIFFERENTIABLE])
def test_opcheck_with_gradients(name, device):
    for what, arguments in samples_of(name, device).items():
        if (name, what) == ("cross_entropy_forward", "part"):
            continue  # refuses one
        if (name, what) == ("_flash_attn_forward", "paged"):
            continue  # likewise
        if not name.endswith(("_", "kvcache")):  # a leaf that asks for a gradient can't be written
            arguments = _differentiable(name, arguments)
        found = torch.library.opcheck(_op(name), arguments, raise_exception=False)
        assert set(found.values()) == {"SUCCESS"}, f"{name} {what}: {found}"


@pytest.mark.parametrize("name", [*LEAVES, *DIFFERENTIABLE])
def test_fakes_have_the_strides_of_the_real_results(name, device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for what, arguments in samples_of(name, device).items():
        real = _op(name)(*arguments)
        with FakeTensorMode() as mode:
            faked = [mode.from_tensor(a) if torch.is_tensor(a) else a for a in arguments]
            fake = _op(name)(*faked)
        pairs = zip(*((x,) if torch.is_tensor(x) else x or () for x in (real, fake)))
        for i, (r, f) in enumerate(pairs):
            where = f"{name} {what} result {i}"
            assert (r.shape, r.dtype, r.device) == (f.shape, f.dtype, f.device), where
            assert r.numel() == 0 or r.stride() == f.stride(), where


@pytest.mark.parametrize("name", [name for name in LEAVES if not name.endswith("_")])
def test_a_leaf_refuses_a_backward_and_forward_mode(name, device):
    for arguments in samples_of(name, device).values():
        results = _op(name)(*_differentiable(name, arguments))
        with pytest.raises(RuntimeError, match="second derivative|gradient"):
            next(x for x in results if x.requires_grad).sum().backward()
        first, *rest = arguments
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(first, torch.ones_like(first))
            with pytest.raises(RuntimeError, match="forward|jvp"):
                _op(name)(dual, *rest)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_operator_is_the_python_function(name, device):
    """Same values and the same gradients through torch.ops and through the Python functions."""
    for what, arguments in samples_of(name, device).items():
        if name == "flash_attn_with_kvcache":
            copies = [a.clone() if torch.is_tensor(a) else a for a in arguments]
            q, k_cache, v_cache, k, v, _, _, lengths = copies
            expected = anyflash.attention_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths)
            assert torch.equal(_op(name)(*arguments), expected)
            assert torch.equal(arguments[1], k_cache)
            continue
        ours, theirs = (_differentiable(name, arguments) for _ in range(2))
        out, expected = _op(name)(*ours), _python_function(name, *theirs)
        torch.testing.assert_close(out, expected, msg=lambda m, w=what: f"{name} {w}: {m}")
        out.sin().sum().backward()
        expected.sin().sum().backward()
        for a, b in zip(ours, theirs):
            if torch.is_tensor(a) and a.requires_grad and b.grad is not None:
                torch.testing.assert_close(a.grad, b.grad)
        assert ours[0].grad is not None


def _python_function(name, *a):
    if name == "fused_mlp":
        activation, recompute = (*a[5:], *("gelu_tanh", False)[len(a[5:]) :])
        return anyflash.fused_mlp(*a[:5], activation=activation, recompute=recompute)
    if "varlen" in name:
        tensors = 1 if "qkvpacked" in name else 2 if "kvpacked" in name else 3
        per_side = 1 if tensors == 1 else 2
        cu, longest = (
            a[tensors : tensors + per_side],
            a[tensors + per_side : tensors + 2 * per_side],
        )
        packed = {"cu_seqlens_q": cu[0], "cu_seqlens_k": cu[-1]}
        packed.update(max_seqlen_q=longest[0], max_seqlen_k=longest[-1])
        return anyflash.attention(*_split(a[:tensors], 1), causal=True, **packed)
    if name != "flash_attn_func":
        tensors = 1 if "qkvpacked" in name else 2
        return anyflash.attention(*_split(a[:tensors], 2), causal=True)
    names = [
        "dropout_p",
        "softmax_scale",
        "causal",
        "window_size",
        "softcap",
        "alibi_slopes",
        "deterministic",
    ]
    return anyflash.attention(*a[:3], **dict(zip(names, a[3:])))


def _split(tensors, dim):
    """q, k, v from (qkv,), (q, kv) or (q, k, v)."""
    if len(tensors) == 1:
        return tensors[0].unbind(dim)
    if len(tensors) == 2:
        return (tensors[0], *tensors[1].unbind(dim))
    return tensors


def test_dropout_of_the_public_operator(device):
    q, k, v = (x.requires_grad_() for x in _qkv(device))
    torch.manual_seed(5)
    out = torch.ops.anyflash.flash_attn_func(q, k, v, 0.4)
    torch.manual_seed(5)
    again = torch.ops.anyflash.flash_attn_func(q, k, v, 0.4)
    assert torch.equal(out, again)
    assert not torch.equal(out, torch.ops.anyflash.flash_attn_func(q, k, v, 0.4))
    # Linear in v: the gradient's bits must be those of the forward.
    (dv,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close((dv * v).sum(), out.sum(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("given", [False, True])
def test_the_forward_returns_what_its_dropout_repeats_from(device, given):
    torch.manual_seed(1)
    state = torch.tensor([7, 8], device=device) if given else None
    call = AttentionCall(*_forward_samples(device)["dense"])._replace(dropout_p=0.5)
    out, _, rng_state = _op("_flash_attn_forward")(*call._replace(rng_state=state))
    again, _, same = _op("_flash_attn_forward")(*call._replace(rng_state=rng_state))
    assert torch.equal(out, again) and torch.equal(rng_state, same)
    assert not given or torch.equal(rng_state, state)
    assert rng_state.data_ptr() not in (same.data_ptr(), 0 if state is None else state.data_ptr())
    other = _op("_flash_attn_forward")(*call)[2]
    assert other.shape == (2,) and not torch.equal(other, rng_state)
    assert _op("_flash_attn_forward")(*call._replace(dropout_p=0.0))[2].shape == (0,)


class Scripted(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse, rng_state = torch.ops.anyflash._flash_attn_forward(
            q, k, v, None, None, 0, 0, None, None, None, None, None, None, None,
            0.0, 0.25, True, -1, -1, 0.0, False, True, 0,
        )  # fmt: skip
        return out * torch.ops.anyflash.flash_attn_func(q, k, v, 0.0, None, True)


def test_torchscript(device):
    q, k, v = _qkv(device)
    scripted = torch.jit.script(Scripted())
    expected = anyflash.attention(q, k, v, softmax_scale=0.25, causal=True) * anyflash.attention(
        q, k, v, causal=True
    )
    torch.testing.assert_close(scripted(q, k, v), expected)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(q, k, v), expected)


def test_torchscript_gradient_of_the_public_operator(device):
    q, k, v = (x.requires_grad_() for x in _qkv(device))

    @torch.jit.script
    def scripted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.ops.anyflash.flash_attn_func(q, k, v, 0.0, None, True)

    found = torch.autograd.grad(scripted(q, k, v).sum(), (q, k, v))
    expected = torch.autograd.grad(anyflash.attention(q, k, v, causal=True).sum(), (q, k, v))
    torch.testing.assert_close(found, expected)


def test_jit_trace(device):
    q, k, v = _qkv(device)
    with torch.no_grad():
        traced = torch.jit.trace(
            lambda q, k, v: anyflash.attention(q, k, v, causal=True), (q, k, v)
        )
    torch.testing.assert_close(traced(q, k, v), anyflash.attention(q, k, v, causal=True))


class Exported(torch.nn.Module):
    def forward(self, q, k, v):
        return anyflash.attention(q, k, v, causal=True)


def test_export_with_a_dynamic_length(device):
    q, k, v = (torch.randn(2, 9, 2, 16, device=device) for _ in "qkv")
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(
        Exported(), (q, k, v), dynamic_shapes=({1: length},) * 3, strict=False
    )
    assert any("anyflash" in str(node.target) for node in program.graph.nodes)
    longer = [torch.randn(2, 33, 2, 16, device=device) for _ in "qkv"]
    torch.testing.assert_close(program.module()(*longer), anyflash.attention(*longer, causal=True))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    torch.testing.assert_close(loaded(*longer), anyflash.attention(*longer, causal=True))


def test_meta_tensors():
    q, k, v = (x.to("meta") for x in _qkv("cpu"))
    out, lse = anyflash.attention(q, k, v, return_lse=True)
    assert out.shape == (2, 7, 4, 16) and out.is_meta
    assert lse.shape == (2, 4, 7) and lse.dtype == torch.float32


def test_a_meta_tensor_beside_others_is_refused():
    """It would choose the fake, which allocates and computes nothing."""
    x, w = torch.ones(2, 8), torch.ones(8)
    q = torch.ones(1, 2, 1, 8)
    for call in (
        lambda: anyflash.layer_norm(x, w.to("meta")),
        lambda: anyflash.attention(q, q.to("meta"), q),
        lambda: anyflash.fused_mlp(
            x, torch.ones(4, 8, device="meta"), None, torch.ones(2, 4), None
        ),
    ):
        with pytest.raises(RuntimeError, match="meta"):
            call()
