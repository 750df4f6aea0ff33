"""Fused MLP and bias + activation: checks and the decision are the core's; where no kernel runs,
plain operators do, which widen half precision so that only the result is rounded."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _core, _records, _threads
from .._activations import ACTIVATIONS, inputs_per_output
from . import without_core

_GELU_TANH, _GELU_ERF, _RELU, _SQUARED_RELU, _ = range(len(ACTIVATIONS))


def _prepare(
    x: Tensor, bias: Tensor | None, dy: Tensor | None, activation: int, backend: int
) -> tuple[_records.BiasActivationCall, _records.Choice | None]:
    """Checks and decides; None without the core: plain operators."""
    if _core.library is None:
        without_core.prepare_bias_activation(x, bias, dy, activation, backend)
        return _records.BiasActivationCall(), None
    call = _records.new(_records.BiasActivationCall)
    for name, tensor in (("x", x), ("bias", bias), ("dy", dy)):
        _records.put(call, name, tensor)
    call.activation = activation
    return call, _core.prepare_bias_activation(call, backend)


# ---- The route `kernel`.


def _put_converted(call: _records.BiasActivationCall, *tensors: tuple[str, Tensor | None]) -> list:
    """Makes the views what a kernel reads; returns what has to live until it has run."""
    kept = []
    for name, tensor in tensors:
        if tensor is not None:
            kept.append(_core.as_matrix(tensor))
            _records.put(call, name, kept[-1])
    return kept


def _run_forward(
    choice: _records.Choice, call: _records.BiasActivationCall, x: Tensor, bias: Tensor | None
) -> Tensor:
    y = x.new_empty((*x.shape[:-1], x.shape[-1] // inputs_per_output(call.activation)))
    if y.numel() == 0:
        return y
    kept = _put_converted(call, ("x", x), ("bias", bias))
    results = _records.new(_records.BiasActivationResults)
    _records.put(results, "y", y)
    _threads.run("bias_activation", choice.instance, x, call, results)
    del kept
    return y


def _run_backward(
    choice: _records.Choice,
    call: _records.BiasActivationCall,
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape)
    dbias = x.new_empty(0 if bias is None else bias.shape)
    if x.numel() == 0:
        return dx, dbias.zero_()
    kept = _put_converted(call, ("x", x), ("bias", bias), ("dy", dy))
    results = _records.new(_records.BiasActivationResults)
    _records.put(results, "dx", dx)
    if bias is not None:
        _records.put(results, "dbias", dbias)
        rows, columns = x.shape[:-1].numel(), dy.shape[-1]
        size = _core.bias_activation_workspace(rows, columns, call.activation)
        kept.append(x.new_empty(size, dtype=torch.uint8))
        results.workspace = kept[-1].data_ptr()
    _threads.run("bias_activation", choice.instance, x, call, results)
    del kept
    return dx, dbias


# ---- Plain operators.


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _input(x: Tensor, bias: Tensor | None) -> Tensor:
    return _widened(x) if bias is None else _widened(x) + bias


# GELU is z * Phi(z), written out as in csrc: PyTorch's own gives NaN at infinity.
_TANH_SCALE = 2 * math.sqrt(2 / math.pi)  # (1 + tanh(t / 2)) / 2 = sigmoid(t)
_TANH_CUBIC = 0.044715


def _gelu_probability(z: Tensor, activation: int) -> Tensor:
    if activation == _GELU_ERF:
        return 0.5 + 0.5 * torch.erf(z * math.sqrt(0.5))
    return torch.sigmoid(z * (_TANH_SCALE + z * z * (_TANH_SCALE * _TANH_CUBIC)))


def _gelu_derivative(z: Tensor, activation: int) -> Tensor:
    p = _gelu_probability(z, activation)
    if activation == _GELU_ERF:
        return p + z * torch.exp(z * z * -0.5) / math.sqrt(2 * math.pi)
    # p' = p (1 - p) t', multiplied in an order in which 0 meets infinity only where z itself
    # overflows.
    slope = _TANH_SCALE + z * z * (3 * _TANH_SCALE * _TANH_CUBIC)
    return (1 + (1 - p) * slope * z) * p


def _activated(z: Tensor, activation: int) -> Tensor:
    if activation in (_GELU_TANH, _GELU_ERF):
        return z * _gelu_probability(z, activation)
    if activation == _RELU:
        return z.relu()
    if activation == _SQUARED_RELU:
        return z.relu().square()
    u, gate = z.chunk(2, -1)
    return u * F.silu(gate)


def _activation_gradient(dy: Tensor, z: Tensor, activation: int) -> Tensor:
    if activation in (_GELU_TANH, _GELU_ERF):
        return dy * _gelu_derivative(z, activation)
    if activation == _RELU:
        return dy.masked_fill(z <= 0, 0.0)
    if activation == _SQUARED_RELU:
        return dy * z.relu() * 2.0
    u, gate = z.chunk(2, -1)
    return torch.cat((dy * F.silu(gate), torch.ops.aten.silu_backward(dy * u, gate)), dim=-1)


def _bias_activation_forward(
    x: Tensor, bias: Tensor | None, activation: int, backend: int
) -> Tensor:
    """schemas.def."""
    call, choice = _prepare(x, bias, None, activation, backend)
    if choice is not None and choice.route == "kernel":
        return _run_forward(choice, call, x, bias)
    return _fresh(activate(x, bias, activation), x)


def activate(x: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    """act(x + bias) in PyTorch operations, in x's dtype."""
    return _activated(_input(x, bias), activation).to(x.dtype)


def _fresh(result: Tensor, x: Tensor) -> Tensor:
    """Contiguous, and never x itself: operators return new tensors."""
    result = result.contiguous()
    return result.clone() if result is x else result


def _bias_activation_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, activation: int, backend: int
) -> tuple[Tensor, Tensor]:
    """schemas.def."""
    call, choice = _prepare(x, bias, dy, activation, backend)
    if choice is not None and choice.route == "kernel":
        return _run_backward(choice, call, dy, x, bias)
    z = _input(x, bias)
    dz = _activation_gradient(dy.to(z.dtype), z, activation)
    dx = _fresh(dz.to(x.dtype), dy)
    if bias is None:
        return dx, x.new_empty(0)
    dbias = dz.reshape(-1, dz.shape[-1]).sum(0) if dz.numel() else dz.new_zeros(bias.shape)
    return dx, dbias.to(x.dtype)


def _check_mlp(activation: int, **tensors: Any) -> None:
    if _core.library is None:
        without_core.check_fused_mlp(**tensors)
        return
    call = _records.new(_records.MlpCall)
    for name, tensor in tensors.items():
        _records.put(call, name, tensor)
    call.activation = activation
    _core.check_fused_mlp(call)


def _widen(x: Tensor) -> Tensor:
    """PyTorch multiplies fp16 matrices on the CPU two orders of magnitude slower than fp32 ones."""
    return x.float() if x.device.type == "cpu" and x.dtype == torch.float16 else x


def _widen_optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else _widen(x)


def _fused_mlp_forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: int,
    save_hidden: bool,
    backend: int,
) -> tuple[Tensor, Tensor]:
    """schemas.def."""
    _check_mlp(activation, x=x, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2)
    dtype = x.dtype
    hidden = F.linear(_widen(x), _widen(weight1))
    activated = _bias_activation_forward(hidden, _widen_optional(bias1), activation, backend)
    hidden = hidden.to(dtype) if save_hidden else x.new_empty(0)
    return F.linear(activated, _widen(weight2), _widen_optional(bias2)).to(dtype), hidden


#: dx, dweight1, dbias1 (empty without bias1), dweight2.
_Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def _differentiate(
    drows: Tensor,
    rows: Tensor,
    z: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    activation: int,
    backend: int,
) -> _Gradients:
    """From act's input before its bias, z (rows, per_output * hidden)."""
    dweight2 = drows.t() @ _bias_activation_forward(z, b1, activation, backend)
    dz, dbias1 = _bias_activation_backward(drows @ w2, z, b1, activation, backend)
    del z  # a recomputed one is held by nobody else
    return dz @ w1, dz.t() @ rows, dbias1, dweight2


def _recompute(
    drows: Tensor,
    rows: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    activation: int,
    backend: int,
) -> _Gradients:
    """The same where z was not saved.

    An MLP is a sum over slices of its hidden features: going through them one by one, no tensor of
    the hidden width is ever whole. More slices would save little more and round dx, their sum, more
    often.
    """
    slices = 4
    per_output, hidden = inputs_per_output(activation), w2.shape[1]
    dx = torch.zeros_like(rows)
    dweight1 = rows.new_empty(per_output, hidden, rows.shape[1])
    dbias1 = rows.new_empty(per_output, 0 if b1 is None else hidden)
    dweight2 = rows.new_empty(w2.shape)
    width = -(-hidden // slices)
    for start in range(0, hidden, width or 1):
        part = slice(start, start + width)
        w1_part = w1.unflatten(0, (per_output, hidden))[:, part].flatten(0, 1)
        b1_part = None if b1 is None else b1.reshape(per_output, hidden)[:, part].flatten()
        part_dx, part_dweight1, part_dbias1, dweight2[:, part] = _differentiate(
            drows, rows, F.linear(rows, w1_part), w1_part, b1_part, w2[:, part], activation, backend
        )
        dx += part_dx
        dweight1[:, part] = part_dweight1.unflatten(0, (per_output, -1))
        if b1 is not None:
            dbias1[:, part] = part_dbias1.unflatten(0, (per_output, -1))
    return dx, dweight1.flatten(0, 1), dbias1.flatten(), dweight2


def _fused_mlp_backward(
    dout: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    hidden: Tensor,
    bias2_requires_grad: bool,
    activation: int,
    backend: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """schemas.def."""
    _check_mlp(
        activation, x=x, weight1=weight1, bias1=bias1, weight2=weight2, dout=dout, hidden=hidden
    )
    count = x.shape[:-1].numel()

    def as_rows(tensor: Tensor) -> Tensor:
        return _widen(tensor).reshape(count, tensor.shape[-1])

    rows, drows, w1, w2 = as_rows(x), as_rows(dout), _widen(weight1), _widen(weight2)
    b1 = _widen_optional(bias1)
    if hidden.numel() > 0:
        found = _differentiate(drows, rows, as_rows(hidden), w1, b1, w2, activation, backend)
    else:
        found = _recompute(drows, rows, w1, b1, w2, activation, backend)
    dx, dweight1, dbias1, dweight2 = found
    dbias2 = drows.sum(0).to(x.dtype) if bias2_requires_grad else x.new_empty(0)
    dtype = x.dtype
    return (
        dx.view(x.shape).to(dtype),
        dweight1.to(dtype),
        dbias1.to(dtype),
        dweight2.to(dtype),
        dbias2,
    )
