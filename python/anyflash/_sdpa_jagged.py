"""accelerate_sdpa() of jagged nested tensors: one packed call.

PyTorch answers for them before its dispatcher is asked, by a function of its own that knows CUDA's
kernels and, where nothing is causal, plain operations. There is nothing to register with, so the
function is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nested._internal.nested_tensor import NestedTensor, nested_view_from_values_offsets

from ._autograd import is_seen
from .attention import attention

_NAME = "jagged_scaled_dot_product_attention"


class JaggedOverride:
    """Holds the place of PyTorch's function until remove().

    Args:
        module: torch.nested._internal.ops, which calls it.
        runs_on_kernel: Whether anyflash has a kernel for (query, key, features).
    """

    def __init__(self, module: ModuleType, runs_on_kernel: Callable[..., bool]) -> None:
        self.module, self.builtin = module, getattr(module, _NAME)
        builtin = self.builtin

        def attend(
            query: Any,
            key: Any,
            value: Any,
            attn_mask: Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            enable_gqa: bool = False,
        ) -> Tensor:
            plain = attn_mask is None and dropout_p == 0.0
            if (
                plain
                and all(_is_packed(x) for x in (query, key, value))
                and not (is_causal and not _have_equal_lengths(query, key))
                and runs_on_kernel(query, key, is_causal)
            ):
                return _attend_packed(query, key, value, is_causal, scale)
            options = {"scale": scale, "enable_gqa": enable_gqa}
            return builtin(query, key, value, attn_mask, dropout_p, is_causal, **options)

        self.function = attend
        setattr(module, _NAME, attend)

    def remove(self) -> None:
        """Puts PyTorch's function back, unless another one has come since."""
        if getattr(self.module, _NAME) is self.function:
            setattr(self.module, _NAME, self.builtin)


def _is_packed(x: Any) -> bool:
    """(batch, heads, jagged seqlen, head_dim) on a CPU, one sequence after the other."""
    return (
        isinstance(x, NestedTensor)
        and x.device.type == "cpu"
        and x.dim() == 4
        and x._ragged_idx == 2
        and x.lengths() is None
    )


def _have_equal_lengths(query: Any, key: Any) -> bool:
    """PyTorch's causal mask begins at the first key of each sequence, anyflash's ends at the last
    one. In graphs no number can be read, so the two must be of one nested tensor's making."""
    ours, others = query.offsets(), key.offsets()
    return ours is others or (not is_seen() and torch.equal(ours, others))


def _attend_packed(query: Any, key: Any, value: Any, is_causal: bool, scale: float | None) -> Any:
    offsets = query.offsets()
    longest = query._get_max_seqlen()
    out = attention(
        *(x.transpose(1, 2).values() for x in (query, key, value)),
        cu_seqlens_q=offsets.int(),
        cu_seqlens_k=key.offsets().int(),
        max_seqlen_q=longest,
        max_seqlen_k=key._get_max_seqlen(),
        softmax_scale=scale,
        causal=is_causal,
    )
    shape = {"min_seqlen": query._maybe_min_seqlen, "max_seqlen": longest}
    return nested_view_from_values_offsets(out, offsets, **shape).transpose(1, 2)
