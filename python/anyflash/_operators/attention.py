"""Attention: _flash_attn_forward and _flash_attn_backward. Both providers bring the kernels; the
fakes, the derivative and the way from the public functions to the operator are here."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from .. import _core, _records, backends
from .._autograd import (
    applier,
    below_autograd,
    direct_apply,
    first_derivative_only,
    in_functorch,
    is_distributed,
    is_exporting,
    is_seen,
    needs_autograd,
    refuse_gradient,
)
from .._guards import BelowAutograd
from . import known_names, statistics_dtype

_forward = torch.ops.anyflash._flash_attn_forward.default
_backward = torch.ops.anyflash._flash_attn_backward.default
_SDPA = torch._C._nn.scaled_dot_product_attention
_PAGED = (
    "block_table: paged attention has no gradient, but a backward went through its result; "
    "expected a call under torch.no_grad(), or keys and values without pages"
)
_ALIBI = (
    "alibi_slopes: attention has no gradient of the slopes, but they require one; expected "
    "alibi_slopes.detach(), or bias = slopes * distances, which has a gradient"
)


class AttentionCall(NamedTuple):
    """What _flash_attn_forward is called with, in its order. Meaning: schemas.def."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    seqused_k: Tensor | None
    leftpad_k: Tensor | None
    block_table: Tensor | None
    alibi_slopes: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    rng_state: Tensor | None
    dropout_p: float
    softmax_scale: float
    causal: bool
    window_size_left: int
    window_size_right: int
    softcap: float
    deterministic: bool
    return_lse: bool
    backend: int


class BackwardCall(NamedTuple):
    """What _flash_attn_backward is called with, in its order."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    softmax_lse: Tensor
    dsoftmax_lse: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    seqused_k: Tensor | None
    leftpad_k: Tensor | None
    alibi_slopes: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    rng_state: Tensor | None
    dropout_p: float
    softmax_scale: float
    causal: bool
    window_size_left: int
    window_size_right: int
    softcap: float
    deterministic: bool
    bias_requires_grad: bool
    sinks_requires_grad: bool
    backend: int


# ---- The fakes.


def lse_like(q: Tensor, packed: bool) -> Tensor:
    """Room for the log-sum-exp: (batch, heads, seqlen_q), packed (heads, total_q)."""
    shape = (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(shape, dtype=statistics_dtype(q))


def out_like(q: Tensor, v: Tensor) -> Tensor:
    """Room for the output: q's strides where head_dim_v is head_dim, else contiguous."""
    if v.shape[-1] == q.shape[-1]:
        return torch.empty_like(q)
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _forward_fake(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = AttentionCall(*arguments, **named)
    q = call.q
    rng_state = q.new_empty(2 if call.dropout_p > 0.0 else 0, dtype=torch.int64)
    return out_like(q, call.v), lse_like(q, call.cu_seqlens_q is not None), rng_state


def _backward_fake(*arguments: Any, **named: Any) -> tuple[Tensor, ...]:
    call = BackwardCall(*arguments, **named)

    def like(x: Tensor | None, wanted: bool) -> Tensor:
        return torch.empty_like(x) if x is not None and wanted else call.q.new_empty(0)

    return (
        *(torch.empty_like(x) for x in (call.q, call.k, call.v)),
        like(call.bias, call.bias_requires_grad),
        like(call.sinks, call.sinks_requires_grad),
    )


FAKES = {"_flash_attn_forward": _forward_fake, "_flash_attn_backward": _backward_fake}


# ---- The derivative. Tuples are taken apart by names that are looked up once: this is the path of
# every training step.


def _picker(source: Sequence[str], names: Sequence[str]) -> Callable[[Sequence[Any]], Any]:
    """Of a tuple with the names ``source``, the elements with the names ``names``."""
    return operator.itemgetter(*(source.index(name) for name in names))


class Saved(NamedTuple):
    """The tensors that a backward needs; rng_state is the one of the forward's results."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    seqused_k: Tensor | None
    leftpad_k: Tensor | None
    block_table: Tensor | None
    alibi_slopes: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    out: Tensor
    softmax_lse: Tensor
    rng_state: Tensor | None


class Numbers(NamedTuple):
    """The other arguments of the forward that its backward takes."""

    max_seqlen_q: int
    max_seqlen_k: int
    dropout_p: float
    softmax_scale: float
    causal: bool
    window_size_left: int
    window_size_right: int
    softcap: float
    deterministic: bool
    backend: int


class _More(NamedTuple):
    """What else _flash_attn_backward takes."""

    dout: Tensor
    dsoftmax_lse: Tensor | None
    bias_requires_grad: bool
    sinks_requires_grad: bool


class Gradients(NamedTuple):
    """Of the arguments that may ask for one."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    alibi_slopes: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None


_RESULTS = ("out", "softmax_lse", "rng_state")
_inputs_saved = _picker(AttentionCall._fields, [n for n in Saved._fields if n not in _RESULTS])
_numbers_of = _picker(AttentionCall._fields, Numbers._fields)
_arguments_of_backward = _picker(
    (*Saved._fields, *Numbers._fields, *_More._fields), BackwardCall._fields
)


#: Which Gradients are asked for, from needs_input_grad; and the places of Gradients + None among an
#: operator's arguments.
asked_gradients = functools.partial(_picker, names=Gradients._fields)


def places_of_gradients(names: Sequence[str]) -> Callable[[Sequence[Any]], Any]:
    """Puts (*Gradients, None) in the places of an operator's arguments, None in all others."""
    source = Gradients._fields
    places = (source.index(name) if name in source else len(source) for name in names)
    return operator.itemgetter(*places)


def remember(
    ctx: Any, call: Sequence[Any], out: Tensor, softmax_lse: Tensor, rng_state: Tensor | None
) -> None:
    """Keeps in a Function's context what ``differentiate`` needs: the elements of an AttentionCall,
    and the results, rng_state only where there was dropout."""
    ctx.save_for_backward(*_inputs_saved(call), out, softmax_lse, rng_state)
    ctx.numbers = _numbers_of(call)
    ctx.set_materialize_grads(False)


def differentiate(
    ctx: Any, dout: Tensor | None, dsoftmax_lse: Tensor | None, asked: Sequence[bool]
) -> Sequence[Tensor | None]:
    """Gradients, those that are asked for, and a refusal in the place of one that there is not."""
    saved = Saved(*ctx.saved_tensors)
    if dout is None:
        dout = torch.zeros_like(saved.out)
    if saved.block_table is not None:
        return [
            refuse_gradient(dout, getattr(saved, name), _PAGED) if is_asked else None
            for name, is_asked in zip(Gradients._fields, asked)
        ]
    _, _, _, alibi_asked, bias_asked, sinks_asked = asked
    more = (dout, dsoftmax_lse, bias_asked, sinks_asked)
    arguments = _arguments_of_backward((*saved, *ctx.numbers, *more))
    dq, dk, dv, dbias, dsinks = below_autograd(_backward, *arguments)
    dalibi = None
    if alibi_asked:
        dalibi = refuse_gradient(dout, saved.alibi_slopes, _ALIBI)  # type: ignore[arg-type]
    return dq, dk, dv, dalibi, dbias if bias_asked else None, dsinks if sinks_asked else None


_asked = asked_gradients(AttentionCall._fields)
_places = places_of_gradients(AttentionCall._fields)


_RETURN_LSE, _BLOCK_TABLE = map(AttentionCall._fields.index, ("return_lse", "block_table"))


def _with_lse(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The call for a forward whose backward needs the log-sum-exp; over pages there is none."""
    if arguments[_BLOCK_TABLE] is not None:
        return arguments
    return (*arguments[:_RETURN_LSE], True, *arguments[_RETURN_LSE + 1 :])


class AttentionFunction(Function):
    """_flash_attn_forward on its arguments; out and softmax_lse are differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        with BelowAutograd():
            return _forward(*_with_lse(arguments))

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        out, softmax_lse, rng_state = output
        remember(ctx, inputs, out, softmax_lse, rng_state if rng_state.numel() else None)

    @staticmethod
    @first_derivative_only
    def backward(
        ctx: Any, dout: Tensor | None, dsoftmax_lse: Tensor | None, _: Any
    ) -> tuple[Tensor | None, ...]:
        asked = _asked(ctx.needs_input_grad)
        return _places((*differentiate(ctx, dout, dsoftmax_lse, asked), None))


apply_attention = applier(AttentionFunction)
_record = direct_apply(AttentionFunction)
DIFFERENTIABLE = {"_flash_attn_forward": apply_attention}


def _has_known_name(call: AttentionCall) -> bool:
    """Whether the call is to go by the original library's operators: they can say it, and trainers
    may look at it. What is written to a file has operators that C++ programs have too. Inference
    need not pay for the log-sum-exp, which those always return."""
    if is_exporting() or torch._C._get_tracing_state() is not None:
        return False
    if not (call.return_lse or _records_call(call)):
        return False
    if call.cu_seqlens_q is None and not (
        call.seqused_k is None and call.leftpad_k is None and call.block_table is None
    ):
        return False
    unknown = (call.bias, call.sinks, call.rng_state)
    is_plain = not call.deterministic and call.backend == 0
    return is_plain and all(x is None for x in unknown) and known_names.are_ours()


def _by_known_name(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """The call through the operator that trainers know."""
    qkv = (call.q, call.k, call.v)
    options = (
        call.dropout_p, call.softmax_scale, call.causal, call.window_size_left,
        call.window_size_right, call.softcap, call.alibi_slopes, False,
    )  # fmt: skip
    names = torch.ops.flash_attn
    if call.cu_seqlens_q is None:
        results = names._flash_attn_forward.default(*qkv, *options)
    else:
        results = names._flash_attn_varlen_forward.default(
            *qkv, call.cu_seqlens_q, call.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k,
            *options, call.block_table, call.leftpad_k, call.seqused_k,
        )  # fmt: skip
    out, softmax_lse, _, rng_state = results
    return out, softmax_lse, rng_state


def _may_leave_it_to_pytorch(call: AttentionCall) -> bool:
    """Whether PyTorch's own attention, recorded by autograd, may be the call: on a device for which
    this library has neither kernels nor routes with a backward, or where it is named."""
    q = call.q
    has_routes = q.is_cpu or _records.is_nvidia(q)
    first = (call.backend or backends.environment_code()) & 0xF
    is_named = first == backends.CODES["aten_sdpa"]
    if (has_routes and _core.library is not None and not is_named) or in_functorch():
        return False
    asks_more = call.return_lse or call.deterministic or call.dropout_p > 0.0
    return not asks_more and call.block_table is None


def _by_pytorch(call: AttentionCall) -> Tensor | None:
    """out of PyTorch's own attention, if that is the route of the call."""
    from .._python_ops.arguments import AttentionArgs
    from .._python_ops.attention import differentiable

    given = call._asdict()
    causal, backend = given.pop("causal"), given.pop("backend")
    given.pop("deterministic")
    for side in ("left", "right"):
        given[f"window_{side}"] = given.pop(f"window_size_{side}")
    return differentiable(AttentionArgs(**given), causal, backend)


def _records_call(call: AttentionCall) -> bool:
    return needs_autograd(call.q, call.k, call.v, call.bias, call.sinks, call.alibi_slopes)


def is_sdpa_replaced() -> bool:
    """Whether somebody has put a function of theirs in its place, as context_parallel does."""
    return F.scaled_dot_product_attention is not _SDPA


def attend(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """(out, softmax_lse, rng_state) of a public function's call; the last two are empty where
    PyTorch's own attention is recorded."""
    if is_sdpa_replaced():
        from . import context_parallel

        if (region := context_parallel.active_region()) is not None:
            return context_parallel.attend(call, region)
    if type(call.q) is not Tensor and is_distributed(call.q):
        from . import context_parallel

        context_parallel.refuse_shards_of_sequence(call.q)
    if is_seen():
        return _by_known_name(call) if _has_known_name(call) else _forward(*call)
    if _records_call(call):
        if _may_leave_it_to_pytorch(call):
            out = _by_pytorch(call)
            if out is not None:
                return out, out.new_empty(0), out.new_empty(0)
        return apply_attention(*call) if in_functorch() else _record(*call)
    return below_autograd(_forward, *call)
