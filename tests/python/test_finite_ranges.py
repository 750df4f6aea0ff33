"""Numbers from all over a dtype's range: what is finite hides no row and makes no NaN, whatever the
scale's sign, and every back end gives the same answer.

q and k hold small integers times powers of two and scales are powers of two, so that the dot
products are exact in every dtype and a logit is what float arithmetic makes of it. What is left is
compared closely, however large it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import anyflash

pytestmark = pytest.mark.providers

BACKENDS = (None, "kernel", "aten_cpu", "math")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
LOWEST = -torch.finfo(torch.float32).max
FAR = (-1.0, -3e4, -65504.0, -1e7, -1e10, -1e20, -1e30, LOWEST, LOWEST / 2, 1e6, 1e20, 3e38)


@dataclass(frozen=True)
class Draw:
    """One problem. Exponents are those of 2.

    Attributes:
        seqlens: query rows and keys.
        scale: sign and exponent of softmax_scale; a sign of 0 is the scale 0.
        bias: "", "row" (one number for all keys of a row), "random" (of that size), with -inf
            among both.
        sink: None, or one number for all heads.
    """

    dtype: str = "fp32"
    seqlens: tuple[int, int] = (3, 5)
    causal: bool = False
    amplitude: int = 0
    scale: tuple[int, int] = (1, -2)
    bias: str = ""
    size: float = 0.0
    sink: float | None = None
    softcap: float = 0.0
    slope: int | None = None
    seed: int = 0


@st.composite
def draws(draw) -> Draw:
    amplitude, scale = draw(st.integers(-20, 90)), draw(st.integers(-25, 20))
    return Draw(
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        seqlens=(draw(st.sampled_from([1, 3, 20, 70])), draw(st.sampled_from([1, 5, 24, 130]))),
        causal=draw(st.booleans()),
        amplitude=amplitude,
        scale=(draw(st.sampled_from([1, 1, 1, -1, 0])), scale),
        bias=draw(st.sampled_from(["", "row", "random"])),
        size=draw(st.sampled_from(FAR)),
        sink=draw(st.sampled_from([None, None, 0.5, *FAR])),
        softcap=draw(st.sampled_from([0.0, 0.0, 30.0])),
        slope=draw(st.sampled_from([None, None, -4, 0, 40])),
        seed=draw(st.integers(0, 1 << 20)),
    )


def _integers(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-3, 4, shape, generator=generator).double()


@dataclass
class Problem:
    """The tensors of a Draw, and what they come to in float64."""

    leaves: dict[str, torch.Tensor]
    options: dict[str, object]
    dout: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    gradients: dict[str, torch.Tensor]
    sizes: dict[str, float]  # of what is summed up in each gradient
    slack: float  # of a probability, beside that of the dtype


def _problem(d: Draw) -> Problem:
    dtype, generator = DTYPES[d.dtype], torch.Generator().manual_seed(d.seed)
    (seqlen_q, seqlen_k), heads, head_dim = d.seqlens, 2, 16
    lowest = torch.float64 if d.dtype == "fp64" else torch.float32
    scale = d.scale[0] * 2.0 ** d.scale[1]
    q = _integers(1, seqlen_q, heads, head_dim, generator=generator) * 2.0**d.amplitude
    k = _integers(1, seqlen_k, 1, head_dim, generator=generator)
    v = torch.randn(1, seqlen_k, 1, head_dim, generator=generator).to(dtype).double()
    dout = torch.randn(1, seqlen_q, heads, head_dim, generator=generator).to(dtype).double()
    leaves = {"q": q, "k": k, "v": v}
    options: dict[str, object] = {
        "causal": d.causal, "softmax_scale": scale, "softcap": d.softcap,
    }  # fmt: skip
    bias = None
    if d.bias:
        shape = (1, 1, seqlen_q, 1 if d.bias == "row" else seqlen_k)
        bias = torch.rand(shape, generator=generator).round() if d.bias == "row" else (
            torch.rand(shape, generator=generator)
        )  # fmt: skip
        bias = (bias * d.size).float().expand(1, 1, seqlen_q, seqlen_k).clone()
        bias[torch.rand(bias.shape, generator=generator) < 0.1] = float("-inf")
        leaves["bias"] = bias.double()
    if d.sink is not None:
        leaves["sinks"] = torch.full((heads,), d.sink).double()
    leaves = {n: x.requires_grad_() for n, x in leaves.items()}

    def rounded(x: torch.Tensor) -> torch.Tensor:
        """What float arithmetic makes of a sum; the derivative is that of the sum."""
        return x + (x.detach().to(lowest).double() - x.detach()).nan_to_num(0.0, 0.0, 0.0)

    scores = torch.einsum("bihd,bjd->bhij", leaves["q"], leaves["k"][:, :, 0]) * scale
    if d.softcap:
        scores = d.softcap * torch.tanh(scores / d.softcap)
    diagonal = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    keys = torch.arange(seqlen_k)
    if d.slope is not None:
        options["alibi_slopes"] = torch.full((heads,), 2.0**d.slope)
        distance = keys.expand(seqlen_q, seqlen_k) if d.causal else -(diagonal - keys).abs()
        scores = rounded(scores + 2.0**d.slope * distance)
    visible = (keys <= diagonal) if d.causal else torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    visible = visible.expand(1, heads, seqlen_q, seqlen_k)
    if bias is not None:
        there = leaves["bias"] > float("-inf")
        visible = visible & there
        scores = rounded(scores + torch.where(there, leaves["bias"], 0.0))
    sees = visible.any(-1, keepdim=True)
    logits = torch.where(sees, scores.masked_fill(~visible, float("-inf")), 0.0)
    if d.sink is not None:
        sinks = leaves["sinks"].view(1, heads, 1, 1).expand(1, heads, seqlen_q, 1)
        logits = torch.cat([logits, sinks], -1)
    p = torch.where(sees, logits.softmax(-1)[..., :seqlen_k], 0.0)
    out = torch.einsum("bhij,bjd->bihd", p, leaves["v"][:, :, 0])
    lse = torch.where(sees[..., 0], logits.logsumexp(-1), float("inf"))
    found = torch.autograd.grad(out, list(leaves.values()), dout, allow_unused=True)
    gradients = {
        n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), found)
    }
    score = head_dim * 4.0 * 4.0  # of dp
    sizes = {"v": 4.0 * seqlen_q, "q": abs(scale) * score * 3, "sinks": score * seqlen_q,
             "k": abs(scale) * score * float(q.detach().abs().max()) * seqlen_q,
             "bias": score * heads * seqlen_q}  # fmt: skip
    near = lse.detach()[lse.detach().abs() < 2.0**14].abs()
    slack = float(near.max()) * torch.finfo(lowest).eps if near.numel() else 0.0
    given = {n: x.detach().to(dtype if n in "qkv" else torch.float32) for n, x in leaves.items()}
    return Problem(
        given, options, dout.to(dtype), out.detach(), lse.detach(), gradients, sizes, slack
    )


def _close(found: torch.Tensor, exact: torch.Tensor, bound: float, what: str) -> None:
    error = (found.double() - exact).abs()
    error = torch.where(found.double() == exact, torch.zeros_like(error), error)
    assert not error.isnan().any(), f"{what}: NaN"
    worst = error.max().item() if error.numel() else 0.0
    assert worst <= bound, f"{what}: off by {worst:.3g}, more than {bound:.3g}"


def _check(d: Draw, backend: str | None) -> None:
    problem = _problem(d)
    wanted = [n for n in problem.leaves if backend != "aten_cpu" or n in "qkv"]  # what it can
    leaves = {n: x.clone().requires_grad_(n in wanted) for n, x in problem.leaves.items()}
    others = {n: x for n, x in leaves.items() if n not in "qkv"}
    try:
        out, lse = anyflash.attention(
            *(leaves[n] for n in "qkv"), **problem.options, **others,
            return_lse=True, backend=backend,
        )  # fmt: skip
    except RuntimeError as error:
        assert "can run this attention" in str(error)
        return
    relative = 0.02 if d.dtype == "bf16" else 1e-4
    relative += 8 * problem.slack
    _close(out, problem.out, 4 * relative, "out")
    finite = problem.lse.isfinite()
    assert torch.equal(lse.double()[~finite], problem.lse[~finite])
    if finite.any():
        size = problem.lse[finite].abs()
        _close(lse.double()[finite] / (1 + size), problem.lse[finite] / (1 + size), 1e-4, "lse")
    gradients = torch.autograd.grad(out, [leaves[n] for n in wanted], problem.dout)
    for name, gradient in zip(wanted, gradients):
        _close(gradient, problem.gradients[name], relative * problem.sizes[name], f"d{name}")


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(d=draws())
@example(d=Draw(bias="row", size=LOWEST))
@example(d=Draw(bias="row", size=LOWEST, sink=LOWEST, seqlens=(70, 130)))
@example(d=Draw(bias="row", size=-1e30, dtype="bf16", seqlens=(70, 130), causal=True))
@example(d=Draw(scale=(-1, -1), causal=True, dtype="fp64", seqlens=(2, 2)))
@example(d=Draw(scale=(0, 0), causal=True, dtype="fp64", seqlens=(2, 2)))
@example(d=Draw(amplitude=36, seqlens=(5, 24)))
@example(d=Draw(amplitude=90, scale=(1, 20), seqlens=(70, 130)))
@example(d=Draw(amplitude=90, scale=(-1, 20), seqlens=(70, 130), dtype="bf16"))
def test_finite_numbers_have_a_finite_answer(d, backend, device):
    if device != "cpu":
        pytest.skip("back ends of the CPU")
    _check(d, backend)
