"""PyTorch's flash attention on CUDA by anyflash's kernels: scaled_dot_product_attention where it
takes its flash back end, and torch.nn.attention.varlen.varlen_attn. The counterpart on CPUs is
anyflash.accelerate_sdpa()::

    from anyflash.integrations import torch_flash
    with torch_flash.enable():
        ...
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from .._guards import isolated
from .._operators.attention import AttentionCall, BackwardCall
from ..attention import contiguous_last_dim
from ..explain import kernel_runs
from ..sdpa import builtin_kernel, in_layout_of

#: The name in torch.nn.attention.list_flash_attention_impls().
NAME = "anyflash"
_KEY = "CUDA"
_KERNEL_ALONE = backends.CODES["kernel"]  # as an order: what kernel_runs answered for

_active: _Overrides | None = None


class FlashActivation:
    """What enable() returned; `close()`, or the end of its `with` block, undoes it."""

    def __init__(self, overrides: _Overrides | None) -> None:
        self._overrides = overrides

    def close(self) -> None:
        """PyTorch's own kernels again, if nobody has activated others since."""
        if _active is not None and _active is self._overrides:
            torch.nn.attention.restore_flash_attention_impl()

    def __enter__(self) -> FlashActivation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def enable() -> FlashActivation:
    """Activates anyflash as PyTorch's implementation of flash attention.

    ``torch.nn.attention.register_flash_attention_impl`` and ``activate_flash_attention_impl`` with
    NAME. What the order of back ends (``anyflash.backend``, ANYFLASH_BACKEND) gives to a kernel of
    anyflash runs on it, forward and backward; all else (dropout, ``num_splits``, fp8, GPUs without
    a kernel) stays PyTorch's, and so does the choice between its flash, cuDNN and other back ends.
    PyTorch has one implementation at a time: a later activation, of whomever, takes this one's
    place. ``torch.nn.attention.restore_flash_attention_impl()`` undoes it too.

    Returns:
        An object with ``close()``, and a context manager.

    Raises:
        RuntimeError: torch is older than 2.10, where there is no such hook, or has no CUDA.
    """
    try:
        from torch.nn.attention import activate_flash_attention_impl, register_flash_attention_impl
    except ImportError as error:
        raise RuntimeError(
            "torch_flash.enable() needs torch.nn.attention.register_flash_attention_impl, which "
            f"torch 2.10 and newer have; this is {torch.__version__}"
        ) from error
    register_flash_attention_impl(NAME, register_fn=_Overrides)
    activate_flash_attention_impl(NAME)
    return FlashActivation(_active)


class _Overrides:
    """The kernels registered with PyTorch, until remove(), which its registry calls."""

    def __init__(self) -> None:
        global _active
        try:
            kept = {name: builtin_kernel(name, _KEY) for name in _KERNELS}
        except RuntimeError as error:
            raise RuntimeError(
                f"torch_flash.enable(): this torch has no flash attention for CUDA: {error}"
            ) from error
        self._library = torch.library.Library("aten", "IMPL")
        for name, kernel in _KERNELS.items():
            function = isolated(functools.partial(_dispatch, kept[name], kernel))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it replaces a kernel, as it should
                self._library.impl(name, function, _KEY, allow_override=True)
        _active = self

    def remove(self) -> None:
        global _active
        _active = None
        self._library._destroy()


class _Kernel(NamedTuple):
    """An operator of aten: its arguments as a call of ours, None if that has no kernel, and its
    results from ours, beginning with the arguments."""

    describe: Callable[..., AttentionCall | BackwardCall | None]
    run: Callable[..., Any]


def _dispatch(builtin: Callable[..., Any], kernel: _Kernel, *arguments: Any, **named: Any) -> Any:
    call = kernel.describe(*arguments, **named)
    return builtin(*arguments, **named) if call is None else kernel.run(call, *arguments)


def _described(kind: type[Any], tensors: dict[str, Tensor], **options: Any) -> Any | None:
    """The call, if its order of back ends gives it to a kernel."""
    q, k = tensors["q"], tensors["k"]
    left, right = options["window_size_left"], options["window_size_right"]
    right = 0 if options["causal"] else right
    asked = {
        "packed": options["cu_seqlens_q"] is not None,
        "paged": options.get("block_table") is not None,
        "seqused_k": options["seqused_k"] is not None,
        "causal": right == 0,
        "window": left >= 0 or right > 0,
        "alibi": options["alibi_slopes"] is not None,
        "gqa": q.size(-2) != k.size(-2),
        "lse": kind is AttentionCall,
    }
    features = tuple(name for name, there in asked.items() if there)
    order = backends.current_code() or backends.environment_code()
    direction = int(kind is BackwardCall)
    if not _runs_on_kernel(direction, q.device, q.dtype, q.size(-1), features, order):
        return None
    given = {**dict.fromkeys(kind._fields), "dropout_p": 0.0, "softcap": 0.0, **options}
    given.update({name: contiguous_last_dim(x) for name, x in tensors.items()})
    given.update(deterministic=torch.are_deterministic_algorithms_enabled())
    given.update(return_lse=True, backend=_KERNEL_ALONE)
    given.update(bias_requires_grad=False, sinks_requires_grad=False)
    if given["softmax_scale"] is None:
        given["softmax_scale"] = q.size(-1) ** -0.5
    return kind(**{name: given[name] for name in kind._fields})


_runs_on_kernel = functools.cache(kernel_runs)


# ---- aten::_flash_attention_forward and _backward: (batch, seqlen, heads, head_dim), or packed.


def _describe_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> AttentionCall | None:
    if dropout_p != 0.0 or return_debug_mask or num_splits is not None:
        return None
    if cum_seq_q is not None and cum_seq_k is None and block_table is None:
        return None
    return _described(
        AttentionCall,
        {"q": query, "k": key, "v": value},
        cu_seqlens_q=cum_seq_q,
        cu_seqlens_k=cum_seq_k,
        max_seqlen_q=0 if cum_seq_q is None else max_q,
        max_seqlen_k=0 if cum_seq_q is None else max_k,
        seqused_k=seqused_k,
        block_table=block_table,
        alibi_slopes=alibi_slopes,
        softmax_scale=scale,
        causal=is_causal,
        window_size_left=-1 if window_size_left is None else window_size_left,
        window_size_right=-1 if window_size_right is None else window_size_right,
    )


def _run_forward(call: AttentionCall, query: Tensor, *_: Any) -> tuple[Tensor, ...]:
    """out, log-sum-exp, and what a call without dropout has no use for."""
    out, softmax_lse, _ = torch.ops.anyflash._flash_attn_forward.default(*call)
    seed = query.new_zeros(2, dtype=torch.uint64)
    return out, softmax_lse, seed, seed.new_zeros(()), query.new_empty(0)


def _describe_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor | None,
    unused: Tensor | None,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> BackwardCall | None:
    if dropout_p != 0.0:
        return None
    return _described(
        BackwardCall,
        {"dout": grad_out, "q": query, "k": key, "v": value, "out": out},
        softmax_lse=logsumexp,
        cu_seqlens_q=cum_seq_q,
        cu_seqlens_k=cum_seq_k,
        max_seqlen_q=0 if cum_seq_q is None else max_q,
        max_seqlen_k=0 if cum_seq_q is None else max_k,
        seqused_k=None,
        alibi_slopes=None,
        softmax_scale=scale,
        causal=is_causal,
        window_size_left=-1 if window_size_left is None else window_size_left,
        window_size_right=-1 if window_size_right is None else window_size_right,
    )


def _run_backward(call: BackwardCall, *_: Any) -> tuple[Tensor, ...]:
    return torch.ops.anyflash._flash_attn_backward.default(*call)[:3]


# ---- The same into memory that the caller brings.


def _describe_inplace(out: Tensor, *arguments: Any, **named: Any) -> AttentionCall | None:
    return _describe_forward(*arguments, **named)


def _run_inplace(call: AttentionCall, out: Tensor, query: Tensor, *_: Any) -> Tensor:
    result, softmax_lse = _run_forward(call, query)[:2]
    out.copy_(result)
    return softmax_lse


# ---- What scaled_dot_product_attention ends in: (batch, heads, seqlen, head_dim).


def _describe_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> AttentionCall | None:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    lengths = (None, None, query.size(2), key.size(2))
    return _describe_forward(
        q, k, v, *lengths, dropout_p, is_causal, return_debug_mask, scale=scale
    )


def _run_sdpa(call: AttentionCall, query: Tensor, key: Tensor, *_: Any) -> tuple[Any, ...]:
    out, softmax_lse, *rest = _run_forward(call, query)
    lengths = (None, None, query.size(2), key.size(2))
    return in_layout_of(query, out.transpose(1, 2)), softmax_lse, *lengths, *rest


def _describe_sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    *rest: Any,
    scale: float | None = None,
) -> BackwardCall | None:
    dout, q, k, v, out = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    return _describe_backward(dout, q, k, v, out, logsumexp, None, None, *rest[2:], scale=scale)


def _run_sdpa_backward(call: BackwardCall, *_: Any) -> tuple[Tensor, ...]:
    return tuple(gradient.transpose(1, 2) for gradient in _run_backward(call))


_KERNELS = {
    "_flash_attention_forward": _Kernel(_describe_forward, _run_forward),
    "_flash_attention_backward": _Kernel(_describe_backward, _run_backward),
    "_scaled_dot_product_flash_attention": _Kernel(_describe_sdpa, _run_sdpa),
    "_scaled_dot_product_flash_attention_backward": _Kernel(
        _describe_sdpa_backward, _run_sdpa_backward
    ),
}
if hasattr(torch.ops.aten, "_flash_attention_forward_no_dropout_inplace"):
    _KERNELS["_flash_attention_forward_no_dropout_inplace"] = _Kernel(
        _describe_inplace, _run_inplace
    )
