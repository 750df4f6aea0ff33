"""Upstream's Triton attention with an additive bias, through anyflash.attention.

Two things differ from flash_attn.flash_attn_func: the order of arguments (bias, causal,
softmax_scale; no dropout), and that causal lets query i see keys up to i whatever the lengths are.
Upstream takes fp16 and bf16 on CUDA with head dims up to 128, and refuses a bias that requires a
gradient; here any device and dtype will do, and bias gets its gradient.
"""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor

import anyflash
from flash_attn._missing import absent


def init_to_zero(name: str) -> Callable[[dict[str, Any]], Tensor]:
    """A hook for triton.Config that clears the kernel argument of that name."""
    return lambda arguments: arguments[name].zero_()


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attention with a bias, differentiable in q, k, v and bias.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k: (batch, seqlen_k, heads, head_dim).
        v: like k.
        bias: (1 or batch, 1 or heads, 1 or seqlen_q, seqlen_k), added to the scaled scores.
        causal: query i sees keys up to i.
        softmax_scale: None: head_dim ** -0.5.

    Returns:
        q's shape.

    Raises:
        RuntimeError: arguments that do not fit together.
    """
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    if bias is not None and bias.dim() != 4:
        raise RuntimeError(
            "bias: expected 4 dimensions, (1 or batch, 1 or heads, 1 or seqlen_q, seqlen_k), got "
            f"{tuple(bias.shape)}"
        )
    if bias is not None and bias.shape[2:] not in ((1, seqlen_k), (seqlen_q, seqlen_k)):
        raise RuntimeError(
            "Last 2 dimensions of bias must be (1, seqlen_k) or (seqlen_q, seqlen_k), here "
            f"seqlen_q = {seqlen_q} and seqlen_k = {seqlen_k}, got {tuple(bias.shape)}"
        )
    scale = softmax_scale or None
    if not causal:
        return anyflash.attention(q, k, v, bias=bias, softmax_scale=scale)
    # anyflash's diagonal ends in the last row and column. So does this one in the square part;
    # queries below it see all keys, keys to the right of it are seen by none.
    square = min(seqlen_q, seqlen_k)
    above = below = bias
    if bias is not None:
        above = bias[..., :square]
        if bias.shape[2] != 1:
            above, below = above[:, :, :square], bias[:, :, square:]
    out = anyflash.attention(
        q[:, :square], k[:, :square], v[:, :square], bias=above, causal=True, softmax_scale=scale
    )
    if square == seqlen_q:
        return out
    rest = anyflash.attention(q[:, square:], k, v, bias=below, softmax_scale=scale)
    return torch.cat([out, rest], dim=1)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """flash_attn_func with keys and values in one kv (batch, seqlen_k, 2, heads, head_dim)."""
    k, v = kv.unbind(2)
    return flash_attn_func(q, k, v, bias, causal, softmax_scale)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """flash_attn_func with everything in one qkv (batch, seqlen, 3, heads, head_dim)."""
    q, k, v = qkv.unbind(2)
    return flash_attn_func(q, k, v, bias, causal, softmax_scale)


class FlashAttnFunc:
    """flash_attn_func under upstream's name of the autograd.Function."""

    apply = staticmethod(flash_attn_func)


class FlashAttnKVPackedFunc:
    """flash_attn_kvpacked_func under upstream's name of the autograd.Function."""

    apply = staticmethod(flash_attn_kvpacked_func)


class FlashAttnQKVPackedFunc:
    """flash_attn_qkvpacked_func under upstream's name of the autograd.Function."""

    apply = staticmethod(flash_attn_qkvpacked_func)


__getattr__ = absent(
    __name__,
    dict.fromkeys(
        (
            "_fwd_kernel",
            "_bwd_kernel",
            "_bwd_kernel_one_col_block",
            "_bwd_preprocess_do_o_dot",
            "_bwd_store_dk_dv",
            "_flash_attn_forward",
            "_flash_attn_backward",
        ),
        "a Triton kernel, or the call of one; flash_attn_func of this module computes it on every "
        "device, and autograd its gradient",
    ),
)
