"""What the operators around attention refuse is refused in a compiled graph too: no shape that does
not fit is broadcast into a number."""

from __future__ import annotations

import pytest
import torch

import anyflash

pytestmark = pytest.mark.providers

X, W = torch.randn(2, 3, 8), torch.ones(8)
HEADS, COS, SIN = torch.randn(1, 5, 2, 8), torch.ones(7, 4), torch.zeros(7, 4)
CU = torch.tensor([0, 2, 5], dtype=torch.int32)
LOGITS, LABELS = torch.randn(3, 9), torch.tensor([1, 2, 3])
REFUSED = {
    "weight of one": lambda: anyflash.layer_norm(X, torch.ones(1)),
    "weight per row": lambda: anyflash.layer_norm(X, torch.ones(3, 8)),
    "weight in fp64": lambda: anyflash.rms_norm(X, W.double()),
    "bias of one": lambda: anyflash.layer_norm(X, W, torch.ones(1)),
    "residual of one row": lambda: anyflash.layer_norm(X, W, residual=X[:, :1]),
    "tables of one row": lambda: anyflash.rotary(HEADS, COS[:1], SIN[:1]),
    "sin of one column": lambda: anyflash.rotary(HEADS, COS, SIN[:, :1]),
    "an offset beyond": lambda: anyflash.rotary(HEADS, COS, SIN, seqlen_offsets=6),
    "tables of one sequence": lambda: anyflash.rotary(
        HEADS[0], COS[:2], SIN[:2], cu_seqlens=CU, max_seqlen=CU.max()
    ),
    "one label": lambda: anyflash.cross_entropy(LOGITS, LABELS[:1]),
    "floating labels": lambda: anyflash.cross_entropy(LOGITS, LABELS.double()),
    "integer logits": lambda: anyflash.cross_entropy(LOGITS.long(), LABELS),
}


@pytest.mark.parametrize("order", ["math", "kernel, math"])
@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_a_graph(what, order, tmp_path, monkeypatch):
    if not hasattr(torch, "compile"):
        pytest.skip("this torch compiles nothing")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    for function in (REFUSED[what], torch.compile(REFUSED[what], backend="eager", fullgraph=True)):
        with anyflash.backend(order), pytest.raises(RuntimeError):
            function()
