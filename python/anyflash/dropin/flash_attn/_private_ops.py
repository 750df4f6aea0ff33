"""_flash_attn_{forward, backward, varlen_forward, varlen_backward}: private, and widely used.

Where torch can (2.4 and later) and nobody else has taken the names, they are custom operators
``flash_attn::_flash_attn_*``, as upstream has them: clients read ``CustomOpDef._init_fn`` and call
``torch.ops.flash_attn``. Otherwise they are plain functions. Nothing of anyflash depends on the
registered names, because other packages register them again.
"""

import inspect
from typing import Any, Callable, Optional

import flash_attn_2_cuda as flash_attn_gpu
import torch
from torch import Tensor

from anyflash.attention_probs import round_up


def maybe_contiguous(x: Optional[Tensor]) -> Optional[Tensor]:
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
    *options, return_softmax = options
    out, softmax_lse, s_dmask, rng_state = forward(q, k, v, *options, False)
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


_BUFFERS = ("dq", "dk", "dv")


def _plain(function: Callable[..., Any]) -> tuple[Any, Any]:
    """Without an operator. Clients read ``_init_fn`` of whatever they find here."""
    function._init_fn = function
    return function, function


def _define(
    name: str, function: Callable[..., Any], fake: Callable[..., Any], mutates: tuple[str, ...]
) -> tuple[Any, Any]:
    """(what clients import as ``_flash_attn_*``, what they import as ``_wrapped_flash_attn_*``)."""
    qualified = f"flash_attn::{name}"
    if not hasattr(torch.library, "custom_op") or torch._C._jit_get_schemas_for_operator(qualified):
        return _plain(function)
    operator = torch.library.custom_op(qualified, function, mutates_args=mutates)
    operator.register_fake(fake)
    return operator, getattr(torch.ops.flash_attn, name)


_flash_attn_forward, _wrapped_flash_attn_forward = _define(
    "_flash_attn_forward", forward, _forward_fake, ()
)
_flash_attn_varlen_forward, _wrapped_flash_attn_varlen_forward = _define(
    "_flash_attn_varlen_forward", varlen_forward, _varlen_forward_fake, ()
)
_flash_attn_backward, _wrapped_flash_attn_backward = _define(
    "_flash_attn_backward", backward, backward, _BUFFERS
)
_flash_attn_varlen_backward, _wrapped_flash_attn_varlen_backward = _define(
    "_flash_attn_varlen_backward", varlen_backward, varlen_backward, _BUFFERS
)
