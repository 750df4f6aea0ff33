"""Saves the weights of an attention layer, a batch, and the loss and gradients of one training step
in Python: the C++ program does the same step.

python make_step.py step.pt
"""

from __future__ import annotations

import sys

import torch
from flash_attn import flash_attn_func

BATCH, SEQLEN, HEADS, HEADS_K, HEAD_DIM = 2, 37, 4, 2, 16
DIM = HEADS * HEAD_DIM


def main(path: str) -> None:
    """Writes the step to `path`."""
    torch.manual_seed(0)
    x, target = torch.randn(2, BATCH, SEQLEN, DIM)
    qkv_weight = torch.randn((HEADS + 2 * HEADS_K) * HEAD_DIM, DIM).div_(DIM**0.5).requires_grad_()
    out_weight = torch.randn(DIM, DIM).div_(DIM**0.5).requires_grad_()

    qkv = (x @ qkv_weight.T).unflatten(-1, (-1, HEAD_DIM))
    q, k, v = qkv.split([HEADS, HEADS_K, HEADS_K], 2)
    attended = flash_attn_func(q, k, v, causal=True)
    loss = torch.nn.functional.mse_loss(attended.flatten(2) @ out_weight.T, target)
    loss.backward()

    step = {
        "x": x,
        "target": target,
        "qkv_weight": qkv_weight.detach(),
        "out_weight": out_weight.detach(),
        "loss": loss.detach(),
        "qkv_gradient": qkv_weight.grad,
        "out_gradient": out_weight.grad,
    }
    torch.save(step, path)


if __name__ == "__main__":
    main(sys.argv[1])
