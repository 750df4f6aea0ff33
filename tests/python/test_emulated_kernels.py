"""The CUDA kernels with the decision, the operators and autograd around them, on the emulator."""

from __future__ import annotations

import pytest
from emulated import run_emulated

STEPS = 60


def test_a_language_model_trains_on_the_kernels_for_gpus():
    """The demo's, with losses that are those of `math` within rounding."""
    pytest.importorskip("tqdm")
    kernels, math = (
        run_emulated("training.py", STEPS, backend=backend) for backend in ("kernel,math", "math")
    )
    assert len(kernels) == STEPS
    assert kernels != math  # what ran is another implementation
    assert max(abs(a - b) for a, b in zip(kernels, math)) < 0.02
    assert kernels[-1] < 0.8 * kernels[0]


@pytest.mark.parametrize("deterministic", (False, True))
@pytest.mark.parametrize("heads_k", (8, 2))
def test_memory_of_a_forward_and_backward(heads_k, deterministic):
    """By torch's allocator: results, 8 bytes per query row, and dq once in fp32 unless the backward
    is deterministic. (FlashAttention-2: 4 bytes per row, dq in fp32, and dk and dv of every query
    head.)"""
    seqlen, heads, head_dim = 256, 8, 64
    in_forward, in_backward = run_emulated(
        "memory.py", seqlen, heads, heads_k, head_dim, deterministic
    )
    rows, keys = seqlen * heads, seqlen * heads_k
    assert in_forward == rows * (2 * head_dim + 4)
    gradients = 2 * head_dim * (rows + 2 * keys)
    assert in_backward == gradients + rows * (8 + (0 if deterministic else 4 * head_dim))


def test_every_case_of_attention():
    """Those of anyflash.testing, with their gradients; what the kernels do not take is refused."""
    found = run_emulated("gradients.py")
    wrong = [(case, text) for case, text in found["wrong"] if "is above 256" not in text]
    assert wrong == []
    assert len(found["ran"]) > 90
