"""Every case on every back end that says it can run it: out and LSE against float64."""

from __future__ import annotations

import pytest
import torch
from support import (
    ALL_ROUTES,
    ROUTES,
    expected_of,
    has_attention_kernels,
    inputs_of,
    problem_of,
)

import anyflash
from anyflash.testing import CORNER, CORRECTNESS, PERFORMANCE, assert_close

pytestmark = pytest.mark.providers

CASES = [pytest.param(case, id=case.name) for case in CORRECTNESS + CORNER]
NAMES = [pytest.param(route, id=route or "default") for route in ALL_ROUTES]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("route", NAMES)
def test_forward(case, route, device):
    inputs = inputs_of(case, device)
    decision = anyflash.decide(problem_of(case, "forward", device, route))

    def run():
        return anyflash.attention(*inputs.qkv, **inputs.options, return_lse=True, backend=route)

    if decision["route"] == "none":
        assert route is not None, f"no back end claims {case.name}: {decision['reasons']}"
        with pytest.raises(RuntimeError) as refused:
            run()
        for name, reason in decision["reasons"]:
            assert f"{name}: {reason}" in str(refused.value)
        return

    assert route in ROUTES[device], f"{route} was chosen on {device}"
    out, lse = run()
    expected = expected_of(case, device)
    assert out.dtype == inputs.qkv[0].dtype
    assert lse.dtype == (torch.float64 if case.dtype == "fp64" else torch.float32)
    assert_close(out, expected.exact["out"], expected.low["out"], f"{case.name} out")
    assert_close(lse, expected.exact["lse"], expected.low["lse"], f"{case.name} lse")


@pytest.mark.parametrize("case", CASES)
def test_layout_of_results(case, device):
    """out is laid out as empty_like(q), the LSE is contiguous: clients view them without a copy."""
    q, k, v = inputs_of(case, device).qkv
    options = inputs_of(case, device).options
    out, lse = anyflash.attention(q, k, v, **options, return_lse=True)
    like = torch.empty_like(q) if q.size(-1) == v.size(-1) else torch.empty(out.shape)
    assert out.stride() == like.stride()
    assert lse.is_contiguous()


def test_some_route_beside_math_is_exercised(device):
    """Guards the parametrisation above: with the wrong features everything would be refused."""
    for route in ROUTES[device][1:]:
        if route == "kernel" and not has_attention_kernels(device):
            continue
        problems = {
            case.name: problem_of(case, "forward", device, route, return_lse=route != "aten_sdpa")
            for case in CORRECTNESS
        }
        chosen = [n for n, p in problems.items() if anyflash.decide(p)["route"] == route]
        sm = problem_of(CORRECTNESS[0], "forward", device, route)["sm"]
        if route in ("aten_flash", "aten_cudnn") and sm < 80 + 10 * (route == "aten_cudnn"):
            continue
        least = 1 if route == "aten_cudnn" else 10
        assert len(chosen) >= least, f"{route} runs only {chosen}"


@pytest.mark.parametrize("case", PERFORMANCE, ids=lambda case: case.name)
def test_performance_cases_have_a_fused_route_on_the_cpu(case):
    route = anyflash.decide(problem_of(case, "forward", "cpu", None))["route"]
    assert route in ("kernel", "aten_cpu")


def _views(dtype: torch.dtype, device: str) -> dict[str, tuple[torch.Tensor, ...]]:
    """q, k, v whose rows begin, lie or end where no 16-byte access may go."""

    def randn(*shape):
        return torch.randn(shape, device=device).to(dtype)

    wide = randn(2, 9, 3, 72)
    return {
        "pointer": (wide[..., 1:65], wide[..., 3:67], wide[..., :64]),
        "row": (randn(2, 9, 3, 67)[..., :64],) * 3,
        "head_dim": (randn(2, 9, 3, 20),) * 3,
        "head_dim_v": (wide[..., :64], wide[..., :64], wide[..., 5:18]),
        "columns": (randn(2, 9, 64, 3).transpose(2, 3),) * 3,
        "heads": (randn(2, 3, 9, 64).transpose(1, 2),) * 3,
        "expanded": (randn(2, 9, 1, 64).expand(2, 9, 3, 64),) * 3,
        "packed": tuple(randn(2, 9, 3, 3, 20).unbind(2)),
        "batch of one": (randn(1, 9, 3, 64).as_strided((1, 9, 3, 64), (7, 192, 64, 1)),) * 3,
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("view", _views(torch.float16, "cpu"))
def test_kernels_take_rows_that_lie_anywhere(view, dtype, device):
    if not has_attention_kernels(device):
        pytest.skip("no attention kernel runs here")
    qkv = _views(dtype, device)[view]
    found, expected = (
        anyflash.attention(*qkv, causal=True, return_lse=True, backend=backend)
        for backend in ("kernel", "math")
    )
    for x, y in zip(found, expected):
        assert x.stride() == y.stride()
        torch.testing.assert_close(x.float(), y.float(), atol=2e-2, rtol=2e-2)


def test_three_dimensions_are_one_sequence(device):
    q, k, v = (torch.randn(19, 2, 16, device=device) for _ in range(3))
    out, lse = anyflash.attention(q, k, v, causal=True, return_lse=True)
    batched, batched_lse = anyflash.attention(
        q[None], k[None], v[None], causal=True, return_lse=True
    )
    assert torch.equal(out, batched[0])
    assert torch.equal(lse, batched_lse[0])


def test_max_seqlen_may_be_left_out_or_a_tensor(device):
    case = next(c for c in CORRECTNESS if c.name == "packed_causal")
    q, k, v = inputs_of(case, device).qkv
    options = dict(inputs_of(case, device).options)
    exact = anyflash.attention(q, k, v, **options)
    for lengths in ((None, None), (torch.tensor(40), torch.tensor(40)), (1000, 900)):
        options.update(max_seqlen_q=lengths[0], max_seqlen_k=lengths[1])
        torch.testing.assert_close(anyflash.attention(q, k, v, **options), exact)


def test_tensor_valued_window_and_scale(device):
    q, k, v = (torch.randn(1, 19, 2, 16, device=device) for _ in range(3))
    plain = anyflash.attention(q, k, v, window_size=(4, 2), softmax_scale=0.25)
    window = tuple(torch.tensor([4, 2]))
    coerced = anyflash.attention(q, k, v, window_size=window, softmax_scale=torch.tensor(0.25))
    assert torch.equal(plain, coerced)


def test_last_dimension_with_a_stride(device):
    """The Python functions take any strides, like upstream's, which copy when the last is not 1."""
    q, k, v = (torch.randn(1, 19, 16, 2, device=device).transpose(2, 3) for _ in range(3))
    expected = anyflash.attention(q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(anyflash.attention(q, k, v), expected)
