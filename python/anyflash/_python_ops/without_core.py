"""What runs where there is no kernel library: PyTorch's CPU attention where it says the same, else
plain operators, in PyTorch's own words where arguments do not fit."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import _core, _defs, _loader, backends
from .._activations import ACTIVATIONS, inputs_per_output
from .._records import Piece
from .arguments import AttentionArgs, BackwardArgs

_LOGGER = logging.getLogger("anyflash")
_PLAIN = "plain PyTorch operators (math)"


def obstacle() -> str:
    """Why there is no kernel."""
    return f"the kernel library is not in use ({'; '.join(_loader.reasons) or 'not built'})"


@functools.cache
def _tell(family: str, route: str) -> None:
    _LOGGER.warning(
        "anyflash: %s runs on %s, because kernel: %s. To make it an error: ANYFLASH_STRICT=1. "
        "This is said once.",
        family,
        "PyTorch's CPU attention (aten_cpu)" if route == "aten_cpu" else _PLAIN,
        obstacle(),
    )


def _route(family: str, names: Sequence[str], on_aten_cpu: bool) -> str:
    """The first of an order of back ends that can run it; "none": no one."""
    for name in names:
        if name == "math" or (family != "attention" and name != "kernel"):
            return "math"
        if name in ("sdpa", "aten_cpu") and on_aten_cpu:
            return "aten_cpu"
    return "none"


def choose(family: str, backend: int, on_aten_cpu: bool = False) -> str:
    """The route of a call, a fallback told once.

    Raises:
        RuntimeError: the order of back ends has none for it.
    """
    names = backends.chain_names(backend) or backends.environment_chain()
    route = _route(family, names, on_aten_cpu)
    if route == "none":
        raise RuntimeError(
            f'anyflash: no back end of "{",".join(names)}" can run this {family}: {obstacle()}'
        )
    if names[0] == "kernel":
        _tell(family, route)
    return route


def decide(problem: dict[str, Any]) -> dict[str, Any]:
    """anyflash.decide without the core, in fewer words."""
    given = problem.get("chain") or backends.DEFAULT_CHAIN
    names = backends.parse_chain(given) if isinstance(given, str) else tuple(given)
    row = next(e.fields for e in _defs.entries("routes") if e.fields[0] == "aten_cpu")
    known = _defs.features(row[9] if problem.get("direction") == "backward" else row[8])
    on_aten_cpu = problem.get("device", "cpu") == "cpu" and known >= {*problem.get("features", ())}
    route = _route(str(problem.get("op", "attention")), names, on_aten_cpu)
    passed = names[: names.index(route)] if route in names else names
    reasons = [(name, obstacle()) for name in passed if name == "kernel" or route != "aten_cpu"]
    return {"route": route, "instance": None, "measured": None, "reasons": reasons}


def plan_pieces(
    seqlen_q: int, seqlen_k: int, left: int, right: int, explicit_masks: bool
) -> tuple[int, int, list[Piece]]:
    """core/pieces.h, cut coarser: one piece, or explicit masks for 512 rows at a time."""
    if seqlen_q == 0 or seqlen_k == 0:
        return 0, 0, []
    begin = max(0, seqlen_q - seqlen_k - right) if right >= 0 else 0
    is_square = seqlen_q == seqlen_k and left < 0 and not explicit_masks
    if (left, right) == (-1, -1) or (right == 0 and is_square):
        return 0, seqlen_q, [Piece(0, seqlen_q, 0, seqlen_k, int(right == 0), False)]
    starts = range(begin, seqlen_q, 512)
    pieces = [Piece(row, min(row + 512, seqlen_q), 0, seqlen_k, 2, False) for row in starts]
    return begin, seqlen_q, pieces


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
    if not 0 <= activation < len(ACTIVATIONS):
        raise ValueError(f"activation: expected 0 to {len(ACTIVATIONS) - 1}, got {activation}")
    if not x.is_floating_point() or x.dim() == 0:
        raise RuntimeError(f"x: expected floating (..., columns), got {x.dtype} {tuple(x.shape)}")
    _check_rows_and_bias(x, bias, x.shape[-1])
    per_output = inputs_per_output(activation)
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


def prepare(args: AttentionArgs, grad: BackwardArgs | None, causal: bool, backend: int) -> str:
    """The route, aten_cpu or math; refuses what both would compute wrongly instead of refusing it.

    Raises:
        RuntimeError: dtypes, head counts or lengths that do not fit, or no back end.
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
    _check_lengths(args)
    beyond = (
        (args.alibi_slopes, args.sinks)
        if grad is None
        else (args.alibi_slopes, args.sinks, grad.dlse)
    )
    plain = args.softcap == 0.0 and args.dropout_p == 0.0 and all(x is None for x in beyond)
    in_backward = grad is not None and (args.paged or grad.bias_requires_grad)
    fits = plain and not in_backward and args.head_dim == args.head_dim_v and args.head_dim > 0
    return choose("attention", backend, fits and q.is_cpu and _core.torch_version() >= 202)
