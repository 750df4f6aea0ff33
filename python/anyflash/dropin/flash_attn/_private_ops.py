"""_flash_attn_{forward, backward, varlen_forward, varlen_backward}: private, and widely used.

Where torch can (2.4 and later) and nobody else has taken the names, they are operators
``flash_attn::_flash_attn_*``, as upstream has them: clients call ``torch.ops.flash_attn``, and
trainers save and count attention by these names. Here they have the derivative of anyflash's
operators. When another package registers the names again, the functions below go on without them.
"""

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Callable, NamedTuple, Optional, TypeVar

import flash_attn_2_cuda as flash_attn_gpu
import torch
from torch import Tensor
from torch.autograd.function import Function

from anyflash import _flops, _ops, _sharding, backends
from anyflash._autograd import (
    NO_SECOND_DERIVATIVE,
    applier,
    below_autograd,
    first_derivative_only,
    forward_only,
    in_functorch,
    is_distributed,
    is_watched,
)
from anyflash._guards import isolated
from anyflash._operators import known_names
from anyflash._operators.attention import (
    AttentionCall,
    Gradients,
    Numbers,
    Saved,
    differentiate,
    places_of_gradients,
    remember,
)
from anyflash.attention_probs import effective_dropout, round_up

#: Of an optional tensor or one that is there.
_X = TypeVar("_X", Tensor, Optional[Tensor])


def maybe_contiguous(x: _X) -> _X:
    """x, copied if the elements of a row do not lie side by side."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Optional[Tensor],
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state) of flash_attn_2_cuda.fwd."""
    q, k, v = (maybe_contiguous(x) for x in (q, k, v))
    out, softmax_lse, s_dmask, rng_state = flash_attn_gpu.fwd(
        q, k, v, None, alibi_slopes, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, return_softmax, None,
    )  # fmt: skip
    return out, softmax_lse, s_dmask, rng_state


def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    return_softmax: bool = False,
    block_table: Optional[Tensor] = None,
    leftpad_k: Optional[Tensor] = None,
    seqused_k: Optional[Tensor] = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state) of flash_attn_2_cuda.varlen_fwd."""
    q, k, v = (maybe_contiguous(x) for x in (q, k, v))
    out, softmax_lse, s_dmask, rng_state = flash_attn_gpu.varlen_fwd(
        q, k, v, None, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, alibi_slopes,
        max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, zero_tensors, causal,
        window_size_left, window_size_right, softcap, return_softmax, None,
    )  # fmt: skip
    return out, softmax_lse, s_dmask, rng_state


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Optional[Tensor],
    dk: Optional[Tensor],
    dv: Optional[Tensor],
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Optional[Tensor],
    deterministic: bool,
    rng_state: Optional[Tensor] = None,
) -> Tensor:
    """softmax_d of flash_attn_2_cuda.bwd; the gradients are in the given buffers."""
    dout, q, k, v, out = (maybe_contiguous(x) for x in (dout, q, k, v, out))
    return flash_attn_gpu.bwd(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, alibi_slopes, dropout_p, softmax_scale,
        causal, window_size_left, window_size_right, softcap, deterministic, None, rng_state,
    )[3]  # fmt: skip


def varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Optional[Tensor],
    dk: Optional[Tensor],
    dv: Optional[Tensor],
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Optional[Tensor],
    deterministic: bool,
    rng_state: Optional[Tensor] = None,
    zero_tensors: bool = False,
) -> Tensor:
    """softmax_d of flash_attn_2_cuda.varlen_bwd; the gradients are in the given buffers."""
    dout, q, k, v, out = (maybe_contiguous(x) for x in (dout, q, k, v, out))
    return flash_attn_gpu.varlen_bwd(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, alibi_slopes,
        max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, zero_tensors, causal,
        window_size_left, window_size_right, softcap, deterministic, None, rng_state,
    )[3]  # fmt: skip


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *others, return_softmax = options
    out, softmax_lse, s_dmask, rng_state = forward(q, k, v, *(*others, False))
    if return_softmax:
        lengths = (round_up(q.shape[1]), round_up(k.shape[1]))
        s_dmask = q.new_empty((q.shape[0], q.shape[2], *lengths))
    return out, softmax_lse, s_dmask, rng_state


_VARLEN_FORWARD = inspect.signature(varlen_forward)


def _varlen_forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = _VARLEN_FORWARD.bind(*args).arguments  # defaults at the end do not arrive
    return_softmax = given.pop("return_softmax", False)
    out, softmax_lse, s_dmask, rng_state = varlen_forward(**given)
    if return_softmax:
        q, batch = given["q"], given["cu_seqlens_q"].shape[0] - 1
        lengths = (round_up(given["max_seqlen_q"]), round_up(given["max_seqlen_k"]))
        s_dmask = q.new_empty((batch, q.shape[1], *lengths))
    return out, softmax_lse, s_dmask, rng_state


# ---- The operators.


def _given(function: Callable[..., Any], arguments: Any, named: Mapping[str, Any]) -> AttentionCall:
    """What a function above was called with, as anyflash's operator takes it."""
    bound = inspect.signature(function).bind(*arguments, **named)
    bound.apply_defaults()
    given: dict[str, Any] = dict.fromkeys(AttentionCall._fields)
    given.update(max_seqlen_q=0, max_seqlen_k=0, deterministic=False, return_lse=True)
    given.update((name, x) for name, x in bound.arguments.items() if name in given)
    given.update(dropout_p=effective_dropout(given["dropout_p"]), backend=backends.current_code())
    return AttentionCall(**given)


def _backward_by_name(ctx: Any, dout: Tensor, asked: Sequence[bool]) -> Sequence[Optional[Tensor]]:
    """anyflash's derivative through the operator that trainers know. It writes into buffers, which
    a compiler would copy, so only where somebody looks."""
    saved = Saved(*ctx.saved_tensors)
    alibi_asked = asked[Gradients._fields.index("alibi_slopes")]
    is_refused = alibi_asked or saved.block_table is not None
    if is_refused or not known_names.are_ours():
        return differentiate(ctx, dout, None, asked)
    buffers = {f"d{name}": torch.empty_like(getattr(saved, name)) for name in "qkv"}
    numbers = Numbers(*ctx.numbers)
    given = {**saved._asdict(), **numbers._asdict(), **buffers, "dout": dout}
    name = "_flash_attn_backward" if saved.cu_seqlens_q is None else "_flash_attn_varlen_backward"
    expected = inspect.signature(_OPERATORS[name].function).parameters
    operator = getattr(torch.ops.flash_attn, name).default
    operator(**{name: given[name] for name in expected if name in given})
    return (*buffers.values(), None, None, None)


def _differentiable(operator: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """A forward as autograd records it."""
    names = tuple(inspect.signature(function).parameters)
    places = places_of_gradients(names)
    bound = {name: i for i, name in enumerate(names)}

    class NamedAttentionFunction(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            return below_autograd(operator, *arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            out, softmax_lse, s_dmask, rng_state = output
            call = _given(function, inputs, {})
            remember(ctx, call, out, softmax_lse, rng_state if call.dropout_p > 0.0 else None)
            ctx.mark_non_differentiable(s_dmask, rng_state)

        @staticmethod
        @first_derivative_only
        def backward(
            ctx: Any, dout: Optional[Tensor], dsoftmax_lse: Optional[Tensor], *_: Any
        ) -> tuple[Optional[Tensor], ...]:
            needed = ctx.needs_input_grad
            indices = [bound.get(name, len(needed)) for name in Gradients._fields]
            asked = [i < len(needed) and needed[i] for i in indices]
            is_plain = dsoftmax_lse is None and not is_distributed(dout) and not in_functorch()
            if is_watched() and dout is not None and is_plain:
                gradients = _backward_by_name(ctx, dout, asked)
            else:
                gradients = differentiate(ctx, dout, dsoftmax_lse, asked)
            return places((*gradients, None))[: len(needed)]

    return applier(NamedAttentionFunction)


class _Private(NamedTuple):
    """One of the functions above, as an operator."""

    function: Callable[..., Any]
    fake: Callable[..., Any]
    schema: str
    count: Callable[[AttentionCall], int]


_LENGTHS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
_OPTIONS = "float dropout_p, float softmax_scale, bool causal"
_WINDOW = "SymInt window_size_left, SymInt window_size_right, float softcap, Tensor? alibi_slopes"
_FORWARD = "Tensor q, Tensor k, Tensor v"
_BACKWARD = (
    "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a!)? dq, "
    "Tensor(b!)? dk, Tensor(c!)? dv"
)
_RESULTS = "(Tensor, Tensor, Tensor, Tensor)"
_OPERATORS = {
    "_flash_attn_forward": _Private(
        forward,
        _forward_fake,
        f"({_FORWARD}, {_OPTIONS}, {_WINDOW}, bool return_softmax) -> {_RESULTS}",
        _flops.forward_flops,
    ),
    "_flash_attn_varlen_forward": _Private(
        varlen_forward,
        _varlen_forward_fake,
        f"({_FORWARD}, {_LENGTHS}, {_OPTIONS}, SymInt window_size_left=-1, "
        "SymInt window_size_right=-1, float softcap=0.0, Tensor? alibi_slopes=None, "
        "bool return_softmax=False, Tensor? block_table=None, Tensor? leftpad_k=None, "
        f"Tensor? seqused_k=None, bool zero_tensors=False) -> {_RESULTS}",
        _flops.forward_flops,
    ),
    "_flash_attn_backward": _Private(
        backward,
        backward,
        f"({_BACKWARD}, {_OPTIONS}, {_WINDOW}, bool deterministic, Tensor? rng_state=None) "
        "-> Tensor",
        _flops.backward_flops,
    ),
    "_flash_attn_varlen_backward": _Private(
        varlen_backward,
        varlen_backward,
        f"({_BACKWARD}, {_LENGTHS}, {_OPTIONS}, {_WINDOW}, bool deterministic, "
        "Tensor? rng_state=None, bool zero_tensors=False) -> Tensor",
        _flops.backward_flops,
    ),
}


_LIBRARIES = known_names.take(_OPERATORS)


class _PrivateFunction:
    """What clients import: it goes through the operator while the names are ours. Not a function,
    so that who inspects it takes ``_init_fn``, as of upstream's."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._init_fn = function
        self._name = name

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if known_names.are_ours():
            return getattr(torch.ops.flash_attn, self._name)(*arguments, **named)
        return self._init_fn(*arguments, **named)


def _define(name: str) -> tuple[Any, Any]:
    """(what clients import as ``_flash_attn_*``, what they import as ``_wrapped_flash_attn_*``)."""
    function, fake, schema, count = _OPERATORS[name]
    library = _LIBRARIES.get(name)
    if library is None:
        function._init_fn = function  # type: ignore[attr-defined]
        return function, function
    is_forward = name.endswith("forward")
    tags = (torch.Tag.nondeterministic_seeded,) if is_forward else ()
    library.define(name + schema, tags=tags)
    packet = getattr(torch.ops.flash_attn, name)
    library.impl(name, isolated(function), "CompositeExplicitAutograd")
    _ops.register_fake(library, packet.default, fake)
    if is_forward:
        recorded = _differentiable(packet.default, function)
        library.impl(name, function, "FuncTorchBatched")  # by the rules of what it calls

        def shardings(*arguments: Any, **named: Any) -> Iterator[_sharding.Sharding]:
            return _sharding.of_attention(_given(function, arguments, named))

        results = ("out", "softmax_lse", "s_dmask", "rng_state")
        _sharding.register(packet.default, shardings, results)
    else:
        recorded = forward_only(packet.default, NO_SECOND_DERIVATIVE)
        kernel = _ops.version_counting_kernel(packet.default)
        library.impl(name, kernel, "ADInplaceOrView")
    library.impl(name, _ops.autograd_kernel(packet.default, recorded), "Autograd")

    def flops(*arguments: Any, out_val: Any = None, **named: Any) -> int:
        return count(_given(function, arguments, named))

    _flops.register(packet, flops)
    return _PrivateFunction(name, function), packet


_flash_attn_forward, _wrapped_flash_attn_forward = _define("_flash_attn_forward")
_flash_attn_varlen_forward, _wrapped_flash_attn_varlen_forward = _define(
    "_flash_attn_varlen_forward"
)
_flash_attn_backward, _wrapped_flash_attn_backward = _define("_flash_attn_backward")
_flash_attn_varlen_backward, _wrapped_flash_attn_varlen_backward = _define(
    "_flash_attn_varlen_backward"
)
