"""What the tests of accelerate_sdpa share: problems, and which operators a call ran.

Whether a kernel of ours ran is read from the profiler, which sees every call of an operator.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from support import has_attention_kernels

from anyflash import sdpa

needs_kernels = pytest.mark.skipif(not has_attention_kernels("cpu"), reason="no kernels here")
if sdpa.obstacle() is not None:
    pytest.skip("this torch cannot keep its own kernels", allow_module_level=True)

# Heads first in memory, rows first, a slice of a packed projection, one head for all.
LAYOUTS = ("heads", "rows", "slice", "expanded")
OURS = ["anyflash::_flash_attn_forward", "anyflash::_flash_attn_backward"]


def operators_of(function):
    """What the function returns, and the operators of attention that it called."""
    with torch.autograd.profiler.profile() as profile:
        result = function()
    names = [event.name for event in profile.function_events]
    return result, [name for name in names if name.startswith("anyflash::")]


@dataclass(frozen=True)
class Problem:
    """One call; mask: its shape, a letter of its kind before it."""

    seqlen_q: int = 17
    seqlen_k: int = 17
    heads: int = 4
    heads_k: int = 4
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    causal: bool = False
    scale: float | None = None
    mask: str = ""  # "", bool, float, fp32
    mask_shape: tuple[int, ...] = ()
    hidden_row: bool = False
    layout: str = (
        "heads"  # first in memory; rows; slice of a packed projection; expanded: over heads
    )

    def tensors(self):
        torch.manual_seed(0)
        q = self._laid_out(self.seqlen_q, self.heads)
        k, v = (self._laid_out(self.seqlen_k, self.heads_k) for _ in "kv")
        return q, k, v, self._mask()

    def _laid_out(self, seqlen, heads):
        dim = self.head_dim
        if self.layout == "heads":
            x = torch.randn(2, heads, seqlen, dim)
        elif self.layout == "rows":
            x = torch.randn(2, seqlen, heads, dim).transpose(1, 2)
        elif self.layout == "expanded":
            x = torch.randn(2, 1, seqlen, dim).expand(2, heads, seqlen, dim)
        else:
            x = torch.randn(2, seqlen, 3, heads, dim)[:, :, 1].transpose(1, 2)
        return x.to(self.dtype).requires_grad_()

    def _mask(self):
        if not self.mask:
            return None
        visible = torch.rand(self.mask_shape) > 0.3
        visible[..., 0] = True
        if self.hidden_row:
            visible[..., 1, :] = False
        if self.mask == "bool":
            return visible
        mask = torch.randn(self.mask_shape).masked_fill(~visible, -torch.inf)
        return mask.to(torch.float32 if self.mask == "fp32" else self.dtype)


def call(problem, q, k, v, mask):
    grouped = problem.heads != problem.heads_k
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=problem.causal, scale=problem.scale, enable_gqa=grouped
    )


def strides(x):
    """Those that mean something."""
    return [stride for size, stride in zip(x.shape, x.stride()) if size > 1]
