"""anyflash.layer_norm, rms_norm and dropout_add_norm against the definition in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import anyflash
from anyflash.norm import dropout_add_norm

pytestmark = pytest.mark.providers

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# Of a result of size 1, rounding included; gradients are sums of several.
ERROR = {FP16: 4e-3, BF16: 3e-2, FP32: 1e-5, FP64: 1e-12}
NAMES = ("x", "residual", "x1", "weight", "bias", "weight1", "bias1", "rowscale")


def definition(t, *, masks=(None, None), p=0.0, eps=1e-5, rms=False, zero_centered=False):
    """(y, y1, z) of float64 tensors, by name."""

    def kept(x, mask):
        return x if mask is None else x * mask / (1 - p)

    z = kept(t["x"] * (t["rowscale"].unsqueeze(-1) if "rowscale" in t else 1), masks[0])
    z = z + (kept(t["x1"], masks[1]) if "x1" in t else 0) + t.get("residual", 0)
    centered = z if rms else z - z.mean(-1, keepdim=True)
    unit = centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()
    ys = [
        unit * (t[f"weight{i}"] + zero_centered) + t.get(f"bias{i}", 0)
        for i in ("", "1")
        if f"weight{i}" in t
    ]
    return ys[0], ys[1] if len(ys) > 1 else None, z


def make(names, shape, device, *, dtype=FP32, residual=None, weights=None, seed=0):
    """Tensors by name; a residual far from 0, so that means matter."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=FP64)

    made = {}
    for name in names:
        if name in ("x", "x1"):
            made[name] = normal(*shape).to(dtype)
        elif name == "residual":
            made[name] = (normal(*shape) + 1).to(residual or dtype)
        elif name == "rowscale":
            made[name] = (1 + 0.3 * normal(*shape[:-1])).to(dtype)
        else:
            made[name] = (normal(shape[-1]) + ("weight" in name)).to(weights or dtype)
    return {name: tensor.to(device) for name, tensor in made.items()}


def leaves(tensors, dtype=None):
    return {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in tensors.items()}


def assert_near(found, expected, dtype, what, factor=1.0):
    assert found.dtype == dtype, what
    assert found.shape == expected.shape, what
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    error = (found.double() - expected).abs()
    allowed = factor * ERROR[dtype] * (expected.abs() + 0.3 * scale + 1e-3)
    assert bool((error <= allowed).all()), (
        f"{what}: {float((error / allowed).max()):.2f} of allowed"
    )


def check(tensors, *, p=0.0, rms=False, zero_centered=False, prenorm=True, **options):
    """Results and every gradient of one call against the definition."""
    ours, exact = leaves(tensors), leaves(tensors, FP64)
    normed = dropout_add_norm(
        ours["x"],
        ours["weight"],
        **{n: t for n, t in ours.items() if n not in ("x", "weight")},
        dropout_p=p,
        is_rms_norm=rms,
        zero_centered_weight=zero_centered,
        return_residual=prenorm,
        **options,
    )
    masks = (normed.dropout_mask, normed.dropout_mask1)
    for mask, there in zip(masks, (p > 0, p > 0 and "x1" in ours)):
        assert (mask is not None) == there
        assert mask is None or (mask.dtype == torch.bool and mask.shape == ours["x"].shape)
    y, y1, z = definition(exact, masks=masks, p=p, rms=rms, zero_centered=zero_centered)
    out_dtype = options.get("out_dtype") or ours["x"].dtype
    sum_dtype = ours["residual"].dtype if "residual" in ours else None
    sum_dtype = sum_dtype or options.get("residual_dtype") or ours["x"].dtype
    wanted = [(normed.y, y, out_dtype, "y")]
    wanted += [] if y1 is None else [(normed.y1, y1, out_dtype, "y1")]
    wanted += [(normed.residual, z, sum_dtype, "residual")] if prenorm else []
    assert (normed.residual is None) == (not prenorm)
    assert (normed.y1 is None) == (y1 is None)
    douts = []
    for i, (found, expected, dtype, name) in enumerate(wanted):
        assert_near(found, expected, dtype, name)
        dout = torch.randn(found.shape, generator=torch.Generator().manual_seed(i))
        douts.append(dout.to(found.device, dtype))
    found = torch.autograd.grad([w[0] for w in wanted], list(ours.values()), douts)
    exact_douts = [d.double() for d in douts]
    expected = torch.autograd.grad([w[1] for w in wanted], list(exact.values()), exact_douts)
    # The backward sees z as it was rounded to the sum's dtype.
    worst = max((t.dtype for t in (normed.y, *ours.values())), key=lambda dtype: ERROR[dtype])
    for (name, leaf), a, b in zip(ours.items(), found, expected):
        assert_near(a, b, leaf.dtype, f"gradient of {name}", 3 * ERROR[worst] / ERROR[leaf.dtype])
    return normed


ALL = {
    "plain": ("x", "weight", "bias"),
    "no_bias": ("x", "weight"),
    "residual": ("x", "residual", "weight", "bias"),
    "rowscale": ("x", "residual", "weight", "bias", "rowscale"),
    "parallel": NAMES[:7],
    "two_norms": ("x", "residual", "weight", "bias", "weight1"),
}


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("names", ALL.values(), ids=ALL)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64])
def test_against_the_definition(dtype, names, p, rms, device):
    torch.manual_seed(1)
    check(make(names, (2, 5, 72), device, dtype=dtype), p=p, rms=rms)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.sampled_from([7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 257]),
    names=st.sampled_from(sorted(ALL.values())),
    dtypes=st.tuples(*[st.sampled_from([FP16, BF16, FP32])] * 4),
    p=st.sampled_from([0.0, 0.5]),
    flags=st.tuples(*[st.booleans()] * 3),
)
def test_any_shape_and_mix_of_dtypes(device, rows, cols, names, dtypes, p, flags):
    dtype, residual, weights, out_dtype = dtypes
    rms, zero_centered, prenorm = flags
    tensors = make(names, (rows, cols), device, dtype=dtype, residual=residual, weights=weights)
    check(tensors, p=p, rms=rms, zero_centered=zero_centered, prenorm=prenorm, out_dtype=out_dtype)


@pytest.mark.parametrize("cols", [1, 2, 3, 5])
def test_few_columns(cols, device):
    """Their gradients are small differences of large numbers, so only the size is asked for."""
    ours = leaves(make(("x", "weight", "bias"), (6, cols), device))
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in ours.items()}
    for rms in (False, True):
        y = dropout_add_norm(**ours, is_rms_norm=rms, eps=0.1).y
        expected, _, _ = definition(exact, rms=rms, eps=0.1)
        assert_near(y, expected, FP32, "y")
        found = torch.autograd.grad(y.sum(), list(ours.values()))
        for a, b in zip(found, torch.autograd.grad(expected.sum(), list(exact.values()))):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_the_sums_dtype(device):
    """The residual's where one is given, whatever residual_dtype says."""
    tensors = make(("x", "residual", "weight"), (3, 16), device, dtype=BF16)
    for given_dtype, asked, expected in ((BF16, FP32, BF16), (FP32, BF16, FP32)):
        tensors["residual"] = tensors["residual"].to(given_dtype)
        assert check(tensors, residual_dtype=asked).residual.dtype == expected
    del tensors["residual"]
    assert check(tensors, residual_dtype=FP32).residual.dtype == FP32
    normed = dropout_add_norm(tensors["x"], tensors["weight"], return_residual=True)
    assert normed.residual is tensors["x"]


def _layouts(device):
    """Tensors of shape (4, 6, 24) with other strides, and NaN in what lies between their rows."""
    wide = torch.full((4, 6, 40), float("nan"), device=device)
    wide[..., 5:29] = torch.randn(4, 6, 24, device=device)
    return {
        "columns_of_a_wider_tensor": wide[..., 5:29],
        "transposed_rows": torch.randn(6, 4, 24, device=device).transpose(0, 1),
        "transposed_columns": torch.randn(4, 24, 6, device=device).transpose(1, 2),
        "expanded": torch.randn(4, 1, 24, device=device).expand(4, 6, 24),
        "backwards": torch.randn(4, 6, 48, device=device)[..., ::2],
    }


def test_strides(device):
    weight, bias = torch.randn(24, device=device), torch.randn(48, device=device)[::2]
    layouts = _layouts(device)
    for (name, x), residual in itertools.product(layouts.items(), list(layouts.values())[:2]):
        for matrix in (False, True):
            a, b = (t[:, 0] if matrix else t for t in (x, residual))
            y, z = anyflash.layer_norm(a, weight, bias, b, prenorm=True)
            expected = F.layer_norm(a + b, (24,), weight, bias)
            torch.testing.assert_close(y, expected, msg=name)
            torch.testing.assert_close(z, a + b, msg=name)
            assert y.is_contiguous() and z.is_contiguous()


@pytest.mark.parametrize("shape", [(16,), (0, 16), (3, 0, 16), (1, 16), (2, 3, 4, 5, 16)])
def test_leading_dimensions(shape, device):
    """None, several, and no rows at all."""
    leaf = torch.randn(shape, device=device, requires_grad=True)
    weight = torch.randn(16, device=device, requires_grad=True)
    normed = dropout_add_norm(leaf, weight, weight, dropout_p=0.2, return_residual=True)
    assert normed.y.shape == normed.residual.shape == normed.dropout_mask.shape == leaf.shape
    assert normed.mean.shape == normed.rstd.shape == leaf.shape[:-1]
    dx, dweight = torch.autograd.grad(normed.y.sum() + normed.residual.sum(), (leaf, weight))
    assert dx.shape == shape and dweight.shape == (16,)
    assert leaf.numel() or not dweight.any()


def test_statistics(device):
    x, weight = torch.randn(5, 40, device=device), torch.ones(40, device=device)
    normed = dropout_add_norm(x, weight, eps=0.5)
    torch.testing.assert_close(normed.mean, x.mean(-1))
    torch.testing.assert_close(normed.rstd, (x.var(-1, correction=0) + 0.5).rsqrt())
    assert dropout_add_norm(x, weight, is_rms_norm=True).mean is None


def test_large_means_cost_no_digits(device):
    """The variance is taken of what is left after the mean."""
    x = torch.randn(4, 512, dtype=FP64, device=device) + 1000
    y = anyflash.layer_norm(x.float(), torch.ones(512, device=device))
    expected = F.layer_norm(x.float().double(), (512,))
    assert float((y - expected).abs().max()) < 1e-3


def test_large_results(device):
    """Those that ask the system for huge pages: their last rows too."""
    x, weight = torch.randn(1100, 2048, device=device), torch.rand(2048, device=device)
    y, z = anyflash.rms_norm(x, weight, None, x, prenorm=True)
    assert torch.equal(z, x + x)
    torch.testing.assert_close(y, F.rms_norm(z, (2048,), weight, 1e-5))


def test_what_is_not_finite_stays_in_its_row(device):
    x = torch.randn(3, 33, device=device)
    x[1, 4], weight = float("inf"), torch.ones(33, device=device)
    y = anyflash.rms_norm(x, weight)
    assert y[1].isnan().any() and y[0].isfinite().all() and y[2].isfinite().all()


def test_a_dropped_infinity_is_zero(device):
    x = torch.full((40, 16), float("inf"), device=device)
    normed = dropout_add_norm(x, torch.ones(16, device=device), dropout_p=0.5, return_residual=True)
    assert torch.equal(normed.residual.isinf(), normed.dropout_mask)
    assert not normed.residual[~normed.dropout_mask].any()


def test_any_number_of_threads_gives_the_same_bits(device):
    threads = torch.get_num_threads()
    tensors = make(NAMES[:7], (300, 520), device)
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            ours = leaves(tensors)
            normed = dropout_add_norm(**ours, dropout_p=0.2, return_residual=True)
            loss = normed.y.square().sum() + normed.y1.sin().sum() + normed.residual.cos().sum()
            results.append([normed.y, *torch.autograd.grad(loss, list(ours.values()))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


# ---- Randomness.


def test_dropout_is_pytorchs_own(device):
    x, weight = torch.ones(200, 50, device=device), torch.ones(50, device=device)

    def draw(**options):
        return dropout_add_norm(x, weight, dropout_p=0.3, return_residual=True, **options)

    torch.manual_seed(3)
    first = draw()
    torch.manual_seed(3)
    again, other = draw(), draw()
    assert torch.equal(first.y, again.y) and not torch.equal(first.y, other.y)
    assert abs(float(first.dropout_mask.float().mean()) - 0.7) < 0.02
    torch.testing.assert_close(first.residual, first.dropout_mask / 0.7)
    mine = [torch.Generator(device).manual_seed(5) for _ in "ab"]
    assert torch.equal(draw(generator=mine[0]).y, draw(generator=mine[1]).y)
    parallel = draw(x1=x)
    assert not torch.equal(parallel.dropout_mask, parallel.dropout_mask1)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_draws_the_same_mask_again(use_reentrant, device):
    x, weight = torch.randn(6, 32, device=device), torch.randn(32, device=device)

    def block(x):
        return dropout_add_norm(x, weight, residual=x, dropout_p=0.4).y

    gradients = []
    for recompute in (False, True):
        torch.manual_seed(4)
        leaf = x.clone().requires_grad_()
        y = checkpoint(block, leaf, use_reentrant=use_reentrant) if recompute else block(leaf)
        y.sin().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


# ---- What autograd asks for.


def test_only_what_is_asked_for_gets_a_gradient(device):
    tensors = make(NAMES[:7], (4, 24), device)
    for asking in NAMES[:7]:
        ours = {n: t.clone().requires_grad_(n == asking) for n, t in tensors.items()}
        normed = dropout_add_norm(**ours, return_residual=True)
        (normed.y.sin().sum() + normed.y1.sum()).backward()
        assert {n for n, t in ours.items() if t.grad is not None} == {asking}


@pytest.mark.parametrize("used", ["y", "y1", "residual"])
def test_a_loss_of_one_result(used, device):
    tensors = make(NAMES[:7], (4, 24), device)
    ours, exact = leaves(tensors), leaves(tensors, FP64)
    normed = dropout_add_norm(**ours, return_residual=True)
    expected = dict(zip(("y", "y1", "residual"), definition(exact)))[used]
    getattr(normed, used).sin().sum().backward()
    expected.sin().sum().backward()
    for name, leaf in ours.items():
        other = exact[name].grad
        grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        assert_near(grad, torch.zeros_like(exact[name]) if other is None else other, FP32, name, 3)


def test_gradients_in_float64(device):
    def function(*tensors):
        torch.manual_seed(0)
        normed = dropout_add_norm(**dict(zip(names, tensors)), dropout_p=0.3, return_residual=True)
        return normed.y, normed.residual, *(() if normed.y1 is None else (normed.y1,))

    for names in (NAMES[:7], ALL["rowscale"]):
        tensors = make(names, (2, 3, 9), device, dtype=FP64)
        assert torch.autograd.gradcheck(function, tuple(leaves(tensors).values()))


def test_functional_gradients(device):
    x, residual, weight, bias = make(ALL["residual"], (3, 4, 24), device).values()

    def loss(x, residual, weight, bias):
        y, z = anyflash.layer_norm(x, weight, bias, residual, prenorm=True)
        return y.sin().sum() + z.cos().sum()

    def exact(x, residual, weight, bias):
        z = x + residual
        return F.layer_norm(z, (24,), weight, bias).sin().sum() + z.cos().sum()

    everything = (0, 1, 2, 3)
    found = torch.func.grad(loss, everything)(x, residual, weight, bias)
    expected = torch.func.grad(exact, everything)(x, residual, weight, bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    over = (0, 0, None, None)
    found = torch.func.vmap(torch.func.grad(loss, everything), over)(x, residual, weight, bias)
    expected = torch.func.vmap(torch.func.grad(exact, everything), over)(x, residual, weight, bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _runs_on_kernel(device):
    from anyflash._operators import runs_on_kernel

    return runs_on_kernel("norm", torch.empty(1, device=device))


def test_kernels_refuse_what_they_cannot_derive(device):
    if not _runs_on_kernel(device):
        return  # plain operators have every derivative
    x, weight = torch.randn(3, 8, device=device, requires_grad=True), torch.ones(8, device=device)
    (dx,) = torch.autograd.grad(anyflash.rms_norm(x, weight).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda x: anyflash.rms_norm(x, weight), (x.detach(),), (x.detach(),))


# ---- torch.compile.


@pytest.fixture
def fresh_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _block(x, residual, weight, bias):
    y, z = anyflash.layer_norm(x * 2, weight, bias, residual, prenorm=True)
    return y.sin() + z.cos()


def test_compiled(device, fresh_compiler):
    compiled = torch.compile(_block, fullgraph=True)
    tensors = make(ALL["residual"], (3, 4, 24), device)
    ours, theirs = leaves(tensors), leaves(tensors)
    out, expected = compiled(*ours.values()), _block(*theirs.values())
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(out.square().sum(), list(ours.values()))
    wanted = torch.autograd.grad(expected.square().sum(), list(theirs.values()))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_compiled_with_dropout_and_any_length(device, fresh_compiler):
    def block(x, weight):
        normed = dropout_add_norm(x, weight, residual=x, dropout_p=0.5, return_residual=True)
        return normed.y, normed.residual, normed.dropout_mask

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    weight = torch.randn(16, device=device, requires_grad=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 12, 31):
            x = torch.randn(rows, 16, device=device, requires_grad=True)
            y, z, mask = compiled(x, weight)
            torch.testing.assert_close(z, x * mask * 2 + x)
            torch.testing.assert_close(y, F.layer_norm(z, (16,), weight))
            assert all(
                g.shape == t.shape
                for g, t in zip(torch.autograd.grad(y.sum() + z.sum(), (x, weight)), (x, weight))
            )


def test_back_ends(device):
    """math gives the same, and nothing but a kernel or math can be asked for."""
    x, weight = torch.randn(5, 40, device=device), torch.randn(40, device=device)
    expected = F.rms_norm(x, (40,), weight, 1e-5)
    for backend in ("math", "kernel,math"):
        with anyflash.backend(backend):
            torch.testing.assert_close(anyflash.rms_norm(x, weight), expected)
    if not _runs_on_kernel(device):
        with anyflash.backend("kernel"), pytest.raises(RuntimeError, match="kernel"):
            anyflash.rms_norm(x, weight)


@pytest.mark.parametrize("residual_dtype, out_dtype", [(FP32, None), (BF16, FP32)])
def test_a_loss_of_the_second_norm_alone(device, residual_dtype, out_dtype):
    torch.manual_seed(0)
    x = torch.randn(4, 8, device=device).to(BF16).requires_grad_()
    residual = torch.randn(4, 8, device=device).to(residual_dtype).requires_grad_()
    weights = [torch.randn(8, device=device, requires_grad=True) for _ in "01"]
    found = dropout_add_norm(
        x, weights[0], residual=residual, weight1=weights[1], out_dtype=out_dtype
    ).y1
    leaves = (x, residual, weights[1])
    gradients = torch.autograd.grad(found.float().sin().sum(), leaves)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = F.layer_norm(wide[0] + wide[1], (8,), wide[2])
    for a, b in zip(gradients, torch.autograd.grad(expected.sin().sum(), wide)):
        torch.testing.assert_close(a.double(), b, atol=0.1, rtol=0.1)


def test_operator_that_keeps_no_sum_has_the_derivative(device):
    torch.manual_seed(0)
    x, residual = (torch.randn(4, 8, device=device, requires_grad=True) for _ in "xr")
    weight = torch.randn(8, device=device, requires_grad=True)
    y, _, z, *_ = torch.ops.anyflash.norm_forward(
        x, residual, None, weight, None, None, None, None, None, None, 0.0, 1e-5, False, False, 4, 0
    )
    assert z.numel() == 0
    leaves = (x, residual, weight)
    expected = F.layer_norm(x + residual, (8,), weight)
    for a, b in zip(
        torch.autograd.grad(y.sin().sum(), leaves),
        torch.autograd.grad(expected.sin().sum(), leaves),
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
