"""Compiles an encoder layer for any batch and length, as an AOTInductor package, and saves what it
computes of two inputs.

python make_package.py encoder.pt2 expected.pt
"""

from __future__ import annotations

import sys

import torch
from flash_attn import flash_attn_func
from torch import Tensor, nn
from torch.export import Dim


class Encoder(nn.Module):
    """Attention with a residual; width dim of heads heads."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, seqlen, dim) -> (batch, seqlen, dim)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return x + self.out(flash_attn_func(q, k, v, window_size=(64, 64)).flatten(2))


@torch.no_grad()
def main(package: str, expected: str) -> None:
    """Writes the package, and the inputs and outputs."""
    torch.manual_seed(0)
    encoder = Encoder(dim=64, heads=4).eval()
    inputs = [torch.randn(2, 37, 64), torch.randn(3, 301, 64)]
    shape = {0: Dim("batch", max=64), 1: Dim("seqlen", max=4096)}
    program = torch.export.export(encoder, (inputs[0],), dynamic_shapes=(shape,))
    torch._inductor.aoti_compile_and_package(program, package_path=package)
    torch.save({"inputs": inputs, "outputs": [encoder(x) for x in inputs]}, expected)


if __name__ == "__main__":
    main(*sys.argv[1:])
