"""One attention problem, as every back end of this provider reads it
(csrc/attention/arguments.h)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class AttentionArgs:
    """The arguments of a call; its numbers are normalised by prepare(). Shapes and semantics:
    schemas.def."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    seqused_k: Tensor | None
    leftpad_k: Tensor | None
    block_table: Tensor | None
    alibi_slopes: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    rng_state: Tensor | None
    dropout_p: float
    softmax_scale: float
    window_left: int  # -1: unbounded
    window_right: int  # -1: unbounded, 0: causal
    softcap: float
    return_lse: bool

    @property
    def longest_q(self) -> int:
        """max_seqlen is a bound, however generous: no sequence is longer than all together."""
        return min(self.max_seqlen_q, self.q.shape[0]) if self.packed else self.max_seqlen_q

    @property
    def longest_k(self) -> int:
        """The same of the keys."""
        storage = self.packed and not self.paged
        return min(self.max_seqlen_k, self.k.shape[0]) if storage else self.max_seqlen_k

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def empty(self) -> bool:
        """Whether there is no score to compute."""
        return 0 in (self.batch, self.max_seqlen_k, self.q.numel(), self.k.numel())

    @property
    def paged(self) -> bool:
        return self.block_table is not None

    @property
    def purely_causal(self) -> bool:
        return self.window_left < 0 and self.window_right == 0

    @property
    def batch(self) -> int:
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def heads(self) -> int:
        return self.q.shape[-2]

    @property
    def heads_k(self) -> int:
        return self.k.shape[-2]

    @property
    def head_dim(self) -> int:
        return self.q.shape[-1]

    @property
    def head_dim_v(self) -> int:
        return self.v.shape[-1]

    @property
    def compute_dtype(self) -> torch.dtype:
        """What scores and log-sum-exp are computed in."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    def normalise(self, causal: bool) -> None:
        """What prepare() does to the numbers, for callers without the core: lengths from the
        shapes, windows that reach every key unbounded, causal as a window."""
        if not self.packed:
            self.max_seqlen_q = self.q.shape[1]
        if self.block_table is not None:
            self.max_seqlen_k = self.block_table.shape[1] * self.k.shape[1]
        elif self.k.dim() == 4:
            self.max_seqlen_k = self.k.shape[1]
        for side in ("window_left", "window_right"):
            window = getattr(self, side)
            setattr(self, side, -1 if window < 0 or window >= self.max_seqlen_k else window)
        if causal:
            self.window_right = 0


@dataclass
class BackwardArgs:
    """What the backward has beside the forward's arguments."""

    dout: Tensor
    out: Tensor
    lse: Tensor
    dlse: Tensor | None
    deterministic: bool
    bias_requires_grad: bool
    sinks_requires_grad: bool


@dataclass
class Gradients:
    """What a back end's backward returns; ``dbias`` and ``dsinks`` only when asked for."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None = None
    dsinks: Tensor | None = None
