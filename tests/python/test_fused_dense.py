"""FusedDense, FusedMLP, the MLP modules, fused_dense_lib and upstream's Triton linear layers."""

from __future__ import annotations

import inspect

import flash_attn.modules.mlp as mlps
import fused_dense_lib
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from benchmarks.measure import peak_bytes
from flash_attn.ops import fused_dense
from flash_attn.ops.triton.linear import triton_dgrad_act, triton_linear_act
from flash_attn.ops.triton.mlp import FusedDenseSqreluDense, fused_dense_sqrelu_dense_function

from anyflash.testing import DTYPES, assert_close

pytestmark = pytest.mark.providers

ACTIVATIONS = {
    "gelu_approx": lambda x: F.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "sqrelu": lambda x: torch.relu(x) ** 2,
}


def _gradients(function, tensors, gradient):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    given = [leaf for leaf in leaves if leaf is not None]
    return [out.detach(), *torch.autograd.grad(out, given, gradient.to(out.dtype))]


def _compare(function, reference, tensors, gradient):
    """Result and gradients within the error rule."""
    found = _gradients(function, tensors, gradient)
    low = _gradients(reference, tensors, gradient)
    wide = [None if t is None else t.double() for t in tensors]
    exact = _gradients(reference, wide, gradient.double())
    for number, results in enumerate(zip(found, exact, low)):
        assert results[0].dtype == tensors[0].dtype
        assert_close(*results, f"result {number}")


def _mlp_tensors(dtype, device, bias1=True, bias2=True, rows=(3, 5)):
    torch.manual_seed(0)
    make = {"device": device}
    tensors = [
        torch.randn(*rows, 20, **make),
        torch.randn(28, 20, **make) / 4,
        torch.randn(12, 28, **make) / 4,
        torch.randn(28, **make) if bias1 else None,
        torch.randn(12, **make) if bias2 else None,
    ]
    tensors = [None if t is None else t.to(dtype) for t in tensors]
    return tensors, torch.randn(*rows, 12, **make).to(dtype)


def _plain_mlp(activation):
    act = ACTIVATIONS[activation]
    return lambda x, w1, w2, b1, b2: F.linear(act(F.linear(x, w1, b1)), w2, b2)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_fused_mlp_func(level, activation, dtype, device):
    for biases in ((True, True), (False, True), (False, False)):
        tensors, gradient = _mlp_tensors(dtype, device, *biases)
        _compare(
            lambda *t: fused_dense.fused_mlp_func(
                *t, activation=activation, checkpoint_lvl=level, heuristic=-1
            ),
            _plain_mlp(activation),
            tensors,
            gradient,
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autograd_classes_without_a_group(activation, device):
    """Called by name and position, as upstream's own functions do."""
    (x, w1, w2, b1, b2), gradient = _mlp_tensors(torch.float32, device)
    for level in (0, 2):
        found = _gradients(
            lambda *t, level=level: fused_dense.FusedMLPFunc.apply(
                *t, activation, True, False, level, -1, None, True
            ),
            [x, w1, b1, w2, b2],
            gradient,
        )
        order = [x, w1, w2, b1, b2]
        out, dx, dw1, dw2, db1, db2 = _gradients(_plain_mlp(activation), order, gradient)
        torch.testing.assert_close(found, [out, dx, dw1, db1, dw2, db2])
    leaf = x.clone().requires_grad_()
    out, residual = fused_dense.FusedDenseFunc.apply(leaf, w1, b1, True)
    (out.sum() + 3 * residual.sum()).backward()
    torch.testing.assert_close(leaf.grad, w1.sum(0).expand_as(leaf) + 3)
    leaf = x.clone().requires_grad_()
    out, residual = fused_dense.FusedMLPFunc.apply(leaf, w1, b1, w2, b2, activation, True, True)
    (0 * out.sum() + 3 * residual.sum()).backward()
    torch.testing.assert_close(leaf.grad, torch.full_like(leaf, 3))


def _reference_of(module, activation):
    model = nn.Sequential(module.fc1, nn.Identity(), module.fc2)
    act = ACTIVATIONS[activation]
    return lambda x: model[2](act(model[0](x)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_fused_mlp_module(activation, training, device):
    torch.manual_seed(0)
    model = mlps.FusedMLP(16, activation=activation, device=device).train(training)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {
        "fc1.weight": (64, 16),
        "fc1.bias": (64,),
        "fc2.weight": (16, 64),
        "fc2.bias": (16,),
    }
    x = torch.randn(2, 7, 16, device=device)
    torch.testing.assert_close(model(x), _reference_of(model, activation)(x))


def test_same_draws_as_two_linear_layers():
    """Initialisation and state dict are those of nn.Linear, in the order fc1, fc2."""
    for cls, options in (
        (mlps.FusedMLP, {"activation": "relu"}),
        (mlps.Mlp, {}),
        (FusedDenseSqreluDense, {}),
    ):
        torch.manual_seed(5)
        model = cls(12, 40, 8, **options)
        torch.manual_seed(5)
        layers = {"fc1": nn.Linear(12, 40), "fc2": nn.Linear(40, 8)}
        expected = {f"{n}.{k}": v for n, m in layers.items() for k, v in m.state_dict().items()}
        assert list(model.state_dict()) == list(expected)
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected[name]), (cls, name)


def test_zero_means_the_default_in_fused_mlp_alone():
    """As upstream: `or` in FusedMLP, `is not None` in Mlp."""
    assert mlps.FusedMLP(8, 0).fc1.out_features == 32
    with pytest.warns(UserWarning, match="zero-element"):
        assert mlps.Mlp(8, 0).fc1.out_features == 0


@pytest.mark.parametrize(
    ("given", "width"), [(None, 384), (100, 128), (128, 128), (129, 256), (300, 384)]
)
def test_gated_mlp_rounds_hidden_features_up(given, width):
    model = mlps.GatedMlp(128, given)
    assert model.fc1.out_features == 2 * width and model.fc2.in_features == width
    assert mlps.GatedMlp(128, 100, multiple_of=10).fc2.in_features == 100
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"multiple_of: expected 1 or more, got {wrong}"):
            mlps.GatedMlp(128, given, multiple_of=wrong)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["sigmoid", "silu", "gelu", "relu"])
def test_gated_mlp(name, dtype, device):
    torch.manual_seed(0)
    act = getattr(F, name)
    model = mlps.GatedMlp(16, 24, activation=act, multiple_of=8, device=device).to(dtype)
    weights = [p.detach() for p in model.parameters()]

    def reference(x, w1, b1, w2, b2):
        y, gate = F.linear(x, w1, b1).chunk(2, dim=-1)
        return F.linear(y * act(gate), w2, b2)

    def ours(x, *parameters):
        named = dict(zip([n for n, _ in model.named_parameters()], parameters))
        return torch.func.functional_call(model, named, x)

    x = torch.randn(4, 5, 16, device=device).to(dtype)
    _compare(ours, reference, [x, *weights], torch.randn(4, 5, 16, device=device).to(dtype))


def test_mlp_applies_its_modules(device):
    """Layers that a client wraps or hooks are called, unlike in FusedMLP, which takes weights."""
    for model in (mlps.Mlp(8, device=device), mlps.GatedMlp(8, activation=F.silu, device=device)):
        calls = []
        for layer in (model.fc1, model.fc2):
            layer.register_forward_hook(lambda m, *_, calls=calls: calls.append(m))
        model(torch.randn(3, 8, device=device))
        assert calls == [model.fc1, model.fc2]


def test_the_residual_is_the_input_itself(device):
    x = torch.randn(3, 8, device=device)
    for model in (
        fused_dense.FusedDense(8, 4, return_residual=True, device=device),
        mlps.FusedMLP(8, return_residual=True, device=device),
        mlps.Mlp(8, return_residual=True, device=device),
        mlps.GatedMlp(8, return_residual=True, device=device),
    ):
        out, residual = model(x)
        assert residual is x
        assert out.shape == (3, 4 if isinstance(model, fused_dense.FusedDense) else 8)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_fused_dense(dtype, device):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, 12), torch.randn(7, 12), torch.randn(7)
    x, weight, bias = (t.to(device, dtype) for t in (x, weight, bias))
    gradient = torch.randn(2, 5, 7, device=device).to(dtype)
    for given in ([x, weight, bias], [x, weight, None]):
        _compare(fused_dense.fused_dense_func, F.linear, given, gradient)
        _compare(fused_dense.FusedDenseFunc.apply, F.linear, given, gradient)
    layer = fused_dense.FusedDense(12, 7, device=device, dtype=dtype)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_frozen_parameters_get_no_gradient(device):
    for needed in range(3):
        leaves = [torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)]
        leaves = [t.to(device).requires_grad_(i == needed) for i, t in enumerate(leaves)]
        fused_dense.FusedDenseFunc.apply(*leaves).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == needed for i in range(3)]


@pytest.mark.parametrize("rows", [(0,), (3, 0), (0, 3)])
@pytest.mark.parametrize("level", [0, 2])
def test_zero_rows(rows, level, device):
    """An empty result, and gradients 0 for the weights."""
    for model in (
        mlps.FusedMLP(8, checkpoint_lvl=level, device=device),
        mlps.GatedMlp(8, activation=F.silu, device=device),
        fused_dense.FusedDense(8, 8, device=device),
        FusedDenseSqreluDense(8, checkpoint_lvl=level, device=device),
    ):
        x = torch.randn(*rows, 8, device=device, requires_grad=True)
        out = model(x)
        assert out.shape == (*rows, 8)
        out.sum().backward()
        assert x.grad.shape == x.shape
        assert all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("level", [0, 2])
def test_autocast(level, device):
    """fp32 modules compute in autocast's dtype; gradients arrive in fp32."""
    torch.manual_seed(0)
    x = torch.randn(4, 16, device=device)
    models = [mlps.FusedMLP(16, checkpoint_lvl=level), fused_dense.FusedDense(16, 16)]
    models += [mlps.GatedMlp(16, activation=F.silu), mlps.Mlp(16)]
    for model in models:
        model.to(device)
        leaf = x.clone().requires_grad_()
        with torch.autocast(device, torch.bfloat16):
            out = model(leaf)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        assert leaf.grad.dtype == torch.float32
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
        half = {n: p.detach().bfloat16() for n, p in model.named_parameters()}
        expected = torch.func.functional_call(model, half, x.bfloat16())
        torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", ["FusedDenseFunc", "FusedMLPFunc"])
def test_autograd_classes_under_autocast(name, device):
    """custom_fwd and custom_bwd: on every device, where upstream looks at CUDA alone."""
    (x, w1, w2, b1, b2), _ = _mlp_tensors(torch.float32, device)
    given = [x, w1, b1] if name == "FusedDenseFunc" else [x, w1, b1, w2, b2]
    leaves = [t.clone().requires_grad_() for t in given]
    function = getattr(fused_dense, name).apply
    with torch.autocast(device, torch.bfloat16):
        out = function(*leaves)
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out.float().sum(), leaves)
    assert {g.dtype for g in gradients} == {torch.float32}
    low = [t.bfloat16().requires_grad_() for t in given]
    expected = torch.autograd.grad(function(*low).float().sum(), low)
    torch.testing.assert_close(gradients, tuple(g.float() for g in expected))


def _second_derivative(function, *leaves):
    (dx,) = torch.autograd.grad(function(*leaves).sum(), leaves[:1], create_graph=True)
    return torch.autograd.grad(dx.square().sum(), leaves)


def test_second_derivatives_are_right_or_refused(device):
    """Also where the incoming gradient is a constant, as that of a plain sum."""
    (x, w1, w2, b1, b2), _ = _mlp_tensors(torch.float64, device)
    leaves = [t.clone().requires_grad_() for t in (x, w1)]
    found = _second_derivative(lambda x, w: fused_dense.fused_dense_func(x, w).square(), *leaves)
    expected = _second_derivative(lambda x, w: F.linear(x, w).square(), *leaves)
    torch.testing.assert_close(found, expected)
    model = mlps.GatedMlp(20, activation=F.silu, dtype=torch.float64, device=device)
    for function in (
        lambda x, w: fused_dense.FusedDenseFunc.apply(x, w, None),
        lambda x, w: fused_dense.fused_mlp_func(x, w, w2),
        lambda x, w: fused_dense.FusedMLPFunc.apply(x, w, b1, w2, b2),
        lambda x, w: fused_dense_sqrelu_dense_function(x, w, b1, w2, b2),
        lambda x, w: model(x),
    ):
        with pytest.raises(RuntimeError, match="no second derivative"):
            _second_derivative(function, *leaves)


def test_recomputation_keeps_nothing_of_the_hidden_width(device):
    for level, training, kept in ((0, True, True), (1, True, True), (2, True, False)):
        model = mlps.FusedMLP(8, 100, checkpoint_lvl=level, device=device).train(training)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: (saved.append(tuple(t.shape)), t)[1], lambda t: t
        ):
            model(torch.randn(50, 8, device=device))
        assert ((50, 100) in saved) == kept


def test_recomputation_takes_little_memory(device, provider):
    """The goal of benchmarks/bench_mlp.py, at a sixteenth of the size."""
    if device != "cpu" or provider != "binary":
        pytest.skip("about the CPU's memory; the Python operators compute half precision in fp32")
    layers = [nn.Linear(192, 768), nn.GELU(approximate="tanh"), nn.Linear(768, 192)]
    plain = nn.Sequential(*layers).bfloat16()
    fused = mlps.FusedMLP(192, 768, checkpoint_lvl=2).bfloat16()
    x = torch.randn(512, 192).bfloat16().requires_grad_()

    def peak(model):
        return peak_bytes(lambda: torch.autograd.grad(model(x).sum(), [x, *model.parameters()]))

    assert peak(fused) < 0.6 * peak(plain)


def test_modules_compile(device, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    models = [mlps.FusedMLP(8, 16), mlps.FusedMLP(8, 16, checkpoint_lvl=2)]
    models += [mlps.GatedMlp(8, 16, activation=F.silu), fused_dense.FusedDense(8, 8)]
    for model in models:
        model.to(device)
        x = torch.randn(3, 8, device=device)
        results = []
        for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            leaf = x.clone().requires_grad_()
            out = call(leaf)
            results.append((out.detach(), *torch.autograd.grad(out.sum(), [leaf])))
        torch.testing.assert_close(*results)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "gelu"}, "activation: expected one of gelu_approx, relu, sqrelu, got 'gel"),
        ({"activation": F.gelu}, "activation: expected one of gelu_approx, relu, sqrelu"),
        ({"checkpoint_lvl": 3}, "checkpoint_lvl: expected 0, 1 or 2, got 3"),
        ({"checkpoint_lvl": -1}, "checkpoint_lvl: expected 0, 1 or 2, got -1"),
        ({"heuristic": 5}, "heuristic: expected 'auto' or -1 to 4, got 5"),
        ({"heuristic": "best"}, "heuristic: expected 'auto' or -1 to 4, got 'best'"),
    ],
)
def test_options_that_do_not_exist(options, message):
    tensors, _ = _mlp_tensors(torch.float32, "cpu")
    for call in (
        lambda: fused_dense.fused_mlp_func(*tensors, **options),
        lambda: fused_dense.FusedMLP(8, **options),
        lambda: fused_dense.ParallelFusedMLP(8, process_group=object(), **options),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_sizes_that_do_not_fit(device):
    x, weight = torch.randn(3, 8, device=device), torch.randn(4, 8, device=device)
    dense = fused_dense.fused_dense_func
    for call, message in (
        (
            lambda: dense(x[:, :7], weight),
            r"x: expected \(..., 8\) for weight \(4, 8\), got \(3, 7",
        ),
        (lambda: dense(x, weight[0]), r"x: expected .* for weight \(8,\)"),
        (lambda: dense(x[0, 0], weight), r"x: expected \(..., 8\).*got \(\)"),
        (lambda: dense(x, weight, x[0]), r"bias: expected \(4,\), the rows of weight, got \(8,\)"),
        (lambda: dense(x, weight.double()), "weight: expected x's dtype torch.float32, got"),
        (lambda: dense(x, weight.to("meta")), "weight: expected x's device .*, got meta"),
        (lambda: triton_linear_act(x, weight, activation="tanh"), "activation: expected one of"),
        (lambda: triton_dgrad_act(x, weight), r"x: expected \(..., 4\)"),
        (
            lambda: triton_dgrad_act(x[:, :4], weight, "gelu"),
            r"act_input: expected \(3, 8\) .* None",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    model = mlps.FusedMLP(8, device=device)
    with pytest.raises(RuntimeError, match=r"weight1: expected \(hidden, 7\) for x \(3, 7\)"):
        model(x[:, :7])
    with pytest.raises(RuntimeError, match="weight1: expected x's dtype bf16, got fp32"):
        model(x.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("is_gelu", [True, False], ids=["gelu", "relu"])
def test_raw_functions(is_gelu, dtype, device):
    """The extension's three functions are one MLP's forward and backward."""
    torch.manual_seed(0)
    x, w1, b1 = torch.randn(6, 20), torch.randn(16, 20) / 4, torch.randn(16)
    w2, gradient = torch.randn(12, 16) / 4, torch.randn(6, 12)
    x, w1, b1, w2, gradient = (t.to(device, dtype) for t in (x, w1, b1, w2, gradient))
    act = ACTIVATIONS["gelu_approx" if is_gelu else "relu"]

    def ours(x, w1, b1, w2):
        return _RawMLP.apply(x, w1, b1, w2, is_gelu)

    _compare(
        ours,
        lambda x, w1, b1, w2: F.linear(act(F.linear(x, w1, b1)), w2),
        [x, w1, b1, w2],
        gradient,
    )
    saved = fused_dense_lib.linear_act_forward(x, w1, None, is_gelu, True, 0)
    assert saved[1].dtype == (dtype if is_gelu else torch.uint8)
    assert saved[1].shape == (6, 16 if is_gelu else 2)
    (alone,) = fused_dense_lib.linear_act_forward(x, w1, None, is_gelu, False, 0)
    assert torch.equal(alone, saved[0])
    assert fused_dense_lib.linear_bias_wgrad(x, gradient, False)[1] is None


class _RawMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, is_gelu):
        hidden, pre_act = fused_dense_lib.linear_act_forward(x, w1, b1, is_gelu, True, 0)
        ctx.save_for_backward(x, w1, w2, hidden, pre_act)
        ctx.is_gelu = is_gelu
        return F.linear(hidden, w2)

    @staticmethod
    def backward(ctx, dout):
        x, w1, w2, hidden, pre_act = ctx.saved_tensors
        dw2, _ = fused_dense_lib.linear_bias_wgrad(hidden, dout, True)
        arguments = (w2, dout, pre_act, ctx.is_gelu, 0)
        dz, db1 = fused_dense_lib.bias_act_linear_dgrad_bgrad(*arguments)
        dw1, db1_again = fused_dense_lib.linear_bias_wgrad(x, dz, True)
        assert torch.equal(db1, db1_again)
        return dz @ w1, dw1, db1, dw2, None


def test_raw_functions_refuse_what_does_not_fit():
    x, w = torch.randn(6, 20), torch.randn(16, 20)
    forward, wgrad = fused_dense_lib.linear_act_forward, fused_dense_lib.linear_bias_wgrad
    dgrad = fused_dense_lib.bias_act_linear_dgrad_bgrad
    for call, message in (
        (lambda: forward(x[0], w, None, True, True, 0), r"input: expected a floating matrix, got"),
        (lambda: forward(x, w[:, :9], None, True, True, 0), r"weight must have shape \(16, 20\)"),
        (lambda: forward(x, w, x[0], True, True, 0), r"bias must have shape \(16,\)"),
        (lambda: forward(x, w[:9], None, False, True, 0), "expected a multiple of 8, got 9"),
        (lambda: wgrad(x, w, True), r"d_output must have shape \(6, 20\)"),
        (lambda: wgrad(x, x.double(), True), "d_output must have .* dtype torch.float32"),
        (lambda: dgrad(w, x[:, :16], x, False, 0), r"pre_act: *|multiple of 8, got 20"),
        (lambda: dgrad(w.t(), x, x, True, 0), r"pre_act must have shape \(6, 16\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    kinds = [p.kind for p in inspect.signature(forward).parameters.values()]
    assert set(kinds) == {inspect.Parameter.POSITIONAL_ONLY}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["id", "gelu", "gelu_approx", "squared_relu"])
def test_triton_linear(name, dtype, device):
    torch.manual_seed(0)
    act = {"id": lambda x: x, "gelu": F.gelu, "squared_relu": ACTIVATIONS["sqrelu"]}
    act["gelu_approx"] = ACTIVATIONS["gelu_approx"]
    x, weight, bias = torch.randn(2, 6, 12), torch.randn(7, 12), torch.randn(7)
    x, weight, bias = (t.to(device, dtype) for t in (x, weight, bias))
    gradient = torch.randn(2, 6, 7, device=device).to(dtype)
    _compare(
        lambda x, w, b: triton_linear_act(x, w, b, activation=name),
        lambda x, w, b: act[name](F.linear(x, w, b)),
        [x, weight, bias],
        gradient,
    )
    out, act_input = triton_linear_act(x, weight, bias, name, save_act_input=True)
    torch.testing.assert_close(act_input, F.linear(x, weight, bias))
    assert out.shape == act_input.shape == (2, 6, 7)

    def after(z, w):
        return F.linear(act[name](z), w.t())

    second, upstream = weight, torch.randn(2, 6, 12, device=device).to(dtype)
    z = act_input.detach()
    exact = _gradients(after, [z.double(), second.double()], upstream.double())[1]
    low = _gradients(after, [z, second], upstream)[1]
    found = triton_dgrad_act(upstream, second.t().contiguous(), name, z)
    assert_close(found, exact, low, f"dgrad {name}")


@pytest.mark.parametrize("level", [0, 1, 2])
def test_fused_dense_sqrelu_dense(level, device):
    (x, w1, w2, b1, b2), gradient = _mlp_tensors(torch.float32, device)
    reference = _plain_mlp("sqrelu")
    _compare(
        lambda x, w1, b1, w2, b2: fused_dense_sqrelu_dense_function(x, w1, b1, w2, b2, level),
        lambda x, w1, b1, w2, b2: reference(x, w1, w2, b1, b2),
        [x, w1, b1, w2, b2],
        gradient,
    )
    model = FusedDenseSqreluDense(20, 28, 12, checkpoint_lvl=level, device=device)
    out = model(x)
    weights = (model.fc1.weight, model.fc2.weight, model.fc1.bias, model.fc2.bias)
    torch.testing.assert_close(out, reference(x, *weights))
