"""One attention problem, as every back end of this provider reads it (csrc/attention.h)."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import backends
from .dispatch import Problem

DTYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


@dataclass
class AttentionArgs:
    """The arguments of a call after normalisation. Shapes and semantics: schemas.def."""

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
        """Lengths from the shapes, windows that reach every key unbounded, causal as a window.

        Ranks are checked only later: what has too few dimensions keeps what it came with.
        """
        if not self.packed and self.q.dim() == 4:
            self.max_seqlen_q = self.q.shape[1]
        if self.k.dim() == 4:
            if self.block_table is None:
                self.max_seqlen_k = self.k.shape[1]
            elif self.block_table.dim() == 2:
                self.max_seqlen_k = self.block_table.shape[1] * self.k.shape[1]
        if self.window_left >= self.max_seqlen_k or self.window_left < 0:
            self.window_left = -1
        if self.window_right >= self.max_seqlen_k or self.window_right < 0:
            self.window_right = -1
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


@functools.cache
def torch_version() -> int:
    """The running torch as a number: 213 for 2.13."""
    match = re.match(r"(\d+)\.(\d+)", torch.__version__)
    return int(match.group(1)) * 100 + int(match.group(2)) if match else 0


@functools.cache
def compute_capability(device: int | None) -> int:
    """Of a CUDA device: 75, 80, 90, ..."""
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@functools.cache
def _environment_code() -> int:
    return backends.code_of(backends.environment_chain())


@functools.lru_cache(maxsize=256)
def _chain(code: int) -> tuple[str, ...]:
    return backends.chain_names(code)


def _features(args: AttentionArgs) -> list[str]:
    present = (
        ("packed", args.packed),
        ("paged", args.paged),
        ("seqused_k", args.seqused_k is not None),
        ("leftpad_k", args.leftpad_k is not None),
        ("causal", args.window_right == 0),
        ("window", args.window_left >= 0 or args.window_right > 0),
        ("softcap", args.softcap > 0.0),
        ("alibi", args.alibi_slopes is not None),
        ("bias", args.bias is not None),
        ("sinks", args.sinks is not None),
        ("dropout", args.dropout_p > 0.0),
        ("gqa", args.heads_k != args.heads),
        ("unequal_head_dims", args.head_dim_v != args.head_dim),
    )
    return [name for name, is_present in present if is_present]


def _problem(op: str, x: Tensor, direction: str, backend: int, **fields: object) -> Problem:
    code = backend or _environment_code()
    on_cuda = x.device.type == "cuda"
    return Problem(
        op=op,
        device="cuda" if on_cuda else "cpu",
        sm=compute_capability(x.device.index) if on_cuda else 0,
        direction=direction,
        dtype=DTYPE_NAMES[x.dtype],
        torch_version=torch_version(),
        chain=_chain(code),
        explicit=code != backends.DEFAULT_CODE,
        **fields,  # type: ignore[arg-type]
    )


def describe(args: AttentionArgs, grad: BackwardArgs | None, backend: int) -> Problem:
    """The value that the decision is made of; ``grad`` is None for the forward."""
    features = _features(args)
    if grad is not None:
        features += ["lse_grad"] if grad.dlse is not None else []
        features += ["bias_grad"] if grad.bias_requires_grad else []
        features += ["deterministic"] if grad.deterministic else []
    return _problem(
        "attention",
        args.q,
        "forward" if grad is None else "backward",
        backend,
        head_dim=args.head_dim,
        head_dim_v=args.head_dim_v,
        features=tuple(features),
    )


def describe_bias_activation(x: Tensor, direction: str, backend: int) -> Problem:
    """The same for the bias + activation kernel."""
    return _problem("bias_activation", x, direction, backend)
