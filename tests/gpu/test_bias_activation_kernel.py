"""The bias + activation kernel against float64: activations, dtypes, directions, awkward shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import anyflash

ACTIVATIONS = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_erf": F.gelu,
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),
    "silu_gate": lambda x: x.chunk(2, -1)[0] * F.silu(x.chunk(2, -1)[1]),
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SHAPES = ((1, 2), (3, 10), (7, 130), (64, 1000), (5, 4098), (70000, 8), (2, 3, 256))
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-6}


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (result.double() - expected).norm()
    return (difference / expected.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("with_bias", (True, False), ids=("bias", "nobias"))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_float64(activation, dtype, shape, with_bias):
    torch.manual_seed(0)
    dtype = DTYPES[dtype]
    x = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
    bias = (
        torch.randn(shape[-1], device="cuda", dtype=dtype, requires_grad=True)
        if with_bias
        else None
    )

    y = anyflash.bias_activation(x, bias, activation=activation, backend="kernel")
    dy = torch.randn_like(y)
    y.backward(dy)

    exact = [t.detach().double().requires_grad_() for t in (x, bias) if t is not None]
    expected = ACTIVATIONS[activation](sum(exact))
    expected.backward(dy.double())
    assert relative_error(y, expected.detach()) < TOLERANCE[dtype]
    assert relative_error(x.grad, exact[0].grad) < TOLERANCE[dtype]
    if bias is not None:
        assert relative_error(bias.grad, exact[1].grad) < TOLERANCE[dtype]


def test_rows_with_a_stride():
    wide = torch.randn(33, 3, 96, device="cuda", dtype=torch.float16)
    x = wide[:, 1]
    result = anyflash.bias_activation(x, None, activation="relu", backend="kernel")
    torch.testing.assert_close(result, F.relu(x))


def test_runs_on_the_current_stream():
    x = torch.zeros(1 << 20, 16, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # keeps the side stream busy while the kernel is queued
        x.fill_(1.0)
        y = anyflash.bias_activation(x, None, activation="relu", backend="kernel")
    side.synchronize()
    assert (y == 1).all()


def test_the_backward_repeats_bit_by_bit():
    x = torch.randn(513, 320, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(320, device="cuda", dtype=torch.bfloat16)
    gradients = []
    for _ in range(3):
        leaf = bias.clone().requires_grad_()
        y = anyflash.bias_activation(x, leaf, activation="gelu_tanh", backend="kernel")
        gradients.append(torch.autograd.grad(y.sum(), leaf)[0])
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_input():
    x = torch.randn(8, 64, device="cuda:1")
    result = anyflash.bias_activation(x, None, activation="relu", backend="kernel")
    torch.testing.assert_close(result, F.relu(x))
