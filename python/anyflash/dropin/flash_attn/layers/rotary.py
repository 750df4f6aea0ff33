"""Rotary position embedding (arXiv 2104.09864), with xPos (arXiv 2212.10554): upstream's functions
and module on anyflash.rotary.

The in-place functions write into the tensor that they are given and return it, with the rotation
recorded on what they return alone: go on with the returned tensor. Any tensor may be turned so,
views and leaves that require a gradient included. Their backward makes a new gradient, where
upstream overwrites the incoming one, which may belong to somebody else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
from torch import Tensor

from anyflash import rotary
from anyflash._autograd import is_compiling, wants_operations

from ..ops.triton.rotary import apply_rotary
from ._rotary_functions import (
    ApplyRotaryEmb,
    ApplyRotaryEmbKV_,
    ApplyRotaryEmbQKV_,
    apply_to_qkv,
    turn_keys_,
)

__all__ = [
    "ApplyRotaryEmb",
    "ApplyRotaryEmbKV_",
    "ApplyRotaryEmbQKV_",
    "RotaryEmbedding",
    "apply_rotary",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
    "rotate_half",
]


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Every pair (a, b) of columns as (-b, a); pairs as in apply_rotary_emb."""
    if interleaved:
        a, b = x.unflatten(-1, (x.shape[-1] // 2, 2)).unbind(-1)
        return torch.stack((-b, a), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """The formula in PyTorch operations, in the dtype that x and the tables promote to.

    Args:
        x: (batch, seqlen, heads, head_dim).
        cos: (seqlen, rotary_dim / 2) or (batch, seqlen, rotary_dim / 2).
        sin: the same.
        interleaved: as in apply_rotary_emb.
    """
    rotary_dim = 2 * cos.shape[-1]
    if rotary_dim > x.shape[-1]:
        raise RuntimeError(
            f"cos: expected at most {x.shape[-1] // 2} columns for x {tuple(x.shape)}, got "
            f"{tuple(cos.shape)}"
        )

    def per_column(table: Tensor) -> Tensor:
        both = table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)
        return both.unsqueeze(-2)

    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    turned = turned * per_column(cos) + rotate_half(turned, interleaved) * per_column(sin)
    return torch.cat((turned, rest), dim=-1)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: Union[int, Tensor] = 0,
    cu_seqlens: Optional[Tensor] = None,
    max_seqlen: Optional[int] = None,
) -> Tensor:
    """Turns the first rotary_dim columns of x; shapes and errors are those of anyflash.rotary.

    Args:
        x: (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with cu_seqlens.
        cos: (seqlen_rotary, rotary_dim / 2).
        sin: the same.
        interleaved: pairs are neighbouring columns (GPT-J), else half of rotary_dim apart
            (GPT-NeoX).
        inplace: write into x; see the head of this module.
        seqlen_offsets: positions of the first rows, one for all or (batch,).
        cu_seqlens: (batch + 1,), where each packed sequence begins, and the end.
        max_seqlen: length of the longest packed sequence.

    Returns:
        x's shape; with inplace x' memory.
    """
    if inplace and wants_operations():
        return rotary(
            x, cos, sin, interleaved=interleaved, inplace=True, seqlen_offsets=seqlen_offsets,
            cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
        )  # fmt: skip
    if inplace:
        return ApplyRotaryEmb.apply(
            x, cos, sin, interleaved, True, seqlen_offsets, cu_seqlens, max_seqlen
        )
    return apply_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Optional[Tensor] = None,
    sin_k: Optional[Tensor] = None,
    interleaved: bool = False,
    seqlen_offsets: Union[int, Tensor] = 0,
    num_heads_q: Optional[int] = None,
) -> Tensor:
    """Turns q and k in place and returns qkv; see the head of this module.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim), or (batch, seqlen, num_heads_q + 2 * num_heads_k,
            head_dim), which needs num_heads_q.
        cos: (seqlen_rotary, rotary_dim / 2).
        sin: the same.
        cos_k: the tables of k where they are others (xPos).
        sin_k: the same.
        interleaved: as in apply_rotary_emb.
        seqlen_offsets: positions of the first rows, one for all or (batch,).
        num_heads_q: heads of q in a qkv of 4 dimensions.
    """
    if wants_operations():
        return apply_to_qkv(
            qkv, cos, sin, cos_k, sin_k, interleaved, True, False, seqlen_offsets, num_heads_q
        )
    return ApplyRotaryEmbQKV_.apply(
        qkv, cos, sin, cos_k, sin_k, interleaved, seqlen_offsets, num_heads_q
    )


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: Union[int, Tensor] = 0,
) -> Tensor:
    """Turns k in place and returns kv; see the head of this module.

    Args:
        kv: (batch, seqlen, 2, heads, head_dim).
        cos: (seqlen_rotary, rotary_dim / 2).
        sin: the same.
        interleaved: as in apply_rotary_emb.
        seqlen_offsets: positions of the first rows, one for all or (batch,).
    """
    if wants_operations():
        turn_keys_(kv, cos, sin, interleaved, seqlen_offsets)
        return kv
    return ApplyRotaryEmbKV_.apply(kv, cos, sin, interleaved, seqlen_offsets)


class RotaryEmbedding(torch.nn.Module):
    """Tables of angles that grow with the sequences seen, and their application to q and k.

    Position p turns pair i by p / base ** (2i / dim). With ``scale_base`` (xPos; the paper: 512) q
    is scaled by a power that grows with the position, and k divided by it.

    Args:
        dim: columns that are turned, even.
        base: of the angles.
        interleaved: as in apply_rotary_emb.
        scale_base: of xPos, or None.
        device: of the buffers.
        pos_idx_in_fp32: positions and inverse frequencies are fp32 whatever dtype the module was
            cast to; False takes the dtype of ``inv_freq``. Upstream had it until 2.7.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: Optional[float] = None,
        device: Optional[torch.device] = None,
        *,
        pos_idx_in_fp32: bool = True,
    ) -> None:
        super().__init__()
        if not (dim > 0 and dim % 2 == 0):
            raise ValueError(f"dim: expected a positive even number of columns, got {dim}")
        if not base > 0:
            raise ValueError(f"base: expected a positive number, got {base}")
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.pos_idx_in_fp32 = pos_idx_in_fp32
        self.inv_freq: Tensor
        self.scale: Optional[Tensor]
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        scale = None
        if scale_base is not None:
            scale = (self._even_columns(device) + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Optional[Tensor] = None
        self._sin_cached: Optional[Tensor] = None
        self._cos_k_cached: Optional[Tensor] = None
        self._sin_k_cached: Optional[Tensor] = None

    def _even_columns(self, device: Optional[torch.device]) -> Tensor:
        return torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)

    def _compute_inv_freq(self, device: Optional[torch.device] = None) -> Tensor:
        """(dim / 2,) fp32: the angle between neighbouring positions."""
        return self.base ** -(self._even_columns(device) / self.dim)

    def _cache_serves(
        self, seqlen: int, device: Optional[torch.device], dtype: Optional[torch.dtype]
    ) -> bool:
        cached = self._cos_cached
        if cached is None or seqlen > self._seq_len_cached:
            return False
        if cached.device != device or cached.dtype != dtype:
            return False
        # Autograd cannot save a table that was made in inference mode.
        return is_compiling() or torch.is_inference_mode_enabled() or not cached.is_inference()

    def _update_cos_sin_cache(
        self,
        seqlen: int,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        """Makes the tables reach ``seqlen`` positions, on that device and in that dtype."""
        if self._cache_serves(seqlen, device, dtype):
            return
        self._seq_len_cached = seqlen
        tables = self._tables(seqlen, device, dtype)
        self._cos_cached, self._sin_cached, self._cos_k_cached, self._sin_k_cached = tables

    def _tables(
        self, seqlen: int, device: Optional[torch.device], dtype: Optional[torch.dtype]
    ) -> tuple[Tensor, Tensor, Optional[Tensor], Optional[Tensor]]:
        """cos and sin of ``seqlen`` positions, and with xPos those of the keys."""
        inv_freq = self.inv_freq
        # A module cast to bf16 would have lost the angles of far positions.
        if self.pos_idx_in_fp32 and inv_freq.dtype != torch.float32:
            inv_freq = self._compute_inv_freq(device)
        positions = torch.arange(seqlen, device=device, dtype=inv_freq.dtype)
        angles = positions[:, None] * inv_freq.to(positions.device)
        cos, sin = torch.cos(angles), torch.sin(angles)
        if self.scale is None or self.scale_base is None:
            return cos.to(dtype), sin.to(dtype), None, None
        steps = torch.arange(seqlen, device=device, dtype=torch.float32) - seqlen // 2
        scale = self.scale.to(steps) ** (steps[:, None] / self.scale_base)
        q_tables, k_tables = (cos * scale, sin * scale), (cos / scale, sin / scale)
        cos, sin, cos_k, sin_k = (table.to(dtype) for table in (*q_tables, *k_tables))
        return cos, sin, cos_k, sin_k

    def _tables_of_call(
        self, qkv: Tensor, seqlen_offset: Union[int, Tensor], max_seqlen: Optional[int]
    ) -> Sequence[Any]:
        """The tables that a call needs, from the cache; in a graph, which would have to be compiled
        again whenever the cache has grown, new ones, where their length is that of the call."""
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        elif not isinstance(seqlen_offset, Tensor):
            length = qkv.shape[1] + seqlen_offset
            if is_compiling():
                return self._tables(length, qkv.device, qkv.dtype)
            self._update_cos_sin_cache(length, device=qkv.device, dtype=qkv.dtype)
        elif self._cos_cached is None:
            raise RuntimeError(
                "max_seqlen: expected with the first seqlen_offset that is a tensor, got None"
            )
        return self._cos_cached, self._sin_cached, self._cos_k_cached, self._sin_k_cached

    def forward(
        self,
        qkv: Tensor,
        kv: Optional[Tensor] = None,
        seqlen_offset: Union[int, Tensor] = 0,
        max_seqlen: Optional[int] = None,
        num_heads_q: Optional[int] = None,
    ) -> Union[Tensor, tuple[Tensor, Tensor]]:
        """Turns q and k in place.

        Args:
            qkv: packed as in ``apply_rotary_emb_qkv_``; with kv, q of (batch, seqlen, heads,
                head_dim).
            kv: (batch, seqlen, 2, heads, head_dim) or None.
            seqlen_offset: positions of the first rows, one for all or (batch,).
            max_seqlen: positions that the tables must reach; give it with a tensor of offsets,
                since the tables grow only where a length is known.
            num_heads_q: heads of q in a qkv of 4 dimensions.

        Returns:
            qkv, or (q, kv).

        Raises:
            RuntimeError: as ``apply_rotary_emb_qkv_`` and ``apply_rotary_emb_kv_``.
            TypeError: seqlen_offset is not an integer.
        """
        if isinstance(seqlen_offset, float):  # the tables would grow by it
            raise TypeError(
                f"seqlen_offset: expected an integer or (batch,) integers, got {seqlen_offset}"
            )
        cos, sin, cos_k, sin_k = self._tables_of_call(qkv, seqlen_offset, max_seqlen)
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q
            )
        q = apply_rotary_emb_func(
            qkv, cos, sin, self.interleaved, inplace=True, seqlen_offsets=seqlen_offset
        )
        if cos_k is not None and sin_k is not None:
            cos, sin = cos_k, sin_k
        return q, apply_rotary_emb_kv_(kv, cos, sin, self.interleaved, seqlen_offset)
