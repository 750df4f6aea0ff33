"""Saves a transformer block with a key/value cache as TorchScript, once scripted and once traced,
with an example inside.

python make_model.py scripted.pt traced.pt
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import anyflash  # noqa: F401  (registers torch.ops.anyflash)


class Block(nn.Module):
    """Pre-norm transformer block: causal attention over a cache, then a gated MLP.

    Args:
        dim: width of the model, heads * head_dim.
        heads: query heads.
        heads_k: key and value heads; divides heads.
    """

    def __init__(self, dim: int, heads: int, heads_k: int):
        super().__init__()
        self.heads = heads
        self.heads_k = heads_k
        self.head_dim = dim // heads
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, (heads + 2 * heads_k) * self.head_dim)
        self.out = nn.Linear(dim, dim)
        self.up = nn.Linear(dim, 8 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor) -> Tensor:
        """x (batch, new, dim) -> (batch, new, dim).

        The caches (batch, capacity, heads_k, head_dim) hold cache_seqlens (batch,) int32 rows, and
        those of x afterwards.
        """
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split([self.heads, self.heads_k, self.heads_k], 2)
        attended = torch.ops.anyflash.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, causal=True
        )
        x = x + self.out(attended.flatten(2))
        hidden = torch.ops.anyflash.fused_mlp(
            self.norm2(x),
            self.up.weight,
            self.up.bias,
            self.down.weight,
            self.down.bias,
            "silu_gate",
        )
        return x + hidden

    def caches(self, batch: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
        """Empty caches and their lengths."""
        shape = (batch, capacity, self.heads_k, self.head_dim)
        return torch.zeros(shape), torch.zeros(shape), torch.zeros(batch, dtype=torch.int32)


class Example(nn.Module):
    """A block, an input, and what the block computes of it in Python in one call."""

    def __init__(self, block: nn.Module, example_input: Tensor, example_output: Tensor):
        super().__init__()
        self.block = block
        self.register_buffer("example_input", example_input)
        self.register_buffer("example_output", example_output)

    def forward(self, x: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor) -> Tensor:
        return self.block(x, k_cache, v_cache, cache_seqlens)


@torch.no_grad()
def main(scripted: str, traced: str) -> None:
    """Writes the models to these paths."""
    torch.manual_seed(0)
    block = Block(dim=64, heads=4, heads_k=2).eval()
    x = torch.randn(2, 37, 64)
    output = block(x, *block.caches(2, 40))
    trace = torch.jit.trace(block, (x[:, :5], *block.caches(2, 40)), check_trace=False)
    torch.jit.script(Example(block, x, output)).save(scripted)
    torch.jit.script(Example(trace, x, output)).save(traced)


if __name__ == "__main__":
    main(*sys.argv[1:])
