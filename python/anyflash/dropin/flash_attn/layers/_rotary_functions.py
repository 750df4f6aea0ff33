"""The rotations that write into their input, as autograd records them.

A function returns its input without saying that it wrote it: the rotation is recorded on what is
returned alone. So any tensor may be turned, views and leaves that require a gradient included. The
backward makes a new gradient, since the incoming one may belong to somebody else.
"""

from __future__ import annotations

from typing import Any, Optional, Union

from torch import Tensor
from torch.autograd.function import Function

from anyflash import rotary


def _query_and_key(qkv: Tensor, num_heads_q: Optional[int]) -> tuple[Tensor, Tensor]:
    """Views (batch, seqlen, heads, head_dim) of q and k in a packed qkv."""
    if qkv.dim() == 5:
        if qkv.shape[2] != 3:
            raise RuntimeError(
                f"qkv: expected (batch, seqlen, 3, nheads, headdim), got {tuple(qkv.shape)}"
            )
        return qkv[:, :, 0], qkv[:, :, 1]
    if qkv.dim() != 4:
        raise RuntimeError(
            "qkv: expected (batch, seqlen, 3, nheads, headdim) or (batch, seqlen, num_heads_q + "
            f"2 * num_heads_k, headdim), got {tuple(qkv.shape)}"
        )
    if num_heads_q is None:
        raise RuntimeError(
            f"num_heads_q: missing, needed for a qkv of 4 dimensions {tuple(qkv.shape)}"
        )
    num_heads_k, odd = divmod(qkv.shape[2] - num_heads_q, 2)
    if odd or num_heads_k < 0 or num_heads_q < 0:
        raise RuntimeError(
            f"num_heads_q: expected num_heads_q + 2 * num_heads_k = {qkv.shape[2]} heads of qkv, "
            f"got num_heads_q {num_heads_q}"
        )
    return qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + num_heads_k]


def _as_one(qkv: Tensor, q: Tensor, k: Tensor) -> Optional[Tensor]:
    """q and k as one tensor with the heads of both, where its strides allow."""
    if qkv.dim() == 4:
        return qkv[:, :, : q.shape[2] + k.shape[2]]
    batch, seqlen, _, heads, head_dim = qkv.shape
    evenly_spaced = qkv.stride(2) == heads * qkv.stride(3)
    return qkv[:, :, :2].view(batch, seqlen, 2 * heads, head_dim) if evenly_spaced else None


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def apply_to_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Optional[Tensor] = None,
    sin_k: Optional[Tensor] = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
    seqlen_offsets: Union[int, Tensor] = 0,
    num_heads_q: Optional[int] = None,
) -> Tensor:
    """qkv with q and k turned: in one call where both see the same tables.

    Upstream's ``_apply_rotary_emb_qkv``.
    """
    for name, table in (("cos_k", cos_k), ("sin_k", sin_k)):
        # So that whatever is wrong with k's tables is found before q is written.
        if table is not None and not _alike(table, cos):
            raise RuntimeError(
                f"{name}: expected cos' {tuple(cos.shape)}, {cos.dtype} on {cos.device}, got "
                f"{tuple(table.shape)}, {table.dtype} on {table.device}"
            )
    if not inplace:
        qkv = qkv.clone()

    def turn_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
        rotary(
            x, cos, sin, interleaved=interleaved, inplace=True, conjugate=conjugate,
            seqlen_offsets=seqlen_offsets,
        )  # fmt: skip

    q, k = _query_and_key(qkv, num_heads_q)
    both = _as_one(qkv, q, k) if cos_k is None and sin_k is None else None
    if both is not None:
        turn_(both, cos, sin)
    else:
        turn_(q, cos, sin)
        turn_(k, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)
    return qkv


def turn_keys_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, seqlen_offsets: Union[int, Tensor]
) -> None:
    """Turns k of a packed kv."""
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise RuntimeError(
            f"kv: expected (batch, seqlen, 2, nheads, headdim), got {tuple(kv.shape)}"
        )
    rotary(
        kv[:, :, 0], cos, sin, interleaved=interleaved, inplace=True, seqlen_offsets=seqlen_offsets
    )


def _save(
    ctx: Any,
    tables: tuple[Optional[Tensor], ...],
    seqlen_offsets: Union[int, Tensor],
    **options: Any,
) -> None:
    """Keeps what the backward needs; offsets may be a tensor."""
    is_tensor = isinstance(seqlen_offsets, Tensor)
    ctx.save_for_backward(*tables, seqlen_offsets if is_tensor else None)
    ctx.offset = 0 if is_tensor else seqlen_offsets
    ctx.options = options


def _saved(ctx: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The tables, and the keyword arguments of the rotation backwards."""
    if any(ctx.needs_input_grad[1:]):
        raise RuntimeError(
            "cos, sin: the in-place functions have no gradient of the tables, got one that "
            "requires it; apply_rotary_emb(..., inplace=False) has"
        )
    *tables, offsets = ctx.saved_tensors
    seqlen_offsets = ctx.offset if offsets is None else offsets
    return tuple(tables), dict(ctx.options, seqlen_offsets=seqlen_offsets, conjugate=True)


def _written(ctx: Any, x: Tensor) -> Tensor:
    """x as the result. A recorded input that is returned as it is would count as a view of itself,
    which a write through another view of its memory (k after q) makes unusable."""
    return x.detach() if ctx.needs_input_grad[0] else x


class ApplyRotaryEmb(Function):
    """apply_rotary_emb as autograd records it in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool = False,
        inplace: bool = False,
        seqlen_offsets: Union[int, Tensor] = 0,
        cu_seqlens: Optional[Tensor] = None,
        max_seqlen: Optional[int] = None,
    ) -> Tensor:
        _save(ctx, (cos, sin, cu_seqlens), seqlen_offsets, interleaved=interleaved,
              max_seqlen=max_seqlen)  # fmt: skip
        out = rotary(
            x, cos, sin, interleaved=interleaved, inplace=inplace, seqlen_offsets=seqlen_offsets,
            cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
        )  # fmt: skip
        return _written(ctx, x) if inplace else out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Optional[Tensor], ...]:
        (cos, sin, cu_seqlens), options = _saved(ctx)
        return (rotary(dout, cos, sin, cu_seqlens=cu_seqlens, **options), *(None,) * 7)


class ApplyRotaryEmbQKV_(Function):  # noqa: N801 (upstream's name)
    """``apply_rotary_emb_qkv_`` as autograd records it."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        cos_k: Optional[Tensor] = None,
        sin_k: Optional[Tensor] = None,
        interleaved: bool = False,
        seqlen_offsets: Union[int, Tensor] = 0,
        num_heads_q: Optional[int] = None,
    ) -> Tensor:
        _save(ctx, (cos, sin, cos_k, sin_k), seqlen_offsets, interleaved=interleaved,
              num_heads_q=num_heads_q)  # fmt: skip
        apply_to_qkv(
            qkv, cos, sin, cos_k, sin_k, interleaved, True, False, seqlen_offsets, num_heads_q
        )
        return _written(ctx, qkv)

    @staticmethod
    def backward(ctx: Any, dqkv: Tensor) -> tuple[Optional[Tensor], ...]:
        tables, options = _saved(ctx)
        return (apply_to_qkv(dqkv, *tables, **options), *(None,) * 7)


class ApplyRotaryEmbKV_(Function):  # noqa: N801 (upstream's name)
    """``apply_rotary_emb_kv_`` as autograd records it."""

    @staticmethod
    def forward(
        ctx: Any,
        kv: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool = False,
        seqlen_offsets: Union[int, Tensor] = 0,
    ) -> Tensor:
        _save(ctx, (cos, sin), seqlen_offsets, interleaved=interleaved)
        turn_keys_(kv, cos, sin, interleaved, seqlen_offsets)
        return _written(ctx, kv)

    @staticmethod
    def backward(ctx: Any, dkv: Tensor) -> tuple[Optional[Tensor], ...]:
        tables, options = _saved(ctx)
        dkv = dkv.clone()
        rotary(dkv[:, :, 0], *tables, inplace=True, **options)
        return (dkv, *(None,) * 4)
