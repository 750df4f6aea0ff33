"""Bias + activation and the fused MLP: both directions, saved or recomputed, all activations."""

from __future__ import annotations

import functools
import math
import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import anyflash
from anyflash.testing import DTYPES, assert_close

pytestmark = pytest.mark.providers


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _silu_gate(x: Tensor) -> Tensor:
    u, g = x.chunk(2, -1)
    return u * g * torch.sigmoid(g)


ACTIVATIONS = {
    "gelu_tanh": _gelu_tanh,
    "gelu_erf": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "relu": torch.relu,
    "squared_relu": lambda x: torch.relu(x) ** 2,
    "silu_gate": _silu_gate,
}
HALF_TYPES = ("fp16", "bf16", "fp32")


def _differentiate(function, tensors: dict, gradient: Tensor | None) -> tuple[Tensor, dict]:
    leaves = {n: None if x is None else x.detach().requires_grad_() for n, x in tensors.items()}
    out = function(**leaves)
    if gradient is None:
        return out.detach(), {}
    given = [n for n, x in leaves.items() if x is not None]
    found = torch.autograd.grad(out, [leaves[n] for n in given], gradient.to(out.dtype))
    return out.detach(), dict(zip(given, found))


def _compare(function, reference, tensors: dict, gradient: Tensor, what: str) -> None:
    """Holds function's result and gradients to the error rule."""
    dtype = next(iter(tensors.values())).dtype
    out, gradients = _differentiate(function, tensors, gradient)
    results = []
    for compute in (torch.float64, dtype):
        cast = {n: None if x is None else x.detach().to(compute) for n, x in tensors.items()}
        results.append(_differentiate(reference, cast, gradient))
    (exact, exact_gradients), (low, low_gradients) = results
    assert out.dtype == dtype
    assert_close(out, exact, low, f"{what} out")
    assert gradients.keys() == exact_gradients.keys()
    for name, found in gradients.items():
        assert_close(found, exact_gradients[name], low_gradients[name], f"{what} d{name}")


@pytest.mark.parametrize("dtype", [*HALF_TYPES, "fp64"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "plain"])
def test_bias_activation(activation, dtype, with_bias, device):
    torch.manual_seed(0)
    act = ACTIVATIONS[activation]
    for shape in ((5, 3, 24), (7, 10), (64,), (0, 8), (2, 4100)):
        x = torch.randn(shape, device=device).mul(2).to(DTYPES[dtype])
        bias = torch.randn(shape[-1], device=device).to(x) if with_bias else None
        width = shape[-1] // 2 if activation == "silu_gate" else shape[-1]
        dy = torch.randn(*shape[:-1], width, device=device).to(x)
        _compare(
            lambda x, bias: anyflash.bias_activation(x, bias, activation=activation),
            lambda x, bias: act(x if bias is None else x + bias),
            {"x": x, "bias": bias},
            dy,
            f"{activation} {shape}",
        )


def test_bias_activation_of_strided_rows(device):
    wide = torch.randn(6, 5, 40, device=device)
    for x in (wide[..., 3:27], wide.transpose(0, 1), wide[::2], wide.transpose(1, 2)):
        bias = torch.randn(x.size(-1), device=device)
        expected = F.gelu(x + bias, approximate="tanh")
        torch.testing.assert_close(
            anyflash.bias_activation(x, bias, activation="gelu_tanh"), expected
        )


def test_bias_activation_of_extremes(device):
    x = torch.tensor([-1e4, -60.0, -0.0, 0.0, 60.0, 1e4], device=device, requires_grad=True)
    for activation in ("gelu_tanh", "gelu_erf", "relu"):
        y = anyflash.bias_activation(x, activation=activation)
        torch.testing.assert_close(y, torch.relu(x))
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert dx.isfinite().all()
        assert dx[0] == dx[1] == 0 and dx[-1] == dx[-2] == 1


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernel_and_operators_agree_on_every_kind_of_number(activation, dtype, device):
    """Zero, infinity and NaN come out alike whoever computes."""
    largest = torch.finfo(DTYPES[dtype]).max
    kinds = [0.0, -0.0, 1.0, -3.0, 20.0, -20.0, 200.0, -200.0, math.inf, -math.inf, math.nan]
    kinds += [] if dtype == "fp32" else [largest, -largest]  # in fp32 their squares overflow
    z = torch.tensor(kinds, device=device).to(DTYPES[dtype]).repeat(7)
    x = torch.cat([torch.ones_like(z), z]) if activation == "silu_gate" else z
    results = []
    for backend in ("auto", "math"):
        with anyflash.backend(backend):
            leaf = x.clone().requires_grad_()
            y = anyflash.bias_activation(leaf, activation=activation)
            y.sum().backward()
            results.append((y.detach(), leaf.grad))
    tolerance = 4 * torch.finfo(DTYPES[dtype]).eps
    torch.testing.assert_close(
        *results, equal_nan=True, atol=max(tolerance, 1e-6), rtol=max(tolerance, 1e-5)
    )


def test_any_number_of_threads_gives_the_same_bits(device):
    if device != "cpu":
        pytest.skip("about the CPU")
    torch.manual_seed(2)
    x, bias, dy = torch.randn(700, 301), torch.randn(301), torch.randn(700, 301)
    act = functools.partial(anyflash.bias_activation, activation="gelu_erf")
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaves = {"x": x, "bias": bias}
            results.append(_differentiate(act, leaves, dy))
    finally:
        torch.set_num_threads(before)
    for y, gradients in results[1:]:
        assert torch.equal(y, results[0][0])
        for name, gradient in gradients.items():
            assert torch.equal(gradient, results[0][1][name]), name


def _mlp_tensors(activation: str, dtype: str, biases: tuple[bool, bool], device: str) -> dict:
    torch.manual_seed(1)
    rows = 56 if activation == "silu_gate" else 28
    make = {"device": device}
    tensors = {
        "x": torch.randn(3, 5, 20, **make),
        "weight1": torch.randn(rows, 20, **make) / 4,
        "bias1": torch.randn(rows, **make) if biases[0] else None,
        "weight2": torch.randn(12, 28, **make) / 4,
        "bias2": torch.randn(12, **make) if biases[1] else None,
    }
    return {n: None if x is None else x.to(DTYPES[dtype]) for n, x in tensors.items()}


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
def test_fused_mlp(activation, dtype, recompute, device):
    act = ACTIVATIONS[activation]
    for biases in ((True, True), (False, False), (True, False)):
        tensors = _mlp_tensors(activation, dtype, biases, device)
        dout = torch.randn(3, 5, 12, device=device).to(DTYPES[dtype])
        _compare(
            lambda **t: anyflash.fused_mlp(**t, activation=activation, recompute=recompute),
            lambda x, weight1, bias1, weight2, bias2: F.linear(
                act(F.linear(x, weight1, bias1)), weight2, bias2
            ),
            tensors,
            dout,
            f"{activation} {dtype} biases {biases}",
        )


def test_fused_mlp_recompute_equals_saved(device):
    tensors = _mlp_tensors("gelu_tanh", "fp32", (True, True), device)
    dout = torch.randn(3, 5, 12, device=device)
    runs = [
        _differentiate(lambda r=r, **t: anyflash.fused_mlp(**t, recompute=r), tensors, dout)
        for r in (False, True)
    ]
    torch.testing.assert_close(runs[0], runs[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slices_of_the_recomputation_are_the_whole(activation, device):
    """The backward recomputes the hidden features in slices, here of 150, 150, 150 and 148."""
    torch.manual_seed(3)
    make = {"device": device, "dtype": torch.float64}
    hidden = 598
    rows = 2 * hidden if activation == "silu_gate" else hidden
    for bias in (True, False):
        tensors = {
            "x": torch.randn(7, 16, **make),
            "weight1": torch.randn(rows, 16, **make),
            "bias1": torch.randn(rows, **make) if bias else None,
            "weight2": torch.randn(9, hidden, **make).t().contiguous().t(),
            "bias2": torch.randn(9, **make) if bias else None,
        }
        dout = torch.randn(7, 9, **make)
        saved, recomputed = (
            _differentiate(
                lambda r=r, **t: anyflash.fused_mlp(**t, activation=activation, recompute=r),
                tensors,
                dout,
            )
            for r in (False, True)
        )
        torch.testing.assert_close(recomputed, saved)


def test_fused_mlp_takes_any_leading_dimensions(device):
    tensors = _mlp_tensors("relu", "fp32", (True, True), device)
    x = tensors.pop("x")
    whole = anyflash.fused_mlp(x, **tensors, activation="relu")
    assert whole.shape == (3, 5, 12)
    flat = anyflash.fused_mlp(x.reshape(15, 20), **tensors, activation="relu")
    torch.testing.assert_close(whole.reshape(15, 12), flat)
    one = anyflash.fused_mlp(x[0, 0], **tensors, activation="relu")
    torch.testing.assert_close(one, flat[0])
    assert anyflash.fused_mlp(x[:0], **tensors, activation="relu").shape == (0, 5, 12)


def test_fused_mlp_partial_gradients(device):
    tensors = _mlp_tensors("gelu_tanh", "fp32", (True, True), device)
    for needed in tensors:
        leaves = {n: x.clone().requires_grad_(n == needed) for n, x in tensors.items()}
        anyflash.fused_mlp(**leaves).sum().backward()
        assert [n for n, x in leaves.items() if x.grad is not None] == [needed]


def test_recompute_keeps_no_hidden_layer(device):
    """recompute=True saves nothing of the hidden width for the backward."""
    rows, width = 64, 512
    x = torch.randn(rows, 8, device=device, requires_grad=True)
    weights = [
        torch.randn(width, 8, device=device),
        None,
        torch.randn(8, width, device=device),
        None,
    ]
    for recompute in (False, True):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: (saved.append(tuple(t.shape)), t)[1], lambda t: t
        ):
            anyflash.fused_mlp(x, *weights, recompute=recompute)
        assert ((rows, width) in saved) == (not recompute), saved


def test_half_precision_on_the_cpu_is_not_slow(device):
    """PyTorch's own fp16 matrix product on CPUs reaches a few hundred MFLOP/s on many machines."""
    if device != "cpu":
        pytest.skip("about the CPU")

    def seconds(dtype):
        x = torch.randn(256, 512, dtype=dtype)
        w1, w2 = torch.randn(1024, 512, dtype=dtype), torch.randn(512, 1024, dtype=dtype)
        q, k, v = (torch.randn(1, 512, 4, 64, dtype=dtype) for _ in range(3))
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            anyflash.fused_mlp(x, w1, None, w2, None)
            anyflash.attention(q, k, v)
            anyflash.attention(q, k, v, softcap=10.0)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(torch.float16) < 8 * seconds(torch.float32)
