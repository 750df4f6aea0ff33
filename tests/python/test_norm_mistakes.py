"""What layer norm and RMS norm refuse, in which words; the same from both providers."""

from __future__ import annotations

import pytest
import torch
from flash_attn.ops.triton.layer_norm import layer_norm_linear_fn

import anyflash
from anyflash import _operators
from anyflash.norm import dropout_add_norm

pytestmark = pytest.mark.providers

X, W = torch.zeros(2, 3, 8), torch.ones(8)
MISTAKES = {
    "weight: expected (8,), x's last dimension, got (9,)": dict(weight=torch.ones(9)),
    "weight: expected (8,), x's last dimension, got (2, 4)": dict(weight=torch.ones(2, 4)),
    "bias: expected (8,)": dict(bias=torch.ones(1)),
    "weight1: expected (8,)": dict(weight1=torch.ones(7)),
    "bias1: expected weight1 with it": dict(bias1=W),
    "residual: expected x's shape (2, 3, 8), got (2, 8)": dict(residual=X[:, 0]),
    "x1: expected x's shape (2, 3, 8), got (3, 8)": dict(x1=X[0]),
    "x1: expected x's dtype fp32, got bf16": dict(x1=X.bfloat16()),
    "rowscale: expected 6 numbers, one per row of x (2, 3, 8), got (3,)": dict(
        rowscale=torch.ones(3)
    ),
    "rowscale is not supported with parallel LayerNorm": dict(x1=X, rowscale=torch.ones(2, 3)),
    "weight: expected fp16, bf16 or fp32 beside x of fp32, got fp64": dict(weight=W.double()),
    "residual: expected fp16, bf16 or fp32 beside x of fp32, got fp64": dict(residual=X.double()),
    "out_dtype: expected fp16, bf16 or fp32 beside x of fp32, got fp64": dict(
        out_dtype=torch.float64
    ),
    "residual_dtype: expected fp16, bf16 or fp32": dict(
        residual_dtype=torch.float64, return_residual=True
    ),
    "residual: expected fp16, bf16 or fp32 beside x of fp32, got int64": dict(residual=X.long()),
    "x: expected (..., columns) with at least one column, got (2, 0)": dict(
        x=torch.zeros(2, 0), weight=torch.zeros(0)
    ),
    "x: expected (..., columns) with at least one column, got ()": dict(x=torch.tensor(1.0)),
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_are_named(text):
    arguments = {"x": X, "weight": W, **MISTAKES[text]}
    with pytest.raises((RuntimeError, ValueError)) as error:
        dropout_add_norm(**arguments)
    assert text in str(error.value)


@pytest.mark.parametrize("p", [1.0, -0.1, 1.5, float("nan")])
def test_impossible_dropout(p):
    with pytest.raises(ValueError, match=r"dropout_p: expected a number in \[0, 1\), got"):
        dropout_add_norm(X, W, dropout_p=p)


def test_other_options():
    with pytest.raises(ValueError, match="eps: expected a number that is not negative, got -1"):
        anyflash.layer_norm(X, W, eps=-1.0)
    with pytest.raises(TypeError, match="weight: expected a torch.Tensor, got NoneType"):
        anyflash.rms_norm(X, None)
    with pytest.raises(ValueError, match="^x: expected fp16, bf16, fp32 or fp64, got torch.int64"):
        anyflash.rms_norm(X.long(), W)
    with pytest.raises(RuntimeError, match="weight: expected the device of x, got cpu"):
        anyflash.rms_norm(X.to("meta"), W)


@pytest.mark.parametrize(
    "weight, bias, message",
    [
        ((5, 7), None, r"linear_weight: expected \(out_features, 8\) .* got \(5, 7\)"),
        ((8,), None, r"linear_weight: expected \(out_features, 8\) .* got \(8,\)"),
        ((5, 8), (4,), r"linear_bias: expected \(5,\), .* got \(4,\)"),
        ((5, 8), (1, 5), r"linear_bias: expected \(5,\), .* got \(1, 5\)"),
    ],
)
def test_a_linear_layer_that_does_not_fit(weight, bias, message):
    bias = None if bias is None else torch.ones(bias)
    with pytest.raises(RuntimeError, match=message):
        layer_norm_linear_fn(X, W, None, torch.ones(weight), bias)


def test_a_refusal_tells_of_no_fallback(monkeypatch):
    told = []

    def choose(family, *rest):
        told.append(family)
        return chosen(family, *rest)

    chosen = _operators._core.choose
    monkeypatch.setattr(_operators._core, "choose", choose)
    _operators._is_kernel.cache_clear()
    integers, labels = torch.ones(2, 8, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    tables = torch.ones(4, 4)
    with anyflash.backend("kernel, math"):
        for refused in (
            lambda: anyflash.layer_norm(integers, W),
            lambda: anyflash.rotary(integers.view(1, 2, 1, 8), tables, tables),
            lambda: anyflash.cross_entropy(integers, labels),
        ):
            with pytest.raises((RuntimeError, ValueError), match="expected fp16, bf16, fp32 or"):
                refused()
        assert told == []
        anyflash.cross_entropy(integers.double(), labels)
    assert told == ["cross_entropy"]


# ---- The operators themselves: the same words from both providers.


def _forward_arguments(**changes):
    arguments = {
        "x": X, "residual": None, "x1": None, "weight": W, "bias": None, "weight1": None,
        "bias1": None, "rowscale": None, "dropout_mask": None, "dropout_mask1": None,
        "dropout_p": 0.0, "eps": 1e-5, "is_rms_norm": False, "zero_centered_weight": False,
        "out_dtype": 4, "residual_dtype": 0,
    }  # fmt: skip
    assert set(changes) <= set(arguments)
    return tuple({**arguments, **changes}.values())


def _backward_arguments(**changes):
    arguments = {
        "dy": X, "dy1": None, "dresidual_out": None, "z": X, "mean": X[..., 0], "rstd": X[..., 0],
        "weight": W, "bias": None, "weight1": None, "bias1": None, "rowscale": None,
        "dropout_mask": None, "dropout_mask1": None, "x": None, "dropout_p": 0.0,
        "is_rms_norm": False, "zero_centered_weight": False, "has_residual": False,
        "has_x1": False, "x_dtype": 4,
    }  # fmt: skip
    assert set(changes) <= set(arguments)
    return tuple({**arguments, **changes}.values())


BOOL = torch.ones(2, 3, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(dropout_mask=X), "dropout_mask: expected bool, got fp32"),
        (dict(dropout_mask=BOOL[0]), "dropout_mask: expected x's shape (2, 3, 8), got (3, 8)"),
        (dict(x1=X, dropout_mask=BOOL), "dropout_mask1: expected one where there are x1"),
        (dict(dropout_mask1=BOOL), "dropout_mask1: expected one where there are x1"),
        (dict(dropout_mask=BOOL, dropout_p=1.0), "dropout_p: expected a number in [0, 1), got 1"),
        (dict(out_dtype=3), "out_dtype: expected 1 (fp16), 2 (bf16), 4 (fp32) or 8 (fp64), got 3"),
        (dict(residual_dtype=-1), "residual_dtype: expected 1 (fp16)"),
        (
            dict(residual=X, residual_dtype=2),
            "residual: expected residual_out's dtype bf16, got fp32",
        ),
        (dict(x=X.long()), "x: expected fp16, bf16, fp32 or fp64, got int64"),
    ],
)
def test_mistakes_of_the_forward_operator(changes, text):
    with pytest.raises(RuntimeError) as error:
        torch.ops.anyflash.norm_forward(*_forward_arguments(**changes))
    assert text in str(error.value)


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(dy=X[0]), "dy: expected x's shape (2, 3, 8), got (3, 8)"),
        (dict(dy1=X), "dy1: expected weight1 with it, got dy1 alone"),
        (dict(dy1=X.bfloat16(), weight1=W), "dy1: expected dy's dtype fp32, got bf16"),
        (dict(dresidual_out=X.half()), "dresidual_out: expected z's dtype fp32, got fp16"),
        (dict(mean=X[0, :, 0]), "mean: expected 6 numbers, one per row of x (2, 3, 8), got (3,)"),
        (dict(rstd=X[..., 0].half()), "rstd: expected the statistics's dtype fp32, got fp16"),
        (dict(x_dtype=0), "x_dtype: expected 1 (fp16), 2 (bf16), 4 (fp32) or 8 (fp64), got 0"),
        (dict(x_dtype=8), "x_dtype: expected fp16, bf16 or fp32 beside x of fp32, got fp64"),
        (dict(weight=W[:7]), "weight: expected (8,), x's last dimension, got (7,)"),
        (
            dict(x=X.half(), rowscale=X[..., 0]),
            "x: expected dx's dtype fp32, got fp16",
        ),
        (dict(has_x1=True, rowscale=X[..., 0]), "rowscale is not supported with parallel"),
    ],
)
def test_mistakes_of_the_backward_operator(changes, text):
    with pytest.raises(RuntimeError) as error:
        torch.ops.anyflash.norm_backward(*_backward_arguments(**changes))
    assert text in str(error.value)
