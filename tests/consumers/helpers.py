"""Comparisons, plain references and device redirection for the tests of clients."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

import torch

import anyflash

DTYPES = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # with the tolerance of a small model


def compare(actual: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Tensors, or equally nested sequences of them, are close."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a backward pass has left in a module's parameters."""
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    assert found, "no parameter has a gradient"
    return found


def compare_training(actual: Any, expected: Any, ours: Any, theirs: Any, tolerance=1e-4) -> None:
    """Outputs of two modules, and all their gradients of one loss."""
    compare(actual, expected, tolerance)
    for module, out in ((ours, actual), (theirs, expected)):
        module.zero_grad()
        out.float().square().mean().backward()
    found, wanted = gradients(ours), gradients(theirs)
    assert found.keys() == wanted.keys()
    compare(found, wanted, tolerance)


def compare_accelerated(run: Callable[[], Any], dtype: torch.dtype, backward: bool = False) -> None:
    """What run() returns, with anyflash.accelerate_sdpa and without: our kernels run in the first
    case alone."""
    expected, without = _watched(run)
    with anyflash.accelerate_sdpa():
        actual, ran = _watched(run)
    compare(actual, expected, DTYPES[dtype])
    kernels = {"anyflash::_flash_attn_forward"}
    if backward:
        kernels.add("anyflash::_flash_attn_backward")
    assert (ran, without) == (kernels, set())


def _watched(run: Callable[[], Any]) -> tuple[Any, set[str]]:
    """What run() returns, and which operators of ours it called."""
    with torch.autograd.profiler.profile() as profile:
        result = run()
    names = {event.name for event in profile.function_events}
    return result, {name for name in names if name.startswith("anyflash::")}


def leaves(*shapes: Sequence[int], dtype=torch.float32) -> list[torch.Tensor]:
    """Random tensors that require a gradient, the same ones in every call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def plain_attention(q, k, v, causal=False, window=(-1, -1), softcap=0.0):
    """(batch, seqlen, heads, head_dim) attention in torch operations, grouped heads too."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    score = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    distance = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None]
    distance = distance - (k.shape[1] - q.shape[1])
    hidden = distance > (0 if causal else window[1] if window[1] >= 0 else k.shape[1])
    if window[0] >= 0:
        hidden |= distance < -window[0]
    return torch.einsum("bhqk,bkhd->bqhd", score.masked_fill(hidden, -math.inf).softmax(-1), v)


def packed_attention(q, k, v, lengths, **options):
    """The same for sequences that lie end to end: (total, heads, head_dim)."""
    parts = zip(*(x.split(lengths) for x in (q, k, v)))
    return torch.cat([plain_attention(*(x[None] for x in p), **options)[0] for p in parts])


def cumulative(lengths: Sequence[int]) -> torch.Tensor:
    """cu_seqlens of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def pretend_cuda(monkeypatch) -> None:
    """For clients that refuse a CPU: torch says that there is an A100, and tensors are on it.

    Nothing else changes: every tensor stays where it is and every call goes where it went.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (8, 0))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True), raising=False)


def plain_rotary(x, cos, sin, interleaved=False):
    """(batch, seqlen, heads, head_dim) turned by (seqlen, rotary_dim / 2) tables, in torch
    operations."""
    dim = 2 * cos.shape[-1]
    cos, sin = (t[: x.shape[1], None].to(x.dtype) for t in (cos, sin))
    if interleaved:
        a, b = x[..., 0:dim:2], x[..., 1:dim:2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = x[..., :dim].chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    return torch.cat([turned, x[..., dim:]], -1)


def rotary_tables(seqlen: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (seqlen, dim / 2)."""
    angle = torch.arange(seqlen)[:, None] / 10000 ** (torch.arange(0, dim, 2) / dim)
    return angle.cos(), angle.sin()


def leave_gloo(rank: int, folder: str, size: int = 2) -> None:
    """Ends this process when the others are done too, without the destructors of gloo's threads,
    which end one process in ten by an abort (seen with torch 2.13)."""
    Path(folder, f"done{rank}").touch()
    while not all(Path(folder, f"done{other}").exists() for other in range(size)):
        time.sleep(0.01)
    os._exit(0)


def join_gloo(rank: int, folder: str, size: int = 2) -> None:
    """Makes this process one of a group that meets in a folder."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size
    )
