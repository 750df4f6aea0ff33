"""CUDA graphs capture every entry, and nothing makes the host wait: per route, both directions."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

import anyflash

ROUTES = ("kernel", "aten_cudnn", "aten_flash", "aten_efficient", "math")


def run(route, function):
    """Runs function on the route; skips where the decision refuses it, with its reasons."""
    try:
        with anyflash.backend(route):
            return function()
    except RuntimeError as error:
        if "no back end of" in str(error):
            pytest.skip(str(error))
        raise


@contextlib.contextmanager
def syncs_are_errors():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make(*shape, **options):
    return torch.randn(*shape, device="cuda", dtype=torch.float16, **options)


def dense(causal=True):
    q, k, v = (make(2, 64, 4, 64) for _ in range(3))
    return (q, k, v), lambda: flash_attn_func(q, k, v, causal=causal)


def packed():
    q, k, v = (make(96, 4, 64) for _ in range(3))
    ends = torch.tensor([0, 10, 10, 50, 96], device="cuda", dtype=torch.int32)
    return (q, k, v), lambda: flash_attn_varlen_func(q, k, v, ends, ends, 46, 46, causal=True)


def kvcache():
    q, k, v = make(2, 1, 4, 64), make(2, 1, 4, 64), make(2, 1, 4, 64)
    cache_k, cache_v = make(2, 128, 4, 64), make(2, 128, 4, 64)
    used = torch.tensor([5, 60], device="cuda", dtype=torch.int32)

    def call():
        return flash_attn_with_kvcache(q, cache_k, cache_v, k, v, cache_seqlens=used, causal=True)

    return (q, k, v, cache_k, cache_v), call


ENTRIES = {
    "dense": dense,
    "full": functools.partial(dense, causal=False),
    "packed": packed,
    "kvcache": kvcache,
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_graph_replays_with_new_data(entry, route):
    inputs, call = ENTRIES[entry]()
    with torch.no_grad():
        run(route, call)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(route, call)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(route, call)
        for tensor in inputs:
            tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        replayed = out.clone()
        torch.testing.assert_close(replayed, run(route, call))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("entry", ENTRIES)
def test_the_forward_never_waits(entry, route):
    _, call = ENTRIES[entry]()
    with torch.no_grad():
        run(route, call)
        with syncs_are_errors():
            run(route, call)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("entry", ("dense", "full", "packed"))
def test_the_backward_never_waits(entry, route):
    inputs, call = ENTRIES[entry]()
    for tensor in inputs:
        tensor.requires_grad_()

    def step():
        out = call()
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    run(route, step)
    with syncs_are_errors():
        run(route, step)


@pytest.mark.parametrize("route", ("kernel", "auto"))
def test_a_training_step_in_a_graph(route):
    inputs, call = dense()
    for tensor in inputs:
        tensor.requires_grad_()
        tensor.grad = torch.zeros_like(tensor)

    def step():
        for tensor in inputs:
            tensor.grad.zero_()
        run(route, lambda: call().float().square().sum().backward())

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    expected = [tensor.grad.clone() for tensor in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    for tensor, gradient in zip(inputs, expected):
        torch.testing.assert_close(tensor.grad, gradient)
