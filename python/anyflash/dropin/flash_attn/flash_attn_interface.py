"""flash_attn's functions: upstream's names, signatures and returns over anyflash's operators.

The public functions run on ``anyflash::`` operators alone. Annotations are real objects and return
types are left out, so that ``inspect.signature`` tells what upstream's tells and
``torch.jit.script`` compiles the ``is_scripting`` branch, which returns the output alone.
"""

from typing import Any, Optional, Union

import flash_attn_2_cuda as flash_attn_gpu
import torch
from torch import Tensor

import anyflash
from anyflash import _numbers
from anyflash.attention import attention_with_rng_state
from anyflash.attention_probs import effective_dropout, signed_probabilities

from ._autograd_functions import (  # noqa: F401  (clients import these names from here)
    FlashAttnFunc,
    FlashAttnKVPackedFunc,
    FlashAttnQKVPackedFunc,
    FlashAttnVarlenFunc,
    FlashAttnVarlenKVPackedFunc,
    FlashAttnVarlenQKVPackedFunc,
)
from ._private_ops import (  # noqa: F401  (likewise)
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    _wrapped_flash_attn_backward,
    _wrapped_flash_attn_forward,
    _wrapped_flash_attn_varlen_backward,
    _wrapped_flash_attn_varlen_forward,
    maybe_contiguous,
)

USE_TRITON_ROCM = False


def round_multiple(x: int, m: int) -> int:
    """The smallest multiple of m that is not below x."""
    return (x + m - 1) // m * m


def _get_block_size_n(device: Any, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """How many keys share the maximum that S_dmask is relative to: all of them."""
    return 1 << 30


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def _parts(packed: Tensor, name: str, count: int, leading: str) -> tuple[Tensor, ...]:
    """The tensors that lie beside each other in the third dimension from the end."""
    _check_tensor(name, packed)
    dims = 4 if leading == "total" else 5
    if packed.dim() != dims or packed.shape[-3] != count:
        raise RuntimeError(
            f"{name}: expected ({leading}, {count}, heads, head_dim), got {tuple(packed.shape)}"
        )
    return packed.unbind(-3)


def _output_alone(more: bool) -> None:
    """TorchScript functions have one return type."""
    if more:
        raise RuntimeError(
            "return_attn_probs, return_softmax_lse: expected False in TorchScript, "
            "where the output comes alone"
        )


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: Optional[float],
    causal: bool,
    window_size: Any,
    softcap: float,
    alibi_slopes: Optional[Tensor],
    deterministic: bool,
    return_attn_probs: bool,
    **lengths: Any,
) -> Any:
    """out, or (out, softmax_lse, S_dmask); lengths are those of packed sequences."""
    if not return_attn_probs:
        return anyflash.attention(
            q, k, v, dropout_p=effective_dropout(dropout_p), softmax_scale=softmax_scale,
            causal=causal, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
            deterministic=deterministic, **lengths,
        )  # fmt: skip
    window = _numbers.window(window_size)
    kept = effective_dropout(dropout_p)
    of = lengths.get
    out, softmax_lse, rng_state = attention_with_rng_state(
        q, k, v, of("cu_seqlens_q"), of("cu_seqlens_k"), of("max_seqlen_q"), of("max_seqlen_k"),
        None, None, of("block_table"), alibi_slopes, None, None, kept, softmax_scale, causal,
        window, softcap, deterministic, None, True, None,
    )  # fmt: skip
    if dropout_p == 0.0:
        return out, softmax_lse, q.new_empty(0)
    scale = q.shape[-1] ** -0.5
    if softmax_scale is not None:
        q, scale = _numbers.scaled(q, softmax_scale)
    pattern = signed_probabilities(
        q, k, alibi_slopes=alibi_slopes, rng_state=rng_state if kept > 0.0 else None,
        dropout_p=kept, softmax_scale=scale, causal=causal, window_size=window, softcap=softcap,
        **lengths,
    )  # fmt: skip
    return out, softmax_lse, pattern


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """Attention.

    Args:
        q: (batch, seqlen_q, heads, head_dim), or (seqlen_q, heads, head_dim) for one sequence.
        k: (batch, seqlen_k, heads_k, head_dim); heads_k divides heads.
        v: like k; its head dim may differ.
        dropout_p: probability of dropping a probability.
        softmax_scale: None: head_dim ** -0.5.
        causal: query i sees keys up to i + seqlen_k - seqlen_q.
        window_size: keys left and right of that diagonal that are visible; -1: all.
        softcap: > 0: scores become softcap * tanh(score / softcap).
        alibi_slopes: (heads,) or (batch, heads) fp32.
        deterministic: the backward adds in a fixed order.
        return_attn_probs: return (out, softmax_lse, S_dmask).

    Returns:
        out in q's shape; with return_attn_probs also softmax_lse (batch, heads, seqlen_q) fp32 and
        S_dmask, which is empty without dropout and anyflash.attention_probs.signed_probabilities
        with it.

    Raises:
        RuntimeError: arguments that do not fit together.
    """
    if torch.jit.is_scripting():
        _output_alone(return_attn_probs)
        return torch.ops.anyflash.flash_attn_func(
            q, k, v, dropout_p, softmax_scale, causal, [window_size[0], window_size[1]], softcap,
            alibi_slopes, deterministic,
        )  # fmt: skip
    else:
        return _attend(
            q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
            deterministic, return_attn_probs,
        )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """flash_attn_func with keys and values in one kv (batch, seqlen_k, 2, heads_k, head_dim)."""
    if torch.jit.is_scripting():
        _output_alone(return_attn_probs)
        return torch.ops.anyflash.flash_attn_kvpacked_func(
            q, kv, dropout_p, softmax_scale, causal, [window_size[0], window_size[1]], softcap,
            alibi_slopes, deterministic,
        )  # fmt: skip
    else:
        k, v = _parts(kv, "kv", 2, "batch, seqlen")
        return _attend(
            q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
            deterministic, return_attn_probs,
        )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """flash_attn_func with everything in one tensor, qkv (batch, seqlen, 3, heads, head_dim)."""
    if torch.jit.is_scripting():
        _output_alone(return_attn_probs)
        return torch.ops.anyflash.flash_attn_qkvpacked_func(
            qkv, dropout_p, softmax_scale, causal, [window_size[0], window_size[1]], softcap,
            alibi_slopes, deterministic,
        )  # fmt: skip
    else:
        q, k, v = _parts(qkv, "qkv", 3, "batch, seqlen")
        return _attend(
            q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
            deterministic, return_attn_probs,
        )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Optional[Tensor] = None,
):
    """Attention of sequences of different lengths that lie end to end.

    Args:
        q: (total_q, heads, head_dim).
        k: (total_k, heads_k, head_dim), or with block_table (num_blocks, page_size, heads_k,
            head_dim).
        v: like k.
        cu_seqlens_q: (batch + 1,) int32: where each sequence begins, and the end.
        cu_seqlens_k: the same for keys; with block_table only the lengths count.
        max_seqlen_q: the longest sequence.
        max_seqlen_k: the same for keys.
        dropout_p to return_attn_probs: as in flash_attn_func; softmax_lse is (heads, total_q).
        block_table: (batch, max_blocks) int32, the pages of each sequence; any page size; no
            gradient.

    Returns:
        As flash_attn_func.

    Raises:
        RuntimeError: arguments that do not fit together.
    """
    if torch.jit.is_scripting():
        _output_alone(return_attn_probs)
        return torch.ops.anyflash.flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
            softmax_scale, causal, [window_size[0], window_size[1]], softcap, alibi_slopes,
            deterministic, block_table,
        )  # fmt: skip
    else:
        return _attend(
            q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
            deterministic, return_attn_probs, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, block_table=block_table,
        )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """flash_attn_varlen_func with keys and values in one kv (total_k, 2, heads_k, head_dim)."""
    if torch.jit.is_scripting():
        _output_alone(return_attn_probs)
        return torch.ops.anyflash.flash_attn_varlen_kvpacked_func(
            q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
            softmax_scale, causal, [window_size[0], window_size[1]], softcap, alibi_slopes,
            deterministic,
        )  # fmt: skip
    else:
        k, v = _parts(kv, "kv", 2, "total")
        return _attend(
            q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
            deterministic, return_attn_probs, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """flash_attn_varlen_func with everything in one tensor, qkv (total, 3, heads, head_dim)."""
    if torch.jit.is_scripting():
        _output_alone(return_attn_probs)
        return torch.ops.anyflash.flash_attn_varlen_qkvpacked_func(
            qkv, cu_seqlens, max_seqlen, dropout_p, softmax_scale, causal,
            [window_size[0], window_size[1]], softcap, alibi_slopes, deterministic,
        )  # fmt: skip
    else:
        q, k, v = _parts(qkv, "qkv", 3, "total")
        return _attend(
            q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
            deterministic, return_attn_probs, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
        )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Optional[Tensor] = None,
    v: Optional[Tensor] = None,
    rotary_cos: Optional[Tensor] = None,
    rotary_sin: Optional[Tensor] = None,
    cache_seqlens: Optional[Union[int, Tensor]] = None,
    cache_batch_idx: Optional[Tensor] = None,
    cache_leftpad: Optional[Tensor] = None,
    block_table: Optional[Tensor] = None,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Optional[Tensor] = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
):
    """Appends k and v to a cache in place, then computes attention over the cache. No gradient.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k_cache: (batch_cache, capacity, heads_k, head_dim), or with block_table (num_blocks,
            page_size, heads_k, head_dim).
        v_cache: like k_cache.
        k: (batch, seqlen_new, heads_k, head_dim), written to rows cache_seqlens and following.
        v: like k.
        rotary_cos: (seqlen_rotary, rotary_dim / 2) in q's dtype; with it, q and k are rotated.
        rotary_sin: like rotary_cos.
        cache_seqlens: (batch,) int32 or one int: keys in the cache before the call; None: all of
            it.
        cache_batch_idx: (batch,) int32, the row of the cache for each sequence.
        cache_leftpad: (batch,) int32, leading rows to skip.
        block_table: (batch, max_blocks) int32, the pages of each sequence; any page size.
        softmax_scale to softcap: as in flash_attn_func.
        rotary_interleaved: rotate neighbours; False: elements half of rotary_dim apart.
        alibi_slopes: (heads,) or (batch, heads) fp32.
        num_splits: a hint, at most 128.
        return_softmax_lse: return (out, softmax_lse).

    Returns:
        out (batch, seqlen_q, heads, head_dim); with return_softmax_lse also softmax_lse (batch,
        heads, seqlen_q) fp32.

    Raises:
        RuntimeError: arguments that do not fit together, or tensors that require a gradient while
            gradients are recorded.
    """
    if torch.jit.is_scripting():
        _output_alone(return_softmax_lse)
        seqlens: Optional[Tensor] = None
        if isinstance(cache_seqlens, int):
            seqlens = torch.full([q.size(0)], cache_seqlens, dtype=torch.int32, device=q.device)
        elif isinstance(cache_seqlens, Tensor):
            seqlens = cache_seqlens
        return torch.ops.anyflash.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, seqlens, cache_batch_idx,
            cache_leftpad, block_table, softmax_scale, causal, [window_size[0], window_size[1]],
            softcap, rotary_interleaved, alibi_slopes, num_splits,
        )  # fmt: skip
    else:
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            _check_tensor(name, cache)
            assert cache.stride(-1) == 1, f"{name} must have contiguous last dimension"
        flash_attn_gpu.check_num_splits(num_splits)
        if isinstance(cache_seqlens, Tensor):
            cache_seqlens = maybe_contiguous(cache_seqlens)
        return anyflash.attention_kvcache(
            q, k_cache, v_cache, maybe_contiguous(k), maybe_contiguous(v), rotary_cos=rotary_cos,
            rotary_sin=rotary_sin, cache_seqlens=cache_seqlens,
            cache_batch_idx=maybe_contiguous(cache_batch_idx), cache_leftpad=cache_leftpad,
            block_table=maybe_contiguous(block_table), softmax_scale=softmax_scale, causal=causal,
            window_size=window_size, softcap=softcap,
            rotary_interleaved=rotary_interleaved, alibi_slopes=alibi_slopes,
            return_lse=return_softmax_lse,
        )  # fmt: skip
