"""_flash_attn_forward and _flash_attn_backward: prepare, run, return."""

from __future__ import annotations

import ctypes
from types import ModuleType

import torch
from torch import Tensor

from .. import _core, _records
from .._guards import WithoutAutocast
from .._rng_state import draw_rng_state
from . import (
    aten_cpu,
    aten_cudnn,
    aten_efficient,
    aten_flash,
    aten_sdpa,
    kernel,
    math,
    without_core,
)
from .arguments import AttentionArgs, BackwardArgs, Gradients

ROUTES: dict[str, ModuleType] = {
    "aten_cpu": aten_cpu,
    "aten_flash": aten_flash,
    "aten_efficient": aten_efficient,
    "aten_cudnn": aten_cudnn,
    "aten_sdpa": aten_sdpa,
    "math": math,
}
_TENSORS = ("q", "k", "v", "alibi_slopes", "bias", "sinks", "rng_state")
_INDEX_TENSORS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "leftpad_k", "block_table")
_OPTIONS = tuple(name for name, *_ in _records.AttentionOptions._fields_)


def views_of(args: AttentionArgs, copies: list[Tensor]) -> _records.AttentionCall:
    """The arguments as the core sees them; ``copies`` lives as long as the views."""
    call = _records.new(_records.AttentionCall)
    for name in _TENSORS:
        _records.put(call, name, getattr(args, name))
    for name in _INDEX_TENSORS:
        _core.put_with_values(call, name, getattr(args, name), copies)
    for name in _OPTIONS:
        setattr(call.options, name, getattr(args, name))
    return call


def take_options(args: AttentionArgs, options: _records.AttentionOptions) -> None:
    """Numbers as the core has normalised them."""
    for name in _OPTIONS:
        setattr(args, name, getattr(options, name))


def _prepare(
    args: AttentionArgs,
    call: _records.AttentionCall,
    grad_call: _records.BackwardCall | None,
    causal: bool,
    backend: int,
) -> _records.Choice:
    """Checks and decides; ``args`` and ``call`` have normalised numbers afterwards.

    Raises:
        RuntimeError: what cannot be computed, or no back end of the order can.
        ValueError: a back end that does not exist.
    """
    choice = _records.Choice()
    _core.raise_for(
        _core.loaded().anyflash_prepare_attention(
            ctypes.byref(call),
            None if grad_call is None else ctypes.byref(grad_call),
            causal,
            ctypes.byref(_core.caller(backend)),
            ctypes.byref(choice),
        )
    )
    take_options(args, call.options)
    return choice


def run_forward(
    choice: _records.Choice, args: AttentionArgs, call: _records.AttentionCall
) -> tuple[Tensor, Tensor]:
    """(out, lse) by the route that was chosen; ``call`` are the views of ``args``, prepared."""
    route = choice.route
    if route == "kernel":
        return kernel.forward(choice, args, call)
    return ROUTES[route].forward(args)


def differentiable(args: AttentionArgs, causal: bool, backend: int) -> Tensor | None:
    """out as PyTorch's own attention, which autograd records; None where the route is another.

    Raises:
        RuntimeError: what cannot be computed, or no back end of the order can.
        ValueError: a back end that does not exist.
    """
    if _core.library is None:
        route = without_core.prepare(args, None, causal, backend)
    else:
        copies: list[Tensor] = []
        route = _prepare(args, views_of(args, copies), None, causal, backend).route
    if route != "aten_sdpa":
        return None
    with WithoutAutocast():
        out = aten_sdpa.attend(args)
    return out if out.requires_grad else _with_zero_gradients(out, args)


def _with_zero_gradients(out: Tensor, args: AttentionArgs) -> Tensor:
    """out of rows that see no key, which no operator has computed from the inputs."""
    inputs = (args.q, args.k, args.v, args.bias)
    return out + sum(x.flatten()[:0].sum() for x in inputs if x is not None and x.requires_grad)


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
    return_lse: bool,
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
        window_right, softcap, return_lse,
    )  # fmt: skip
    out, softmax_lse = _run_forward(args, causal, backend)
    if rng_state is None:
        rng_state = q.new_empty(0, dtype=torch.int64)
    return out, softmax_lse, rng_state


def _run_forward(args: AttentionArgs, causal: bool, backend: int) -> tuple[Tensor, Tensor]:
    if _core.library is None:
        return ROUTES[without_core.prepare(args, None, causal, backend)].forward(args)
    copies: list[Tensor] = []
    call = views_of(args, copies)
    choice = _prepare(args, call, None, causal, backend)
    return run_forward(choice, args, call)


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
        window_right, softcap, True,
    )  # fmt: skip
    # What autograd hands over may be expanded or transposed; the routes read rows of contiguous
    # elements.
    grad = BackwardArgs(
        _core.contiguous_rows(dout), _core.contiguous_rows(out), lse, dlse, deterministic,
        bias_requires_grad, sinks_requires_grad,
    )  # fmt: skip
    result = _run_backward(args, grad, causal, backend)
    dbias = q.new_empty(0) if result.dbias is None else result.dbias
    dsinks = q.new_empty(0) if result.dsinks is None else result.dsinks
    return result.dq, result.dk, result.dv, dbias, dsinks


def _run_backward(args: AttentionArgs, grad: BackwardArgs, causal: bool, backend: int) -> Gradients:
    if _core.library is None:
        return ROUTES[without_core.prepare(args, grad, causal, backend)].backward(args, grad)
    copies: list[Tensor] = []
    call = views_of(args, copies)
    grad_call = _records.new(_records.BackwardCall)
    for name in ("dout", "out", "lse", "dlse"):
        _records.put(grad_call, name, getattr(grad, name))
    for name in ("deterministic", "bias_requires_grad", "sinks_requires_grad"):
        setattr(grad_call, name, getattr(grad, name))
    choice = _prepare(args, call, grad_call, causal, backend)
    if choice.route == "kernel":
        return kernel.backward(choice, args, grad, call, grad_call)
    return ROUTES[choice.route].backward(args, grad)


def refuse_gradient(gradient: Tensor, size: list[int], why: str) -> Tensor:
    """schemas.def."""
    raise RuntimeError(why)
