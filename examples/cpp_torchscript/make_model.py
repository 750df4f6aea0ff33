"""Saves a transformer block that attends with anyflash as TorchScript, with an example inside.

python make_model.py block.pt
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import anyflash  # noqa: F401  (registers torch.ops.anyflash)


class Block(nn.Module):
    """Pre-norm transformer block: causal attention with grouped heads, then a gated MLP.

    Args:
        dim: width of the model, heads * head_dim.
        heads: query heads.
        heads_k: key and value heads; divides heads.
    """

    def __init__(self, dim: int, heads: int, heads_k: int):
        super().__init__()
        self.heads = heads
        self.heads_k = heads_k
        head_dim = dim // heads
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, (heads + 2 * heads_k) * head_dim)
        self.out = nn.Linear(dim, dim)
        self.up = nn.Linear(dim, 8 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, seqlen, dim) -> (batch, seqlen, dim)."""
        batch, seqlen, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, seqlen, self.heads + 2 * self.heads_k, -1)
        q, k, v = qkv.split([self.heads, self.heads_k, self.heads_k], 2)
        attended = torch.ops.anyflash.flash_attn_func(q, k, v, 0.0, None, True)
        x = x + self.out(attended.reshape(batch, seqlen, dim))
        hidden = torch.ops.anyflash.fused_mlp(
            self.norm2(x),
            self.up.weight,
            self.up.bias,
            self.down.weight,
            self.down.bias,
            "silu_gate",
        )
        return x + hidden


class Example(nn.Module):
    """The block, and what it computed in Python: the C++ program compares with it."""

    def __init__(self, block: nn.Module, example_input: Tensor):
        super().__init__()
        self.block = block
        self.register_buffer("example_input", example_input)
        self.register_buffer("example_output", block(example_input))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def main(path: str) -> None:
    """Writes the model to `path`."""
    torch.manual_seed(0)
    block = Block(dim=64, heads=4, heads_k=2).eval()
    with torch.no_grad():
        example = Example(block, torch.randn(2, 37, 64))
    torch.jit.script(example).save(path)


if __name__ == "__main__":
    main(sys.argv[1])
