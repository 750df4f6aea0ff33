"""What runs where there is no kernel library: everything as plain operators, in PyTorch's own words
where they do not fit."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from .. import _loader, backends
from .arguments import AttentionArgs

_LOGGER = logging.getLogger("anyflash")


def obstacle() -> str:
    """Why there is nothing but plain operators."""
    return f"the kernel library is not in use ({'; '.join(_loader.reasons) or 'not built'})"


@functools.cache
def _tell(family: str) -> None:
    _LOGGER.warning(
        "anyflash: %s runs on plain PyTorch operators (math), because kernel: %s. "
        "To make it an error: ANYFLASH_STRICT=1. This is said once.",
        family,
        obstacle(),
    )


def choose(family: str, backend: int) -> None:
    """Takes `math`, told once.

    Raises:
        RuntimeError: the order of back ends has nothing that means it.
    """
    names = backends.chain_names(backend) or backends.environment_chain()
    means_math = ("math",) if family == "attention" else tuple(n for n in names if n != "kernel")
    if not any(name in means_math for name in names):
        raise RuntimeError(
            f'anyflash: no back end of "{",".join(names)}" can run this {family}: {obstacle()}'
        )
    if names[0] == "kernel":
        _tell(family)


def decide(problem: dict[str, object]) -> dict[str, object]:
    """anyflash.decide: math, and why nothing else."""
    given = problem.get("chain") or backends.DEFAULT_CHAIN
    names = backends.parse_chain(given) if isinstance(given, str) else tuple(given)  # type: ignore[arg-type]
    route = "math" if "math" in names or problem.get("op") == "bias_activation" else "none"
    reasons = [(name, obstacle()) for name in names if name != "math"]
    return {"route": route, "instance": None, "measured": None, "reasons": reasons}


def _check_cumulative(name: str, cu: Tensor | None, longest: int, rows: int) -> None:
    if cu is None or cu.device.type != "cpu":
        return
    lengths = cu.diff()
    if cu[0] != 0 or (lengths < 0).any() or (lengths > longest).any() or cu[-1] > rows:
        raise RuntimeError(
            f"{name}: expected to rise from 0 to at most {rows} in steps of at most {longest}, "
            f"got {cu.tolist()}"
        )


def normalise(args: AttentionArgs, causal: bool) -> None:
    """Lengths from the shapes, windows that reach every key unbounded, causal as a window."""
    if not args.packed:
        args.max_seqlen_q = args.q.shape[1]
    if args.block_table is not None:
        args.max_seqlen_k = args.block_table.shape[1] * args.k.shape[1]
    elif args.k.dim() == 4:
        args.max_seqlen_k = args.k.shape[1]
    for side in ("window_left", "window_right"):
        window = getattr(args, side)
        setattr(args, side, -1 if window < 0 or window >= args.max_seqlen_k else window)
    if causal:
        args.window_right = 0


def prepare(args: AttentionArgs, causal: bool, backend: int) -> None:
    """Refuses what plain operators would compute wrongly instead of refusing it.

    Raises:
        RuntimeError: dtypes, head counts or lengths that do not fit.
    """
    q, k, v = args.q, args.k, args.v
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise RuntimeError(f"q, k, v: expected one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.dim() != (3 if args.packed else 4) or k.shape[:-1] != v.shape[:-1]:
        raise RuntimeError(
            f"q, k, v: shapes do not fit together, got {tuple(q.shape)}, {tuple(k.shape)}, "
            f"{tuple(v.shape)}"
        )
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2] != 0 or q.shape[-1] != k.shape[-1]:
        raise RuntimeError(
            f"k: expected heads that divide q's and its head_dim, got {tuple(k.shape)} for q "
            f"{tuple(q.shape)}"
        )
    if args.dropout_p > 0.0 and args.rng_state is None:
        raise RuntimeError(f"rng_state: missing, dropout_p is {args.dropout_p}")
    normalise(args, causal)
    choose("attention", backend)
    _check_cumulative("cu_seqlens_q", args.cu_seqlens_q, args.max_seqlen_q, q.shape[0])
    if not args.paged and args.seqused_k is None:
        _check_cumulative("cu_seqlens_k", args.cu_seqlens_k, args.max_seqlen_k, k.shape[0])
    used = args.seqused_k
    if used is not None and used.device.type == "cpu" and bool((used > args.max_seqlen_k).any()):
        raise RuntimeError(
            f"seqused_k: expected at most {args.max_seqlen_k}, got {used.tolist()}"
        )
    torch._assert(args.softcap >= 0.0, f"softcap: expected 0 or more, got {args.softcap}")
