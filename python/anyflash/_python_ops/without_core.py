"""What runs where there is no kernel library: PyTorch's public attention where it says the same,
else plain operators, in PyTorch's own words where arguments do not fit."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import _defs, _loader, backends
from .._activations import ACTIVATIONS, inputs_per_output
from .arguments import AttentionArgs, BackwardArgs
from .checks import check, shape_text


def obstacle() -> str:
    """Why there is no kernel."""
    return f"the kernel library is not in use ({'; '.join(_loader.reasons) or 'not built'})"


@functools.cache
def _tell(family: str, route: str) -> None:
    ran = {"aten_sdpa": "PyTorch's own attention"}.get(route, "plain PyTorch operators")
    logging.getLogger("anyflash").warning(
        f"anyflash: {family} runs on {ran}, because kernel: {obstacle()}. To make it an error: "
        "ANYFLASH_STRICT=1. This is said once."
    )


def _route(family: str, names: Sequence[str], fits_sdpa: bool) -> str:
    """The first of an order of back ends that can run it; "none": no one."""
    for name in names:
        if name == "math" or (family != "attention" and name != "kernel"):
            return "math"
        if name in ("sdpa", "aten_sdpa") and fits_sdpa:
            return "aten_sdpa"
    return "none"


def choose(family: str, backend: int, fits_sdpa: bool = False) -> str:
    """The route of a call, a fallback told once.

    Raises:
        RuntimeError: the order of back ends has none for it.
    """
    names = backends.order_names(backend) or backends.environment_order()
    route = _route(family, names, fits_sdpa)
    why = f'no back end of "{",".join(names)}" can run this {family}: {obstacle()}'
    check(route != "none", f"anyflash: {why}")
    if names[0] == "kernel":
        _tell(family, route)
    return route


def decide(problem: dict[str, Any]) -> dict[str, Any]:
    """anyflash.decide without the core, in fewer words."""
    given = problem.get("order") or backends.DEFAULT_ORDER
    names = backends.parse_order(given) if isinstance(given, str) else tuple(given)
    row = next(e.fields for e in _defs.entries("routes") if e.fields[0] == "aten_sdpa")
    known = _defs.features(row[9] if problem.get("direction") == "backward" else row[8])
    lacks = [name for name in problem.get("features", ()) if name not in known]
    op = str(problem.get("op", "attention"))
    route = _route(op, names, not lacks)
    reasons: list[tuple[str, str]] = []
    for name in names:
        if name == route or (name == "sdpa" and route == "aten_sdpa"):
            break
        if name in ("sdpa", "aten_sdpa") and op == "attention":
            reasons.append(("aten_sdpa", f"does not support {', '.join(lacks)}"))
        elif name == "kernel" or op == "attention":
            reasons.append((name, obstacle()))
    return {"route": route, "instance": None, "measured": None, "reasons": reasons}


def _check_bias(x: Tensor, bias: Tensor | None, columns: int) -> None:
    fits = bias is None or (bias.shape == (columns,) and bias.dtype == x.dtype)
    got = "" if bias is None else f"{shape_text(bias)} {bias.dtype}"
    check(fits, f"bias: expected ({columns},) {x.dtype}, got {got}")


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
    fits = x.is_floating_point() and x.dim() > 0
    check(fits, f"x: expected floating (..., columns), got {x.dtype} {shape_text(x)}")
    _check_bias(x, bias, x.shape[-1])
    per_output = inputs_per_output(activation)
    fits = x.shape[-1] % per_output == 0
    check(fits, f"x: expected an even last dimension, got {shape_text(x)}")
    fits = dy is None or dy.shape == (*x.shape[:-1], x.shape[-1] // per_output)
    check(fits, "dy: expected the shape of y")
    choose("bias_activation", backend)


def check_fused_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, **others: Tensor | None
) -> None:
    """The same for the fused MLP; PyTorch's matrix products refuse the rest."""
    _check_bias(x, bias1, weight1.shape[0])
    _check_bias(x, others.get("bias2"), weight2.shape[0])


def _check_shapes(args: AttentionArgs) -> None:
    """Shapes that broadcasting and slices would make fit."""
    batch, heads = args.batch, args.heads
    if not args.packed and not args.paged:
        check(args.k.shape[0] == batch, f"k: expected batch {batch}, got {shape_text(args.k)}")
    expected = {
        "cu_seqlens_k": batch + 1, "seqused_k": batch, "leftpad_k": batch, "sinks": heads,
    }  # fmt: skip
    for name, size in expected.items():
        x = getattr(args, name)
        if x is not None:
            check(x.shape == (size,), f"{name}: expected ({size},), got {shape_text(x)}")
    table, slopes, bias = args.block_table, args.alibi_slopes, args.bias
    if table is not None:
        fits = table.dim() == 2 and table.shape[0] == batch
        check(fits, f"block_table: expected ({batch}, blocks), got {shape_text(table)}")
    if slopes is not None:
        fits = slopes.shape in ((heads,), (batch, heads))
        wanted = f"({heads},) or ({batch}, {heads})"
        check(fits, f"alibi_slopes: expected {wanted}, got {shape_text(slopes)}")
    if bias is not None:
        full = (batch, heads, args.max_seqlen_q, args.max_seqlen_k)
        sizes = (1,) * (4 - bias.dim()) + tuple(bias.shape)
        fits = len(sizes) == 4 and all(n in (1, size) for n, size in zip(sizes, full))
        check(fits, f"bias: expected a shape that broadcasts to {full}, got {shape_text(bias)}")


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
        fits = begin == 0 and min(lengths, default=0) >= 0 and max(ends, default=0) <= rows
        check(fits, f"{name}: expected to rise from 0 to at most {rows}, got {ends}")
        fits = args.seqused_k is not None or max(lengths, default=0) <= longest
        check(fits, f"max_seqlen_{name[-1]}: expected {max(lengths, default=0)}, got {longest}")
    used = args.seqused_k
    if used is not None and used.device.type == "cpu":
        most = max(used.tolist(), default=0)
        check(most <= args.max_seqlen_k, f"seqused_k: at most {args.max_seqlen_k}, got {most}")
    pads = args.leftpad_k
    if pads is not None and pads.device.type == "cpu":
        least = min(pads.tolist(), default=0)
        check(least >= 0, f"leftpad_k: expected 0 or more, got {least}")


def prepare(args: AttentionArgs, grad: BackwardArgs | None, causal: bool, backend: int) -> str:
    """The route, aten_sdpa or math; refuses what both would compute wrongly instead of refusing it.

    Raises:
        RuntimeError: dtypes, head counts or lengths that do not fit, or no back end.
    """
    q, k, v = args.q, args.k, args.v
    check(
        q.dtype == k.dtype == v.dtype and q.is_floating_point(),
        f"q, k, v: expected one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}",
    )
    shapes = f"{shape_text(q)}, {shape_text(k)}, {shape_text(v)}"
    fits = q.dim() == (3 if args.packed else 4) and k.shape[:-1] == v.shape[:-1]
    check(fits, f"q, k, v: shapes do not fit together, got {shapes}")
    fits = k.shape[-2] > 0 and q.shape[-2] % k.shape[-2] == 0 and q.shape[-1] == k.shape[-1]
    check(fits, f"k: expected heads that divide q's and its head_dim, got {shapes}")
    is_drawn = not args.dropout_p > 0.0 or args.rng_state is not None
    check(is_drawn, f"rng_state: missing, dropout_p is {args.dropout_p}")
    scale = args.softmax_scale
    check(math.isfinite(scale), f"softmax_scale: expected a finite number, got {scale}")
    args.normalise(causal)
    _check_shapes(args)
    _check_lengths(args)
    is_plain = args.softcap == 0.0 and args.dropout_p == 0.0 and not args.return_lse
    is_plain = is_plain and args.alibi_slopes is None and args.sinks is None
    return choose("attention", backend, is_plain and grad is None)
