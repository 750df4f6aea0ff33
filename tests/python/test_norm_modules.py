"""flash_attn.ops.{triton.layer_norm, layer_norm, rms_norm} and the extension dropout_layer_norm."""

from __future__ import annotations

import copy
import itertools

import dropout_layer_norm
import pytest
import torch
import torch.nn.functional as F
from flash_attn.ops import layer_norm as ops_layer_norm
from flash_attn.ops import rms_norm as ops_rms_norm
from flash_attn.ops.triton import layer_norm as triton_norm
from flash_attn.ops.triton.layer_norm import layer_norm_fn, layer_norm_linear_fn, rms_norm_fn

pytestmark = pytest.mark.providers

COLS = 24
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def randn(*shape, dtype=FP32, grad=False):
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def near(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **(tolerance or {"rtol": 1e-4, "atol": 1e-5}))


# ---- ops.triton.layer_norm.


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("masks", [False, True])
def test_what_comes_back(p, prenorm, second, masks):
    x, weight = randn(3, 5, COLS), randn(COLS)
    found = layer_norm_fn(
        x,
        weight,
        None,
        x1=randn(3, 5, COLS) if second else None,
        weight1=randn(COLS) if second else None,
        dropout_p=p,
        prenorm=prenorm,
        return_dropout_mask=masks,
    )
    count = 1 + second + prenorm + 2 * masks
    assert torch.is_tensor(found) if count == 1 else type(found) is tuple and len(found) == count
    if masks:
        mask, mask1 = found[-2:]
        assert (mask is None) == (p == 0.0)
        assert (mask1 is None) == (p == 0.0 or not second)
        assert mask is None or (mask.dtype == torch.bool and mask.shape == x.shape)
    if prenorm and p == 0.0 and not second:
        assert found[1] is x


@pytest.mark.parametrize("given", [None, BF16, FP32])
@pytest.mark.parametrize("in_fp32", [False, True])
def test_dtype_of_the_sum(given, in_fp32):
    """residual_in_fp32 counts only where no residual is given."""
    x, weight = randn(4, COLS, dtype=BF16), randn(COLS)
    residual = None if given is None else randn(4, COLS, dtype=given)
    _, total = layer_norm_fn(x, weight, None, residual, prenorm=True, residual_in_fp32=in_fp32)
    assert total.dtype == (given or (FP32 if in_fp32 else BF16))
    _, total = ops_layer_norm.dropout_add_layer_norm(
        x, residual, weight, None, 0.0, 1e-5, prenorm=True, residual_in_fp32=in_fp32
    )
    assert total.dtype == (given or (FP32 if in_fp32 else BF16))


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("case", ["plain", "parallel", "rowscale"])
def test_against_the_reference_of_the_module(rms, zero_centered, case):
    x, residual, weight, bias = randn(3, 4, COLS), randn(3, 4, COLS), randn(COLS), randn(COLS)
    more = {}
    if case == "parallel":
        more = {"x1": randn(3, 4, COLS), "weight1": randn(COLS), "bias1": randn(COLS)}
    if case == "rowscale":
        more = {"rowscale": torch.rand(3, 4)}
    function, reference = layer_norm_fn, triton_norm.layer_norm_ref
    if rms:
        function, reference = rms_norm_fn, triton_norm.rms_norm_ref
    for upcast in (False, True):
        *found, mask, mask1 = function(
            x, weight, bias, residual, dropout_p=0.3, prenorm=True,
            zero_centered_weight=zero_centered, return_dropout_mask=True, **more,
        )  # fmt: skip
        expected = reference(
            x, weight, bias, residual, dropout_p=0.3, prenorm=True,
            zero_centered_weight=zero_centered, dropout_mask=mask, dropout_mask1=mask1,
            upcast=upcast, **more,
        )  # fmt: skip
        assert len(found) == len(expected) == 2 + (case == "parallel")
        near(tuple(found), expected)


def test_buffers():
    x, residual, weight = randn(2, 3, COLS), randn(2, 3, COLS), randn(COLS)
    expected, total = layer_norm_fn(x, weight, None, residual, prenorm=True)
    out = torch.empty(2, 3, 2 * COLS, dtype=BF16)[..., ::2]
    sums = torch.empty(2, 3, COLS)
    y = layer_norm_fn(x, weight, None, residual, out=out, residual_out=sums)
    assert y is out and torch.equal(out, expected.bfloat16()) and torch.equal(sums, total)
    y, z = layer_norm_fn(x, weight, None, residual, prenorm=True, out=out, residual_out=sums)
    assert y is out and z is sums
    leaf = weight.clone().requires_grad_()
    y = rms_norm_fn(x, leaf, None, out=torch.empty_like(x))
    (found,) = torch.autograd.grad(y.sum(), leaf)
    near(found, torch.autograd.grad(rms_norm_fn(x, leaf, None).sum(), leaf)[0])


@pytest.mark.parametrize(
    "mistake, text",
    [
        ({"weight": torch.ones(COLS + 1)}, "weight: expected (24,)"),
        ({"residual": torch.ones(3, COLS)}, "residual: expected x's shape (2, 3, 24), got (3, 24)"),
        ({"bias1": torch.ones(COLS)}, "bias1: expected weight1 with it"),
        (
            {"rowscale": torch.ones(2, 3), "x1": torch.ones(2, 3, COLS)},
            "rowscale is not supported with parallel LayerNorm",
        ),
        ({"dropout_p": 1.0}, "dropout_p: expected a number in [0, 1), got 1.0"),
        ({"out_dtype": BF16}, "out: expected (2, 3, 24), torch.bfloat16 on cpu, got"),
        ({"residual_out": torch.ones(6, COLS)}, "residual_out: expected (2, 3, 24)"),
        (
            {"residual": torch.ones(2, 3, COLS).half()},
            "residual_out: expected (2, 3, 24), torch.float16",
        ),
    ],
)
def test_nothing_is_written_before_a_mistake_is_seen(mistake, text):
    arguments = {
        "x": randn(2, 3, COLS), "weight": torch.ones(COLS), "bias": None,
        "out": torch.full((2, 3, COLS), 7.0), "residual_out": torch.full((2, 3, COLS), 7.0),
    }  # fmt: skip
    buffers = arguments["out"], arguments["residual_out"]
    with pytest.raises((RuntimeError, ValueError)) as error:
        layer_norm_fn(**{**arguments, **mistake})
    assert text in str(error.value)
    assert all(bool((buffer == 7.0).all()) for buffer in buffers)


def test_rows_may_lie_anywhere():
    x = randn(3, 2 * COLS, 5).transpose(1, 2)[..., ::2]
    residual = randn(5, 3, COLS).transpose(0, 1)
    y, z = layer_norm_fn(x, torch.ones(COLS), None, residual, eps=1e-5, prenorm=True)
    near(z, x + residual)
    near(y, F.layer_norm(x + residual, (COLS,)))
    assert layer_norm_fn(x[:0], torch.ones(COLS), None).shape == (0, 5, COLS)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rms", [False, True])
def test_norm_and_linear(autocast, rms):
    leaves = [
        randn(*s, grad=True) for s in ((3, COLS), (COLS,), (COLS,), (7, COLS), (7,), (3, COLS))
    ]
    x, weight, bias, linear, linear_bias, residual = leaves
    with torch.autocast("cpu", BF16, enabled=autocast):
        out, total = layer_norm_linear_fn(
            *leaves[:5], residual, eps=1e-5, prenorm=True, is_rms_norm=rms
        )
    assert out.dtype == (BF16 if autocast else FP32) and total.dtype == FP32
    z = x + residual
    unit = F.rms_norm(z, (COLS,), weight, 1e-5) + bias if rms else None
    y = F.layer_norm(z, (COLS,), weight, bias, 1e-5) if unit is None else unit
    expected = F.linear(y, linear, linear_bias)
    tolerance = {"rtol": 0.05, "atol": 0.1} if autocast else {"rtol": 1e-4, "atol": 1e-5}
    near(out.float(), expected, **tolerance)
    near(total, z)
    found = torch.autograd.grad(out.float().sin().sum() + total.sum(), leaves)
    wanted = torch.autograd.grad(expected.sin().sum() + z.sum(), leaves)
    tolerance = {"rtol": 0.1, "atol": 0.5} if autocast else {"rtol": 1e-4, "atol": 1e-4}
    near(found, wanted, **tolerance)


def test_names_of_upstreams_autograd_functions():
    x, weight, bias = randn(3, COLS), randn(COLS), randn(COLS)
    near(triton_norm.LayerNormFn.apply(x, weight, bias), layer_norm_fn(x, weight, bias))
    near(
        triton_norm.LayerNormLinearFn.apply(x, weight, bias, torch.eye(COLS), None),
        layer_norm_fn(x, weight, bias),
    )
    apply = ops_layer_norm.DropoutAddLayerNormFn.apply
    found = apply(x, None, weight, bias, None, None, 0.0, 1e-5, False, True, True, True)
    assert len(found) == 3 and found[1] is x and found[2].dtype == torch.uint8
    with pytest.raises(NotImplementedError, match="no Triton"):
        triton_norm.triton_autotune_configs()
    strided = randn(4, 6).T
    assert triton_norm.maybe_contiguous_lastdim(strided).is_contiguous()
    assert triton_norm.maybe_contiguous(None) is None
    assert ops_layer_norm.maybe_align(x) is x
    unaligned = torch.zeros(9)[1:]
    assert ops_layer_norm.maybe_align(unaligned).data_ptr() % 16 == 0


# ---- Modules.


def test_modules_have_upstreams_state():
    norm = triton_norm.RMSNorm(COLS, dropout_p=0.2, dtype=BF16)
    assert list(norm.state_dict()) == ["weight"] and norm.bias is None
    assert norm.eps == 1e-5 and norm.drop.p == 0.2 and norm.weight.dtype == BF16
    assert bool((norm.weight == 1).all()) and triton_norm.RMSNorm(COLS).drop is None
    assert not triton_norm.RMSNorm(COLS, zero_centered_weight=True).weight.any()
    for module in (ops_rms_norm.RMSNorm(COLS), ops_rms_norm.DropoutAddRMSNorm(COLS)):
        assert list(module.state_dict()) == ["weight"] and module.bias is None
        assert bool((module.weight == 1).all())
    module = ops_layer_norm.DropoutAddLayerNorm(COLS)
    assert list(module.state_dict()) == ["weight", "bias"]
    assert bool((module.weight == 1).all()) and not module.bias.any()


def test_modules_compute():
    x, residual = randn(3, COLS), randn(3, COLS)
    for zero_centered in (False, True):
        norm = copy.deepcopy(
            triton_norm.RMSNorm(COLS, dropout_p=0.5, zero_centered_weight=zero_centered)
        )
        y, z = norm.eval()(x, residual, prenorm=True)
        near(z, x + residual)
        near(y, F.rms_norm(z, (COLS,), eps=1e-5))
        assert not torch.equal(norm.train()(x), norm(x))
    near(ops_rms_norm.RMSNorm(COLS)(x), F.rms_norm(x, (COLS,), eps=1e-5))
    for cls, function in (
        (ops_layer_norm.DropoutAddLayerNorm, F.layer_norm),
        (ops_rms_norm.DropoutAddRMSNorm, F.rms_norm),
    ):
        module = cls(COLS, prenorm=True, p=0.5, residual_in_fp32=True)
        y, z = module.eval()(x.bfloat16())
        assert z.dtype == FP32 and y.dtype == BF16
        near(y.float(), function(x, (COLS,), eps=1e-5), rtol=0.02, atol=0.02)
        y, z = module(x, residual)
        near(z, x + residual)
        torch.manual_seed(1)
        _, dropped = module.train()(x)
        assert 0 < int((dropped == 0).sum()) < x.numel()


def test_a_module_in_a_graph():
    norm = triton_norm.RMSNorm(COLS, dropout_p=0.5)
    compiled = torch.compile(
        lambda x, r: norm(x, r, prenorm=True), fullgraph=True, backend="aot_eager"
    )
    x, residual = randn(3, COLS, grad=True), randn(3, COLS, grad=True)
    y, z = compiled(x, residual)
    near(y, F.rms_norm(z, (COLS,), eps=1e-5))
    y.sum().backward()
    assert x.grad.shape == x.shape and norm.weight.grad is not None


# ---- ops.layer_norm and ops.rms_norm.


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("layerscale", [False, True])
@pytest.mark.parametrize("rowscale", [False, True])
def test_dropout_add_norm(rms, p, layerscale, rowscale):
    x, residual, weight, bias = (randn(*s, grad=True) for s in ((2, 3, COLS),) * 2 + ((COLS,),) * 2)
    columns = randn(COLS, grad=True) if layerscale else None
    rows = torch.rand(2, 3, requires_grad=True) if rowscale else None
    function = ops_rms_norm.dropout_add_rms_norm if rms else ops_layer_norm.dropout_add_layer_norm
    y, z, mask = function(
        x, residual, weight, bias, p, 1e-5, rowscale=rows, layerscale=columns, prenorm=True,
        return_dropout_mask=True,
    )  # fmt: skip
    assert mask.dtype == torch.uint8 and mask.shape == x.shape and (p > 0 or bool(mask.all()))
    scaled = x if rows is None else x * rows[..., None]
    scaled = scaled if columns is None else scaled * columns
    total = scaled * mask / (1 - p) + residual
    unit = F.rms_norm(total, (COLS,), None, 1e-5) if rms else F.layer_norm(total, (COLS,))
    near((y, z), (unit * weight + bias, total))
    leaves = [t for t in (x, residual, weight, bias, columns, rows) if t is not None]
    found = torch.autograd.grad(y.sin().sum() + z.cos().sum(), leaves)
    wanted = torch.autograd.grad((unit * weight + bias).sin().sum() + total.cos().sum(), leaves)
    near(found, wanted, rtol=1e-3, atol=1e-4)


def test_half_precision_is_rounded_once():
    """layerscale does not make x0's dtype wider outside."""
    x, weight, columns = randn(3, COLS, dtype=BF16), randn(COLS), randn(COLS)
    y, z = ops_layer_norm.dropout_add_layer_norm(
        x, None, weight, None, 0.0, 1e-5, layerscale=columns, prenorm=True
    )
    assert y.dtype == z.dtype == BF16
    assert torch.equal(z, (x.float() * columns).bfloat16())


@pytest.mark.parametrize("rms", [False, True])
def test_two_norms_of_one_sum(rms):
    x0, x1, weight0, weight1 = randn(3, COLS), randn(3, COLS), randn(COLS), randn(COLS)
    function = ops_layer_norm.dropout_add_layer_norm_parallel_residual
    norm = F.layer_norm
    if rms:
        function, norm = ops_rms_norm.dropout_add_rms_norm_parallel_residual, F.rms_norm
    y0, y1, z, mask0, mask1 = function(
        x0, x1, None, weight0, None, weight1, None, 0.3, 1e-5, prenorm=True,
        return_dropout_mask=True,
    )  # fmt: skip
    near(z, x0 * mask0 / 0.7 + x1 * mask1 / 0.7)
    near((y0, y1), (norm(z, (COLS,), weight0, eps=1e-5), norm(z, (COLS,), weight1, eps=1e-5)))
    y0, y1 = function(x0, None, x1, weight0, None, None, None, 0.0, 1e-5)
    near(y0, norm(x0 + x1, (COLS,), weight0, eps=1e-5))
    assert y1 is None
    _, _, mask0, mask1 = function(
        x0, None, None, weight0, None, None, None, 0.3, 1e-5, return_dropout_mask=True
    )
    assert not mask0.all() and bool(mask1.all()) and mask1.dtype == torch.uint8


SUBSET = {
    "x0_subset": torch.tensor([1, 0, 3, 2, 0, 5], dtype=torch.int32),
    "out_subset": torch.tensor([4, 1, 0, 2, 0, 3], dtype=torch.int32),
    "out_numrows": 4,
}


def subset_by_hand(x0, residual, weight, mask, p, factor):
    """(y, z) row by row."""
    sums, y = [], [torch.zeros(COLS)] * SUBSET["out_numrows"]
    for i, (taken, made) in enumerate(zip(SUBSET["x0_subset"], SUBSET["out_subset"])):
        row = residual[i]
        if taken:
            row = row + x0[taken - 1] * mask[taken - 1] * factor / (1 - p)
        sums.append(row)
        if made:
            y[made - 1] = F.layer_norm(row, (COLS,), weight)
    return torch.stack(y), torch.stack(sums)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("layerscale", [False, True])
def test_some_rows(p, layerscale):
    x0, residual, weight = (
        randn(5, COLS, grad=True),
        randn(6, COLS, grad=True),
        randn(COLS, grad=True),
    )
    columns = randn(COLS, grad=True) if layerscale else None
    y, z, mask = ops_layer_norm.dropout_add_layer_norm_subset(
        x0, residual, weight, None, p, 1e-5, layerscale=columns, rowscale_const=1.5, prenorm=True,
        return_dropout_mask=True, **SUBSET,
    )  # fmt: skip
    assert y.shape == (4, COLS) and z.shape == (6, COLS) and mask.shape == (5, COLS)
    scaled = x0 if columns is None else x0 * columns
    expected = subset_by_hand(scaled, residual, weight, mask, p, 1.5)
    near((y, z), expected)
    leaves = [t for t in (x0, residual, weight, columns) if t is not None]
    found = torch.autograd.grad(y.sin().sum() + z.cos().sum(), leaves)
    wanted = torch.autograd.grad(expected[0].sin().sum() + expected[1].cos().sum(), leaves)
    near(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"x0_subset": torch.tensor([1, 6, 0, 0, 0, 0])}, "x0_subset: expected 0 (none) to 5"),
        ({"out_subset": torch.tensor([1, -1, 0, 0, 0, 0])}, "out_subset: expected 0 (none) to 4"),
        ({"out_numrows": 2}, "out_subset: expected 0 (none) to 2, the rows of the output"),
        ({"out_subset": None}, "out_subset: expected x0_subset and out_subset or neither"),
        ({"x0_subset": torch.zeros(3, dtype=torch.int32)}, "out_subset: expected 3 numbers"),
        ({"x0_subset": torch.zeros(6)}, "x0_subset: expected int32 or int64"),
        ({"layerscale": torch.ones(3)}, "layerscale: expected (24,)"),
        ({"residual": torch.ones(5, COLS)}, "residual: expected x's shape (6, 24), got (5, 24)"),
    ],
)
def test_mistakes_with_rows(change, text):
    arguments = {
        "x0": randn(5, COLS), "residual": randn(6, COLS), "weight": randn(COLS), "bias": None,
        "dropout_p": 0.0, "epsilon": 1e-5, **SUBSET,
    }  # fmt: skip
    with pytest.raises(RuntimeError) as error:
        ops_layer_norm.dropout_add_layer_norm_subset(**{**arguments, **change})
    assert text in str(error.value)


# ---- The extension: positional, no autograd, gradients from what the forward returned.


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype, sum_dtype", [(FP32, FP32), (BF16, FP32), (FP64, FP64)])
@pytest.mark.parametrize("subset, colscale, rowscale", [
    (False, False, False), (False, True, True), (True, True, False), (True, False, False),
])  # fmt: skip
def test_raw_functions(rms, p, dtype, sum_dtype, subset, colscale, rowscale):
    rows, wide = 6 if subset else 5, FP64 if dtype == FP64 else FP32
    x0, gamma, beta = randn(5, COLS, dtype=dtype), *(randn(COLS, dtype=wide) for _ in "gb")
    residual = randn(rows, COLS, dtype=sum_dtype)
    columns = randn(COLS, dtype=wide) if colscale else None
    scales = torch.rand(5, dtype=dtype) if rowscale else None
    subsets = (SUBSET["x0_subset"], SUBSET["out_subset"]) if subset else (None, None)
    z_rows = 4 if subset else 0
    constant = 1.5 if subset else 1.0
    z, x, dmask, mu, rsigma = dropout_layer_norm.dropout_add_ln_fwd(
        x0, residual, gamma, beta, scales, columns, *subsets, p, 1e-5, constant, z_rows, None,
        False, rms,
    )  # fmt: skip
    assert z.dtype == dtype and x.dtype == sum_dtype and x.shape == (rows, COLS)
    assert mu.shape == rsigma.shape == (rows,) and mu.dtype == wide
    assert (dmask is None) == (p == 0.0)
    dz, dx = torch.randn_like(z), torch.randn_like(x)
    found = dropout_layer_norm.dropout_add_ln_bwd(
        dz, dx, x, x0 if colscale else None, dmask, mu, rsigma, gamma, scales, columns, *subsets,
        p, constant, 5, True, rms,
    )  # fmt: skip
    assert len(found) == 6 + 2 * colscale

    leaves = [t.detach().to(wide).requires_grad_() for t in (x0, residual, gamma, beta)]
    leaves += [columns.clone().requires_grad_()] if colscale else []
    mask = torch.ones(5, COLS, dtype=wide) if dmask is None else dmask.to(wide)
    total = leaves[0] * mask / (1 - p) * constant
    total = total * scales[:, None] if rowscale else total
    total = total * leaves[4] if colscale else total
    if subset:
        total = F.pad(total, (0, 0, 1, 0))[SUBSET["x0_subset"].long()]
    total = total + leaves[1]
    y = F.rms_norm(total, (COLS,), None, 1e-5) if rms else F.layer_norm(total, (COLS,))
    y = y * leaves[2] + leaves[3]
    if subset:
        y = torch.zeros(5, COLS, dtype=wide).index_copy(0, SUBSET["out_subset"].long(), y)[1:]
    wanted = torch.autograd.grad((y * dz.to(wide)).sum() + (total * dx.to(wide)).sum(), leaves)
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype != BF16 else {"rtol": 0.03, "atol": 0.03}
    near(z.to(wide), y, **tolerance)
    near(x.to(wide), total, **tolerance)
    for gradient, expected, part in zip(found[:4], wanted, (None, None, *found[4:6])):
        near(gradient.to(wide), expected, **tolerance)
        assert part is None or torch.allclose(part.sum(0), gradient)
    assert found[0].dtype == dtype and found[1].dtype == sum_dtype
    if colscale:
        near(found[6], wanted[4], **tolerance)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("second", [False, True])
def test_raw_parallel_functions(rms, p, second):
    x0, residual, gamma0 = randn(5, COLS), randn(5, COLS), randn(COLS)
    x1, gamma1 = (randn(5, COLS), randn(COLS)) if second else (None, None)
    z0, z1, x, dmask0, dmask1, mu, rsigma = dropout_layer_norm.dropout_add_ln_parallel_residual_fwd(
        x0, x1, residual, gamma0, None, gamma1, None, p, 1e-5, None, False, rms
    )
    assert (z1 is None) == (not second) and (dmask1 is None) == (p == 0.0 or not second)
    dz0, dx = torch.randn_like(z0), torch.randn_like(x)
    dz1 = torch.randn_like(z0) if second else None
    found = dropout_layer_norm.dropout_add_ln_parallel_residual_bwd(
        dz0, dz1, dx, x, dmask0, dmask1, mu, rsigma, gamma0, gamma1, p, second, True, rms
    )
    assert len(found) == 11
    leaves = [t.clone().requires_grad_() for t in (x0, residual, gamma0)]
    leaves += [t.clone().requires_grad_() for t in (x1, gamma1)] if second else []
    total = leaves[0] * (1 if dmask0 is None else dmask0 / (1 - p)) + leaves[1]
    if second:
        total = total + leaves[3] * (1 if dmask1 is None else dmask1 / (1 - p))
    unit = F.rms_norm(total, (COLS,), None, 1e-5) if rms else F.layer_norm(total, (COLS,))
    loss = (unit * leaves[2] * dz0).sum() + (total * dx).sum()
    loss = loss + (unit * leaves[4] * dz1).sum() if second else loss
    dx0, dx1, dresidual, dgamma0, dbeta0, dgamma1, dbeta1 = found[:7]
    near([dx0, dresidual, dgamma0, *([dx1, dgamma1] if second else [])],
         list(torch.autograd.grad(loss, leaves)), rtol=1e-3, atol=1e-4)  # fmt: skip
    near(dbeta0, dz0.sum(0))
    assert second or (dx1 is None and dgamma1 is None and dbeta1 is None)
    if second:
        near(dbeta1, dz1.sum(0))


def test_raw_results_that_do_not_exist_are_none():
    x0, gamma = randn(5, COLS), randn(COLS)
    nothing = (None,) * 4
    z, x, dmask, mu, rsigma = dropout_layer_norm.dropout_add_ln_fwd(
        x0, None, gamma, None, *nothing, 0.0, 1e-5, 1.0, 0, None
    )
    assert x is None and dmask is None
    found = dropout_layer_norm.dropout_add_ln_bwd(
        z, None, x0, None, None, mu, rsigma, gamma, *nothing, 0.0, 1.0, 0, False
    )
    assert found[1] is None
    generators = [torch.Generator().manual_seed(2) for _ in "ab"]
    masks = [
        dropout_layer_norm.dropout_add_ln_fwd(
            x0, None, gamma, None, *nothing, 0.5, 1e-5, 1.0, 0, generator
        )[2]
        for generator in generators
    ]
    assert torch.equal(*masks) and masks[0].dtype == torch.uint8
    with pytest.raises(RuntimeError, match=r"dmask: expected the mask of the forward"):
        dropout_layer_norm.dropout_add_ln_bwd(
            z, None, x0, None, None, mu, rsigma, gamma, *nothing, 0.5, 1.0, 0, False
        )
    with pytest.raises(RuntimeError, match=r"x0: expected \(rows, columns\), got \(2, 5, 24\)"):
        dropout_layer_norm.dropout_add_ln_fwd(
            randn(2, 5, COLS), None, gamma, None, *nothing, 0.0, 1e-5, 1.0, 0, None
        )


def test_every_dtype():
    for dtype, weights in itertools.product((torch.float16, BF16, FP32), repeat=2):
        x = randn(3, COLS, dtype=dtype)
        y = ops_rms_norm.rms_norm(x, torch.ones(COLS, dtype=weights), 1e-5)
        assert y.dtype == dtype
        near(y.float(), F.rms_norm(x.float(), (COLS,), eps=1e-5), rtol=0.02, atol=0.02)
    x = randn(3, COLS, dtype=torch.float64)
    y = ops_layer_norm.layer_norm(x, torch.ones(COLS).double(), None, 1e-5)
    near(y, F.layer_norm(x, (COLS,)), rtol=1e-12, atol=1e-12)
