"""flash_attn's public functions: upstream's signatures and returns, and what clients pass."""

from __future__ import annotations

import functools
import inspect
import math

import flash_attn
import pytest
import torch
from flash_attn import flash_attn_interface as interface
from torch.utils.checkpoint import checkpoint

from anyflash.testing import keep_mask, reference, reference_kvcache

# Upstream 2.8.3, written down by hand: name and default, in order; REQUIRED for none.
REQUIRED = inspect.Parameter.empty
OPTIONS = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
LENGTHS = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), REQUIRED)
PUBLIC = {
    "flash_attn_func": {**dict.fromkeys("qkv", REQUIRED), **OPTIONS},
    "flash_attn_kvpacked_func": {"q": REQUIRED, "kv": REQUIRED, **OPTIONS},
    "flash_attn_qkvpacked_func": {"qkv": REQUIRED, **OPTIONS},
    "flash_attn_varlen_func": {
        **dict.fromkeys("qkv", REQUIRED),
        **LENGTHS,
        **OPTIONS,
        "block_table": None,
    },
    "flash_attn_varlen_kvpacked_func": {"q": REQUIRED, "kv": REQUIRED, **LENGTHS, **OPTIONS},
    "flash_attn_varlen_qkvpacked_func": {
        **dict.fromkeys(("qkv", "cu_seqlens", "max_seqlen"), REQUIRED),
        **OPTIONS,
    },
    "flash_attn_with_kvcache": {
        **dict.fromkeys(("q", "k_cache", "v_cache"), REQUIRED),
        **dict.fromkeys(("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens")),
        **dict.fromkeys(("cache_batch_idx", "cache_leftpad", "block_table", "softmax_scale")),
        "causal": False,
        "window_size": (-1, -1),
        "softcap": 0.0,
        "rotary_interleaved": True,
        "alibi_slopes": None,
        "num_splits": 0,
        "return_softmax_lse": False,
    },
}
INTERFACE = [
    *(f"_flash_attn_{n}" for n in ("forward", "backward", "varlen_forward", "varlen_backward")),
    *(f"_wrapped_flash_attn_{n}" for n in ("forward", "backward")),
    *(f"_wrapped_flash_attn_varlen_{n}" for n in ("forward", "backward")),
    *(f"FlashAttn{n}Func" for n in ("", "KVPacked", "QKVPacked")),
    *(f"FlashAttnVarlen{n}Func" for n in ("", "KVPacked", "QKVPacked")),
    *("flash_attn_gpu", "maybe_contiguous", "round_multiple", "_get_block_size_n"),
    "USE_TRITON_ROCM",
]


def _qkv(device, *, batch=2, sq=7, sk=9, heads=4, heads_k=2, dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, sq, heads, dim), (batch, sk, heads_k, dim), (batch, sk, heads_k, dim))
    return tuple(torch.randn(s, generator=generator).to(device, dtype) for s in shapes)


def _packed(device, lengths_q=(3, 0, 6), lengths_k=(5, 2, 4), heads_k=2, seed=0):
    q, k, v = _qkv(
        device, batch=1, sq=sum(lengths_q), sk=sum(lengths_k), heads_k=heads_k, seed=seed
    )
    cu = [
        torch.tensor([0, *torch.tensor(x).cumsum(0).tolist()], dtype=torch.int32, device=device)
        for x in (lengths_q, lengths_k)
    ]
    return q[0], k[0], v[0], *cu, max(lengths_q), max(lengths_k)


def _close(actual, expected, tolerance=2e-5):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def test_top_level_exports():
    assert flash_attn.__version__ == "2.8.3"
    assert {
        n for n in vars(flash_attn) if n.endswith("_func") or n.startswith("flash_attn_with")
    } == set(PUBLIC)
    assert set(flash_attn.__all__) == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_signatures_are_upstreams(name):
    function = getattr(interface, name)
    assert getattr(flash_attn, name) is function
    parameters = inspect.signature(function).parameters.values()
    assert {p.name: p.default for p in parameters} == PUBLIC[name]
    assert [p.name for p in parameters] == list(PUBLIC[name])
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    assert list(inspect.getfullargspec(function).args) == list(PUBLIC[name])


@pytest.mark.parametrize("name", INTERFACE)
def test_interface_has_every_name_that_clients_import(name):
    assert hasattr(interface, name)


def test_small_helpers():
    assert interface.round_multiple(1, 8) == 8 and interface.round_multiple(16, 8) == 16
    x = torch.randn(3, 4)
    assert interface.maybe_contiguous(x) is x and interface.maybe_contiguous(None) is None
    assert interface.maybe_contiguous(x.t()).is_contiguous()
    assert interface.USE_TRITON_ROCM is False


@pytest.mark.parametrize("causal", [False, True])
def test_all_layouts_agree_with_the_reference(device, causal):
    q, k, v = _qkv(device, sq=6, sk=9)
    expected = reference(q.cpu(), k.cpu(), v.cpu(), causal=causal)[0].to(device)
    _close(flash_attn.flash_attn_func(q, k, v, 0.0, None, causal), expected)
    kv = torch.stack([k, v], 2)
    _close(flash_attn.flash_attn_kvpacked_func(q, kv, 0.0, None, causal), expected)
    q, k, v = _qkv(device, sq=6, sk=6, heads_k=4)
    expected = reference(q.cpu(), k.cpu(), v.cpu(), causal=causal)[0].to(device)
    qkv = torch.stack([q, k, v], 2)
    _close(flash_attn.flash_attn_qkvpacked_func(qkv, 0.0, None, causal), expected)


def test_all_packed_layouts_agree_with_the_reference(device):
    q, k, v, cu_q, cu_k, max_q, max_k = _packed(device)
    where = {"cu_seqlens_q": cu_q.cpu(), "cu_seqlens_k": cu_k.cpu()}
    out, lse = (x.to(device) for x in reference(q.cpu(), k.cpu(), v.cpu(), causal=True, **where))
    lengths = (cu_q, cu_k, max_q, max_k)
    mine = flash_attn.flash_attn_varlen_func(q, k, v, *lengths, causal=True, return_attn_probs=True)
    _close(mine[0], out)
    _close(mine[1], lse)
    kv = torch.stack([k, v], 1)
    _close(flash_attn.flash_attn_varlen_kvpacked_func(q, kv, *lengths, 0.0, None, True), out)
    q, k, v, cu, _, longest, _ = _packed(device, (4, 5), (4, 5), heads_k=4)
    where = {"cu_seqlens_q": cu.cpu(), "cu_seqlens_k": cu.cpu()}
    out, _ = reference(q.cpu(), k.cpu(), v.cpu(), causal=True, **where)
    qkv = torch.stack([q, k, v], 1)
    mine = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu, longest, causal=True)
    _close(mine, out.to(device))


@pytest.mark.parametrize("layout", ["separate", "kvpacked", "qkvpacked", "varlen_qkvpacked"])
def test_gradients(device, layout):
    q, k, v = (x.double() for x in _qkv(device, sq=5, sk=5, heads_k=4))
    leaves = [x.cpu().clone().requires_grad_() for x in (q, k, v)]
    out, _ = reference(*leaves, causal=True)
    dout = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    wanted = torch.autograd.grad(out, leaves, dout)
    dim = 2
    if layout == "separate":
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        mine = flash_attn.flash_attn_func(*inputs, causal=True)
    elif layout == "kvpacked":
        inputs = [q.clone().requires_grad_(), torch.stack([k, v], 2).requires_grad_()]
        mine = flash_attn.flash_attn_kvpacked_func(*inputs, causal=True)
    elif layout == "qkvpacked":
        inputs = [torch.stack([q, k, v], 2).requires_grad_()]
        mine = flash_attn.flash_attn_qkvpacked_func(*inputs, causal=True)
    else:
        dim = 1
        inputs = [torch.stack([q, k, v], 2).flatten(0, 1).requires_grad_()]
        cu = torch.arange(0, 11, 5, dtype=torch.int32, device=device)
        mine = flash_attn.flash_attn_varlen_qkvpacked_func(inputs[0], cu, 5, causal=True)
    got = torch.autograd.grad(mine, inputs, dout.to(device).view_as(mine))
    flat = [part for g in got for part in (g.unbind(dim) if g.dim() > mine.dim() else [g])]
    for gradient, expected in zip(flat, wanted):
        _close(gradient, expected.to(device).view_as(gradient), 1e-10)


def test_return_conventions(device):
    q, k, v = _qkv(device)
    assert torch.is_tensor(flash_attn.flash_attn_func(q, k, v))
    out, lse, s_dmask = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    assert out.shape == q.shape
    assert lse.shape == (2, 4, 7) and lse.dtype == torch.float32
    assert s_dmask.shape == (0,) and s_dmask.dtype == q.dtype
    *arguments, max_q, max_k = _packed(device)
    out, lse, s_dmask = flash_attn.flash_attn_varlen_func(
        *arguments, max_q, max_k, return_attn_probs=True
    )
    assert out.shape == (9, 4, 16) and lse.shape == (4, 9) and s_dmask.shape == (0,)
    assert torch.is_tensor(flash_attn.flash_attn_with_kvcache(q, k, v))
    out, lse = flash_attn.flash_attn_with_kvcache(q, k, v, return_softmax_lse=True)
    assert out.shape == q.shape and lse.shape == (2, 4, 7)


def test_three_dimensions_are_one_sequence(device):
    q, k, v = (x[0] for x in _qkv(device))
    out, lse, s_dmask = flash_attn.flash_attn_func(
        q, k, v, 0.3, causal=True, return_attn_probs=True
    )
    assert out.shape == q.shape and lse.shape == (4, 7) and s_dmask.shape == (4, 128, 128)
    _, expected = reference(q[None].cpu(), k[None].cpu(), v[None].cpu(), causal=True)
    _close(lse, expected[0].to(device))


@pytest.mark.parametrize("dim", [1, 24, 59, 111, 257])
def test_any_head_dim(device, dim):
    q, k, v = _qkv(device, dim=dim)
    out = flash_attn.flash_attn_func(q, k, v)
    _close(out, reference(q.cpu(), k.cpu(), v.cpu())[0].to(device), 5e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(device, dtype):
    q, k, v = _qkv(device, dtype=dtype)
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    _close(out, reference(q.cpu(), k.cpu(), v.cpu(), causal=True)[0].to(device), 2e-2)


def test_out_keeps_the_layout_of_q(device):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in _qkv(device))
    assert not q.is_contiguous()
    out = flash_attn.flash_attn_func(q, k, v)
    assert out.stride() == q.stride()
    rows = torch.randn(2, 7, 3, 4, 16, device=device)
    assert flash_attn.flash_attn_qkvpacked_func(rows).shape == (2, 7, 4, 16)


def test_rows_that_do_not_lie_side_by_side_are_copied(device):
    q, k, v = _qkv(device)
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    assert turned[0].stride(-1) != 1
    _close(flash_attn.flash_attn_func(*turned), flash_attn.flash_attn_func(q, k, v), 1e-6)


def test_numbers_as_tensors(device):
    """Upstream's tests pass windows as tensors, transformers passes max_seqlen as one."""
    q, k, v = _qkv(device)
    window = torch.tensor([2, 1])
    expected = flash_attn.flash_attn_func(q, k, v, window_size=(2, 1))
    _close(flash_attn.flash_attn_func(q, k, v, window_size=window), expected, 0)
    _close(flash_attn.flash_attn_func(q, k, v, window_size=[2, 1]), expected, 0)
    _close(flash_attn.flash_attn_with_kvcache(q, k, v, window_size=window), expected, 1e-5)
    scale = torch.tensor(0.25)
    _close(flash_attn.flash_attn_func(q, k, v, 0, scale), flash_attn.flash_attn_func(q, k, v), 1e-6)
    q, k, v, cu_q, cu_k, max_q, max_k = _packed(device)
    longest = [(cu[1:] - cu[:-1]).max() for cu in (cu_q, cu_k)]
    for probs in (False, True):
        options = {"dropout_p": 0.2 * probs, "return_attn_probs": probs}
        torch.manual_seed(0)
        mine = flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, *longest, **options)
        torch.manual_seed(0)
        expected = flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, **options)
        for a, b in zip(mine, expected) if probs else [(mine, expected)]:
            _close(a, b, 0)


def test_window_alone_can_be_causal(device):
    q, k, v = _qkv(device)
    for left in (-1, 3):
        causal = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(left, left))
        _close(flash_attn.flash_attn_func(q, k, v, window_size=(left, 0)), causal, 0)


def test_rows_without_keys(device):
    q, k, v = _qkv(device, sq=9, sk=4)
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (out[:, :5] == 0).all() and (lse[:, :, :5] == math.inf).all()
    assert lse[:, :, 5:].isfinite().all()


def test_alibi_and_softcap(device):
    q, k, v = _qkv(device)
    slopes = torch.rand(2, 4, device=device)
    mine = flash_attn.flash_attn_func(
        q, k, v, softcap=3.0, alibi_slopes=slopes, causal=True, return_attn_probs=True
    )
    options = {"softcap": 3.0, "alibi_slopes": slopes.cpu(), "causal": True}
    expected = reference(q.cpu(), k.cpu(), v.cpu(), **options)
    for a, b in zip(mine, expected):
        _close(a, b.to(device))


def _upstream_normalisation(s_dmask, q, k, visible):
    """As in upstream's tests: blocks of keys, each relative to the maximum from the last on."""
    scores = torch.einsum("bihd,bjhd->bhij", q.float(), k.float()) / q.shape[-1] ** 0.5
    scores.masked_fill_(~visible, -math.inf)
    block = interface._get_block_size_n(q.device, q.shape[-1], True, False)
    pieces = scores.split(block, dim=-1)
    lse = torch.logsumexp(scores, -1)
    lse[lse == -math.inf] = math.inf
    maxima = torch.stack([piece.amax(-1) for piece in pieces], -1)
    running = torch.cummax(maxima.flip(-1), -1).values.flip(-1).unbind(-1)
    parts = s_dmask.abs()[..., : q.shape[1], : k.shape[1]].split(block, dim=-1)
    return torch.cat([p * torch.exp(m - lse)[..., None] for p, m in zip(parts, running)], -1)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 2)])
def test_s_dmask_is_the_dropout_pattern(device, window):
    q, k, v = _qkv(device, sq=20, sk=33, heads_k=4)
    diagonal = torch.arange(20)[:, None] + 13
    column = torch.arange(33)
    visible = torch.ones(20, 33, dtype=torch.bool)
    if window[0] >= 0:
        visible &= column >= diagonal - window[0]
    if window[1] >= 0:
        visible &= column <= diagonal + window[1]
    visible = visible.to(device)
    out, _, s_dmask = flash_attn.flash_attn_func(
        q, k, v, 0.25, window_size=window, return_attn_probs=True
    )
    assert s_dmask.shape == (2, 4, 128, 128) and s_dmask.dtype == q.dtype
    probabilities = _upstream_normalisation(s_dmask, q, k, visible)
    _close(probabilities.masked_fill(~visible, 0.0).sum(-1), torch.ones(2, 4, 20, device=device))
    kept = s_dmask[..., :20, :33] >= 0
    assert 0.15 < (~kept & visible).sum() / (visible.sum() * 8) < 0.35
    expected = torch.einsum("bhij,bjhd->bihd", probabilities * kept * visible / 0.75, v)
    _close(out, expected)
    assert (s_dmask[..., 20:, :] == 0).all() and (s_dmask[..., 33:] == 0).all()


@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func"])
@pytest.mark.parametrize("way", ["eager", "compile", "checkpoint", "checkpoint reentrant"])
def test_s_dmask_shows_the_dropout_that_ran(device, name, way):
    """Where the values are unit vectors the output is what dropout left of the probabilities. A
    call draws once, whatever it returns, and its recomputation shows the same."""
    q, k, _ = (x.requires_grad_() for x in _qkv(device, batch=1, sq=9, sk=12, heads_k=4))
    v = torch.eye(12, 16, device=device).view(1, 12, 1, 16).repeat(1, 1, 4, 1)
    lengths = ()
    if "varlen" in name:
        q, k, v = q[0], k[0], v[0]
        cu = [torch.tensor([0, n], dtype=torch.int32, device=device) for n in (9, 12)]
        lengths = (*cu, 9, 12)
    call = functools.partial(getattr(flash_attn, name), dropout_p=0.4)
    patterns = []

    def body(q, k, v):
        out, _, s_dmask = call(q, k, v, *lengths, return_attn_probs=True)
        patterns.append(s_dmask)
        return out * s_dmask.abs().sum()  # which its backward needs

    function = body
    if way == "compile":
        torch._dynamo.reset()
        function = torch.compile(body, backend="aot_eager")
    elif way != "eager":
        function = functools.partial(checkpoint, body, use_reentrant="reentrant" in way)
    torch.manual_seed(5)
    out = function(q, k, v)
    next_number = torch.rand(1, device=device)
    out.sum().backward()
    kept = patterns[0].view(4, 128, 128)[:, :9, :12] > 0
    assert torch.equal(out.view(9, 4, 16)[..., :12].transpose(0, 1) > 0, kept)
    assert 0.4 < kept.float().mean() < 0.8
    assert len(patterns) == 1 + ("checkpoint" in way)
    assert torch.equal(patterns[0], patterns[-1])
    torch.manual_seed(5)
    plain = call(q, k, v, *lengths)
    assert torch.equal(plain > 0, out > 0)
    assert torch.equal(torch.rand(1, device=device), next_number)


def test_s_dmask_of_packed_sequences(device):
    from anyflash.attention_probs import signed_probabilities

    q, k, v, cu_q, cu_k, max_q, max_k = _packed(device, (20, 3), (17, 9), heads_k=4)
    state = torch.tensor([5, 6], device=device)
    s_dmask = signed_probabilities(
        q, k, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k,
        rng_state=state, dropout_p=0.5, softmax_scale=0.25, causal=False, window_size=(-1, -1),
        softcap=0.0,
    )  # fmt: skip
    assert s_dmask.shape == (2, 4, 128, 128)
    for b, (rows, columns) in enumerate(((20, 17), (3, 9))):
        kept = keep_mask(state.cpu(), 0.5, b, 4, rows, columns).to(device)
        assert torch.equal(s_dmask[b, :, :rows, :columns] > 0, kept)
        assert (s_dmask[b, :, rows:] == 0).all() and (s_dmask[b, :, :, columns:] == 0).all()
        assert (s_dmask[b, :, :rows].abs().amax(-1) == 1).all()


def test_a_negligible_dropout_keeps_everything(device):
    """diffusers passes 1e-30 to get at the log-sum-exp."""
    q, k, v = _qkv(device)
    out, lse, s_dmask = flash_attn.flash_attn_func(q, k, v, 1e-30, return_attn_probs=True)
    expected = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    assert s_dmask.shape == (2, 4, 128, 128) and (s_dmask >= 0).all()


def test_dropout_follows_the_seed(device):
    q, k, v = _qkv(device)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(flash_attn.flash_attn_func(q, k, v, 0.5))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


class TestKVCache:
    def test_append_rotate_and_attend(self, device):
        q, k_cache, v_cache = _qkv(device, sq=3, sk=16)
        k, v = (torch.randn(2, 3, 2, 16, device=device) for _ in range(2))
        cos, sin = (torch.randn(16, 4, device=device) for _ in range(2))
        lengths = torch.tensor([2, 9], dtype=torch.int32, device=device)
        everything = (q, k_cache, v_cache, k, v)
        expected = reference_kvcache(
            *(x.cpu() for x in everything), rotary_cos=cos.cpu(), rotary_sin=sin.cpu(),
            cache_seqlens=lengths.cpu(), causal=True,
        )  # fmt: skip
        out, lse = flash_attn.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cos, sin, lengths, causal=True, return_softmax_lse=True
        )
        for mine, theirs in zip((out, lse, k_cache, v_cache), expected):
            _close(mine, theirs.to(device))

    def test_length_as_a_number(self, device):
        q, k_cache, v_cache = _qkv(device)
        lengths = torch.full((2,), 5, dtype=torch.int32, device=device)
        expected = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths)
        mine = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=5)
        _close(mine, expected, 0)

    def test_a_permuted_cache_is_written_in_place(self, device):
        """Megatron keeps (seqlen, batch, heads, head_dim)."""
        storage = torch.zeros(8, 2, 2, 16, device=device)
        cache = storage.permute(1, 0, 2, 3)
        q, k, v = _qkv(device, sq=1, sk=1)
        flash_attn.flash_attn_with_kvcache(q, cache, cache.clone(), k, v, cache_seqlens=4)
        assert torch.equal(storage[4], k[:, 0]) and (storage[5:] == 0).all()

    @pytest.mark.parametrize("page", [1, 7, 256])
    def test_pages_of_any_size_and_padded_tables(self, device, page):
        """transformers pads block tables with -1."""
        blocks = 9 // page + 1
        q, k_cache, v_cache = _qkv(device, batch=2 * blocks + 1, sk=page)
        q = q[:2]
        table = torch.arange(2 * blocks, dtype=torch.int32, device=device).view(2, blocks).flip(1)
        table = torch.nn.functional.pad(table, (0, 2), value=-1)
        lengths = torch.tensor([9, 4], dtype=torch.int32, device=device)
        mine = flash_attn.flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=lengths, block_table=table, causal=True
        )
        expected = reference_kvcache(
            q.cpu(), k_cache.cpu(), v_cache.cpu(), cache_seqlens=lengths.cpu(),
            block_table=table.cpu(), causal=True,
        )  # fmt: skip
        _close(mine, expected[0].to(device))

    def test_rows_of_the_cache_and_leftpad(self, device):
        q, k_cache, v_cache = _qkv(device, batch=4)
        rows = torch.tensor([3, 0], dtype=torch.int32, device=device)
        leftpad = torch.tensor([2, 1], dtype=torch.int32, device=device)
        lengths = torch.tensor([8, 5], dtype=torch.int32, device=device)
        arguments = {"cache_batch_idx": rows, "cache_leftpad": leftpad, "cache_seqlens": lengths}
        mine = flash_attn.flash_attn_with_kvcache(q[:2], k_cache, v_cache, causal=True, **arguments)
        on_cpu = {n: x.cpu() for n, x in arguments.items()}
        expected = reference_kvcache(
            q[:2].cpu(), k_cache.cpu(), v_cache.cpu(), causal=True, **on_cpu
        )
        _close(mine, expected[0].to(device))

    def test_refusals(self, device):
        q, k, v = _qkv(device)
        with pytest.raises(AssertionError, match="k_cache must have contiguous last dimension"):
            flash_attn.flash_attn_with_kvcache(q, k.transpose(2, 3), v)
        with pytest.raises(TypeError, match="v_cache: expected a torch.Tensor, got list"):
            flash_attn.flash_attn_with_kvcache(q, k, [v])
        with pytest.raises(RuntimeError, match="num_splits > 128 not supported, got 129"):
            flash_attn.flash_attn_with_kvcache(q, k, v, num_splits=129)
        with pytest.raises(RuntimeError, match="cache has no gradient.*no_grad"):
            flash_attn.flash_attn_with_kvcache(q.requires_grad_(), k, v).sum().backward()
        with torch.no_grad():
            assert not flash_attn.flash_attn_with_kvcache(q, k, v).requires_grad


@pytest.mark.parametrize("name", [n for n in PUBLIC if "packed" in n])
def test_packed_shapes_are_checked(device, name):
    function = getattr(flash_attn, name)
    tensor = torch.randn(4, 5, 4, 2, 8, device=device)
    leading = (tensor,) if "qkv" in name else (tensor[:, :, 0], tensor)
    lengths = (torch.zeros(1, dtype=torch.int32),) * 2 * ("varlen" in name) + (1, 1)
    lengths = lengths[: len(PUBLIC[name]) - len(OPTIONS) - len(leading)] if "varlen" in name else ()
    with pytest.raises(
        RuntimeError, match=r"kv: expected \(.*heads, head_dim\), got \(4, 5, 4, 2, 8\)"
    ):
        function(*leading, *lengths)
    with pytest.raises(TypeError, match="kv: expected a torch.Tensor, got NoneType"):
        function(*leading[:-1], None, *lengths)


class Scripted(torch.nn.Module):
    def forward(self, q, k, v):
        window = interface.flash_attn_func(q, k, v, causal=True, window_size=(3, -1))
        cached = interface.flash_attn_with_kvcache(q, k, v, cache_seqlens=4)
        return window + cached


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript(device):
    q, k, v = _qkv(device)
    _close(torch.jit.script(Scripted())(q, k, v), Scripted()(q, k, v), 1e-6)
    for name in PUBLIC:
        scripted = torch.jit.script(getattr(interface, name))
        assert str(scripted.schema).endswith("-> Tensor")
    with pytest.raises(torch.jit.Error, match="expected False in TorchScript"):
        torch.jit.script(interface.flash_attn_func)(q, k, v, return_attn_probs=True)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device, dynamic):
    def block(q, k, v):
        out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        return out * 2, lse

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seqlen in (5, 6):
        q, k, v = (x.requires_grad_() for x in _qkv(device, sq=seqlen, sk=seqlen))
        mine, expected = compiled(q, k, v), block(q, k, v)
        _close(mine[0], expected[0], 1e-6)
        for a, b in zip(*(torch.autograd.grad(o[0].sum(), (q, k, v)) for o in (mine, expected))):
            _close(a, b, 1e-6)


def test_kwargs_that_transformers_probes():
    parameters = inspect.signature(flash_attn.flash_attn_varlen_func).parameters
    for name in ("dropout_p", "window_size", "deterministic", "softcap", "block_table"):
        assert name in parameters
    for name in ("s_aux", "learnable_sink", "page_table"):
        assert name not in parameters
