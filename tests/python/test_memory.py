"""Memory: the composed maths works in chunks, and kernels fill new memory in huge pages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from support import run_python

import anyflash
from anyflash import _loader

pytestmark = pytest.mark.providers

CODE = """
import resource, torch, anyflash
torch.set_num_threads(2)
seqlen, heads, dim = 16384, 8, 64
leaves = [torch.randn(1, seqlen, heads, dim).requires_grad_() for _ in range(3)]
dout = torch.randn(1, seqlen, heads, dim)
warm = [x[:, :64].detach().requires_grad_() for x in leaves]
anyflash.attention(*warm, backend="math").sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = anyflash.attention(*leaves, backend="math", causal=True)
torch.autograd.grad(out, leaves, dout)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_long_sequence_of_math(device):
    """16384 tokens, 8 heads of 64, fp32, forward and backward: under 1.5 GiB above the inputs.

    Causal, which takes half the time; the last rows still see every key.
    """
    if device != "cpu":
        pytest.skip("measured on the CPU")
    gib = float(run_python(CODE, timeout=600))
    assert gib < 1.5, f"{gib:.2f} GiB above the inputs"


def _has_huge_pages(x: torch.Tensor) -> bool:
    """Whether the system was asked for huge pages for the memory in the middle of x."""
    middle, inside = x.data_ptr() + x.numel() * x.element_size() // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            begin, end = (int(number, 16) for number in first.split("-"))
            inside = begin <= middle < end
        elif inside and first == "VmFlags:":
            return "hg" in rest
    return False


def _rotary(x):
    angles = torch.rand(1100, 16)
    return anyflash.rotary(x.view(1, 1100, 64, 32), angles.cos(), angles.sin())


def _cross_entropy(x):
    labels = torch.zeros(1100, dtype=torch.int64)
    losses, _ = anyflash.cross_entropy(x.requires_grad_(), labels)
    return torch.autograd.grad(losses.sum(), x)[0]


RESULTS = {
    "norm": lambda x: anyflash.rms_norm(x, torch.ones(2048)),
    "rotary": _rotary,
    "cross entropy": _cross_entropy,
    "bias + activation": lambda x: anyflash.bias_activation(x, torch.ones(2048), activation="relu"),
}


@pytest.mark.skipif(_loader.cpu_isa() == "none", reason="no kernels here")
@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages here"
)
@pytest.mark.parametrize("name", RESULTS)
def test_kernels_fill_new_memory_in_huge_pages(name):
    """8.6 MiB of it."""
    assert _has_huge_pages(RESULTS[name](torch.rand(1100, 2048)))
