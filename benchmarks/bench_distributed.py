"""What a call on DTensors costs, beside scaled_dot_product_attention's on DTensors: one process,
one thread, so no time of the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from benchmarks.measure import Row, interleaved
from flash_attn import flash_attn_func
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import register_sharding

NUMBER = 10
Calls = tuple[Callable[[], object], Callable[[], object]]


def rows() -> Iterator[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        _shard_aten()
        tiny, small = _calls(8, 2, 16), _calls(64, 8, 64)
        for direction, goal in (("forward", 15), ("forward+backward", 60)):
            times = [1e6 * t for t in interleaved(*tiny[direction], number=NUMBER)]
            name = f"flash_attn_func over SDPA, DTensors of s8 h2 d16, {direction} (us)"
            yield Row.excess(name, *times, at_most=goal, unit="us")
        for direction, calls in small.items():
            times = [1e6 * t for t in interleaved(*calls, number=NUMBER)]
            name = f"flash_attn_func beside SDPA, DTensors of s64 h8 d64, {direction} (us)"
            yield Row.part(name, *times, at_most=1.2)
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)


def _shard_aten() -> None:
    """What SDPA of CPU tensors ends in has no sharding strategies of PyTorch's: batch and heads."""
    aten, placements = torch.ops.aten, (Replicate(), Shard(0), Shard(1))
    name = "_scaled_dot_product_flash_attention_for_cpu"
    for operator, results, tensors in ((name, 2, 3), (f"{name}_backward", 3, 6)):

        def strategy(*arguments, results=results, tensors=tensors, **options):
            others = [None] * (len(arguments) - tensors)
            return [([p] * results, [p] * tensors + others) for p in placements]

        register_sharding(getattr(aten, operator).default)(strategy)


def _calls(seqlen: int, heads: int, head_dim: int) -> dict[str, Calls]:
    """Causal calls, ours and SDPA's, on tensors sharded along their heads."""
    mesh = init_device_mesh("cpu", (1,))
    rows_first = [torch.randn(1, seqlen, heads, head_dim) for _ in range(4)]
    q, k, v, dout = (distribute_tensor(x, mesh, [Shard(2)]) for x in rows_first)
    ours = [x.detach().requires_grad_() for x in (q, k, v)]
    heads_first = [x.transpose(1, 2).contiguous() for x in rows_first]
    *qkv, sdpa_dout = (distribute_tensor(x, mesh, [Shard(1)]) for x in heads_first)
    theirs = [x.detach().requires_grad_() for x in qkv]

    def attend(leaves):
        return flash_attn_func(*leaves, causal=True)

    def sdpa(leaves):
        return F.scaled_dot_product_attention(*leaves, is_causal=True)

    return {
        "forward": (lambda: attend((q, k, v)), lambda: sdpa(qkv)),
        "forward+backward": (
            lambda: torch.autograd.grad(attend(ours), ours, dout),
            lambda: torch.autograd.grad(sdpa(theirs), theirs, sdpa_dout),
        ),
    }
