"""Refuses attention that cannot be computed, with the checks and the texts of csrc/validate.cpp.

Everything here raises RuntimeError as the functions of checks.py do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import (
    check,
    check_alibi_slopes,
    check_block_table,
    check_block_table_row,
    check_head_dim,
    check_index_vector,
    check_last_dim_contiguous,
    check_same_device,
    check_sinks,
    check_window_and_scale,
    dtype_text,
    shape_text,
    values_are_checked,
)
from .problem import DTYPE_NAMES, AttentionArgs, BackwardArgs


def _check_query(q: Tensor, packed: bool) -> None:
    if packed:
        check(
            q.dim() == 3,
            f"q: expected (total_q, heads, head_dim) with cu_seqlens_q, got {shape_text(q)}",
        )
    else:
        check(q.dim() == 4, f"q: expected (batch, seqlen_q, heads, head_dim), got {shape_text(q)}")
    check(
        q.dtype in DTYPE_NAMES,
        "FlashAttention only support fp16 and bf16 data type (anyflash: fp32 and fp64 too), got ",
        f"q of {dtype_text(q)}",
    )


def _check_heads(heads: int, heads_k: int, name: str) -> None:
    check(
        heads > 0 and heads_k > 0 and heads % heads_k == 0,
        "Number of heads in key/value must divide number of heads in query, got ",
        f"{heads_k} heads in {name} and {heads} in q",
    )


class Layout(NamedTuple):
    """How keys and values lie, and what the caller calls them."""

    packed: bool = False
    paged: bool = False
    spare_rows: bool = False  # a cache may hold more sequences than q
    k: str = "k"
    v: str = "v"

    @property
    def shape(self) -> tuple[int, str, str]:
        """Rank, the shape in the original library's words, and ours without the last dimensions."""
        if self.paged:
            names = "(num_blocks, page_block_size, num_heads_k, head_size)"
            return 4, names, "num_blocks, page_size"
        if self.packed:
            return 3, "(total_k, num_heads_k, head_size)", "total_k"
        return 4, "(batch_size, seqlen_k, num_heads_k, head_size)", "batch, seqlen_k"


def check_query_and_keys(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, packed_queries: bool, direction: str
) -> None:
    """Ranks, shapes, dtypes, devices and layouts of q, k and v."""
    _check_query(q, packed_queries)
    named = ((k, layout.k, "key"), (v, layout.v, "value"))
    for tensor, name, word in named:
        check(
            tensor.dtype == q.dtype,
            f"query and {word} must have the same dtype, got q of {dtype_text(q)} ",
            f"and {name} of {dtype_text(tensor)}",
        )
    for tensor, name, _ in named:
        check_same_device(q, "q", tensor, name)

    rank, names, leading = layout.shape
    head_dim = q.shape[-1]
    batch_fits = rank == 3 or layout.paged
    if not batch_fits and k.dim() == 4:
        spare = layout.spare_rows and k.shape[0] > q.shape[0]
        batch_fits = k.shape[0] == q.shape[0] or spare
    check(
        k.dim() == rank and k.shape[-1] == head_dim and batch_fits,
        f"{layout.k} must have shape {names}; {layout.k}: expected ({leading}, heads_k, ",
        f"{head_dim}), got {shape_text(k)} with q {shape_text(q)}",
    )
    check(
        v.dim() == rank and v.shape[:-1] == k.shape[:-1],
        f"{layout.v} must have shape {names}; {layout.v}: expected the shape of {layout.k}, ",
        f"{shape_text(k)}, up to the last dimension, got {shape_text(v)}",
    )
    for tensor, name in ((q, "q"), (k, layout.k), (v, layout.v)):
        check_last_dim_contiguous(tensor, name)
    _check_heads(q.shape[-2], k.shape[-2], layout.k)
    check_head_dim("q", head_dim, direction)
    check_head_dim(layout.v, v.shape[-1], direction)


def _check_sequences(args: AttentionArgs) -> None:
    cu_q, cu_k, q = args.cu_seqlens_q, args.cu_seqlens_k, args.q
    check(cu_q is not None or cu_k is None, "cu_seqlens_q: missing, cu_seqlens_k is given")
    if cu_q is not None:
        check(
            cu_q.dim() == 1 and args.batch >= 0,
            f"cu_seqlens_q must have shape (batch_size + 1), got {shape_text(cu_q)}",
        )
    batch = args.batch
    if cu_q is not None:
        check_index_vector(cu_q, "cu_seqlens_q", q, batch + 1, "(batch_size + 1)")
        check(args.max_seqlen_q >= 0, "max_seqlen_q: expected 0 or more, got ", args.max_seqlen_q)
        if not args.paged:
            check(cu_k is not None, "cu_seqlens_k: missing, cu_seqlens_q is given")
            check(
                args.max_seqlen_k >= 0, "max_seqlen_k: expected 0 or more, got ", args.max_seqlen_k
            )
    if cu_k is not None:
        check_index_vector(cu_k, "cu_seqlens_k", q, batch + 1, "(batch_size + 1)")
    if args.seqused_k is not None:
        check_index_vector(args.seqused_k, "seqused_k", q, batch, "(batch_size)")
    if args.leftpad_k is not None:
        check(
            not args.paged,
            "We don't support Paged KV and leftpad_k running at the same time yet",
        )
        check_index_vector(args.leftpad_k, "leftpad_k", q, batch, "(batch_size)")
    if args.block_table is not None:
        check_block_table(args.block_table, q, batch)


def _check_bias(args: AttentionArgs, bias: Tensor) -> None:
    check(
        bias.dtype in DTYPE_NAMES or bias.dtype == torch.bool,
        f"bias: expected a floating or bool dtype, got {dtype_text(bias)}",
    )
    check_same_device(args.q, "q", bias, "bias")
    full = (args.batch, args.heads, args.max_seqlen_q, args.max_seqlen_k)
    sizes = tuple(bias.shape)
    fits = len(sizes) <= 4 and all(
        size in (1, want) for size, want in zip(reversed(sizes), reversed(full))
    )
    check(
        fits,
        "bias: expected a shape that broadcasts to (batch, heads, seqlen_q, seqlen_k) = ",
        f"{full}, got {sizes}",
    )


def _check_dropout(args: AttentionArgs) -> None:
    check(
        0.0 <= args.dropout_p < 1.0,
        "dropout_p: expected 0 <= dropout_p < 1, got ",
        args.dropout_p,
    )
    if args.dropout_p == 0.0:
        return
    check(
        args.softcap == 0.0,
        "Softcapping does not support dropout for now, got softcap ",
        args.softcap,
        " and dropout_p ",
        args.dropout_p,
    )
    rng = args.rng_state
    if rng is None:
        check(False, "rng_state: missing, dropout_p is ", args.dropout_p)
        return
    check(
        rng.dtype == torch.int64 and rng.shape == (2,) and rng.is_contiguous(),
        "rng_state: expected a contiguous int64 tensor of shape (2,), got ",
        f"{dtype_text(rng)} {shape_text(rng)}",
    )
    check_same_device(args.q, "q", rng, "rng_state")


def _check_cumulative(
    cu: list[int], name: str, rows: tuple[int, str] | None, longest: int, longest_name: str
) -> None:
    check(cu[0] == 0, name, ": expected to start at 0, got ", cu[0])
    for i, (begin, end) in enumerate(zip(cu, cu[1:])):
        check(
            end >= begin,
            f"{name}: must not decrease, got {begin} and then {end} at index {i + 1}",
        )
        check(
            end - begin <= longest,
            f"{longest_name}: expected at least {end - begin}, the length of sequence {i} ",
            f"in {name}, got {longest}",
        )
    if rows is not None:
        check(cu[-1] <= rows[0], f"{name}: ends at {cu[-1]}, but {rows[1]} has {rows[0]} rows")


def _check_used_rows(begin: list[int], used: list[int], args: AttentionArgs, share: bool) -> None:
    """Keys at rows begin[b] to begin[b] + used[b], with gaps between sequences; what the last
    entry of ``begin`` says does not count."""
    total = args.k.shape[0]
    for b, (first, length) in enumerate(zip(begin, used)):
        check(
            0 <= first <= total,
            f"cu_seqlens_k: expected 0 to {total}, the rows of k, got {first} for sequence {b}",
        )
        check(
            0 <= length <= total - first,
            f"seqused_k: expected 0 to {total - first}, the rows of k from {first} on, ",
            f"got {length} for sequence {b}",
        )
        check(
            length <= args.max_seqlen_k,
            f"max_seqlen_k: expected at least {length}, the keys of sequence {b} in seqused_k, ",
            f"got {args.max_seqlen_k}",
        )
        check(
            share or b + 1 == len(used) or first + length <= begin[b + 1],
            "cu_seqlens_k: the backward needs sequences in the order of their rows, each with ",
            f"rows of its own, got sequence {b} at rows {first} to {first + length} ",
            f"and sequence {b + 1} from {begin[b + 1]} on",
        )


def _check_values(args: AttentionArgs, direction: str) -> None:
    def numbers(tensor: Tensor | None) -> list | None:
        return None if tensor is None else tensor.tolist()

    cu_q, cu_k, used = map(numbers, (args.cu_seqlens_q, args.cu_seqlens_k, args.seqused_k))
    leftpad, table = numbers(args.leftpad_k), numbers(args.block_table)
    if args.paged and used is not None:
        cu_k = None
    if cu_q is not None:
        _check_cumulative(
            cu_q, "cu_seqlens_q", (args.q.shape[0], "q"), args.max_seqlen_q, "max_seqlen_q"
        )
    if cu_k is not None and used is not None:
        _check_used_rows(cu_k, used, args, direction == "forward")
    elif cu_k is not None:
        _check_cumulative(
            cu_k,
            "cu_seqlens_k",
            None if args.paged else (args.k.shape[0], "k"),
            args.max_seqlen_k,
            "block_table: capacity" if args.paged else "max_seqlen_k",
        )
    for b in range(args.batch):
        length = args.max_seqlen_k if cu_k is None else cu_k[b + 1] - cu_k[b]
        if used is not None:
            length = used[b]
            check(
                cu_k is not None or 0 <= length <= args.max_seqlen_k,
                f"seqused_k: expected 0 to {args.max_seqlen_k}, the keys of sequence {b}, ",
                f"got {length}",
            )
        if leftpad is not None:
            check(
                leftpad[b] >= 0,
                f"leftpad_k: expected 0 or more, got {leftpad[b]} for sequence {b}",
            )
        if table is not None:
            check_block_table_row(table[b], b, length, args.k.shape[1], args.k.shape[0])


def validate_forward(args: AttentionArgs, direction: str = "forward") -> None:
    """Shapes, dtypes, devices and options; values of index tensors where reading them is free."""
    layout = Layout(packed=args.packed, paged=args.paged)
    check_query_and_keys(args.q, args.k, args.v, layout, args.packed, direction)
    _check_sequences(args)
    check_window_and_scale(args.softmax_scale, args.softcap)
    _check_dropout(args)
    if args.alibi_slopes is not None:
        check_alibi_slopes(args.alibi_slopes, args.q, args.batch, args.heads)
    if args.bias is not None:
        _check_bias(args, args.bias)
    if args.sinks is not None:
        check_sinks(args.sinks, args.q, args.heads)
    has_values = args.packed or args.paged or args.seqused_k is not None
    if (has_values or args.leftpad_k is not None) and values_are_checked(args.q):
        _check_values(args, direction)


def validate_backward(args: AttentionArgs, grad: BackwardArgs) -> None:
    """The forward's checks, and the shapes of what the backward has beside them."""
    validate_forward(args, "backward")
    q = args.q
    for tensor, name in ((grad.out, "out"), (grad.dout, "dout")):
        check(
            tensor.dtype == q.dtype,
            f"query and {name} must have the same dtype, got q of {dtype_text(q)} ",
            f"and {name} of {dtype_text(tensor)}",
        )
    for tensor, name in ((grad.dout, "dout"), (grad.out, "out"), (grad.lse, "lse")):
        check_same_device(q, "q", tensor, name)

    out_shape = (*q.shape[:-1], args.head_dim_v)
    if args.packed:
        out_names = "(total_q, num_heads, head_size)"
        lse_shape, lse_names = (args.heads, q.shape[0]), "(heads, total_q)"
    else:
        out_names = "(batch_size, seqlen_q, num_heads, head_size)"
        lse_shape = (q.shape[0], args.heads, q.shape[1])
        lse_names = "(batch, heads, seqlen_q)"
    check(
        grad.out.shape == out_shape,
        f"out must have shape {out_names}; out: expected q's shape {shape_text(q)} ",
        f"with last dimension {args.head_dim_v}, got {shape_text(grad.out)}",
    )
    check(
        grad.dout.shape == out_shape,
        f"dout must have shape {out_names}; dout: expected {shape_text(grad.out)}, ",
        f"got {shape_text(grad.dout)}",
    )
    check(
        grad.lse.dtype == args.compute_dtype,
        f"lse: expected {DTYPE_NAMES[args.compute_dtype]} for q of {dtype_text(q)}, ",
        f"got {dtype_text(grad.lse)}",
    )
    check(
        grad.lse.shape == lse_shape,
        f"lse: expected {lse_names} for q {shape_text(q)}, got {shape_text(grad.lse)}",
    )
    if grad.dlse is not None:
        check(
            grad.dlse.shape == lse_shape,
            f"dlse: expected {shape_text(grad.lse)}, got {shape_text(grad.dlse)}",
        )
        check_same_device(q, "q", grad.dlse, "dlse")
    check(
        not grad.bias_requires_grad or args.bias is not None,
        "bias_requires_grad: no bias is given",
    )
    check(
        not grad.sinks_requires_grad or args.sinks is not None,
        "sinks_requires_grad: no sinks are given",
    )
