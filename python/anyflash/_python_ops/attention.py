"""_flash_attn_forward and _flash_attn_backward: describe, validate, decide, run, return."""

from __future__ import annotations

import torch
from torch import Tensor

from .._rng_state import draw_rng_state
from . import aten_cpu, aten_cudnn, aten_efficient, aten_flash, dispatch, math
from .notice import note_choice
from .problem import AttentionArgs, BackwardArgs, describe
from .validate import validate_backward, validate_forward

_ROUTES = {
    "aten_cpu": aten_cpu,
    "aten_flash": aten_flash,
    "aten_efficient": aten_efficient,
    "aten_cudnn": aten_cudnn,
    "math": math,
}


def _route(problem: dispatch.Problem) -> str:
    """The route that computes the problem.

    Raises:
        RuntimeError: no back end of the chain can.
    """
    decision = dispatch.choose(problem)
    if decision.route == "none":
        raise RuntimeError(dispatch.refusal(problem, decision))
    note_choice(problem, decision)
    return decision.route


def choose_forward(args: AttentionArgs, backend: int) -> str:
    """The route for normalised and validated arguments; raises RuntimeError where there is none."""
    return _route(describe(args, None, backend))


def run_forward(route: str, args: AttentionArgs) -> tuple[Tensor, Tensor]:
    return _ROUTES[route].forward(args)


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    rng_state: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    deterministic: bool,
    backend: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """schemas.def."""
    if not dropout_p > 0.0:
        rng_state = None
    else:
        rng_state = draw_rng_state(q.device) if rng_state is None else rng_state.clone()
    args = AttentionArgs(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, leftpad_k,
        block_table, alibi_slopes, bias, sinks, rng_state, dropout_p, softmax_scale, window_left,
        window_right, softcap,
    )  # fmt: skip
    args.normalise(causal)
    validate_forward(args)
    out, softmax_lse = run_forward(choose_forward(args, backend), args)
    if rng_state is None:
        rng_state = q.new_empty(0, dtype=torch.int64)
    return out, softmax_lse, rng_state


def _contiguous_last_dim(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    rng_state: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    deterministic: bool,
    bias_requires_grad: bool,
    sinks_requires_grad: bool,
    backend: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """schemas.def."""
    args = AttentionArgs(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, leftpad_k,
        None, alibi_slopes, bias, sinks, rng_state, dropout_p, softmax_scale, window_left,
        window_right, softcap,
    )  # fmt: skip
    grad = BackwardArgs(
        dout, out, lse, dlse, deterministic, bias_requires_grad, sinks_requires_grad
    )
    args.normalise(causal)
    validate_backward(args, grad)
    # What autograd hands over may be expanded or transposed; the routes read rows of contiguous
    # elements.
    grad.dout, grad.out = _contiguous_last_dim(dout), _contiguous_last_dim(out)
    result = _ROUTES[_route(describe(args, grad, backend))].backward(args, grad)
    dbias = q.new_empty(0) if result.dbias is None else result.dbias
    dsinks = q.new_empty(0) if result.dsinks is None else result.dsinks
    return result.dq, result.dk, result.dv, dbias, dsinks


def refuse_gradient(gradient: Tensor, size: list[int], why: str) -> Tensor:
    """schemas.def."""
    raise RuntimeError(why)
