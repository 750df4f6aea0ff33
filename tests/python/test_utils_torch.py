"""flash_attn.utils.torch and flash_attn.utils.library: autocast of own Functions, own operators."""

from __future__ import annotations

import pytest
import torch
from flash_attn.utils.library import triton_op
from flash_attn.utils.torch import custom_amp_decorator, custom_bwd, custom_fwd
from support import run_python


class _Product(torch.autograd.Function):
    """x @ w, noting in which dtype its directions compute."""

    seen: list[torch.dtype] = []

    @staticmethod
    @custom_fwd
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        out = x @ w
        _Product.seen.append(out.dtype)
        return out

    @staticmethod
    @custom_bwd
    def backward(ctx, dout):
        x, w = ctx.saved_tensors
        dx = dout @ w.t()
        _Product.seen.append(dx.dtype)
        return dx, x.t() @ dout


def test_the_backward_computes_under_the_autocast_of_its_forward(device):
    _Product.seen = []
    leaves = [torch.randn(4, 4, device=device, requires_grad=True) for _ in range(2)]
    with torch.autocast(device, torch.bfloat16):
        out = _Product.apply(*leaves)
    out.sum().backward()
    assert _Product.seen == [torch.bfloat16, torch.bfloat16]
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)
    out = _Product.apply(*leaves)
    with torch.autocast(device, torch.bfloat16):
        out.sum().backward()
    assert _Product.seen[2:] == [torch.float32, torch.float32]


def test_cast_inputs(device):
    class Cast(torch.autograd.Function):
        @staticmethod
        @custom_fwd(cast_inputs=torch.float64)
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @custom_bwd
        def backward(ctx, dout):
            return dout * 2

    x = torch.ones(2, device=device)
    assert Cast.apply(x).dtype == torch.float32
    with torch.autocast(device, torch.bfloat16):
        assert Cast.apply(x).dtype == torch.float64


def test_decorators_of_torch_that_know_cuda_alone():
    """torch before 2.4: what is given is returned."""
    assert custom_amp_decorator(custom_bwd, False) is custom_bwd


def test_custom_fwd_keeps_the_name():
    assert _Product.forward.__name__ == "forward"


def test_triton_op(tmp_path):
    """Runs, differentiates by what is registered, and compiles without being looked into."""
    code = """
import torch
from flash_attn.utils.library import triton_op

@triton_op("af_test::scaled", mutates_args=())
def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor

def add_one_(x): x.add_(1)
add_one_ = triton_op(
    "af_test::add_one_", add_one_, mutates_args={"x"}, schema="(Tensor(a!) x) -> ()",
    allow_decomposition=False,
)
scaled.register_autograd(
    lambda ctx, dy: (dy * ctx.factor, None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "factor", inputs[1]),
)
assert torch.ops.af_test.add_one_.default._schema.is_mutable

def run(x):
    y = scaled(x, 3.0)
    z = y.detach().clone()
    add_one_(z)
    return y, z

compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
for call in (run, compiled):
    x = torch.ones(2, requires_grad=True)
    y, z = call(x)
    y.sum().backward()
    print(y.tolist(), z.tolist(), x.grad.tolist())
"""
    lines = run_python(code, TORCHINDUCTOR_CACHE_DIR=str(tmp_path)).split("\n")
    assert lines[:2] == ["[3.0, 3.0] [4.0, 4.0] [3.0, 3.0]"] * 2


def test_triton_op_says_which_torch_it_needs(monkeypatch):
    monkeypatch.delattr(torch.library, "custom_op")
    with pytest.raises(ImportError, match="triton_op needs torch 2.4 or newer, this is"):
        triton_op("af_test::nothing", lambda x: x, mutates_args=())
