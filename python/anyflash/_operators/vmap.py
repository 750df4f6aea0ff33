"""How the operators compute under torch.vmap: all samples in one call, where it can say them.

Attention and rotary embedding take the samples as more heads: dense, packed and paged layouts and
everything that belongs to a head follow. The others take them as more rows, but for gradients of
what all rows share, which every sample has of its own. What one call cannot say (samples with
sequence lengths or dropout of their own, with norms or tables of their own) runs sample by sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .attention import AttentionCall, BackwardCall
from .mlp import BiasActivationCall, FusedMLPCall

_ops = torch.ops.anyflash
#: (what torch says about the samples, dimension of the samples or None for each argument,
#: *arguments) -> (results, dimension of the samples or None for each)
Rule = Callable[..., tuple[Any, Any]]


def _in_front(x: Tensor | None, dim: int | None, count: int) -> Any:
    """(samples, ...), whether the tensor has samples or all share it."""
    if x is None:
        return None
    return x.unsqueeze(0).expand(count, *x.shape) if dim is None else x.movedim(dim, 0)


def _sample_by_sample(operator: Callable[..., Any], info: Any, dims: Any, *args: Any) -> Any:
    found = []
    for i in range(info.batch_size):
        sample = (x if dim is None else x.select(dim, i) for x, dim in zip(args, dims))
        found.append(operator(*sample))
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    results = tuple(map(torch.stack, zip(*found)))
    return results, (0,) * len(results)


def for_any_count(operator: Callable[..., Any], rule: Rule) -> Rule:
    """The rule; and for no samples, of which it could not make anything, results without elements,
    of the shapes that a sample of zeros has."""

    def counted(info: Any, dims: Any, *args: Any) -> tuple[Any, Any]:
        if info.batch_size > 0:
            return rule(info, dims, *args)
        sample = (
            x if dim is None else x.new_zeros(x.movedim(dim, 0).shape[1:])
            for x, dim in zip(args, dims)
        )
        found = operator(*sample)
        if isinstance(found, Tensor):
            return found.new_empty((0, *found.shape)), 0
        return tuple(x.new_empty((0, *x.shape)) for x in found), (0,) * len(found)

    return counted


# ---- Samples as heads.


def _as_heads(x: Tensor | None, dim: int | None, count: int, at: int) -> Any:
    """The samples of a tensor with its heads at the dimension ``at``, counted from the end."""
    if x is None:
        return None
    return _in_front(x, dim, count).movedim(0, at - 1).flatten(at - 1, at)


def _bias_as_heads(bias: Tensor | None, dim: int | None, count: int, heads: int) -> Any:
    """(batch or 1, samples * heads, rows or 1, keys)."""
    if bias is None:
        return None
    bias = _in_front(bias, dim, count)
    while bias.dim() < 5:
        bias = bias.unsqueeze(1)
    return _as_heads(bias.expand(-1, -1, heads, -1, -1), 0, count, -3)


_HEADS_AT = {
    **dict.fromkeys(("q", "k", "v", "dout", "out", "softmax_lse", "dsoftmax_lse"), -2),
    **dict.fromkeys(("alibi_slopes", "sinks"), -1),
}
_OF_ALL_HEADS = (
    "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "leftpad_k", "block_table", "rng_state",
)  # fmt: skip


def _call_as_heads(kind: Any, info: Any, dims: Sequence[Any], args: Sequence[Any]) -> Any:
    """The call with samples * heads heads; None where heads cannot differ in what samples do."""
    call, dim_of, count = kind(*args), kind(*dims)._asdict(), info.batch_size
    if call.dropout_p > 0.0 and call.rng_state is None and info.randomness != "different":
        raise RuntimeError(
            "dropout_p: under torch.vmap expected rng_state, or randomness='different', got "
            f"randomness={info.randomness!r}"
        )
    if call.dropout_p > 0.0 or any(dim_of.get(n) is not None for n in _OF_ALL_HEADS):
        return None
    given = call._asdict()
    for name in given.keys() & _HEADS_AT.keys():
        given[name] = _as_heads(given[name], dim_of[name], count, _HEADS_AT[name])
    given["bias"] = _bias_as_heads(call.bias, dim_of["bias"], count, given["q"].shape[-2] // count)
    return kind(**given)


def _attention_forward(info: Any, dims: Any, *args: Any) -> tuple[Any, Any]:
    operator = _ops._flash_attn_forward.default
    call = _call_as_heads(AttentionCall, info, dims, args)
    if call is None:
        return _sample_by_sample(operator, info, dims, *args)
    out, lse, rng_state = operator(*call)
    out, lse = (x.unflatten(-2, (info.batch_size, -1)) for x in (out, lse))
    return (out, lse, rng_state), (out.dim() - 3, lse.dim() - 3, None)


def _attention_backward(info: Any, dims: Any, *args: Any) -> tuple[Any, Any]:
    operator = _ops._flash_attn_backward.default
    call = _call_as_heads(BackwardCall, info, dims, args)
    if call is None:
        return _sample_by_sample(operator, info, dims, *args)
    count, bias = info.batch_size, BackwardCall(*args).bias
    *dqkv, dbias, dsinks = operator(*call)
    dqkv = [x.unflatten(-2, (count, -1)) for x in dqkv]
    if call.bias_requires_grad and bias is not None:
        bias_dim = dims[BackwardCall._fields.index("bias")]
        shape = (bias if bias_dim is None else bias.select(bias_dim, 0)).shape
        dbias = dbias.unflatten(1, (count, -1)).movedim(1, 0)
        if len(shape) < 3 or shape[-3] == 1:
            dbias = dbias.sum(2, keepdim=True)
        dbias = dbias.reshape(count, *shape)
    if call.sinks_requires_grad:
        dsinks = dsinks.unflatten(0, (count, -1))
    return (*dqkv, dbias, dsinks), (
        *(x.dim() - 3 for x in dqkv),
        0 if call.bias_requires_grad else None,
        0 if call.sinks_requires_grad else None,
    )


def _rotary(info: Any, dims: Any, x: Tensor, *rest: Any) -> tuple[Any, Any]:
    operator = _ops.rotary.default
    if any(dim is not None for dim in dims[1:]):
        return _sample_by_sample(operator, info, dims, x, *rest)
    y = operator(_as_heads(x, dims[0], info.batch_size, -2), *rest)
    return y.unflatten(-2, (info.batch_size, -1)), y.dim() - 2  # y has a dimension less


# ---- Samples as rows.


def _norm_forward(info: Any, dims: Any, *args: Any) -> tuple[Any, Any]:
    operator, parameters = _ops.norm_forward.default, range(3, 7)
    if any(dims[i] is not None for i in parameters):
        return _sample_by_sample(operator, info, dims, *args)
    given = list(args)
    for i in (0, 1, 2, 7, 8, 9):
        given[i] = _in_front(args[i], dims[i], info.batch_size)
    y, y1, residual_out, mean, rstd = operator(*given)
    is_rms_norm, residual_dtype = args[12], args[15]
    has = (True, args[5] is not None, residual_dtype != 0, not is_rms_norm, True)
    return (y, y1, residual_out, mean, rstd), tuple(0 if x else None for x in has)


def _norm_backward(info: Any, dims: Any, *args: Any) -> tuple[Any, Any]:
    operator, parameters = _ops.norm_backward.default, range(6, 10)
    if any(dims[i] is not None for i in parameters):
        return _sample_by_sample(operator, info, dims, *args)
    given, is_rms_norm = list(args), args[15]
    for i in (0, 1, 2, 3, *(() if is_rms_norm else (4,)), 5, 10, 11, 12, 13):
        given[i] = _in_front(args[i], dims[i], info.batch_size)
    dx, dx1, dresidual, *_, drowscale = operator(*given)
    dy, dy1, _, z, mean, rstd = given[:6]
    normalised = z.to(rstd.dtype) if is_rms_norm else z - mean.unsqueeze(-1)
    normalised = normalised * rstd.unsqueeze(-1)
    gradients = []
    for dout, weight, bias in ((dy, *args[6:8]), (dy1, *args[8:10])):
        for parameter, factor in ((weight, normalised), (bias, 1.0)):
            if parameter is None:
                gradients.append(z.new_empty(0))
            elif dout is None:
                gradients.append(parameter.new_zeros(info.batch_size, *parameter.shape))
            else:
                product = dout.to(rstd.dtype) * factor
                gradients.append(_summed(product).to(parameter.dtype))
    has = (True, dx1.numel() > 0, dresidual.numel() > 0, *(p is not None for p in args[6:10]))
    places = (*has, args[10] is not None and args[13] is not None)
    results = (dx, dx1, dresidual, *gradients, drowscale)
    return results, tuple(0 if x else None for x in places)


def _cross_entropy(operator: Callable[..., Any], tensors: int) -> Rule:
    """An operator whose first arguments are ``tensors`` tensors of rows, as its results are."""

    def rule(info: Any, dims: Any, *args: Any) -> tuple[Any, Any]:
        count, given = info.batch_size, list(args)
        for i, x in enumerate(args[:tensors]):
            x = _in_front(x, dims[i], count)
            given[i] = None if x is None else x.flatten(0, 1)
        results = operator(*given)
        if isinstance(results, Tensor):
            return results.unflatten(0, (count, -1)), 0
        return tuple(x.unflatten(0, (count, -1)) for x in results), (0,) * len(results)

    return rule


def _of_rows(parameter: Tensor | None, dim: int | None, x: Tensor) -> Any:
    """A parameter of samples, (samples, 1, ..., columns), to go with x (samples, ..., columns)."""
    if parameter is None or dim is None:
        return parameter
    parameter = parameter.movedim(dim, 0)
    return parameter.reshape(len(parameter), *(1,) * (x.dim() - 2), -1)


def _activate(x: Tensor, bias: Tensor | None, of_samples: bool, *options: int) -> Tensor:
    """act(x + bias), where samples may have a bias of their own."""
    if of_samples and bias is not None:
        x, bias = x + bias, None
    return _ops._bias_activation_forward.default(x, bias, *options)


def _activation_gradient(
    dy: Tensor, x: Tensor, bias: Tensor | None, of_samples: bool, *options: int
) -> Tensor:
    if of_samples and bias is not None:
        x, bias = x + bias, None
    return _ops._bias_activation_backward.default(dy, x, bias, *options)[0]


def _summed(x: Tensor) -> Tensor:
    """(samples, columns) of (samples, ..., columns): over all rows of a sample."""
    return x.flatten(1, -2).sum(1) if x.dim() > 2 else x


def _bias_activation_forward(info: Any, dims: Any, *args: Any) -> tuple[Any, Any]:
    call, dims = BiasActivationCall(*args), BiasActivationCall(*dims)
    x = _in_front(call.x, dims.x, info.batch_size)
    bias = _of_rows(call.bias, dims.bias, x)
    return _activate(x, bias, dims.bias is not None, call.activation, call.backend), 0


def _bias_activation_backward(
    info: Any, dims: Any, dy: Tensor, x: Tensor, bias: Tensor | None, *options: int
) -> tuple[Any, Any]:
    dy, x = (_in_front(t, dim, info.batch_size) for t, dim in zip((dy, x), dims))
    rows_bias = _of_rows(bias, dims[2], x)
    dx = _activation_gradient(dy, x, rows_bias, dims[2] is not None, *options)
    return (dx, x.new_empty(0) if bias is None else _summed(dx)), (0, None if bias is None else 0)


def _matrices(weight: Tensor, dim: int | None) -> Tensor:
    return weight if dim is None else weight.movedim(dim, 0)


def _fused_mlp_forward(info: Any, dims: Any, *args: Any) -> tuple[Any, Any]:
    call, dims = FusedMLPCall(*args), FusedMLPCall(*dims)
    x = _in_front(call.x, dims.x, info.batch_size)
    if all(dim is None for dim in dims[1:]):
        out, hidden = _ops._fused_mlp_forward.default(x, *args[1:])
        return (out, hidden), (0, 0 if call.save_hidden else None)
    shape, rows = x.shape[:-1], x.reshape(len(x), -1, x.shape[-1])
    hidden = rows @ _matrices(call.weight1, dims.weight1).mT
    bias1 = _of_rows(call.bias1, dims.bias1, rows)
    options = (call.activation, call.backend)
    activated = _activate(hidden, bias1, dims.bias1 is not None, *options)
    out = activated @ _matrices(call.weight2, dims.weight2).mT
    if call.bias2 is not None:
        out = out + _of_rows(call.bias2, dims.bias2, rows)
    hidden = hidden.view(*shape, -1) if call.save_hidden else x.new_empty(0)
    return (out.view(*shape, -1), hidden), (0, 0 if call.save_hidden else None)


def _fused_mlp_backward(
    info: Any,
    dims: Any,
    dout: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    hidden: Tensor,
    bias2_requires_grad: bool,
    *options: int,
) -> tuple[Any, Any]:
    count = info.batch_size
    dout, x = (_in_front(t, dim, count) for t, dim in zip((dout, x), dims))
    shape = x.shape
    dout, x = (t.reshape(count, -1, t.shape[-1]) for t in (dout, x))
    w1, w2 = _matrices(weight1, dims[2]), _matrices(weight2, dims[4])
    if hidden.numel():
        z = _in_front(hidden, dims[5], count).reshape(count, x.shape[1], -1)
    else:
        z = x @ w1.mT
    own_bias, b1 = dims[3] is not None, _of_rows(bias1, dims[3], x)
    dz = _activation_gradient(dout @ w2, z, b1, own_bias, *options)
    dbias1 = x.new_empty(0) if bias1 is None else _summed(dz)
    dbias2 = _summed(dout) if bias2_requires_grad else x.new_empty(0)
    results = (
        (dz @ w1).view(shape),
        dz.mT @ x,
        dbias1,
        dout.mT @ _activate(z, b1, own_bias, *options),
        dbias2,
    )
    return results, (0, 0, None if bias1 is None else 0, 0, 0 if bias2_requires_grad else None)


# ---- What is refused.


def _refuse_cache(info: Any, dims: Any, *args: Any) -> tuple[Any, Any]:
    raise RuntimeError(
        "attention over a key/value cache writes into the cache, which torch.vmap cannot follow; "
        "expected the samples as a larger batch"
    )


RULES: dict[str, Rule] = {
    "_flash_attn_forward": _attention_forward,
    "_flash_attn_backward": _attention_backward,
    "_flash_attn_kvcache_": _refuse_cache,
    "_bias_activation_forward": _bias_activation_forward,
    "_bias_activation_backward": _bias_activation_backward,
    "_fused_mlp_forward": _fused_mlp_forward,
    "_fused_mlp_backward": _fused_mlp_backward,
    "rotary": _rotary,
    "norm_forward": _norm_forward,
    "norm_backward": _norm_backward,
    "cross_entropy_forward": _cross_entropy(_ops.cross_entropy_forward.default, 3),
    "cross_entropy_backward": _cross_entropy(_ops.cross_entropy_backward.default, 4),
}
