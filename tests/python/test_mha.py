"""flash_attn.modules.mha: values and gradients against float64 written out here, caches, shapes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from flash_attn.modules import mha
from flash_attn.utils.generation import InferenceParams
from torch import nn

pytestmark = pytest.mark.providers

DIM, HEADS, TOKENS = 48, 4, 9


def _make(seed: int = 0, dim: int = DIM, heads: int = HEADS, **options) -> mha.MHA:
    torch.manual_seed(seed)
    return mha.MHA(dim, heads, **{"dtype": torch.float64, **options})


def _rotated(x: torch.Tensor, dim: int, interleaved: bool) -> torch.Tensor:
    """x (batch, seqlen, heads, head_dim), positions from 0, base 10000; complex numbers turn."""
    turned = x[..., :dim]
    pairs = turned.unflatten(-1, (-1, 2)) if interleaved else turned.unflatten(-1, (2, -1)).mT
    angles = torch.arange(x.shape[1])[:, None].double() * 10000.0 ** -(
        torch.arange(0, dim, 2).double() / dim
    )
    spin = torch.polar(torch.ones_like(angles), angles)[:, None, :]
    out = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * spin)
    out = out.flatten(-2) if interleaved else out.mT.flatten(-2)
    return torch.cat([out, x[..., dim:]], dim=-1)


def _attention(q, k, v, causal=False, window=(-1, -1), slopes=None, kept=None):
    """(batch, seqlen_q, heads, head_dim); kept: (batch, seqlen_k) bool."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    last = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    column = torch.arange(k.shape[1])
    if slopes is not None:
        scores = scores - torch.tensor(slopes)[:, None, None].double() * (last - column).abs()
    left, right = window[0], 0 if causal else window[1]
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    if right >= 0:
        hidden |= column > last + right
    if left >= 0:
        hidden |= column < last - left
    if kept is not None:
        hidden |= ~kept[:, None, None, :]
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


def _reference(module: mha.MHA, x: torch.Tensor, **options) -> torch.Tensor:
    """What the module computes without a cache."""
    heads_k = module.num_heads_kv
    split = [DIM, heads_k * module.head_dim, heads_k * module.head_dim]
    q, k, v = (
        part.unflatten(-1, (-1, module.head_dim)) for part in module.Wqkv(x).split(split, dim=-1)
    )
    if module.rotary_emb_dim:
        rotary = (module.rotary_emb_dim, module.rotary_emb.interleaved)
        q, k = _rotated(q, *rotary), _rotated(k, *rotary)
    return module.out_proj(_attention(q, k, v, **options).flatten(-2))


def _assert_same(module, x, got, expected, tolerance=1e-6):
    """Values and all gradients. The tables of the rotary embedding are made in fp32."""
    leaves = [x, *module.parameters()]
    dout = torch.randn_like(expected)
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    ours = torch.autograd.grad(got, leaves, dout)
    for name, a, b in zip(range(99), ours, torch.autograd.grad(expected, leaves, dout)):
        torch.testing.assert_close(a, b, atol=10 * tolerance, rtol=tolerance, msg=str(name))


OPTIONS = [
    {},
    {"causal": True},
    {"num_heads_kv": 2, "causal": True},
    {"num_heads_kv": 1},
    {"rotary_emb_dim": 12, "causal": True},
    {"rotary_emb_dim": 8, "rotary_emb_interleaved": True, "num_heads_kv": 2},
    {"qkv_proj_bias": False, "out_proj_bias": False, "checkpointing": True, "num_heads_kv": 2},
    {"checkpointing": True, "causal": True},
]


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients(options, flash):
    module = _make(use_flash_attn=flash, **options)
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    expected = _reference(module, x, causal=options.get("causal", False))
    _assert_same(module, x, module(x), expected)


def test_window_and_alibi():
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    module = _make(use_flash_attn=True, window_size=(3, 1))
    _assert_same(module, x, module(x), _reference(module, x, window=(3, 1)))
    module = _make(use_flash_attn=True, causal=True, use_alibi=True, num_heads_kv=2)
    expected = _reference(module, x, causal=True, slopes=mha.get_alibi_slopes(HEADS))
    _assert_same(module, x, module(x), expected)


def test_slopes_of_alibi():
    assert mha.get_alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert mha.get_alibi_slopes(6) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    assert mha.get_alibi_slopes(1) == [2.0**-8]


def test_padded_keys_are_hidden():
    module = _make(num_heads_kv=2)
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    kept = torch.arange(TOKENS) < torch.tensor([[TOKENS], [4]])
    got = module(x, key_padding_mask=kept)
    _assert_same(module, x, got, _reference(module, x, kept=kept))
    changed = torch.where(kept[..., None], x, 1e3 * torch.randn_like(x))
    torch.testing.assert_close(module(changed, key_padding_mask=kept)[kept], got[kept])


@pytest.mark.parametrize("module", [mha.SelfAttention, mha.CrossAttention])
def test_rows_without_a_key_are_finite(module):
    qkv = torch.randn(2, 5, 3, 2, 8)
    kept = torch.tensor([[False] * 5, [False, False, True, True, True]])
    given = (qkv,) if module is mha.SelfAttention else (qkv[:, :, 0], qkv[:, :, 1:])
    assert module(causal=True)(*given, key_padding_mask=kept).isfinite().all()


def test_packed_sequences():
    module = _make(use_flash_attn=True, causal=True)
    lengths = [4, 1, 6]
    x = torch.randn(sum(lengths), DIM, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
    got = module(x, cu_seqlens=cu_seqlens, max_seqlen=6)
    parts = [_reference(module, part[None], causal=True)[0] for part in x.split(lengths)]
    _assert_same(module, x, got, torch.cat(parts))


@pytest.mark.parametrize("flash", [False, True])
def test_cross_attention(flash):
    module = _make(cross_attn=True, num_heads_kv=2, use_flash_attn=flash)
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    other = torch.randn(2, 7, DIM, dtype=torch.float64)

    def expected(queries, source):
        q, kv = module.Wq(queries), module.Wkv(source)
        k, v = kv.unflatten(-1, (2, -1, module.head_dim)).unbind(2)
        out = _attention(q.unflatten(-1, (-1, module.head_dim)), k, v)
        return module.out_proj(out.flatten(-2))

    torch.testing.assert_close(module(x, x_kv=other), expected(x, other))
    torch.testing.assert_close(module(x, mixer_subset=slice(0, 1)), expected(x[:, :1], x))
    torch.testing.assert_close(
        module(x, x_kv=other, mixer_subset=[0, 3]), expected(x[:, [0, 3]], other)
    )


def test_packed_cross_attention():
    module = _make(cross_attn=True, use_flash_attn=True)
    x, other = torch.randn(5, DIM).double(), torch.randn(9, DIM).double()
    cu_q = torch.tensor([0, 2, 5], dtype=torch.int32)
    cu_k = torch.tensor([0, 6, 9], dtype=torch.int32)
    got = module(x, x_kv=other, cu_seqlens=cu_q, max_seqlen=3, cu_seqlens_k=cu_k, max_seqlen_k=6)
    parts = [module(x[None, :2], x_kv=other[None, :6]), module(x[None, 2:], x_kv=other[None, 6:])]
    torch.testing.assert_close(got, torch.cat(parts, dim=1)[0])
    with pytest.raises(RuntimeError, match="cu_seqlens_k"):
        module(x, x_kv=other, cu_seqlens=cu_q, max_seqlen=3)


@pytest.mark.parametrize("options", [{}, {"num_heads_kv": 2}, {"cross_attn": True}], ids=str)
def test_the_convolution_sees_no_later_token(options):
    module = _make(dwconv=True, causal=True, **options)
    x = torch.randn(1, TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    module(x)[0, 5].sum().backward()
    reached = x.grad[0].abs().sum(-1) > 0
    assert reached.tolist() == [i <= 5 for i in range(TOKENS)]
    plain = _make(causal=True, **options)
    plain.load_state_dict(module.state_dict(), strict=False)
    for convolution in (m for n, m in module.named_children() if n.startswith("dwconv")):
        nn.init.zeros_(convolution.weight)
        nn.init.zeros_(convolution.bias)
        convolution.weight.data[:, :, -1] = 1.0
    torch.testing.assert_close(module(x), plain(x))


def test_dropout_is_drawn_again_in_the_recomputation():
    modules = [_make(dropout=0.5, checkpointing=c) for c in (False, True)]
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    results = []
    for module in modules:
        torch.manual_seed(7)
        out = module(x)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in module.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
    assert not torch.equal(modules[0](x), modules[0](x))
    module = modules[0].eval()
    torch.testing.assert_close(module(x), _reference(module, x))


def test_return_residual_gives_the_input():
    x = torch.randn(1, 3, DIM, dtype=torch.float64)
    module = _make(return_residual=True)
    out, residual = module(x)
    assert residual is x
    torch.testing.assert_close(out, _reference(module, x))


KEYS = {
    "self": ({}, ["Wqkv.weight", "Wqkv.bias"]),
    "rotary": ({"rotary_emb_dim": 8, "use_flash_attn": True}, ["Wqkv.weight", "Wqkv.bias"]),
    "alibi": ({"use_alibi": True, "use_flash_attn": True}, ["Wqkv.weight", "Wqkv.bias"]),
    "cross": ({"cross_attn": True}, ["Wq.weight", "Wq.bias", "Wkv.weight", "Wkv.bias"]),
    "dwconv": (
        {"dwconv": True},
        ["Wqkv.weight", "Wqkv.bias", "dwconv_qkv.weight", "dwconv_qkv.bias"],
    ),
}


@pytest.mark.parametrize("name", KEYS)
def test_state_dict(name):
    options, keys = KEYS[name]
    module = _make(**options)
    assert list(module.state_dict()) == [*keys, "out_proj.weight", "out_proj.bias"]


def test_initialisation_draws_in_order():
    """As torch.nn.Linear draws: the projection in, then the one out."""
    module = _make(seed=3, num_heads_kv=2, rotary_emb_dim=12)
    torch.manual_seed(3)
    first = nn.Linear(DIM, DIM + 2 * DIM // 2, dtype=torch.float64)
    last = nn.Linear(DIM, DIM, dtype=torch.float64)
    torch.testing.assert_close(module.Wqkv.state_dict(), first.state_dict())
    torch.testing.assert_close(module.out_proj.state_dict(), last.state_dict())


# ---- the cache ----

CACHED = [
    {},
    {"num_heads_kv": 2},
    {"use_flash_attn": True},
    {"use_flash_attn": True, "num_heads_kv": 1, "rotary_emb_dim": 16},
    {"use_flash_attn": True, "rotary_emb_dim": 16, "rotary_emb_interleaved": True},
    {"use_flash_attn": True, "rotary_emb_dim": 8},
    {"use_flash_attn": True, "rotary_emb_dim": 16, "rotary_emb_scale_base": 512.0},
    {"use_flash_attn": True, "window_size": (3, 0), "rotary_emb_dim": 16},
    {"use_flash_attn": True, "use_alibi": True},
    {"rotary_emb_dim": 16},
]


def _cached(module, x, params, steps):
    """The outputs of x fed in steps of so many tokens."""
    outs = []
    for part in x.split(steps, dim=1):
        outs.append(module(part, inference_params=params))
        params.seqlen_offset += part.shape[1]
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("options", CACHED, ids=str)
@pytest.mark.parametrize("steps", [[6, 1, 1, 1], [3, 4, 2]], ids=str)
def test_a_cache_changes_nothing(options, steps):
    module = _make(dim=64, layer_idx=1, causal=True, dtype=torch.float32, **options).eval()
    x = torch.randn(2, TOKENS, 64)
    params = InferenceParams(max_seqlen=12, max_batch_size=3)
    with torch.no_grad():
        got = _cached(module, x, params, steps)
        torch.testing.assert_close(got, module(x), atol=1e-5, rtol=1e-5)
    assert params.key_value_memory_dict[1].shape == (3, 12, 2, module.num_heads_kv, 16)


@pytest.mark.parametrize("flash", [False, True])
def test_a_batch_in_the_middle_of_the_cache(flash):
    module = _make(dim=64, layer_idx=0, causal=True, use_flash_attn=flash, dtype=torch.float32)
    x = torch.randn(2, TOKENS, 64)
    cache = module.allocate_inference_cache(5, 10).fill_(math.nan)
    params = InferenceParams(10, 5, batch_size_offset=2, key_value_memory_dict={0: cache})
    with torch.no_grad():
        torch.testing.assert_close(_cached(module, x, params, [7, 1, 1]), module(x))
    assert cache[[0, 1, 4]].isnan().all() and cache[2:4, 9:].isnan().all()
    assert cache[2:4, :9].isfinite().all()


@pytest.mark.parametrize(
    "options",
    [{}, {"use_flash_attn": True, "rotary_emb_dim": 16}, {"rotary_emb_dim": 16}],
    ids=str,
)
def test_sequences_of_different_lengths(options):
    """lengths_per_sample is in place of seqlen_offset; what lies behind a length is not read."""
    module = _make(dim=64, layer_idx=0, causal=True, dtype=torch.float32, **options).eval()
    lengths, x = [3, 7, 5], torch.randn(3, 8, 64)
    params = InferenceParams(max_seqlen=10, max_batch_size=3)
    with torch.no_grad():
        module(x, inference_params=params)
        cache = params.key_value_memory_dict[0]
        for row, length in enumerate(lengths):
            cache[row, length:] = math.nan
        params.seqlen_offset = max(lengths)
        params.lengths_per_sample = torch.tensor(lengths, dtype=torch.int32)
        tokens = torch.stack([x[row, length] for row, length in enumerate(lengths)])[:, None]
        got = module(tokens, inference_params=params)
        whole = module(x)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(got[row, 0], whole[row, length], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("flash", [False, True])
def test_decoding_outside_no_grad(flash):
    options = {"use_flash_attn": True, "rotary_emb_dim": 16} if flash else {}
    module = _make(dim=64, layer_idx=0, causal=True, dtype=torch.float32, **options)
    x = torch.randn(2, TOKENS, 64)
    got = _cached(module, x, InferenceParams(12, 2), [6, 1, 1, 1])
    torch.testing.assert_close(got, module(x), atol=1e-5, rtol=1e-5)


def test_a_prompt_has_its_gradient():
    module = _make(dim=64, layer_idx=0, causal=True, use_flash_attn=True)
    twin = copy.deepcopy(module)
    x = torch.randn(2, TOKENS, 64, dtype=torch.float64)
    module(x, inference_params=InferenceParams(12, 2)).square().sum().backward()
    twin(x).square().sum().backward()
    for a, b in zip(module.parameters(), twin.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_cache_of_a_module():
    module = _make(dim=64, num_heads_kv=2, dtype=torch.bfloat16)
    cache = module.allocate_inference_cache(3, 10)
    assert cache.shape == (3, 10, 2, 2, 16) and cache.dtype == torch.bfloat16
    assert not cache.requires_grad
    assert module.allocate_inference_cache(3, 10, torch.float32).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_flash_modules_in_every_dtype(dtype):
    qkv = torch.randn(2, 7, 3, 4, 16).to(dtype)
    q, k, v = (x.double() for x in qkv.unbind(2))
    slopes = torch.tensor(mha.get_alibi_slopes(4))
    module = mha.FlashSelfAttention(causal=True, alibi_slopes=slopes).to(dtype)
    assert list(module.state_dict()) == []
    expected = _attention(q, k, v, causal=True, slopes=mha.get_alibi_slopes(4)).to(dtype)
    torch.testing.assert_close(module(qkv), expected, atol=2e-2, rtol=2e-2)
    cross = mha.FlashCrossAttention(window_size=(2, 0)).to(dtype)
    expected = _attention(q[:, :3], k, v, window=(2, 0)).to(dtype)
    torch.testing.assert_close(cross(qkv[:, :3, 0], qkv[:, :, 1:]), expected, atol=2e-2, rtol=2e-2)


def test_another_rotary_embedding_in_its_place():
    """As stripedhyena does for its longer context: a subclass that scales positions."""

    class Slower(mha.RotaryEmbedding):
        def _compute_inv_freq(self, device=None):
            return super()._compute_inv_freq(device) / 4

    module = _make(dim=64, rotary_emb_dim=16, use_flash_attn=True, causal=True, layer_idx=0)
    old = module.rotary_emb
    module.rotary_emb = Slower(16, pos_idx_in_fp32=old.pos_idx_in_fp32)
    x = torch.randn(1, TOKENS, 64, dtype=torch.float64)
    with torch.no_grad():
        whole = module(x)
        got = _cached(module, x, InferenceParams(12, 1), [8, 1])
        torch.testing.assert_close(got, whole, atol=1e-6, rtol=1e-6)
        module.rotary_emb = old
        assert not torch.allclose(module(x), whole)


IMPOSSIBLE = [
    ({"num_heads_kv": 3}, "num_heads must be divisible by num_heads_kv, got 4 and 3"),
    ({"heads": 5}, "embed_dim must be divisible by num_heads, got 48 and 5"),
    ({"num_heads_kv": 0}, "num_heads_kv: expected at least 1"),
    ({"use_alibi": True}, "ALiBi code path requires flash_attn"),
    ({"window_size": (2, 0)}, "Local .sliding window. attention code path requires flash_attn"),
    ({"cross_attn": True, "rotary_emb_dim": 8}, "does not support cross-attention"),
]


@pytest.mark.parametrize("options, message", IMPOSSIBLE, ids=str)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        _make(**options)


X = torch.randn(2, 5, DIM, dtype=torch.float64)
MASK = torch.ones(2, 5, dtype=torch.bool)
CU = torch.tensor([0, 2], dtype=torch.int32)
REFUSED = [
    ({}, {"cu_seqlens": CU, "max_seqlen": 2}, "cu_seqlens: expected use_flash_attn=True"),
    ({"use_flash_attn": True}, {"key_padding_mask": MASK}, "key_padding_mask: expected"),
    ({}, {"key_padding_mask": MASK.long()}, "key_padding_mask: expected bool"),
    ({}, {"key_padding_mask": MASK[:, :4]}, "key_padding_mask: expected bool of .2, 5."),
    (
        {"use_flash_attn": True, "rotary_emb_dim": 12},
        {"cu_seqlens": CU, "max_seqlen": 2},
        "rotary_emb_dim=0",
    ),
    ({}, {"x_kv": X}, "x_kv, mixer_subset: expected cross_attn=True"),
    ({"num_heads_kv": 2}, {"mixer_subset": slice(0, 1)}, "expected cross_attn=True"),
    ({}, {"inference_params": InferenceParams(8, 2)}, "layer_idx"),
    (
        {"layer_idx": 0},
        {"inference_params": InferenceParams(4, 2)},
        "at least 2 sequences of 5 tokens, got 2 of 4",
    ),
    (
        {"layer_idx": 0, "dwconv": True},
        {"inference_params": InferenceParams(8, 2)},
        "inference_params: expected neither",
    ),
]


@pytest.mark.parametrize("options, call, message", REFUSED, ids=str)
def test_calls_that_are_refused(options, call, message):
    with pytest.raises(ValueError, match=message):
        _make(**options)(X, **call)
