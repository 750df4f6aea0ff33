"""Fused MLP and bias + activation, from plain operators. Half precision is widened, so that only
the result is rounded."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _core
from . import without_core
from .checks import check, check_same_device, dtype_text, shape_text
from .arguments import DTYPE_NAMES

#: Names in the order of their numbers in the schemas.
ACTIVATIONS = ("gelu_tanh", "gelu_erf", "relu", "squared_relu", "silu_gate")
_GELU_TANH, _GELU_ERF, _RELU, _SQUARED_RELU, _SILU_GATE = range(5)


def activation_number(name: str) -> int:
    """The number of an activation's name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got '{name}'")
    return ACTIVATIONS.index(name)


def _check_activation(activation: int) -> None:
    if not 0 <= activation < len(ACTIVATIONS):
        raise ValueError(f"activation: expected 0 to {len(ACTIVATIONS) - 1}, got {activation}")


def _inputs_per_output(activation: int) -> int:
    return 2 if activation == _SILU_GATE else 1


def _check_floating(x: Tensor) -> None:
    check(x.dtype in DTYPE_NAMES, f"x: expected fp16, bf16, fp32 or fp64, got {dtype_text(x)}")


def _check_like_x(tensor: Tensor, name: str, x: Tensor) -> None:
    check(
        tensor.dtype == x.dtype,
        f"{name}: expected x's dtype {dtype_text(x)}, got {dtype_text(tensor)}",
    )
    check_same_device(x, "x", tensor, name)


def _validate_bias_activation(x: Tensor, bias: Tensor | None, activation: int) -> None:
    _check_activation(activation)
    _check_floating(x)
    check(
        1 <= x.dim() <= 7,
        f"x: expected (..., columns), 1 to 7 dimensions, got {shape_text(x)}",
    )
    check(
        x.shape[-1] % _inputs_per_output(activation) == 0,
        f"x: silu_gate halves the last dimension, expected an even size, got {shape_text(x)}",
    )
    if bias is None:
        return
    check(
        bias.dtype == x.dtype,
        f"bias: expected x's dtype {dtype_text(x)}, got {dtype_text(bias)}",
    )
    check(
        bias.shape == (x.shape[-1],),
        f"bias: expected ({x.shape[-1]},), x's last dimension, got {shape_text(bias)}",
    )
    check_same_device(x, "x", bias, "bias")


def _decide(x: Tensor, direction: str, backend: int) -> None:
    """There is one way to compute it here; a chain without it is refused, and the fallback told."""
    if _core.library is None:
        without_core.choose("bias_activation", backend)
    else:
        _core.choose(x, "bias_activation", direction, backend)


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _input(x: Tensor, bias: Tensor | None) -> Tensor:
    return _widened(x) if bias is None else _widened(x) + bias


def _activated(z: Tensor, activation: int) -> Tensor:
    if activation in (_GELU_TANH, _GELU_ERF):
        return F.gelu(z, approximate="tanh" if activation == _GELU_TANH else "none")
    if activation == _RELU:
        return z.relu()
    if activation == _SQUARED_RELU:
        return z.relu().square()
    u, gate = z.chunk(2, -1)
    return u * F.silu(gate)


def _activation_gradient(dy: Tensor, z: Tensor, activation: int) -> Tensor:
    if activation in (_GELU_TANH, _GELU_ERF):
        kind = "tanh" if activation == _GELU_TANH else "none"
        return torch.ops.aten.gelu_backward(dy, z, approximate=kind)
    if activation == _RELU:
        return dy.masked_fill(z <= 0, 0.0)
    if activation == _SQUARED_RELU:
        return dy * z.relu() * 2.0
    u, gate = z.chunk(2, -1)
    return torch.cat((dy * F.silu(gate), torch.ops.aten.silu_backward(dy * u, gate)), dim=-1)


def bias_activation(x: Tensor, bias: Tensor | None, activation: int, backend: int) -> Tensor:
    """schemas.def."""
    _validate_bias_activation(x, bias, activation)
    _decide(x, "forward", backend)
    return _fresh(_activated(_input(x, bias), activation).to(x.dtype), x)


def _fresh(result: Tensor, x: Tensor) -> Tensor:
    """Contiguous, and never x itself: operators return new tensors."""
    result = result.contiguous()
    return result.clone() if result is x else result


def bias_activation_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, activation: int, backend: int
) -> tuple[Tensor, Tensor]:
    """schemas.def."""
    _validate_bias_activation(x, bias, activation)
    check(dy.dtype == x.dtype, f"dy: expected x's dtype {dtype_text(x)}, got {dtype_text(dy)}")
    shape = (*x.shape[:-1], x.shape[-1] // _inputs_per_output(activation))
    check(
        dy.shape == shape,
        f"dy: expected the shape of y for x {shape_text(x)}, got {shape_text(dy)}",
    )
    check_same_device(x, "x", dy, "dy")
    _decide(x, "backward", backend)
    z = _input(x, bias)
    dz = _activation_gradient(dy.to(z.dtype), z, activation)
    dx = _fresh(dz.to(x.dtype), dy)
    if bias is None:
        return dx, x.new_empty(0)
    dbias = dz.reshape(-1, dz.shape[-1]).sum(0) if dz.numel() else dz.new_zeros(bias.shape)
    return dx, dbias.to(x.dtype)


def _validate_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: int,
) -> None:
    _check_activation(activation)
    _check_floating(x)
    check(x.dim() >= 1, f"x: expected (..., in_features), got {shape_text(x)}")
    features = x.shape[-1]
    _check_like_x(weight1, "weight1", x)
    _check_like_x(weight2, "weight2", x)
    check(
        weight1.dim() == 2 and weight1.shape[1] == features,
        f"weight1: expected (hidden, {features}) for x {shape_text(x)}, got {shape_text(weight1)}",
    )
    per_output = _inputs_per_output(activation)
    check(
        weight1.shape[0] % per_output == 0,
        "weight1: silu_gate halves the hidden features, expected an even number of rows, got ",
        shape_text(weight1),
    )
    hidden = weight1.shape[0] // per_output
    check(
        weight2.dim() == 2 and weight2.shape[1] == hidden,
        f"weight2: expected (out, {hidden}) for weight1 {shape_text(weight1)}, ",
        f"got {shape_text(weight2)}",
    )
    for bias, name, weight in ((bias1, "bias1", weight1), (bias2, "bias2", weight2)):
        if bias is not None:
            _check_like_x(bias, name, x)
            check(
                bias.shape == (weight.shape[0],),
                f"{name}: expected ({weight.shape[0]},), the rows of weight{name[-1]}, ",
                f"got {shape_text(bias)}",
            )


def _widen(x: Tensor) -> Tensor:
    """PyTorch multiplies fp16 matrices on the CPU two orders of magnitude slower than fp32 ones."""
    return x.float() if x.device.type == "cpu" and x.dtype == torch.float16 else x


def _widen_optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else _widen(x)


def fused_mlp_forward(
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
    _validate_mlp(x, weight1, bias1, weight2, bias2, activation)
    dtype = x.dtype
    hidden = F.linear(_widen(x), _widen(weight1))
    activated = bias_activation(hidden, _widen_optional(bias1), activation, backend)
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
    dweight2 = drows.t() @ bias_activation(z, b1, activation, backend)
    dz, dbias1 = bias_activation_backward(drows @ w2, z, b1, activation, backend)
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
    per_output, hidden = _inputs_per_output(activation), w2.shape[1]
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


def fused_mlp_backward(
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
    _validate_mlp(x, weight1, bias1, weight2, None, activation)
    _check_like_x(dout, "dout", x)
    check(
        dout.shape == (*x.shape[:-1], weight2.shape[0]),
        f"dout: expected x's shape {shape_text(x)} with last dimension {weight2.shape[0]}, ",
        f"got {shape_text(dout)}",
    )
    saved = hidden.numel() > 0 and hidden.shape == (*x.shape[:-1], weight1.shape[0])
    check(
        saved or hidden.numel() == 0,
        f"hidden: expected x's shape {shape_text(x)} with last dimension {weight1.shape[0]}, ",
        f"or an empty tensor, got {shape_text(hidden)}",
    )

    count = x.shape[:-1].numel()

    def as_rows(tensor: Tensor) -> Tensor:
        return _widen(tensor).reshape(count, tensor.shape[-1])

    rows, drows, w1, w2 = as_rows(x), as_rows(dout), _widen(weight1), _widen(weight2)
    b1 = _widen_optional(bias1)
    if saved:
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
