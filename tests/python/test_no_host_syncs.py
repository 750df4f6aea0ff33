"""Nobody waits for a GPU, so every call can be part of a CUDA graph: on fake tensors of a CUDA
device, where a read is an error. stand_in_checks.py counts reads where the operators compute
something, backward included."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from graph_cases import CASES, Inputs, results
from support import inputs_of, torch_version
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from anyflash._python_ops.arguments import AttentionArgs, BackwardArgs
from anyflash._python_ops.attention import ROUTES
from anyflash.testing import CORRECTNESS

pytestmark = [
    pytest.mark.skipif(torch_version() < 210, reason="aten's attention has other arguments"),
    pytest.mark.filterwarnings("ignore"),
]

READS_A_LENGTH = "max_seqlen tensor"  # a number that the caller left on the device


class NoCopies(TorchDispatchMode):
    """An error for what copies between the host and a device: a CUDA graph cannot."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)]
        written = [out] if isinstance(out, torch.Tensor) else []
        kinds = {x.device.type for x in (*given, *written) if x.dim() or x.device.type == "cuda"}
        assert len(kinds) <= 1, f"{func} copies between {kinds}"
        return out


def _on_cuda(x):
    if not isinstance(x, torch.Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")


def _call(name):
    case = CASES[name]
    function = case.function
    inputs = Inputs(*case.inputs(5, 22))
    with FakeTensorMode():
        if case.module is not None:
            with torch.device("cuda"):
                function = functools.partial(function, case.module())
        leaves = [_on_cuda(x).requires_grad_() for x in inputs.leaves]
        others = [_on_cuda(x) for x in inputs.others]
        with NoCopies():
            return results(function(*leaves, *others))


@pytest.mark.parametrize("name", [name for name in CASES if READS_A_LENGTH not in name])
def test_public_functions(name):
    found = _call(name)
    assert {x.device.type for x in found} == {"cuda"}


@pytest.mark.parametrize("name", [name for name in CASES if READS_A_LENGTH in name])
def test_a_length_on_the_device_is_read(name):
    """Guards the test above."""
    with pytest.raises(DataDependentOutputException):
        _call(name)


# ---- The routes through PyTorch's CUDA routines, which a fake of an operator does not reach.

CASES_OF_ROUTES = {
    "aten_flash": ("causal_fp16", "gqa_bf16_causal", "dense_fp16", "packed_bf16_causal"),
    "aten_efficient": ("causal_fp16", "bias_full", "packed_causal", "packed_seqused", "leftpad"),
    "math": ("causal", "softcap", "alibi", "packed_causal", "packed_dropout", "packed_seqused"),
}


def _arguments(inputs):
    given = dict.fromkeys(field.name for field in dataclasses.fields(AttentionArgs))
    options = dict(inputs.options)
    causal = options.pop("causal", False)
    given["window_left"], given["window_right"] = options.pop("window_size", (-1, -1))
    given.update(zip("qkv", inputs.qkv), return_lse=True, max_seqlen_q=0, max_seqlen_k=0)
    given.update(dropout_p=0.0, softmax_scale=0.3, softcap=0.0)
    given.update(options)
    args = AttentionArgs(**{name: _on_cuda(x) for name, x in given.items()})
    args.normalise(causal)
    return args, _on_cuda(inputs.dout)


@pytest.mark.parametrize(
    "route, name", [(route, name) for route, names in CASES_OF_ROUTES.items() for name in names]
)
def test_routes(route, name):
    case = next(case for case in CORRECTNESS if case.name == name)
    inputs = inputs_of(case, "cpu")
    with FakeTensorMode():
        args, dout = _arguments(inputs)
        with NoCopies():
            out, lse = ROUTES[route].forward(args)
            assert out.shape == args.q.shape and out.device.type == "cuda"
            if route == "aten_efficient":  # torch 2.13's fake of its backward lacks one
                return
            grad = BackwardArgs(dout, out, lse, None, False, args.bias is not None, False)
            gradients = ROUTES[route].backward(args, grad)
    for x, like in ((gradients.dq, args.q), (gradients.dk, args.k), (gradients.dv, args.v)):
        assert x.shape == like.shape and x.device.type == "cuda"
