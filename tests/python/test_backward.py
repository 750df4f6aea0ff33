"""Gradients of every case on every back end, against autograd of the float64 reference."""

from __future__ import annotations

import pytest
import torch
from support import ALL_ROUTES, ROUTES, expected_of, inputs_of, problem_of

import anyflash
from anyflash.backends import order_code
from anyflash.testing import CORNER, CORRECTNESS, assert_close, error_bound

pytestmark = pytest.mark.providers

DIFFERENTIABLE = [case for case in CORRECTNESS + CORNER if case.differentiable]
CASES = [pytest.param(case, id=case.name) for case in DIFFERENTIABLE]
NAMES = [pytest.param(route, id=route or "default") for route in ALL_ROUTES]


def _gradients(inputs, route, with_dlse, deterministic=False, forward_route=None):
    """Gradients by name; `route` runs the backward, `forward_route` (or `route`) the forward."""
    leaves = {n: x.detach().requires_grad_() for n, x in inputs.differentiable().items()}
    options = {n: leaves.get(n, x) for n, x in inputs.options.items()}
    out, lse = anyflash.attention(
        *(leaves[n] for n in "qkv"),
        **options,
        deterministic=deterministic,
        return_lse=True,
        backend=forward_route or route,
    )
    if with_dlse:
        found = torch.autograd.grad([out, lse], list(leaves.values()), [inputs.dout, inputs.dlse])
    else:
        found = torch.autograd.grad([out], list(leaves.values()), [inputs.dout])
    return dict(zip(leaves, found))


def _check(case, device, gradients, with_dlse):
    expected = expected_of(case, device, gradients=True, dlse=with_dlse)
    for name, gradient in gradients.items():
        assert_close(
            gradient, expected.exact[name], expected.low[name], f"{case.name} gradient of {name}"
        )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("route", NAMES)
@pytest.mark.parametrize("with_dlse", [False, True], ids=["out", "out_and_lse"])
def test_backward(case, route, with_dlse, device):
    inputs = inputs_of(case, device)
    needs = ["lse_grad"] * with_dlse + ["bias_grad"] * ("bias" in inputs.differentiable())
    forward = anyflash.decide(problem_of(case, "forward", device, route))
    backward = anyflash.decide(problem_of(case, "backward", device, route, *needs))
    if "none" in (forward["route"], backward["route"]):
        assert route is not None, f"no back end claims {case.name}: {backward['reasons']}"
        with pytest.raises(RuntimeError) as refused:
            _gradients(inputs, route, with_dlse)
        refusing = forward if forward["route"] == "none" else backward
        for name, reason in refusing["reasons"]:
            assert f"{name}: {reason}" in str(refused.value)
        return
    assert route in ROUTES[device], f"{route} was chosen on {device}"
    _check(case, device, _gradients(inputs, route, with_dlse), with_dlse)


@pytest.mark.parametrize("name", ["causal_longer_k", "packed_causal", "seqused_leftpad_gqa"])
def test_forward_and_backward_of_different_routes(name, device):
    """Whatever computed out and the LSE, any backward can use them."""
    case = next(c for c in DIFFERENTIABLE if c.name == name)
    inputs = inputs_of(case, device)

    def runnable(direction):
        problems = {r: problem_of(case, direction, device, r) for r in ROUTES[device][1:]}
        return [r for r, p in problems.items() if anyflash.decide(p)["route"] != "none"]

    assert "math" in runnable("backward")
    for forward in runnable("forward"):
        leaves = [x.detach() for x in inputs.qkv]
        out, lse = anyflash.attention(*leaves, **inputs.options, return_lse=True, backend=forward)
        for backward in runnable("backward"):
            gradients = _leaf_backward(inputs, out, lse, backward)
            _check(case, device, dict(zip("qkv", gradients)), with_dlse=False)


def _leaf_backward(inputs, out, lse, backend, dout=None, dlse=None, k=None, v=None, **changes):
    """The backward operator itself, with any out and LSE."""
    q, given_k, given_v = inputs.qkv
    k, v = given_k if k is None else k, given_v if v is None else v
    o = {**inputs.options, **changes}
    window_left, window_right = o["window_size"]
    longest = o.get("max_seqlen_k", k.size(1))
    return torch.ops.anyflash._flash_attn_backward(
        inputs.dout if dout is None else dout,
        q,
        k,
        v,
        out,
        lse,
        dlse,
        o.get("cu_seqlens_q"),
        o.get("cu_seqlens_k"),
        o.get("max_seqlen_q", q.size(1)),
        longest,
        o.get("seqused_k"),
        o.get("leftpad_k"),
        None,
        None,
        None,
        None,
        0.0,
        q.size(-1) ** -0.5,
        o["causal"],
        window_left,
        window_right,
        0.0,
        False,
        False,
        False,
        order_code(backend),
    )


@pytest.mark.parametrize("route", NAMES)
def test_backward_uses_the_given_out_and_lse(route, device):
    """Ring attention: two halves of the keys, each half's backward with the merged values."""
    if route not in (*ROUTES[device], None):
        pytest.skip(f"{route} does not run on {device}")
    case = next(c for c in DIFFERENTIABLE if c.name == "dense_bf16")
    if anyflash.decide(problem_of(case, "backward", device, route))["route"] == "none":
        pytest.skip(f"{route}: these operators have no kernel")
    inputs = inputs_of(case, device)
    q, k, v = inputs.qkv
    half = k.size(1) // 2
    parts = [(k[:, :half], v[:, :half]), (k[:, half:], v[:, half:])]
    done = [anyflash.attention(q, *kv, return_lse=True, backend=route) for kv in parts]
    lse = torch.logsumexp(torch.stack([one[1] for one in done]), 0)
    out = sum(o.float() * (one - lse).exp().transpose(1, 2)[..., None] for o, one in done)
    found = [
        _leaf_backward(inputs, out.to(q.dtype), lse, route, k=kv[0], v=kv[1])[:3] for kv in parts
    ]
    expected = expected_of(case, device, gradients=True, dlse=False)
    dk, dv = (torch.cat([one[i] for one in found], 1) for i in (1, 2))
    for name, gradient in (("q", found[0][0] + found[1][0]), ("k", dk), ("v", dv)):
        exact, low = expected.exact[name], expected.low[name]
        error = (gradient.double() - exact).abs().max().item()
        # The two halves of dq are rounded once more.
        assert error <= 2 * error_bound(exact, low, q.dtype), f"d{name}: {error}"


def test_optional_results_are_empty(device):
    case = next(c for c in DIFFERENTIABLE if c.name == "causal")
    inputs = inputs_of(case, device)
    out, lse = anyflash.attention(*inputs.qkv, **inputs.options, return_lse=True)
    *_, dbias, dsinks = _leaf_backward(inputs, out, lse, None)
    assert dbias.numel() == 0
    assert dsinks.numel() == 0


def test_gradient_layouts(device):
    """dq, dk, dv are laid out like q, k, v."""
    for name in ("transposed", "sliced", "packed_transposed", "fused_qkv"):
        case = next(c for c in DIFFERENTIABLE if c.name == name)
        inputs = inputs_of(case, device)
        out, lse = anyflash.attention(*inputs.qkv, **inputs.options, return_lse=True)
        gradients = _leaf_backward(inputs, out, lse, None)[:3]
        for tensor, gradient in zip(inputs.qkv, gradients):
            assert gradient.stride() == torch.empty_like(tensor).stride(), name


def test_strided_gradient_of_out(device):
    """dout comes transposed, expanded or with another last stride from real models."""
    case = next(c for c in DIFFERENTIABLE if c.name == "dense_fp32")
    q, k, v = (x.clone().requires_grad_() for x in inputs_of(case, device).qkv)
    for layout in ("expanded", "transposed", "last"):
        out = anyflash.attention(q, k, v)
        dout = torch.randn_like(out)
        if layout == "expanded":
            given = torch.ones((), device=device).expand_as(out)
        elif layout == "transposed":
            given = dout.transpose(1, 2).contiguous().transpose(1, 2)
        else:
            given = dout.transpose(2, 3).contiguous().transpose(2, 3)
        found = torch.autograd.grad(out, (q, k, v), given, retain_graph=True)
        plain = torch.autograd.grad(out, (q, k, v), given.contiguous())
        for a, b in zip(found, plain):
            torch.testing.assert_close(a, b)


def test_only_the_asked_gradients(device):
    case = next(c for c in DIFFERENTIABLE if c.name == "gqa")
    for needed in ("q", "k", "v", "qv"):
        leaves = [
            x.clone().requires_grad_(n in needed)
            for n, x in zip("qkv", inputs_of(case, device).qkv)
        ]
        anyflash.attention(*leaves).sum().backward()
        assert [x.grad is not None for x in leaves] == [n in needed for n in "qkv"]


def test_deterministic_backward_repeats_bitwise(device):
    for name in ("gqa_bf16_causal", "packed_causal", "dropout"):
        case = next(c for c in DIFFERENTIABLE if c.name == name)
        inputs = inputs_of(case, device)
        first = _gradients(inputs, None, with_dlse=False, deterministic=True)
        for _ in range(3):
            again = _gradients(inputs, None, with_dlse=False, deterministic=True)
            assert all(torch.equal(first[n], again[n]) for n in first)
