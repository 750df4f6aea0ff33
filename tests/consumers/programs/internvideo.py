"""InternVideo 2's block: RMS norms that carry the residual, packed attention, FusedMLP."""

from __future__ import annotations

import pytest
import torch
from helpers import compare_training, plain_attention

HEADS, DIM = 4, 32


class Flash(torch.nn.Module):
    def __init__(self):
        from flash_attn.modules.mlp import FusedMLP
        from flash_attn.ops.rms_norm import DropoutAddRMSNorm

        super().__init__()
        self.norm1 = DropoutAddRMSNorm(DIM, eps=1e-6, prenorm=True)
        self.norm2 = DropoutAddRMSNorm(DIM, eps=1e-6, prenorm=True)
        self.qkv = torch.nn.Linear(DIM, 3 * DIM, bias=False)
        self.mlp = FusedMLP(in_features=DIM, hidden_features=4 * DIM, heuristic="auto")

    def forward(self, x, residual):
        from flash_attn.bert_padding import pad_input, unpad_input
        from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func

        x, residual = self.norm1(x, residual)
        qkv = self.qkv(x)
        rows, indices, cu_seqlens, longest, *_ = unpad_input(qkv, torch.ones(qkv.shape[:2]).int())
        out = flash_attn_varlen_qkvpacked_func(
            rows.unflatten(-1, (3, HEADS, -1)), cu_seqlens, longest, 0.0, causal=False
        )
        x, residual = self.norm2(pad_input(out.flatten(-2), indices, *qkv.shape[:2]), residual)
        return self.mlp(x), residual


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = (torch.nn.RMSNorm(DIM, eps=1e-6) for _ in range(2))
        self.qkv = torch.nn.Linear(DIM, 3 * DIM, bias=False)
        self.mlp = torch.nn.Module()
        self.mlp.fc1, self.mlp.fc2 = torch.nn.Linear(DIM, 4 * DIM), torch.nn.Linear(4 * DIM, DIM)

    def forward(self, x, residual):
        residual = x + residual
        qkv = self.qkv(self.norm1(residual)).unflatten(-1, (3, HEADS, -1))
        residual = residual + plain_attention(*qkv.unbind(2)).flatten(-2)
        hidden = torch.nn.functional.gelu(self.mlp.fc1(self.norm2(residual)), approximate="tanh")
        return self.mlp.fc2(hidden), residual


@pytest.mark.shows("imported", "forward", "backward")
def test_block():
    torch.manual_seed(0)
    flash, plain = Flash(), Plain()
    plain.load_state_dict(flash.state_dict())
    x, residual = torch.randn(2, 7, DIM), torch.randn(2, 7, DIM)
    found, wanted = (torch.cat(m(x, residual), -1) for m in (flash, plain))
    compare_training(found, wanted, flash, plain)
