"""flash_attn.ops.activations and ops.triton.k_activations: values, gradients, dtypes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from flash_attn.ops import activations
from flash_attn.ops.triton import k_activations

from anyflash.testing import DTYPES, assert_close


def _gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _gelu_erf(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def _slope(function, x, g):
    """The gradient of function at x for the gradient g of its result, in fp64."""
    leaf = x.detach().double().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf, g.double())[0]


def _assert_rounded(found, exact, dtype):
    """Within some roundings in fp32, and one in the dtype of the result."""
    assert found.dtype == dtype and found.shape == exact.shape
    eps = torch.finfo(dtype).eps
    tolerance = eps if eps > 1e-4 else 16 * eps
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gelu(dtype, device):
    torch.manual_seed(0)
    x, g = (torch.randn(6, 33, device=device).to(dtype) for _ in range(2))
    _assert_rounded(activations.gelu_fwd(x), _gelu_tanh(x.double()), dtype)
    _assert_rounded(activations.gelu_bwd(g, x), _slope(_gelu_tanh, x, g), dtype)
    leaf = x.detach().clone().requires_grad_()
    activations.fast_gelu_impl(leaf).backward(g)
    torch.testing.assert_close(leaf.grad, activations.gelu_bwd(g, x))


@pytest.mark.parametrize("shape", [(6, 33), (2, 3, 33), (0, 33)])
def test_bias_gelu(shape, device):
    torch.manual_seed(1)
    y, g = torch.randn(shape, device=device), torch.randn(shape, device=device)
    bias = torch.randn(shape[-1], device=device)
    leaves = [t.detach().double().requires_grad_() for t in (y, bias)]
    expected = _gelu_tanh(leaves[0] + leaves[1])
    gradients = torch.autograd.grad(expected, leaves, g.double())
    torch.testing.assert_close(activations.bias_gelu(y, bias).double(), expected)
    for found, exact in zip(activations.bias_gelu_back(g, y, bias), gradients):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    leaves = [t.clone().requires_grad_() for t in (y, bias)]
    out = activations.bias_gelu_impl(*leaves)
    torch.testing.assert_close(out.double(), expected)
    for found, exact in zip(torch.autograd.grad(out, leaves, g), gradients):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_bias_gelu_of_two_dtypes_keeps_each():
    y, bias = torch.randn(4, 8).bfloat16(), torch.randn(8)
    out = activations.bias_gelu(y, bias)
    dy, dbias = activations.bias_gelu_back(torch.ones_like(out), y, bias)
    assert (out.dtype, dy.dtype, dbias.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_relu_and_its_square(dtype, device):
    x = torch.tensor([-2.0, -0.0, 0.0, 3.0], device=device).to(dtype)
    g = torch.tensor([5.0, 6.0, 7.0, 8.0], device=device).to(dtype)
    assert activations.relu_bwd(g, x).tolist() == [0, 6, 7, 8]  # upstream's choice at 0
    assert activations.sqrelu_fwd(x).tolist() == [0, 0, 0, 9]
    assert activations.sqrelu_bwd(g, x).tolist() == [0, 0, 0, 48]
    for found in (
        activations.relu_bwd(g, x),
        activations.sqrelu_fwd(x),
        activations.sqrelu_bwd(g, x),
    ):
        assert found.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_swiglu(dtype, device):
    torch.manual_seed(2)
    x, y, g = (torch.randn(5, 40, device=device).mul(3).to(dtype) for _ in range(3))
    leaves = [t.detach().double().requires_grad_() for t in (x, y)]
    expected = F.silu(leaves[0]) * leaves[1]
    gradients = torch.autograd.grad(expected, leaves, g.double())
    _assert_rounded(activations.swiglu_fwd(x, y), expected.detach(), dtype)
    for found, exact in zip(activations.swiglu_bwd(x, y, g), gradients):
        _assert_rounded(found, exact, dtype)
    leaves = [t.clone().requires_grad_() for t in (x, y)]
    out = activations.swiglu(*leaves)
    for found, exact in zip(torch.autograd.grad(out, leaves, g), gradients):
        _assert_rounded(found, exact, dtype)


def test_swiglu_of_halves_is_the_gated_operator():
    import anyflash

    halves = torch.randn(7, 24)
    y, gate = halves.chunk(2, dim=-1)
    expected = anyflash.bias_activation(halves, activation="silu_gate")
    torch.testing.assert_close(activations.swiglu(gate, y), expected)


def test_swiglu_refuses_integers_and_shapes_that_do_not_fit():
    x, integers = torch.randn(3, 4), torch.ones(3, 4, dtype=torch.int32)
    for arguments, message in (
        ((integers, x), "x: expected a floating dtype, got torch.int32"),
        ((x, integers), "y: expected a floating dtype, got torch.int32"),
        ((x, x[:, :3]), r"y: expected a shape that broadcasts with x \(3, 4\), got \(3, 3\)"),
    ):
        for function in (activations.swiglu, activations.swiglu_fwd):
            with pytest.raises(ValueError, match=message):
                function(*arguments)
        with pytest.raises(ValueError, match=message):
            activations.swiglu_bwd(*arguments, x)
    row = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(activations.swiglu, (x.double().requires_grad_(), row))


@pytest.mark.parametrize("name", ["swiglu", "fast_gelu_impl", "bias_gelu_impl"])
def test_gradients_and_their_gradients(name):
    torch.manual_seed(3)
    shapes = {"swiglu": [(3, 4), (3, 4)], "fast_gelu_impl": [(3, 4)]}
    shapes["bias_gelu_impl"] = [(3, 4), (4,)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes[name]]
    function = getattr(activations, name)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


EXACT = {
    "relu": torch.relu,
    "leaky_relu": lambda x: torch.where(x >= 0, x, 0.01 * x),
    "gelu": _gelu_erf,
    "gelu_approx": _gelu_tanh,
    "squared_relu": lambda x: torch.relu(x) ** 2,
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", EXACT)
def test_activations_by_name(name, dtype, device):
    torch.manual_seed(4)
    x = torch.randn(300, device=device).to(dtype)
    ones = torch.ones_like(x)
    low = EXACT[name](x)
    for activation in (name, k_activations.Activation(name)):
        forward = k_activations.get_triton_activation_kernel(activation)
        backward = k_activations.get_triton_activation_bwd_kernel(activation)
        assert_close(forward(x), EXACT[name](x.double()), low, name)
        slope = _slope(EXACT[name], x, ones)
        assert_close(backward(x), slope, slope.to(dtype), f"slope of {name}")
        assert forward(x).dtype == backward(x).dtype == dtype


def test_names_of_activations():
    assert k_activations.get_triton_activation_kernel(None) is None
    assert k_activations.get_triton_activation_bwd_kernel(None) is None
    assert k_activations.Activation.SquaredReLU == "squared_relu"
    with pytest.raises(ValueError, match="activation: expected one of squared_relu, .*'swish'"):
        k_activations.get_triton_activation_kernel("swish")
