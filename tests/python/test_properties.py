"""Laws that hold for any shape, mask and layout, on random problems."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import anyflash
from anyflash.testing import Case, assert_close, expect, make_inputs

pytestmark = pytest.mark.providers

COMMON = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
FEW = settings(COMMON, max_examples=25)
MANY = settings(COMMON, max_examples=120)

LENGTH = st.integers(0, 40)
WINDOW = st.one_of(st.just(-1), st.integers(0, 45))


@st.composite
def cases(draw) -> Case:
    """Any problem the library promises to compute, small."""
    layout = draw(st.sampled_from(["dense", "packed", "paged", "packed_paged"]))
    batch = draw(st.integers(1, 3))
    fixed = layout == "dense"
    seqlens_q = [draw(LENGTH) for _ in range(batch)]
    seqlens_k = [draw(LENGTH) for _ in range(batch)]
    if layout in ("dense", "paged"):
        seqlens_q = seqlens_q[:1] * batch
    if fixed:
        seqlens_k = seqlens_k[:1] * batch
    used = leftpad = None
    if "paged" not in layout and draw(st.booleans()):
        used = tuple(draw(st.integers(0, n)) for n in seqlens_k)
    if "paged" not in layout and draw(st.integers(0, 3)) == 0:
        leftpad = tuple(draw(st.integers(0, n)) for n in (used or seqlens_k))
    heads_k = draw(st.integers(1, 3))
    score_change = draw(
        st.sampled_from(["", "", "", "softcap", "alibi", "sinks", "bias", "dropout"])
    )
    bias = ""
    if score_change == "bias" and "paged" not in layout:
        bias = draw(st.sampled_from(["full", "head", "key"]))
    same_dims = draw(st.booleans())
    return Case(
        name=f"random_{draw(st.integers(0, 1 << 30))}",
        seqlens_q=tuple(seqlens_q),
        seqlens_k=tuple(seqlens_k),
        heads=heads_k * draw(st.integers(1, 3)),
        heads_k=heads_k,
        head_dim=draw(st.integers(1, 40)),
        head_dim_v=0 if same_dims else draw(st.integers(1, 40)),
        dtype=draw(st.sampled_from(["fp32", "fp32", "bf16", "fp16", "fp64"])),
        layout=layout,
        page_size=draw(st.integers(1, 20)),
        causal=draw(st.booleans()),
        window=(draw(WINDOW), draw(WINDOW)),
        softcap=3.0 if score_change == "softcap" else 0.0,
        alibi=draw(st.sampled_from(["heads", "batch"])) if score_change == "alibi" else "",
        bias=bias,
        sinks=score_change == "sinks",
        dropout=0.4 if score_change == "dropout" else 0.0,
        seqused_k=used,
        leftpad_k=leftpad,
        strides=draw(st.sampled_from(["contiguous", "transposed", "sliced"])),
    )


@MANY
@given(case=cases())
def test_any_problem_equals_the_reference(case, device):
    inputs = make_inputs(case, device)
    on_cpu = make_inputs(case, "cpu")
    gradients = case.differentiable
    expected = expect(on_cpu, gradients)
    leaves = {n: x.detach().requires_grad_(gradients) for n, x in inputs.differentiable().items()}
    options = {n: leaves.get(n, x) for n, x in inputs.options.items()}
    results = anyflash.attention(*(leaves[n] for n in "qkv"), **options, return_lse=True)
    found = dict(zip(("out", "lse"), results))
    if gradients:
        tensors = list(leaves.values())
        grads = torch.autograd.grad(results, tensors, [inputs.dout, inputs.dlse], allow_unused=True)
        found.update(zip(leaves, grads))
    for name, value in found.items():
        assert value is not None, name
        exact, low = expected.exact[name], expected.low[name]
        # A draw of few elements has no typical rounding error to measure by: a few are allowed.
        slack = 4 * torch.finfo(low.dtype).eps * exact[exact.isfinite()].abs().sum().clamp(max=4)
        assert_close(value.cpu(), exact, low + slack.to(low), f"{case} {name}")


def _random(*shape, device, **options):
    return torch.randn(*shape, device=device, **options)


@FEW
@given(
    lengths=st.lists(st.tuples(LENGTH, LENGTH), min_size=1, max_size=5),
    causal=st.booleans(),
    window=st.tuples(WINDOW, WINDOW),
)
def test_packed_is_a_loop_of_dense(lengths, causal, window, device):
    longest = [max(max(pair[i] for pair in lengths), 1) for i in (0, 1)]
    # A window that reaches all of the longest sequence is no window; keep it one for all or none.
    window = tuple(-1 if w >= min(k for _, k in lengths) else w for w in window)
    q = _random(sum(a for a, _ in lengths), 2, 16, device=device)
    k, v = (_random(sum(b for _, b in lengths), 2, 16, device=device) for _ in "kv")
    cu = [
        torch.tensor([0, *torch.tensor([p[i] for p in lengths]).cumsum(0)], dtype=torch.int32).to(
            device
        )
        for i in (0, 1)
    ]
    packed, packed_lse = anyflash.attention(
        q,
        k,
        v,
        cu_seqlens_q=cu[0],
        cu_seqlens_k=cu[1],
        max_seqlen_q=longest[0],
        max_seqlen_k=longest[1],
        causal=causal,
        window_size=window,
        return_lse=True,
    )
    for b in range(len(lengths)):
        rows, keys = (slice(int(c[b]), int(c[b + 1])) for c in cu)
        out, lse = anyflash.attention(
            *(q[None, rows], k[None, keys], v[None, keys]),
            causal=causal,
            window_size=window,
            return_lse=True,
        )
        torch.testing.assert_close(packed[rows], out[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(packed_lse[:, rows], lse[0], atol=1e-5, rtol=1e-5)


@FEW
@given(seqlen_q=LENGTH, seqlen_k=LENGTH, group=st.integers(2, 4), causal=st.booleans())
def test_grouped_heads_equal_expanded_heads(seqlen_q, seqlen_k, group, causal, device):
    q = _random(2, seqlen_q, 2 * group, 8, device=device)
    k, v = (_random(2, seqlen_k, 2, 8, device=device) for _ in "kv")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    grouped = anyflash.attention(*leaves, causal=causal)
    expanded = anyflash.attention(
        q, *(x.repeat_interleave(group, 2) for x in leaves[1:]), causal=causal
    )
    torch.testing.assert_close(grouped, expanded, atol=1e-5, rtol=1e-5)
    dout = torch.randn_like(grouped)
    for a, b in zip(
        torch.autograd.grad(grouped, leaves, dout), torch.autograd.grad(expanded, leaves, dout)
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@FEW
@given(seqlen_q=LENGTH, seqlen_k=LENGTH, more=st.integers(0, 9), causal=st.booleans())
def test_a_window_over_all_keys_is_none(seqlen_q, seqlen_k, more, causal, device):
    q = _random(1, seqlen_q, 2, 8, device=device)
    k, v = (_random(1, seqlen_k, 2, 8, device=device) for _ in "kv")
    plain = anyflash.attention(q, k, v, causal=causal, return_lse=True)
    window = (seqlen_k + more, seqlen_k + 2 * more)
    wide = anyflash.attention(q, k, v, causal=causal, window_size=window, return_lse=True)
    assert torch.equal(plain[0], wide[0])
    assert torch.equal(plain[1], wide[1])


@FEW
@given(seqlen=st.integers(1, 40), left=WINDOW, right=WINDOW)
def test_zero_right_window_is_causal_and_causal_forces_it(seqlen, left, right, device):
    q, k, v = (_random(1, seqlen, 1, 8, device=device) for _ in "qkv")
    forced = anyflash.attention(q, k, v, causal=True, window_size=(left, right))
    alone = anyflash.attention(q, k, v, window_size=(left, 0))
    assert torch.equal(forced, alone)


@FEW
@given(
    seqlen_q=LENGTH,
    seqlen_k=st.integers(1, 40),
    cut=st.integers(0, 40),
    route=st.sampled_from([None, "math"]),
)
def test_unused_keys_do_not_matter(seqlen_q, seqlen_k, cut, route, device):
    """Keys after the used length may hold anything: the result is that of the shorter tensors."""
    cut = min(cut, seqlen_k)
    q = _random(1, seqlen_q, 2, 8, device=device)
    k, v = (_random(1, seqlen_k, 2, 8, device=device) for _ in "kv")
    short = anyflash.attention(q, k[:, :cut], v[:, :cut], causal=True, backend=route)
    for poison in (float("nan"), float("inf")):
        k[:, cut:], v[:, cut:] = poison, poison
        used = torch.tensor([cut], dtype=torch.int32, device=device)
        out = anyflash.attention(q, k, v, seqused_k=used, causal=True, backend=route)
        torch.testing.assert_close(out, short, atol=1e-6, rtol=1e-5)


@FEW
@given(seqlen_q=LENGTH, seqlen_k=LENGTH, scale=st.floats(-2, 2))
def test_permuting_keys_changes_nothing(seqlen_q, seqlen_k, scale, device):
    q = _random(1, seqlen_q, 2, 8, device=device)
    k, v = (_random(1, seqlen_k, 2, 8, device=device) for _ in "kv")
    order = torch.randperm(seqlen_k, device=device)
    a = anyflash.attention(q, k, v, softmax_scale=scale)
    b = anyflash.attention(q, k[:, order], v[:, order], softmax_scale=scale)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@FEW
@given(
    seqlen=st.integers(1, 64), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
)
def test_forward_repeats_bitwise(seqlen, dtype, device):
    q, k, v = (
        _random(2, seqlen, 2, 16, device=device, dtype=torch.float32).to(dtype) for _ in "qkv"
    )
    first = anyflash.attention(q, k, v, causal=True, return_lse=True)
    again = anyflash.attention(q, k, v, causal=True, return_lse=True)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@FEW
@given(seqlen=st.integers(1, 40), slope=st.floats(0.01, 0.5))
def test_lse_of_causal_alibi(seqlen, slope, device):
    """Purely causal: + slope * j. out is that of - slope * |i - j|, the LSE differs per row."""
    q, k, v = (_random(1, seqlen, 1, 8, device=device) for _ in "qkv")
    slopes = torch.tensor([slope], device=device)
    out, lse = anyflash.attention(q, k, v, alibi_slopes=slopes, causal=True, return_lse=True)
    i = torch.arange(seqlen, device=device)
    bias = -slope * (i[:, None] - i[None, :]).abs().float()
    other, other_lse = anyflash.attention(q, k, v, bias=bias, causal=True, return_lse=True)
    torch.testing.assert_close(out, other, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse, other_lse + slope * i, atol=1e-4, rtol=1e-4)


FEATURES = st.fixed_dictionaries(
    {"causal": st.booleans(), "window_size": st.sampled_from([(-1, -1), (3, 2), (0, 0)])},
    optional={
        "alibi_slopes": st.just(True),
        "sinks": st.just(True),
        "softcap": st.just(2.0),
        "dropout_p": st.just(0.3),
        "bias": st.sampled_from(["full", "key"]),
    },
).filter(lambda features: not {"softcap", "dropout_p"} <= features.keys())  # refused


def _options(features: dict, heads: int, bias_shape: tuple[int, ...], device: str) -> dict:
    """Tensors in place of the drawn marks."""
    options = dict(features)
    for name in ("alibi_slopes", "sinks"):
        if name in options:
            options[name] = torch.rand(heads, device=device)
    if "bias" in options:
        shape = bias_shape if options["bias"] == "full" else (1, 1, 1, bias_shape[3])
        options["bias"] = _random(*shape, device=device)
    if "dropout_p" in options:
        options["rng_state"] = torch.tensor([5, 7], device=device)
    for name in ("sinks", "bias"):
        if name in options:
            options[name].requires_grad_()
    return options


def _with_gradients(q, k, v, options: dict, backend: str | None):
    """out, lse and the gradients of all that has one; None where the back end cannot do it."""
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if backend != "aten_cpu":  # which has no other gradients
        leaves += [options[name] for name in ("sinks", "bias") if name in options]
    try:
        out, lse = anyflash.attention(q, k, v, **options, return_lse=True, backend=backend)
    except RuntimeError as error:
        assert "can run this attention" in str(error)
        return None
    return out, lse, *torch.autograd.grad(out, leaves, torch.ones_like(out))


@FEW
@given(
    lengths=st.lists(st.tuples(LENGTH, LENGTH), min_size=1, max_size=4),
    features=FEATURES,
    more=st.sampled_from([(1, 0), (0, 1), (1000, 9), (1 << 30, 1 << 30)]),
    backend=st.sampled_from([None, "kernel", "aten_cpu", "math"]),
)
def test_max_seqlen_is_only_a_bound(lengths, features, more, backend, device):
    """However generous it is: the same bits, and no memory for it."""
    features = {n: x for n, x in features.items() if n != "bias"}  # has max_seqlen in its shape
    longest = [max(max(pair[i] for pair in lengths), 4) for i in (0, 1)]
    cu = [
        torch.tensor([0, *torch.tensor([p[i] for p in lengths]).cumsum(0)], dtype=torch.int32)
        for i in (0, 1)
    ]
    q = _random(int(cu[0][-1]), 2, 8, device=device)
    k, v = (_random(int(cu[1][-1]), 2, 8, device=device) for _ in "kv")
    options = _options(features, 2, (), device)
    options.update(cu_seqlens_q=cu[0].to(device), cu_seqlens_k=cu[1].to(device))
    results = []
    for extra in ((0, 0), more):
        bounds = {"max_seqlen_q": longest[0] + extra[0], "max_seqlen_k": longest[1] + extra[1]}
        results.append(_with_gradients(q, k, v, {**options, **bounds}, backend))
    if results[0] is None:
        assert results[1] is None
        return
    for one, other in zip(*results):
        assert torch.equal(one, other)


@MANY
@given(
    sizes=st.tuples(*[st.sampled_from([0, 1, 7])] * 3).filter(lambda sizes: 0 in sizes),
    features=FEATURES,
    packed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    backend=st.sampled_from([None, "kernel", "aten_cpu", "math"]),
)
def test_empty_tensors_have_one_answer(sizes, features, packed, dtype, backend, device):
    """No batch, no queries or no keys: out 0 and lse +inf where there are rows, gradients of 0."""
    batch, seqlen_q, seqlen_k = sizes
    options = _options(features, 2, (batch, 2, seqlen_q, seqlen_k), device)
    q = _random(batch, seqlen_q, 2, 8, device=device).to(dtype)
    k, v = (_random(batch, seqlen_k, 2, 8, device=device).to(dtype) for _ in "kv")
    if packed:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
        options.update(cu_seqlens_q=starts * seqlen_q, cu_seqlens_k=starts * seqlen_k)
        options.update(max_seqlen_q=seqlen_q, max_seqlen_k=seqlen_k)
    results = _with_gradients(q, k, v, options, backend)
    if results is None:
        return
    out, lse, *gradients = results
    assert out.shape == q.shape
    assert lse.shape == ((2, batch * seqlen_q) if packed else (batch, 2, seqlen_q))
    assert (out == 0).all() and (lse == float("inf")).all()
    assert all((gradient == 0).all() for gradient in gradients)
