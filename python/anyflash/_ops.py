"""What the operators need from Python whoever provides them: fake kernels, and autograd for the
public ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from . import _autocast, _core, _defs, _loader
from ._autograd import (
    NO_SECOND_DERIVATIVE,
    forward_only,
    inside_kernel,
    may_record,
    needs_autograd,
)
from ._guards import BelowAutograd, BelowWriteCounts, count_write, isolated
from ._operators import attention, cross_entropy, kvcache, mlp, norm, rotary, vmap
from ._operators.attention import out_like

_keep_alive: list[torch.library.Library] = []


def _refuse_gradient(gradient: Tensor, size: Sequence[int], why: str) -> Tensor:
    return gradient.new_empty(size)


def _like_q(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return out_like(q, v)


def _like_q_of_kvpacked(q: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(q)


def _like_q_of_qkvpacked(qkv: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(qkv.select(-3, 0))


def _fused_mlp(x: Tensor, weight1: Tensor, bias1: Any, weight2: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight2.shape[0]))


FAKES: dict[str, Callable[..., Any]] = {
    "refuse_gradient": _refuse_gradient,
    "flash_attn_func": _like_q,
    "flash_attn_kvpacked_func": _like_q_of_kvpacked,
    "flash_attn_qkvpacked_func": _like_q_of_qkvpacked,
    "flash_attn_varlen_func": _like_q,
    "flash_attn_varlen_kvpacked_func": _like_q_of_kvpacked,
    "flash_attn_varlen_qkvpacked_func": _like_q_of_qkvpacked,
    "flash_attn_with_kvcache": _like_q,
    "fused_mlp": _fused_mlp,
}


def _window(window_size: Sequence[int]) -> tuple[int, int]:
    left, right = window_size
    return left, right


def _attend(q: Tensor, k: Tensor, v: Tensor, options: Sequence[Any], **lengths: Any) -> Tensor:
    """anyflash.attention with the options of a public operator, those at the end left out when
    default."""
    from .attention import attention

    names = ("dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes")
    named = dict(zip((*names, "deterministic", "block_table"), options))
    return attention(q, k, v, **named, **lengths)


def _flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    return _attend(q, k, v, options)


def _flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *options: Any) -> Tensor:
    k, v = kv.unbind(-3)
    return _attend(q, k, v, options)


def _flash_attn_qkvpacked_func(qkv: Tensor, *options: Any) -> Tensor:
    q, k, v = qkv.unbind(-3)
    return _attend(q, k, v, options)


def _flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *options: Any,
) -> Tensor:
    return _attend(
        q,
        k,
        v,
        options,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )


def _flash_attn_varlen_kvpacked_func(q: Tensor, kv: Tensor, *rest: Any) -> Tensor:
    k, v = kv.unbind(-3)
    return _flash_attn_varlen_func(q, k, v, *rest)


def _flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *options: Any
) -> Tensor:
    q, k, v = qkv.unbind(-3)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return _flash_attn_varlen_func(q, k, v, *lengths, *options)


def _fused_mlp_autograd(*args: Any) -> Tensor:
    from .fused_mlp import fused_mlp

    names = ("x", "weight1", "bias1", "weight2", "bias2", "activation", "recompute")
    return fused_mlp(**dict(zip(names, args)))


def _flash_attn_with_kvcache(*args: Any) -> Tensor:
    from .kvcache import attention_kvcache

    schema = torch.ops.anyflash.flash_attn_with_kvcache.default._schema
    named = dict(zip((argument.name for argument in schema.arguments), args))
    named.pop("num_splits", None)
    out = attention_kvcache(**named)
    assert isinstance(out, Tensor)
    return out


# The last one has no derivative, and says so where one is asked for.
DIFFERENTIABLE: dict[str, Callable[..., Tensor]] = {
    "flash_attn_func": _flash_attn_func,
    "flash_attn_kvpacked_func": _flash_attn_kvpacked_func,
    "flash_attn_qkvpacked_func": _flash_attn_qkvpacked_func,
    "flash_attn_varlen_func": _flash_attn_varlen_func,
    "flash_attn_varlen_kvpacked_func": _flash_attn_varlen_kvpacked_func,
    "flash_attn_varlen_qkvpacked_func": _flash_attn_varlen_qkvpacked_func,
    "fused_mlp": _fused_mlp_autograd,
    "flash_attn_with_kvcache": _flash_attn_with_kvcache,
}


def autograd_kernel(operator: OpOverload, differentiable: Callable[..., Any]) -> Callable[..., Any]:
    """The operator under autograd: recorded through the autograd.Functions where a gradient is
    asked for."""

    def kernel(*args: Any) -> Any:
        # First what is known without the arguments: graphs that compute no gradient come here too.
        if may_record() and needs_autograd(*(arg for arg in args if isinstance(arg, Tensor))):
            with inside_kernel():
                return differentiable(*args)
        with BelowAutograd():
            return operator(*args)

    return kernel


def _public_kernel(operator: OpOverload, function: Callable[..., Any]) -> Callable[..., Any]:
    """A public operator under autograd; under autocast too it is the Python function."""
    recorded = autograd_kernel(operator, function)

    def kernel(*args: Any) -> Any:
        return function(*args) if _autocast.is_enabled(args[0]) else recorded(*args)

    return kernel


def _on_one_device(operator: OpOverload, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The fake, but for a meta tensor beside others: that would choose it, and what it allocates
    would pass for a result."""
    names = [a.name for a in operator._schema.arguments]

    @functools.wraps(fake)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = (*zip(names, args), *kwargs.items())
        tensors = [(n, x.device) for n, x in given if isinstance(x, Tensor)]
        first, device = tensors[0]
        for other, its in tensors[1:]:
            if its != device and "meta" in (its.type, device.type):
                raise RuntimeError(f"{other}: expected {first}'s device {device}, got {its}")
        return fake(*args, **kwargs)

    return checked


def register_fake(
    library: torch.library.Library, operator: OpOverload, fake: Callable[..., Any]
) -> None:
    """Registers what an operator's results look like."""
    fake, name = _on_one_device(operator, fake), operator._schema.name
    if hasattr(torch.library, "register_fake"):  # torch 2.4
        torch.library.register_fake(name, fake, lib=library)
    elif hasattr(torch.library, "impl_abstract"):  # torch 2.1
        torch.library.impl_abstract(name, fake, lib=library)
    else:
        library.impl(name.partition("::")[2], fake, "Meta")


def _register_vmap(library: torch.library.Library) -> None:
    """Gives the operators their rules for samples; torch before 2.5 goes through the samples.
    Public ones are Python functions of operators that have one."""
    if not hasattr(torch.library, "register_vmap"):
        return
    for name, rule in vmap.RULES.items():
        counted = vmap.for_any_count(_overload(name), rule)
        torch.library.register_vmap(f"anyflash::{name}", counted, lib=library)
    for name, function in DIFFERENTIABLE.items():
        library.impl(name, function, "FuncTorchBatched")


#: The families of _operators/.
FAMILIES: tuple[Any, ...] = (attention, kvcache, mlp, rotary, norm, cross_entropy)


def version_counting_kernel(operator: OpOverload) -> Callable[..., Any]:
    """An operator that writes into arguments, and then tells autograd so: what was saved of them
    before the write is no longer valid."""
    aliases = (argument.alias_info for argument in operator._schema.arguments)
    written = [i for i, alias in enumerate(aliases) if alias is not None and alias.is_write]

    def kernel(*args: Any) -> Any:
        with BelowWriteCounts():
            result = operator(*args)
        for i in written:
            if args[i] is not None:
                count_write(args[i])
        return result

    return kernel


def _draws_random_numbers(name: str) -> bool:
    """Whether a call of the operator may draw from torch's generator."""
    return "flash_attn" in name and "backward" not in name and "kvcache" not in name


def _overload(name: str) -> OpOverload:
    return getattr(torch.ops.anyflash, name).default


def _tag(name: str) -> None:
    """Tells the compiler, which then neither merges calls nor repeats one with other numbers. Tags
    cannot be part of a definition in C++."""
    tags = getattr(_overload(name), "tags", None)  # torch 2.1
    if tags is not None and torch.Tag.nondeterministic_seeded not in tags:
        tags.append(torch.Tag.nondeterministic_seeded)


def _register_family(library: torch.library.Library, family: Any) -> None:
    """What a family of _operators/ says of itself. On the CPU key a kernel goes before its math:
    the binary's, or here that of the Python provider."""
    if _loader.provider == "python" and _core.library is not None:
        for name, kernel in getattr(family, "KERNELS", {}).items():
            library.impl(name, isolated(kernel), "CPU")
    for name, math in getattr(family, "MATH", {}).items():
        library.impl(name, isolated(math), "CompositeExplicitAutograd")
        if name.endswith("_"):
            library.impl(name, version_counting_kernel(_overload(name)), "ADInplaceOrView")
    for name, fake in family.FAKES.items():
        register_fake(library, _overload(name), fake)
    for name, differentiable in family.DIFFERENTIABLE.items():
        library.impl(name, autograd_kernel(_overload(name), differentiable), "Autograd")


def register() -> None:
    """Gives the operators their fake and autograd kernels; what fails is a reason for doctor, not
    an error."""
    library = torch.library.Library("anyflash", "IMPL")
    _keep_alive.append(library)
    try:
        for name, fake in FAKES.items():
            register_fake(library, _overload(name), fake)
        for name, function in DIFFERENTIABLE.items():
            library.impl(name, _public_kernel(_overload(name), function), "Autograd")
        for family in FAMILIES:
            _register_family(library, family)
        differentiable = {name for family in FAMILIES for name in family.DIFFERENTIABLE}
        for operator in _defs.operators():
            if operator.group == "leaf" and operator.name not in differentiable:
                overload = _overload(operator.name)
                refusal = forward_only(overload, NO_SECOND_DERIVATIVE)
                library.impl(operator.name, autograd_kernel(overload, refusal), "Autograd")
        for operator in _defs.operators():
            if _draws_random_numbers(operator.name):
                _tag(operator.name)
        _register_vmap(library)
    except Exception as error:  # noqa: BLE001 - without them the operators still run
        _loader.reasons.append(
            f"the operators have no fake or autograd kernels: {type(error).__name__}: {error}"
        )
