"""Times this library's kernels on the GPU beside its routes through PyTorch, plain SDPA and
FlexAttention, in one process; writes bench.json, bench.txt and lines for core/measured.def.

python -m benchmarks.gpu --out FOLDER

Random data, medians of CUDA events, the L2 cache overwritten before every call. Forwards are
replayed from CUDA graphs, so that what Python costs is not in them.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, Callable

import torch
import torch.nn.functional as F
from benchmarks.gpu_table import (
    BACKWARD,
    ROUTES,
    Row,
    attention_flop,
    cache_bytes,
    measured_lines,
    table,
)
from flash_attn import flash_attn_with_kvcache
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import anyflash

TOKENS, HIDDEN = 16384, 2048
HEAD_DIMS = (64, 128, 256)
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)

DECODE_TOKENS, DECODE_HEADS, DECODE_HEAD_DIM, MOST_SEQUENCES = 131072, 32, 128, 64
DECODE_HEADS_K = (4, 32)
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
PAGE_SIZES = (16, 64, 256)
ROTARY_CONTEXT = 8192

# Of backwards, and of the second dtype, whose code differs in few bytes.
FEW_SEQLENS = (512, 8192)
FEW_CONTEXTS = (1024, 65536)

# Every shape is a compilation of some seconds; none of the few.
FLEX_SEQLENS = (2048, 16384)
FLEX_CONTEXTS = (8192, 131072)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Call = Callable[[], Any]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Clock:
    """Measures calls, each after the L2 cache was overwritten."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.scratch = torch.empty(4 * cache, dtype=torch.uint8, device="cuda")

    def us(self, call: Call) -> float:
        """Median microseconds on the GPU: at least 0.1 s of warming up, at least 30 rounds."""
        warm = time.perf_counter() + 0.1
        while time.perf_counter() < warm:
            call()
            torch.cuda.synchronize()
        pairs = []
        for _ in range(30):
            self.scratch.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return statistics.median(1e3 * begin.elapsed_time(end) for begin, end in pairs)

    def graph_us(self, call: Call) -> float:
        """The same for a CUDA graph of the call."""
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad():
            call()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                call()
        return self.us(graph.replay)


def sm_mhz() -> int | None:
    """The clock of the multiprocessors now."""
    command = ["nvidia-smi", "-i", "0", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True).stdout)
    except (OSError, ValueError):
        return None


def fill(row: Row, measure: Callable[[Call], float], calls: dict[str, Call]) -> Row:
    """Times each call; one that fails keeps its reason."""
    for name, call in calls.items():
        try:
            row.us[name] = measure(call)
        except Exception as error:  # the others still count
            row.refused[name] = str(error) or type(error).__name__
    row.sm_mhz = sm_mhz()
    print(f"  {row.group}: {row.shape}", file=sys.stderr, flush=True)
    return row


def randn(*shape: int, dtype: str = "bf16", **options: Any) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=DTYPES[dtype], **options)


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """PyTorch's attention by its own choice, on (batch, seqlen, heads, head_dim)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = {"enable_gqa": True} if q.size(1) != k.size(1) else {}
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, **grouped).transpose(1, 2)


def held_to(*back_ends: str, causal: bool) -> dict[str, Attend]:
    """These back ends, the routes through PyTorch, and PyTorch without this library."""
    attends: dict[str, Attend] = {
        name: functools.partial(anyflash.attention, causal=causal, backend=name)
        for name in (*back_ends, *ROUTES)
    }
    return {**attends, "sdpa": functools.partial(sdpa, causal=causal)}


def flex(seqlen_q: int, seqlen_k: int, causal: bool) -> Attend:
    """FlexAttention compiled for these lengths."""
    torch.compiler.reset()  # a compilation per shape, without a limit on their number
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None
    if causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, seqlen_q, seqlen_k, "cuda")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1))

    return attend


def forward_row(clock: Clock, dtype: str, seqlen: int, head_dim: int, causal: bool) -> Row:
    batch, heads = TOKENS // seqlen, HIDDEN // head_dim
    q, k, v = (randn(batch, seqlen, heads, head_dim, dtype=dtype) for _ in range(3))
    attends = held_to("kernel", causal=causal)
    if seqlen in FLEX_SEQLENS:
        attends["flex"] = flex(seqlen, seqlen, causal)
    row = Row(
        group=f"forward, {dtype}, {TOKENS} tokens, hidden {HIDDEN}",
        shape=f"head_dim {head_dim} {'causal' if causal else 'full'} {seqlen}",
        unit="TFLOP/s",
        work=attention_flop(batch, heads, seqlen, head_dim, causal),
        ours=("kernel",),
        point=("forward", dtype, head_dim),
    )
    calls = {name: functools.partial(attend, q, k, v) for name, attend in attends.items()}
    return fill(row, clock.graph_us, calls)


def backward_row(clock: Clock, dtype: str, seqlen: int, head_dim: int, causal: bool) -> Row:
    """The backward alone, each after a forward of its own."""
    batch, heads = TOKENS // seqlen, HIDDEN // head_dim
    shape = (batch, seqlen, heads, head_dim)
    q, k, v = (randn(*shape, dtype=dtype, requires_grad=True) for _ in range(3))
    dout = randn(*shape, dtype=dtype)

    def backward(attend: Attend) -> Call:
        forward = functools.cache(lambda: attend(q, k, v))
        return lambda: torch.autograd.grad(forward(), (q, k, v), dout, retain_graph=True)

    row = Row(
        group=f"backward, {dtype}, {TOKENS} tokens, hidden {HIDDEN}",
        shape=f"head_dim {head_dim} {'causal' if causal else 'full'} {seqlen}",
        unit="TFLOP/s",
        work=BACKWARD * attention_flop(batch, heads, seqlen, head_dim, causal),
        ours=("kernel",),
        point=("backward", dtype, head_dim),
    )
    attends = held_to("kernel", causal=causal)
    return fill(row, clock.us, {name: backward(attend) for name, attend in attends.items()})


def paged(k: Tensor, v: Tensor, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A cache (batch, context, heads_k, head_dim) as pages in random order, and the block table."""
    stored = [cache.reshape(-1, page_size, *cache.shape[2:]) for cache in (k, v)]
    order = torch.randperm(stored[0].size(0), device=k.device)
    shuffled = (torch.empty_like(pages).index_copy_(0, order, pages) for pages in stored)
    return *shuffled, order.to(torch.int32).reshape(k.size(0), -1)


def decode_row(clock: Clock, dtype: str, context: int, heads_k: int) -> Row:
    """One token per sequence against its cache, stored in one piece and in pages."""
    batch = min(MOST_SEQUENCES, DECODE_TOKENS // context)
    q = randn(batch, 1, DECODE_HEADS, DECODE_HEAD_DIM, dtype=dtype)
    k, v = (randn(batch, context, heads_k, DECODE_HEAD_DIM, dtype=dtype) for _ in range(2))
    used = torch.full((batch,), context, device=q.device, dtype=torch.int32)
    attends = held_to(causal=False)
    attends["contiguous"] = lambda q, k, v: flash_attn_with_kvcache(q, k, v, cache_seqlens=used)
    if context in FLEX_CONTEXTS:
        attends["flex"] = flex(1, context, causal=False)
    row = Row(
        group=f"decode, {dtype}, {DECODE_HEADS} heads, head_dim {DECODE_HEAD_DIM}",
        shape=f"heads_k {heads_k} batch {batch} context {context}",
        unit="GB/s",
        work=cache_bytes(batch, heads_k, context, DECODE_HEAD_DIM, q.element_size()),
        ours=("contiguous", *(f"page {size}" for size in PAGE_SIZES)),
        point=("forward", dtype, DECODE_HEAD_DIM),
    )
    with anyflash.backend("kernel"):
        fill(row, clock.graph_us, {n: functools.partial(a, q, k, v) for n, a in attends.items()})
        for size in PAGE_SIZES:
            *pages, block_table = paged(k, v, size)
            options = {"cache_seqlens": used, "block_table": block_table}
            call = functools.partial(flash_attn_with_kvcache, q, *pages, **options)
            fill(row, clock.graph_us, {f"page {size}": call})
    return row


def append_row(clock: Clock, dtype: str, heads_k: int) -> Row:
    """A decoding step that also turns the new token and appends it, beside one that does not."""
    context, head_dim = ROTARY_CONTEXT, DECODE_HEAD_DIM
    batch = DECODE_TOKENS // context
    q, new_k, new_v = (
        randn(batch, 1, heads, head_dim, dtype=dtype) for heads in (DECODE_HEADS, heads_k, heads_k)
    )
    k, v = (randn(batch, context, heads_k, head_dim, dtype=dtype) for _ in range(2))
    cos, sin = (randn(context, head_dim // 2, dtype=dtype) for _ in range(2))
    used = torch.full((batch,), context - 1, device=q.device, dtype=torch.int32)
    row = Row(
        group=f"decode, {dtype}, with the new token turned and appended",
        shape=f"heads_k {heads_k} batch {batch} context {context}",
        unit="GB/s",
        work=cache_bytes(batch, heads_k, context, head_dim, q.element_size()),
        ours=("rotary and append", "append"),
    )
    decode = functools.partial(flash_attn_with_kvcache, q, k, v, cache_seqlens=used)
    calls: dict[str, Call] = {
        "rotary and append": functools.partial(
            decode, k=new_k, v=new_v, rotary_cos=cos, rotary_sin=sin
        ),
        "append": functools.partial(decode, k=new_k, v=new_v),
        "neither": decode,
    }
    with anyflash.backend("kernel"):
        return fill(row, clock.graph_us, calls)


def bias_activation_rows(clock: Clock) -> Iterator[Row]:
    """The kernel and plain PyTorch, forward, then forward and backward."""
    x = randn(16384, 16384, requires_grad=True)
    bias = randn(16384, requires_grad=True)

    def activate(route: str) -> Tensor:
        return anyflash.bias_activation(x, bias, activation="gelu_tanh", backend=route)

    def step(route: str) -> Any:
        y = activate(route)
        return torch.autograd.grad(y, (x, bias), y.detach())

    for shape, passes, measure, call in (
        ("forward", 2, clock.graph_us, activate),
        ("forward and backward", 5, clock.us, step),
    ):
        work = passes * x.numel() * x.element_size()
        row = Row("bias + gelu_tanh, bfloat16, 16384 x 16384", shape, "GB/s", work, ("kernel",))
        yield fill(row, measure, {r: functools.partial(call, r) for r in ("kernel", "math")})


def rows(clock: Clock, sm: int) -> Iterator[Row]:
    dtypes = ("bf16", "fp16") if sm >= 80 else ("fp16",)
    for dtype in dtypes:
        is_first = dtype == dtypes[0]
        for head_dim in HEAD_DIMS:
            for causal in (False, True):
                for seqlen in SEQLENS if is_first else FEW_SEQLENS:
                    yield forward_row(clock, dtype, seqlen, head_dim, causal)
                for seqlen in FEW_SEQLENS if sm >= 80 else ():
                    yield backward_row(clock, dtype, seqlen, head_dim, causal)
        for heads_k in DECODE_HEADS_K:
            for context in CONTEXTS if is_first else FEW_CONTEXTS:
                yield decode_row(clock, dtype, context, heads_k)
            if is_first:
                yield append_row(clock, dtype, heads_k)
    yield from bias_activation_rows(clock)


def write(folder: pathlib.Path, measured: list[Row]) -> None:
    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    facts["cudnn"] = torch.backends.cudnn.version()
    facts["rows"] = [row.as_dict() for row in measured]
    (folder / "bench.json").write_text(json.dumps(facts, indent=1) + "\n")
    (folder / "bench.txt").write_text(table(measured) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU that torch can use", file=sys.stderr)
        return 3
    torch.manual_seed(0)
    major, minor = torch.cuda.get_device_capability()
    sm = 10 * major + minor
    measured: list[Row] = []
    for row in rows(Clock(), sm):
        measured.append(row)
        write(options.out, measured)  # a run that is ended early leaves what it has
    print(table(measured))
    if any(name in row.refused for row in measured for name in row.ours):
        return 1
    lines = "".join(f"{line}\n" for line in measured_lines(sm, measured))
    (options.out / "measured.def").write_text(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
