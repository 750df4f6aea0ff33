"""How torch.distributed.tensor's DTensor shards the operators: what each process may compute of its
own shards alone. Everything else DTensor gathers before the call, which is right, and slow.

The strategies wait for the module in an import hook, and need torch 2.5, which made it public.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch

from ._activations import inputs_per_output
from ._after_import import AfterImport
from ._operators.attention import AttentionCall, BackwardCall
from ._operators.mlp import BiasActivationCall, FusedMLPCall
from ._operators.norm_arguments import DTYPES, has_own_dresidual

_MODULE = "torch.distributed.tensor"

#: By the name of an argument or result, the dimension whose shards the processes have, or SUM: each
#: has a summand. What is not named they have as a whole; a result without a name is "out".
Sharding = dict[str, int]
SUM = -1


def _of_batch(call: AttentionCall | BackwardCall, is_paged: bool) -> Sharding:
    by_sequence = ("seqused_k", "leftpad_k", "block_table", "softmax_lse", "dsoftmax_lse")
    keys = () if is_paged else ("k", "v", "dk", "dv")  # pages belong to no sequence
    sharding = dict.fromkeys(("q", "out", "dout", "dq", *keys, *by_sequence), 0)
    if call.alibi_slopes is not None and call.alibi_slopes.ndim == 2:
        sharding["alibi_slopes"] = 0
    if getattr(call, "sinks_requires_grad", False):
        sharding["dsinks"] = SUM
    return {**sharding, **_of_bias(call, 4)}


def _of_heads(call: AttentionCall | BackwardCall) -> Sharding:
    heads = call.q.ndim - 2
    keys = call.k.ndim - 2  # of pages too
    sharding = dict.fromkeys(("q", "out", "dout", "dq"), heads)
    sharding.update(dict.fromkeys(("k", "v", "dk", "dv"), keys))
    sharding.update(dict.fromkeys(("softmax_lse", "dsoftmax_lse"), heads - 1))
    if call.alibi_slopes is not None:
        sharding["alibi_slopes"] = call.alibi_slopes.ndim - 1
    sharding["sinks"] = 0
    if getattr(call, "sinks_requires_grad", False):
        sharding["dsinks"] = 0
    return {**sharding, **_of_bias(call, 3)}


def _of_bias(call: AttentionCall | BackwardCall, from_the_right: int) -> Sharding:
    """bias along a dimension of (batch, heads, seqlen_q, seqlen_k); where it is broadcast there,
    all have it, and a summand of its gradient."""
    bias = call.bias
    if bias is None:
        return {}
    dim = bias.ndim - from_the_right
    has_dim = dim >= 0 and bias.shape[dim] != 1
    sharding = {"bias": dim} if has_dim else {}
    if getattr(call, "bias_requires_grad", False):
        sharding["dbias"] = dim if has_dim else SUM
    return sharding


def _keep_their_keys(call: AttentionCall | BackwardCall) -> bool:
    """Whether shards of heads have the keys of their own queries. Fewer keys than shards DTensor
    leaves out by itself."""
    q, heads_k = call.q, call.k.shape[-2]
    sizes = q.mesh.shape  # type: ignore[attr-defined]
    shards = {
        math.prod(some)
        for n in range(1, len(sizes) + 1)
        for some in itertools.combinations(sizes, n)
    }
    return q.shape[-2] == heads_k or all(heads_k % n == 0 or heads_k < n for n in shards)


def of_attention(call: AttentionCall | BackwardCall) -> Iterator[Sharding]:
    """By batch and by heads."""
    if call.dropout_p > 0.0:  # a shard would drop what other rows of the whole drop
        if call.rng_state is None:
            raise NotImplementedError(
                "dropout_p: expected 0 for DTensor arguments, or an rng_state that all processes "
                f"share, got {call.dropout_p}"
            )
        return
    if call.cu_seqlens_q is None:
        yield _of_batch(call, is_paged=getattr(call, "block_table", None) is not None)
    if _keep_their_keys(call):
        yield _of_heads(call)


def _forward(*arguments: Any) -> Iterator[Sharding]:
    return of_attention(AttentionCall(*arguments))


def _backward(*arguments: Any) -> Iterator[Sharding]:
    return of_attention(BackwardCall(*arguments))


def _kvcache(*_: Any) -> Iterator[Sharding]:
    raise NotImplementedError(
        "attention_kvcache writes into its arguments, which DTensor cannot let it; expected "
        "tensors, got DTensors: call it with their shards (to_local(), or "
        "torch.distributed.tensor.experimental.local_map)"
    )


def _rotary(x: Any, cos: Any, sin: Any, *rest: Any) -> Iterator[Sharding]:
    cu_seqlens = rest[2]
    if cu_seqlens is None:
        yield {"x": 0, "out": 0, "seqlen_offsets": 0}
    yield dict.fromkeys(("x", "out"), x.ndim - 2)


def _norm_forward(*arguments: Any) -> Iterator[Sharding]:
    x, _, x1, _, _, weight1, _, rowscale, mask, mask1, _, _, is_rms_norm, _, _, to = arguments
    if any(a is not None for a in (x1, weight1, rowscale, mask, mask1)):
        return
    names = ["x", "residual", "y", "rstd"]
    names += [] if is_rms_norm else ["mean"]
    names += ["residual_out"] if to else []
    for rows in range(x.ndim - 1):
        yield dict.fromkeys(names, rows)


def _norm_backward(*arguments: Any) -> Iterator[Sharding]:
    _, dy1, _, z, _, _, _, bias, weight1, _, rowscale, mask, mask1, x, *rest = arguments
    _, is_rms_norm, _, has_residual, has_x1, x_dtype = rest
    if has_x1 or any(a is not None for a in (dy1, weight1, rowscale, mask, mask1, x)):
        return
    names = ["dy", "dresidual_out", "z", "rstd", "dx"]
    names += [] if is_rms_norm else ["mean"]
    same_dtype = DTYPES[x_dtype] == z.tensor_meta.dtype
    names += ["dresidual"] if has_own_dresidual(has_residual, False, False, same_dtype) else []
    sums = {"dweight": SUM} if bias is None else {"dweight": SUM, "dbias": SUM}
    for rows in range(z.ndim - 1):
        yield {**dict.fromkeys(names, rows), **sums}


def _bias_activation(*arguments: Any) -> Iterator[Sharding]:
    call = BiasActivationCall(*arguments)
    for rows in range(call.x.ndim - 1):
        yield {"x": rows, "out": rows}
    if inputs_per_output(call.activation) == 1:
        yield {"x": call.x.ndim - 1, "bias": 0, "out": call.x.ndim - 1}


def _bias_activation_backward(
    dy: Any, x: Any, bias: Any, activation: int, backend: int
) -> Iterator[Sharding]:
    for rows in range(x.ndim - 1):
        yield {"dy": rows, "x": rows, "dx": rows, **({} if bias is None else {"dbias": SUM})}
    if inputs_per_output(activation) == 1:
        columns = dict.fromkeys(("dy", "x", "dx"), x.ndim - 1)
        yield {**columns, **({} if bias is None else {"bias": 0, "dbias": 0})}


def _fused_mlp(*arguments: Any) -> Iterator[Sharding]:
    call = FusedMLPCall(*arguments)
    x, hidden = call.x, ("hidden",) if call.save_hidden else ()
    for rows in range(x.ndim - 1):
        yield dict.fromkeys(("x", "out", *hidden), rows)
    if inputs_per_output(call.activation) == 1 and call.bias2 is None:
        columns = dict.fromkeys(hidden, x.ndim - 1)
        yield {"weight1": 0, "bias1": 0, "weight2": 1, "out": SUM, **columns}


def _fused_mlp_backward(
    dout: Any,
    x: Any,
    weight1: Any,
    bias1: Any,
    weight2: Any,
    hidden: Any,
    bias2_requires_grad: bool,
    activation: int,
    backend: int,
) -> Iterator[Sharding]:
    has_hidden = hidden.ndim == x.ndim  # else it is empty
    names = ("dout", "x", "dx", *(("hidden",) if has_hidden else ()))
    sums = ["dweight1", "dweight2"]
    sums += [] if bias1 is None else ["dbias1"]
    sums += ["dbias2"] if bias2_requires_grad else []
    for rows in range(x.ndim - 1):
        yield {**dict.fromkeys(names, rows), **dict.fromkeys(sums, SUM)}
    if inputs_per_output(activation) == 1 and not bias2_requires_grad:
        columns = {"weight1": 0, "dweight1": 0, "weight2": 1, "dweight2": 1, "dx": SUM}
        columns.update({} if bias1 is None else {"bias1": 0, "dbias1": 0})
        yield {**columns, **({"hidden": x.ndim - 1} if has_hidden else {})}


def _as_a_whole(*_: Any) -> Iterator[Sharding]:
    return iter(())


def _cross_entropy(*_: Any) -> Iterator[Sharding]:
    names = ("logits", "labels", "precomputed_lse", "losses", "z_losses", "lse", "dlosses", "out")
    yield dict.fromkeys(names, 0)


#: An operator's name -> what may be sharded in a call of it, from its arguments, of whose tensors
#: only shape, dtype and mesh are known.
RULES: dict[str, Callable[..., Iterator[Sharding]]] = {
    "_flash_attn_forward": _forward,
    "_flash_attn_backward": _backward,
    "_flash_attn_kvcache_": _kvcache,
    "rotary": _rotary,
    "rotary_": _rotary,
    "norm_forward": _norm_forward,
    "norm_backward": _norm_backward,
    "_bias_activation_forward": _bias_activation,
    "_bias_activation_backward": _bias_activation_backward,
    "_fused_mlp_forward": _fused_mlp,
    "_fused_mlp_backward": _fused_mlp_backward,
    "cross_entropy_forward": _cross_entropy,
    "cross_entropy_backward": _cross_entropy,
    "cross_entropy_backward_": _cross_entropy,
    "refuse_gradient": _as_a_whole,
}


_waiting: list[tuple[Any, Callable[..., Iterator[Sharding]], Sequence[str]]] = []


def _strategy(
    operator: Any, rule: Callable[..., Iterator[Sharding]], results: Sequence[str]
) -> Callable[..., Any]:
    """The rule as DTensor takes it: placements of the results and of all arguments, beginning with
    nothing sharded."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    names = [argument.name for argument in operator._schema.arguments]
    tensors = {a.name for a in operator._schema.arguments if "Tensor" in str(a.type)}

    def place(name: str, sharding: Sharding) -> Any:
        dim = sharding.get(name)
        return Replicate() if dim is None else Partial() if dim == SUM else Shard(dim)

    def strategy(*arguments: Any, **named: Any) -> list[tuple[list[Any], list[Any]]]:
        given = {**dict(zip(names, arguments)), **named}
        present = [n if n in tensors and given[n] is not None else None for n in given]
        return [
            (
                [place(name, sharding) for name in results],
                [None if name is None else place(name, sharding) for name in present],
            )
            for sharding in ({}, *rule(*arguments, **named))
        ]

    return strategy


def register_operators() -> None:
    """Those of this library."""
    for name, rule in RULES.items():
        operator = getattr(torch.ops.anyflash, name).default
        register(operator, rule, [result.name or "out" for result in operator._schema.returns])


def register(
    operator: Any, rule: Callable[..., Iterator[Sharding]], results: Sequence[str]
) -> None:
    """Tells DTensor what may be sharded in calls of an operator, at once or when it is imported.

    Args:
        operator: torch.ops.NAMESPACE.NAME.default.
        rule: the shardings of a call, from its arguments.
        results: what the rule calls them.
    """
    _waiting.append((operator, rule, results))
    if len(_waiting) == 1:
        AfterImport(_MODULE, _hand_over)


def _hand_over(_: ModuleType) -> None:
    try:
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor.experimental import register_sharding
    except ImportError:
        return
    infos = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    while _waiting:
        operator, rule, results = _waiting.pop()
        register_sharding(operator)(_strategy(operator, rule, results))
        # DTensor keeps what a rule said, for calls that are the same from an argument on: torch's
        # choice is the first int, though rules see the flags before it too (torch 2.13; findings/).
        kinds = [str(argument.type) for argument in operator._schema.arguments]
        first = min((i for i, kind in enumerate(kinds) if kind in ("int", "bool")), default=100)
        infos[operator] = dataclasses.replace(infos[operator], static_argnum=first)
