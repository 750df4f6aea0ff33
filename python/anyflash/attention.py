"""anyflash.attention: dense, packed and paged attention with everything flash_attn knows, bias and
sinks besides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

from torch import Tensor

from . import _autocast, _numbers, backends
from ._numbers import integer, real
from ._operators.attention import AttentionCall, attend
from ._rng_state import draw_rng_state, must_be_given

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Options(TypedDict, total=False):
    """The keywords of attention, all but return_lse, which decides what comes back."""

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | Tensor | None
    max_seqlen_k: int | Tensor | None
    seqused_k: Tensor | None
    leftpad_k: Tensor | None
    block_table: Tensor | None
    alibi_slopes: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    dropout_p: float
    softmax_scale: float | Tensor | None
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    deterministic: bool
    rng_state: Tensor | None
    backend: str | None


def _require_tensors(**tensors: Any) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def contiguous_last_dim(x: Tensor) -> Tensor:
    """x itself where the elements of a row lie side by side, else a contiguous copy."""
    return x if x.dim() == 0 or x.stride(-1) == 1 else x.contiguous()


def _longest(name: str, given: int | Tensor | None, bound: int) -> int:
    """max_seqlen; where none is given, what no sequence can exceed."""
    return bound if given is None else integer(name, given)


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[_Options]
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **options: Unpack[_Options]
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    block_table: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    rng_state: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T) v, differentiable in q, k, v, bias, sinks and softmax_scale.

    Args:
        q: (batch, seqlen_q, heads, head_dim); (total_q, heads, head_dim) with cu_seqlens_q; three
            dimensions without cu_seqlens_q are one sequence. fp16, bf16, fp32 or fp64; head_dim 1
            to 512.
        k: (batch, seqlen_k, heads_k, head_dim), (total_k, heads_k, head_dim), or with block_table
            (num_blocks, page_size, heads_k, head_dim). heads_k divides heads.
        v: k's shape; its last dimension may differ.
        cu_seqlens_q: (batch + 1,) int32, where each packed sequence begins, and the end.
        cu_seqlens_k: the same for keys; with seqused_k only where each sequence's keys begin.
        max_seqlen_q: the longest sequence; None: a bound that costs memory on some back ends.
        max_seqlen_k: the same for keys.
        seqused_k: (batch,) int32, how many keys each sequence has, whatever cu_seqlens_k says.
        leftpad_k: (batch,) int32, leading keys to skip.
        block_table: (batch, max_blocks) int32, the pages of each sequence. The call then has no
            gradient: a backward through its result raises RuntimeError.
        alibi_slopes: (heads,) or (batch, heads) fp32. Where they ask for a gradient, a backward
            raises RuntimeError.
        bias: additive, or boolean with true = visible; broadcasts to (batch, heads, seqlen_q,
            seqlen_k).
        sinks: (heads,), one more logit per head, without a value.
        dropout_p: in [0, 1).
        softmax_scale: None: head_dim ** -0.5. A tensor of one element may ask for a gradient; then,
            and in graphs, it is multiplied into q in q's dtype.
        causal: query i sees keys up to i + seqlen_k - seqlen_q.
        window_size: keys to the left and right of that diagonal that are visible; -1: all, as is a
            number from seqlen_k on (packed: max_seqlen_k, paged: the room in block_table; upstream
            has it so, and it counts where there are more queries than keys).
        softcap: > 0: scores become softcap * tanh(score / softcap).
        deterministic: the backward adds in a fixed order.
        rng_state: (2,) int64 seed and offset of the dropout; None: drawn.
        return_lse: also return the log-sum-exp of each row, differentiable.
        backend: comma list of back ends to try for this call (anyflash.backends).

    Returns:
        out in q's shape and layout with v's head dim; with return_lse (out, lse), lse fp32 (fp64
        for fp64) of (batch, heads, seqlen_q), packed (heads, total_q).

    Raises:
        RuntimeError: arguments that do not fit together, or no back end of the choice can run the
            call.
        ValueError: an unknown back end.
        TypeError: q, k or v is not a tensor, or an option not a number.
    """
    out, lse, _ = attention_with_rng_state(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, leftpad_k,
        block_table, alibi_slopes, bias, sinks, dropout_p, softmax_scale, causal, window_size,
        softcap, deterministic, rng_state, return_lse, backend,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def attention_with_rng_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    softmax_scale: float | Tensor | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    deterministic: bool,
    rng_state: Tensor | None,
    return_lse: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """attention, which also returns where its dropout began: (out, lse, rng_state), rng_state (2,)
    int64, empty without dropout."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        _require_tensors(q=q, k=k, v=v)
    if _autocast.is_enabled(q):
        if block_table is None:
            q, k, v, bias = _autocast.cast(q, k, v, bias)
        else:
            q, bias = _autocast.cast(q, bias, cache=k)
    single = q.dim() == 3 and cu_seqlens_q is None
    if single:
        q, k, v = _one_sequence(q, k, v)
    if not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous()):
        q, k, v = contiguous_last_dim(q), contiguous_last_dim(k), contiguous_last_dim(v)
    if cu_seqlens_q is not None:
        max_seqlen_q = _longest("max_seqlen_q", max_seqlen_q, q.size(0))
        max_seqlen_k = _longest("max_seqlen_k", max_seqlen_k, k.size(0))
    else:
        max_seqlen_q = max_seqlen_k = 0
    if softmax_scale is None:
        head_dim = q.size(-1)
        softmax_scale = head_dim**-0.5 if head_dim else 1.0
    elif type(softmax_scale) is not float:
        q, softmax_scale = _numbers.scaled(q, softmax_scale)
    if not (type(dropout_p) is float and type(softcap) is float):
        dropout_p, softcap = real("dropout_p", dropout_p), real("softcap", softcap)
    if dropout_p > 0.0 and rng_state is None and must_be_given():
        rng_state = draw_rng_state(q.device)
    window_size_left, window_size_right = _numbers.window(window_size)
    call = AttentionCall(  # in its order: with names it would take half a microsecond more
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, leftpad_k,
        block_table, alibi_slopes, bias, sinks, rng_state, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, deterministic, return_lse,
        backends.resolve(backend),
    )  # fmt: skip
    out, lse, rng_state = attend(call)
    if single:
        out, lse = out.squeeze(0), lse.squeeze(0)
    return out, lse, rng_state


def _one_sequence(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(total, heads, head_dim) as a batch of one."""
    if k.dim() != 3 or v.dim() != 3:
        raise RuntimeError(
            f"k, v: expected (seqlen_k, heads_k, head_dim) like q {tuple(q.shape)}, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    return q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
