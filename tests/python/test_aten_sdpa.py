"""PyTorch's public attention as a route: what devices get for which this library has nothing of its
own. The CPU stands in for them, with its exact lengths and with padded batches."""

from __future__ import annotations

import pytest
import torch
from support import expected_of, features_of, inputs_of

import anyflash
from anyflash import _defs
from anyflash.testing import CORRECTNESS, assert_close

pytestmark = pytest.mark.providers

ROUTE = next(e.fields for e in _defs.entries("routes") if e.fields[0] == "aten_sdpa")
FORWARD, BACKWARD = (_defs.features(column) for column in ROUTE[-2:])


def _fits(case, features) -> bool:
    return {*features_of(case)} <= features


CASES = [case for case in CORRECTNESS if _fits(case, FORWARD)]
TRAINED = [case for case in CASES if case.differentiable and _fits(case, BACKWARD)]


@pytest.fixture(params=["by sequence", "padded"])
def layout(request, monkeypatch):
    """Padded: as on a device whose lengths are not read."""
    from anyflash._python_ops import batches

    if request.param == "padded":
        monkeypatch.setattr(batches, "runs_of", lambda *problem: [batches.padded_batch(*problem)])
    return request.param


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward(case):
    inputs = inputs_of(case, "cpu")
    out = anyflash.attention(*inputs.qkv, **inputs.options, backend="aten_sdpa")
    expected = expected_of(case, "cpu")
    assert_close(out, expected.exact["out"], expected.low["out"], case.name)
    assert out.stride() == anyflash.attention(*inputs.qkv, **inputs.options).stride()


@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case.name)
def test_training(case, layout):
    inputs = inputs_of(case, "cpu")
    leaves = {n: x.detach().requires_grad_() for n, x in inputs.differentiable().items()}
    options = {n: leaves.get(n, x) for n, x in inputs.options.items()}
    q, k, v = (leaves[n] for n in "qkv")
    out = anyflash.attention(q, k, v, **options, backend="aten_sdpa")
    assert "AttentionFunction" not in type(out.grad_fn).__name__
    gradients = torch.autograd.grad(out, tuple(leaves.values()), inputs.dout)
    expected = expected_of(case, "cpu", gradients=True, dlse=False)
    for name, x in {"out": out.detach(), **dict(zip(leaves, gradients))}.items():
        what = f"{case.name} {name}, {layout}"
        assert_close(x, expected.exact[name], expected.low[name], what)


def test_all_layouts_are_here():
    assert {case.layout for case in CASES} == {"dense", "packed", "paged", "packed_paged"}
    assert len(CASES) > 30 and len(TRAINED) > 25


@pytest.mark.parametrize("page_size", [None, 4])
def test_cache(page_size):
    lengths = torch.tensor([3, 7], dtype=torch.int32)
    table = None if page_size is None else torch.tensor([[3, 0, 4], [1, 2, 5]], dtype=torch.int32)
    shape = (2, 12) if page_size is None else (6, page_size)
    q, k, v = torch.randn(2, 3, 4, 16), torch.randn(2, 2, 2, 16), torch.randn(2, 2, 2, 16)
    caches = [torch.randn(*shape, 2, 16) for _ in "kv"]
    found = []
    for backend in ("aten_sdpa", "math"):
        written = [x.clone() for x in caches]
        options = dict(cache_seqlens=lengths, block_table=table, causal=True, backend=backend)
        found.append((anyflash.attention_kvcache(q, *written, k, v, **options), *written))
    torch.testing.assert_close(*found)
    with pytest.raises(RuntimeError, match="aten_sdpa: does not support the log-sum-exp"):
        anyflash.attention_kvcache(q, *caches, k, v, **{**options, "backend": "aten_sdpa"},
                                   return_lse=True)  # fmt: skip


def test_there_is_no_log_sum_exp():
    q = torch.randn(1, 5, 2, 16)
    with pytest.raises(RuntimeError, match="aten_sdpa: does not support the log-sum-exp beside"):
        anyflash.attention(q, q, q, return_lse=True, backend="aten_sdpa")
    _, lse = anyflash.attention(q, q, q, return_lse=True, backend="aten_sdpa,math")
    assert lse.isfinite().all()
    lengths, tensors, options = (
        (None, None, 0, 0),
        [None] * 7,
        (0.0, 0.25, True, -1, -1, 0.0, False),
    )
    call = (q, q, q, *lengths, *tensors, *options)
    aten_sdpa, kernel = 8, 0
    operator = torch.ops.anyflash._flash_attn_forward
    assert operator(*call, False, aten_sdpa)[1].isnan().all()
    # Where a gradient is recorded the log-sum-exp is needed, whoever asks.
    graded = (q.clone().requires_grad_(), *call[1:])
    assert operator(*graded, False, kernel)[1].isfinite().all()
    with pytest.raises(RuntimeError, match="aten_sdpa: does not support the log-sum-exp beside"):
        operator(*graded, False, aten_sdpa)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("far", [1e4, 6e4, 3e38])
def test_a_finite_bias_hides_no_row(dtype, far):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 6, 2, 16, dtype=dtype) for _ in range(3))
    bias = torch.full((6, 6), -far, dtype=torch.promote_types(dtype, torch.float32))
    bias[:, 3] = -float("inf")
    bias[4] = -float("inf")
    found = [anyflash.attention(q, k, v, bias=bias, backend=b) for b in ("aten_sdpa", "math")]
    torch.testing.assert_close(*found)
    assert not found[0][:, 4].any() and found[0][:, 0].any()


@pytest.mark.parametrize("scale", [-0.7, 0.0, 0.3])
@pytest.mark.parametrize("causal", [False, True])
def test_any_scale(scale, causal):
    torch.manual_seed(0)
    leaves = [torch.randn(2, 9, 2, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    found = []
    for backend in ("aten_sdpa", "math"):
        out = anyflash.attention(*leaves, softmax_scale=scale, causal=causal, backend=backend)
        found.append((out, *torch.autograd.grad(out.pow(2).sum(), leaves)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("case", ["no rows", "no keys", "no sequences", "hidden", "unused storage"])
@pytest.mark.parametrize("bias_shape", [None, (), (1, 2, 1, 1)])
def test_where_no_row_sees_a_key_the_gradients_are_zero(case, bias_shape, layout):
    """Zero, not missing."""
    rows, keys = 0 if case == "no rows" else 3, 0 if case == "no keys" else 2
    sequences = 0 if case == "no sequences" else 1
    q = torch.randn(sequences, rows, 2, 8, requires_grad=True)
    k, v = (torch.randn(sequences, keys, 2, 8, requires_grad=True) for _ in "kv")
    options = {}
    if case == "hidden":
        options = dict(seqused_k=torch.zeros(1, dtype=torch.int32))
    if case == "unused storage":
        q, k, v = (x.detach().squeeze(0).requires_grad_() for x in (q, k, v))
        cu_seqlens = torch.zeros(1, dtype=torch.int32)
        options = dict(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
    leaves = [q, k, v]
    if bias_shape is not None:
        options["bias"] = torch.randn(bias_shape, requires_grad=True)
        leaves.append(options["bias"])
    out = anyflash.attention(q, k, v, **options, backend="aten_sdpa")
    assert out.shape == q.shape and not out.any()
    for leaf, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves)):
        assert gradient.shape == leaf.shape and not gradient.any()


def test_a_negative_scale_does_not_leave_the_range_of_fp16():
    q = torch.full((1, 2, 1, 64), 200.0, dtype=torch.float16, requires_grad=True)
    k = (torch.arange(3.0) / 1e6).half().view(1, 3, 1, 1).expand(1, 3, 1, 64)
    v = torch.eye(3, dtype=torch.float16).view(1, 3, 1, 3)
    out = anyflash.attention(q, k, v, softmax_scale=-100.0, backend="aten_sdpa")
    expected = anyflash.attention(q, k, v, softmax_scale=-100.0, backend="math")
    torch.testing.assert_close(out, expected)


def test_dropout_trains_on_the_next_back_end():
    """It draws its own bits; PyTorch's attention has others."""
    q = torch.randn(1, 33, 2, 8, requires_grad=True)
    found = []
    for backend in ("aten_sdpa,math", "math"):
        torch.manual_seed(0)
        out = anyflash.attention(q, q, q, dropout_p=0.5, backend=backend)
        found.append((out, *torch.autograd.grad(out.sum(), q)))
    torch.testing.assert_close(*found)


def test_other_devices_leave_training_to_pytorch(monkeypatch):
    """The way of a call on a device without routes of this library's, named by nobody."""
    from anyflash import _records
    from anyflash._operators import attention

    q = torch.randn(1, 5, 2, 16, requires_grad=True)
    is_ours = "AttentionFunction"
    assert is_ours in type(anyflash.attention(q, q, q).grad_fn).__name__
    device = torch.device("cpu")

    class OnMps:
        """What attend() reads of a tensor there."""

        is_cpu, is_cuda = False, False

    call = attention.AttentionCall(
        OnMps, q, q, *[None] * 2, 0, 0, *[None] * 7, 0.0, 0.25, True, -1, -1, 0.0, False, False, 0
    )  # fmt: skip
    assert attention._may_leave_it_to_pytorch(call)
    for named in (
        dict(return_lse=True), dict(deterministic=True), dict(dropout_p=0.5), dict(block_table=q),
        dict(q=q),
    ):  # fmt: skip
        assert not attention._may_leave_it_to_pytorch(call._replace(**named)), named
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert _records.device_numbers(torch.device("cuda", 1)) == (_records.DEVICES.index("hip"), 1)
    assert _records.device_numbers(device) == (0, -1)
