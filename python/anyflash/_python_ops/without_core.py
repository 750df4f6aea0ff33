"""What runs where there is no kernel library: everything as plain operators, in PyTorch's own words
where they do not fit."""

from __future__ import annotations

import functools
import logging

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


#: Names in the order of their numbers in the schemas.
_ACTIVATIONS = ("gelu_tanh", "gelu_erf", "relu", "squared_relu", "silu_gate")


def activation_number(name: str) -> int:
    """
    Raises:
        ValueError: an unknown name.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation: unknown name '{name}'")
    return _ACTIVATIONS.index(name)


def _check_rows_and_bias(x: Tensor, bias: Tensor | None, columns: int) -> None:
    if bias is not None and (bias.shape != (columns,) or bias.dtype != x.dtype):
        raise RuntimeError(
            f"bias: expected ({columns},) {x.dtype}, got {tuple(bias.shape)} {bias.dtype}"
        )


def prepare_bias_activation(
    x: Tensor, bias: Tensor | None, dy: Tensor | None, activation: int, backend: int
) -> None:
    """Refuses what plain operators would compute wrongly instead of refusing it.

    Raises:
        RuntimeError: shapes or dtypes that do not fit, or no back end.
        ValueError: an activation that is none.
    """
    if not 0 <= activation < len(_ACTIVATIONS):
        raise ValueError(f"activation: expected 0 to {len(_ACTIVATIONS) - 1}, got {activation}")
    if not x.is_floating_point() or x.dim() == 0:
        raise RuntimeError(f"x: expected floating (..., columns), got {x.dtype} {tuple(x.shape)}")
    _check_rows_and_bias(x, bias, x.shape[-1])
    per_output = 2 if activation == 4 else 1
    if x.shape[-1] % per_output != 0:
        raise RuntimeError(f"x: expected an even last dimension, got {tuple(x.shape)}")
    if dy is not None and dy.shape != (*x.shape[:-1], x.shape[-1] // per_output):
        raise RuntimeError(f"dy: expected the shape of y, got {tuple(dy.shape)}")
    choose("bias_activation", backend)


def check_fused_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None = None,
    **gradient: Tensor,
) -> None:
    """The same for the fused MLP; PyTorch's matrix products refuse the rest."""
    _check_rows_and_bias(x, bias1, weight1.shape[0])
    _check_rows_and_bias(x, bias2, weight2.shape[0])


def decide(problem: dict[str, object]) -> dict[str, object]:
    """anyflash.decide: math, and why nothing else."""
    given = problem.get("chain") or backends.DEFAULT_CHAIN
    names = backends.parse_chain(given) if isinstance(given, str) else tuple(given)  # type: ignore[arg-type]
    route = "math" if "math" in names or problem.get("op") == "bias_activation" else "none"
    reasons = [(name, obstacle()) for name in names if name != "math"]
    return {"route": route, "instance": None, "measured": None, "reasons": reasons}


def _check_lengths(args: AttentionArgs) -> None:
    """Lengths on the CPU that slices would shorten without a word."""
    starts = (
        ("cu_seqlens_q", args.cu_seqlens_q, args.max_seqlen_q, args.q.shape[0]),
        ("cu_seqlens_k", args.cu_seqlens_k, args.max_seqlen_k, args.k.shape[0]),
    )
    for name, cu, longest, rows in starts:
        if cu is None or cu.device.type != "cpu" or (name[-1] == "k" and args.paged):
            continue
        begin, *ends = cu.tolist()
        lengths = [end - start for start, end in zip([begin, *ends], ends)]
        if begin != 0 or min(lengths, default=0) < 0 or max(ends, default=0) > rows:
            raise RuntimeError(f"{name}: expected to rise from 0 to at most {rows}, got {ends}")
        if args.seqused_k is None and max(lengths, default=0) > longest:
            raise RuntimeError(f"max_seqlen_{name[-1]}: expected {max(lengths)}, got {longest}")
    used = args.seqused_k
    if used is not None and used.device.type == "cpu":
        most = max(used.tolist(), default=0)
        if most > args.max_seqlen_k:
            raise RuntimeError(f"seqused_k: expected at most {args.max_seqlen_k}, got {most}")


def prepare(args: AttentionArgs, causal: bool, backend: int) -> None:
    """Refuses what plain operators would compute wrongly instead of refusing it.

    Raises:
        RuntimeError: dtypes, head counts or lengths that do not fit.
    """
    q, k, v = args.q, args.k, args.v
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        got = f"{q.dtype}, {k.dtype}, {v.dtype}"
        raise RuntimeError(f"q, k, v: expected one floating dtype, got {got}")
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
    args.normalise(causal)
    choose("attention", backend)
    _check_lengths(args)
