"""Rotary embedding without a layer around it."""

from __future__ import annotations

from typing import Optional, Union

from torch import Tensor

from anyflash import rotary
from flash_attn._missing import absent


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: Union[int, Tensor] = 0,
    cu_seqlens: Optional[Tensor] = None,
    max_seqlen: Optional[int] = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """anyflash.rotary. Upstream's records nothing for autograd; this one is differentiable, in
    place as well."""
    return rotary(
        x,
        cos,
        sin,
        interleaved=interleaved,
        inplace=inplace,
        conjugate=conjugate,
        seqlen_offsets=seqlen_offsets,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
    )


__getattr__ = absent(
    __name__,
    {"rotary_kernel": "a Triton kernel; apply_rotary of this module computes it on every device"},
)
