"""What `math` does on a GPU, here on the CPU: sequences gathered into padded tensors.

The Python provider takes views or padding by the device; here padding is chosen for it.
"""

from __future__ import annotations

import pytest
from support import expected_of, inputs_of

from anyflash._python_ops import attention as python_operators
from anyflash._python_ops import batches
from anyflash.testing import CORNER, CORRECTNESS, assert_close

MATH = 3
WITH_LENGTHS = [
    case
    for case in CORRECTNESS + CORNER
    if case.layout != "dense" or case.seqused_k is not None or case.leftpad_k is not None
]


@pytest.fixture(autouse=True)
def padded(monkeypatch):
    """One padded batch instead of a view per sequence."""

    def one_batch(*problem):
        yield batches.padded_batch(*problem)

    monkeypatch.setattr(batches, "runs_of", one_batch)


def _arguments(inputs):
    """The operators' arguments up to `softcap`."""
    q, k, v = inputs.qkv
    o = inputs.options
    longest = (o.get("max_seqlen_q", 0), o.get("max_seqlen_k", 0))
    names = ["seqused_k", "leftpad_k", "block_table", "alibi_slopes", "bias", "sinks", "rng_state"]
    scale = o.get("softmax_scale", q.size(-1) ** -0.5)
    return [
        *(q, k, v, o.get("cu_seqlens_q"), o.get("cu_seqlens_k"), *longest),
        *(o.get(name) for name in names),
        *(o.get("dropout_p", 0.0), scale, o["causal"], *o["window_size"], o.get("softcap", 0.0)),
    ]


@pytest.mark.parametrize("case", WITH_LENGTHS, ids=lambda case: case.name)
def test_padded(case):
    inputs = inputs_of(case, "cpu")
    arguments = _arguments(inputs)
    out, lse, _ = python_operators._flash_attn_forward(*arguments, False, True, MATH)
    found = {"out": out, "lse": lse}
    expected = expected_of(case, "cpu", gradients=case.differentiable)
    if case.differentiable:
        q, k, v, *rest = arguments
        del rest[6]  # block_table
        wanted = ["bias" in inputs.differentiable(), "sinks" in inputs.differentiable()]
        gradients = python_operators._flash_attn_backward(
            *(inputs.dout, q, k, v, out, lse, inputs.dlse, *rest, False, *wanted, MATH)
        )
        names = ["q", "k", "v"] + ["bias"] * wanted[0] + ["sinks"] * wanted[1]
        found.update(zip(names, [g for g in gradients if g.numel() or g.dim() > 1]))
    for name, value in found.items():
        what = f"{case.name} {name}"
        assert_close(value, expected.exact[name], expected.low[name], what)


def test_all_layouts_are_here():
    assert {case.layout for case in WITH_LENGTHS} == {"dense", "packed", "paged", "packed_paged"}
    assert len(WITH_LENGTHS) > 25
