"""flash_attn.layers.rotary and the extension of 1.x as clients call them, eager and compiled."""

from __future__ import annotations

import flash_attn.layers.rotary as layers
import pytest
import rotary_emb
import torch
from flash_attn.ops.triton.rotary import apply_rotary
from rotary_support import angles, assert_close, reference, sample, weighted
from torch.utils._python_dispatch import TorchDispatchMode

import anyflash
from anyflash._operators import runs_on_kernel

pytestmark = pytest.mark.providers

FORMULA = layers.apply_rotary_emb_torch


class _Counter(TorchDispatchMode):
    """Names of the operators called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def _unpacked_formula(qkv, num_heads_q, tables, tables_k):
    """The same of q and k one by one, not in place."""
    if qkv.dim() == 5:
        q, k, v = qkv.unbind(2)
        return torch.stack([FORMULA(q, *tables), FORMULA(k, *tables_k), v], 2)
    heads_k = (qkv.shape[2] - num_heads_q) // 2
    q, k, v = qkv.split([num_heads_q, heads_k, heads_k], 2)
    return torch.cat([FORMULA(q, *tables), FORMULA(k, *tables_k), v], 2)


@pytest.mark.parametrize("own_tables_of_k", [False, True])
@pytest.mark.parametrize("layout", ["5 dimensions", "grouped", "not contiguous"])
def test_qkv_in_place(device, layout, own_tables_of_k):
    x, cos, sin = sample(heads=12, device=device)
    cos, sin = cos[:5], sin[:5]
    num_heads_q = 6 if layout == "grouped" else None
    shape = (2, 5, 12, 10) if layout == "grouped" else (2, 5, 3, 4, 10)
    k_tables = (1.5 * cos, 0.5 * sin) if own_tables_of_k else (None, None)

    def packed(x):
        if layout == "not contiguous":  # q and k of a head lie side by side
            return x.view(2, 5, 4, 3, 10).transpose(2, 3) * 1
        return x.view(shape) * 1

    expected = _unpacked_formula(
        packed(x), num_heads_q, (cos, sin), k_tables if own_tables_of_k else (cos, sin)
    )
    qkv = packed(x)
    out = layers.apply_rotary_emb_qkv_(qkv, cos, sin, *k_tables, num_heads_q=num_heads_q)
    assert out.data_ptr() == qkv.data_ptr()
    torch.testing.assert_close(out, expected)
    gradient = torch.randn_like(out)
    kept = gradient.clone()
    gradients = [torch.autograd.grad(y, x, gradient)[0] for y in (out, expected)]
    torch.testing.assert_close(*gradients)
    assert torch.equal(gradient, kept)  # upstream writes into it
    if runs_on_kernel("rotary", x):
        with torch.no_grad(), _Counter() as counter:
            layers.apply_rotary_emb_qkv_(packed(x), cos, sin, *k_tables, num_heads_q=num_heads_q)
        one_launch = not own_tables_of_k and layout != "not contiguous"
        assert counter.names.count("anyflash::rotary_") == (1 if one_launch else 2)


def test_a_gradient_that_somebody_else_has_too(device):
    """The sum hands the same tensor to both of its operands."""
    x, cos, sin = sample(device=device)
    other = torch.zeros_like(x, requires_grad=True)
    y = layers.apply_rotary_emb(x * 1, cos, sin, inplace=True) + other
    gradient = torch.randn_like(y)
    y.backward(gradient.clone())
    assert torch.equal(other.grad, gradient)
    torch.testing.assert_close(x.grad, anyflash.rotary(gradient, cos, sin, conjugate=True))


def test_kv_in_place(device):
    x, cos, sin = sample(heads=4, device=device)
    kv = x.view(2, 5, 2, 2, 10) * 1
    out = layers.apply_rotary_emb_kv_(kv, cos, sin, interleaved=True, seqlen_offsets=2)
    expected = x.view(2, 5, 2, 2, 10)
    turned = FORMULA(expected[:, :, 0], cos[2:], sin[2:], interleaved=True)
    expected = torch.stack([turned, expected[:, :, 1]], 2)
    assert out.data_ptr() == kv.data_ptr()
    torch.testing.assert_close(out, expected)
    out.sum().backward()  # an expanded gradient
    found, x.grad = x.grad, None
    expected.sum().backward()
    torch.testing.assert_close(found, x.grad)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offsets", [2, torch.tensor([2, 0])])
def test_apply_rotary_emb_on_a_leaf(device, inplace, offsets):
    """Upstream's tests turn leaves that require a gradient in place."""
    x, cos, sin = sample(device=device)
    first = [2, 2] if isinstance(offsets, int) else offsets.tolist()
    offsets = offsets if isinstance(offsets, int) else offsets.to(device)
    expected = torch.stack(
        [FORMULA(x[i : i + 1] * 1, cos[o : o + 5], sin[o : o + 5])[0] for i, o in enumerate(first)]
    )
    (dx,) = torch.autograd.grad(weighted(expected), x)
    y = layers.apply_rotary_emb(x, cos, sin, inplace=inplace, seqlen_offsets=offsets)
    assert (y.data_ptr() == x.data_ptr()) == inplace
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(weighted(y), x)[0], dx)


def test_the_functions_by_their_classes(device):
    """Older clients call .apply themselves, with as many arguments as they need."""
    x, cos, sin = sample(device=device)
    y = layers.ApplyRotaryEmb.apply(x, cos, sin)
    weighted(y).backward()
    found, x.grad = x.grad, None
    weighted(FORMULA(x, cos[:5], sin[:5])).backward()
    torch.testing.assert_close(found, x.grad)


def test_tables_have_no_gradient_in_place(device):
    x, cos, sin = sample(device=device)
    y = layers.apply_rotary_emb(x * 1, cos.requires_grad_(), sin, inplace=True)
    with pytest.raises(RuntimeError, match="no gradient of the tables"):
        y.sum().backward()


def test_sedd_call(device):
    """Strided tables in qkv's dtype, a non-leaf, autocast switched off inside autocast."""
    weight = torch.randn(16, 3 * 2 * 8, device=device, requires_grad=True)
    theta = torch.arange(6, device=device)[:, None] * torch.linspace(1, 0.1, 4, device=device)
    emb = torch.cat([theta, theta], -1)[None, :, None, None, :].repeat(1, 1, 3, 1, 1)
    results = []
    for rotate in (layers.apply_rotary_emb_qkv_, _unpacked_formula):
        with torch.autocast(device, dtype=torch.bfloat16):
            qkv = (torch.ones(2, 6, 16, device=device) @ weight).view(2, 6, 3, 2, 8)
            with torch.autocast(device, enabled=False):
                cos, sin = (t.to(qkv.dtype)[0, :, 0, 0, :4] for t in (emb.cos(), emb.sin()))
                assert not cos.is_contiguous()
                tables = (cos, sin)
                if rotate is _unpacked_formula:
                    y = rotate(qkv.float(), None, *[[t.float() for t in tables]] * 2)
                else:
                    y = rotate(qkv, *tables)
                    assert y.dtype == torch.bfloat16
        results.append((y.float(), torch.autograd.grad(weighted(y.float()), weight)[0]))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, atol=0.1, rtol=0.02)


def test_modernbert_call(device):
    """A (total, 2 heads, head_dim) view inside somebody's autograd.Function."""
    cos, sin = angles(6, 4, device=device)
    ends = torch.tensor([0, 4, 10], dtype=torch.int32, device=device)
    qkv = torch.randn(10, 3, 2, 8, device=device)
    steps = torch.cat([torch.arange(4), torch.arange(6)])
    expected = reference(qkv[:, :2].cpu(), cos.cpu(), sin.cpu(), steps[:, None].expand(10, 2))
    value = qkv[:, 2].clone()
    qk = qkv[:, :2].view(10, -1, 8)
    apply_rotary(
        qk, cos, sin, seqlen_offsets=0, cu_seqlens=ends, max_seqlen=6, interleaved=False,
        inplace=True,
    )  # fmt: skip
    assert_close(qkv[:, :2], expected)
    assert torch.equal(qkv[:, 2], value)


# ---- The module.


def test_module_tables(device):
    rope = layers.RotaryEmbedding(8, base=100.0, device=device)
    assert not rope.state_dict() and set(dict(rope.named_buffers())) == {"inv_freq"}
    assert rope.scale is None and rope._seq_len_cached == 0 and rope._cos_cached is None
    theta = torch.arange(12).double()[:, None] * 100.0 ** -(torch.arange(4).double() / 4)
    qkv = torch.randn(2, 12, 3, 2, 8, device=device)
    assert rope(qkv.clone()).shape == qkv.shape
    torch.testing.assert_close(rope._cos_cached.cpu(), theta.cos().float())
    torch.testing.assert_close(rope._sin_cached.cpu(), theta.sin().float())
    kept = rope._cos_cached
    rope(qkv[:, :5].clone())
    assert rope._cos_cached is kept and rope._seq_len_cached == 12  # long enough
    rope(qkv.clone(), seqlen_offset=3)
    assert rope._seq_len_cached == 15
    rope.to(torch.bfloat16)(qkv.bfloat16())
    assert rope.inv_freq.dtype == torch.bfloat16 and rope._cos_cached.dtype == torch.bfloat16
    torch.testing.assert_close(rope._cos_cached.cpu(), theta.cos().bfloat16())


def test_module_position_dtype(device):
    """Until 2.7 pos_idx_in_fp32=False took the dtype of inv_freq, with the loss it brings."""
    assert layers.RotaryEmbedding(8).pos_idx_in_fp32
    rope = layers.RotaryEmbedding(8, pos_idx_in_fp32=False, device=device).to(torch.bfloat16)
    rope._update_cos_sin_cache(300, device=torch.device(device), dtype=torch.float32)
    assert rope._cos_cached[257, 0] == torch.tensor(256.0).bfloat16().cos().float()


def test_module_on_views_of_one_tensor(device):
    """Upstream's attention with grouped heads: q and kv are parts of what one layer computed."""
    leaf = torch.randn(2, 5, 8, 16, device=device, requires_grad=True)
    rope = layers.RotaryEmbedding(16, device=device)
    qkv = leaf * 1
    q, kv = rope(qkv[:, :, :4], qkv[:, :, 4:].unflatten(2, (2, 2)))
    (found,) = torch.autograd.grad(weighted(q) + weighted(kv), leaf)
    tables = (rope._cos_cached, rope._sin_cached)
    q = FORMULA(leaf[:, :, :4], *tables)
    k, v = leaf[:, :, 4:].unflatten(2, (2, 2)).unbind(2)
    kv = torch.stack([FORMULA(k, *tables), v], 2)
    (expected,) = torch.autograd.grad(weighted(q) + weighted(kv), leaf)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("separate", [False, True])
def test_module_xpos(device, separate):
    """q is scaled, k divided by the scale, so that their product depends on the distance alone."""
    rope = layers.RotaryEmbedding(8, scale_base=16, device=device)
    assert set(dict(rope.named_buffers())) == {"inv_freq", "scale"}
    one = torch.ones(1, 9, 1, 8, device=device)
    if separate:
        q, kv = rope(one.clone(), torch.stack([one, one], 2))
        k = kv[:, :, 0]
    else:
        q, k, _ = rope(torch.stack([one, one, one], 2)).unbind(2)
    scores = torch.einsum("bihd,bjhd->ij", q, k)
    for distance in range(-8, 9):
        along = scores.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), atol=1e-4, rtol=1e-4)
    scale = (torch.arange(0, 8, 2) + 0.4 * 8) / (1.4 * 8)
    expected = scale ** ((8 - 9 // 2) / 16) * rope.inv_freq.cpu().mul(8).cos()
    torch.testing.assert_close(rope._cos_cached[8].cpu(), expected)
    assert scores[0, 8] != scores[8, 0]


def test_module_with_offsets_of_each_sequence(device):
    rope = layers.RotaryEmbedding(8, device=device)
    q = torch.randn(2, 1, 3, 8, device=device)
    kv = torch.randn(2, 1, 2, 3, 8, device=device)
    offsets = torch.tensor([4, 7], dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match="max_seqlen"):
        rope(q.clone(), kv.clone(), seqlen_offset=offsets)
    turned, _ = rope(q.clone(), kv.clone(), seqlen_offset=offsets, max_seqlen=10)
    expected = torch.cat(
        [
            rope(q[i : i + 1].clone(), kv[:1].clone(), seqlen_offset=o)[0]
            for i, o in ((0, 4), (1, 7))
        ]
    )
    torch.testing.assert_close(turned, expected)


def test_module_after_inference_mode(device):
    rope = layers.RotaryEmbedding(8, device=device).eval()
    qkv = torch.randn(1, 4, 3, 2, 8, device=device)
    with torch.inference_mode():
        expected = rope(qkv.clone())
    out = rope(qkv.clone().requires_grad_() * 1)
    out.sum().backward()
    assert torch.equal(out, expected)


# ---- The extension of 1.x.


@pytest.mark.parametrize("aliased", [False, True])
@pytest.mark.parametrize("conj", [False, True])
def test_extension(device, conj, aliased):
    x = torch.randn(2, 5, 3, 16, device=device).bfloat16()
    cos, sin = angles(5, 8, torch.bfloat16, device)
    positions = torch.arange(5).expand(2, 5)
    expected = reference(x.cpu(), cos.cpu(), sin.cpu(), positions, conjugate=conj)
    out = x if aliased else torch.empty_like(x)
    parts = (*x.chunk(2, -1), cos[:, None], sin[:, None], *out.chunk(2, -1))
    assert rotary_emb.apply_rotary(*parts, conj) is None
    assert_close(out, expected)
    with pytest.raises(RuntimeError, match="out2: expected x1's"):
        rotary_emb.apply_rotary(*parts[:5], out.chunk(2, -1)[1].float(), conj)
    with pytest.raises(RuntimeError, match="cos: expected a shape that broadcasts to x1"):
        rotary_emb.apply_rotary(*parts[:2], *(t[:4, None] for t in (cos, sin)), *parts[4:], conj)
    assert_close(out, expected)


# ---- Compiled.


@pytest.fixture
def fresh_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _block(qkv, cos, sin):
    qkv = layers.apply_rotary_emb_qkv_(qkv * 2, cos, sin) * 0.5
    q, k = qkv[:, :, 0], qkv[:, :, 1]
    q = layers.apply_rotary_emb(q, cos, sin, interleaved=True)
    apply_rotary(k, cos, sin, conjugate=True, inplace=True)
    return q * k


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(device, fresh_compiler, backend):
    cos, sin = angles(8, 4, device=device)
    compiled = torch.compile(_block, fullgraph=True, backend=backend)
    results = []
    for function in (_block, compiled):
        torch.manual_seed(3)
        qkv = torch.randn(2, 6, 3, 2, 10, device=device, requires_grad=True)
        y = function(qkv, cos, sin)
        results.append((y, *torch.autograd.grad(weighted(y), qkv)))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected)


def test_compiled_module_writes_into_its_input(device, fresh_compiler):
    rope = layers.RotaryEmbedding(8, device=device)
    qkv = torch.randn(2, 6, 3, 2, 8, device=device)
    expected, written = rope(qkv.clone()), qkv.clone()
    compiled = torch.compile(
        lambda x, o: rope(x, seqlen_offset=o), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(written, 0), expected)
    torch.testing.assert_close(written, expected)
