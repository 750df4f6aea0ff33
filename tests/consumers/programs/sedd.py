"""Text diffusion (SEDD, MDLM, BD3-LM): a block of packed attention, rotary and FusedMLP."""

from __future__ import annotations

import pytest
import torch
from helpers import compare_training, plain_attention, plain_rotary, rotary_tables
from torch.utils.checkpoint import checkpoint

HEADS, DIM, SEQLEN = 4, 64, 12


class Block(torch.nn.Module):
    """The attention and the MLP are a subclass's; the names of the parameters are the same."""

    def __init__(self, mlp):
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(DIM), torch.nn.LayerNorm(DIM)
        self.attn_qkv = torch.nn.Linear(DIM, 3 * DIM, bias=False)
        self.attn_out = torch.nn.Linear(DIM, DIM, bias=False)
        self.mlp = mlp

    def forward(self, x):
        qkv = self.attn_qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1))
        x = x + self.attn_out(self.attend(qkv).flatten(-2))
        return x + self.mlp(self.norm2(x))


class Plain(Block):
    def __init__(self):
        super().__init__(torch.nn.Module())
        self.mlp.fc1, self.mlp.fc2 = torch.nn.Linear(DIM, 4 * DIM), torch.nn.Linear(4 * DIM, DIM)
        self.mlp.forward = lambda x: self.mlp.fc2(
            torch.nn.functional.gelu(self.mlp.fc1(x), approximate="tanh")
        )

    def attend(self, qkv):
        tables = rotary_tables(SEQLEN, DIM // HEADS)
        q, k, v = qkv.unbind(2)
        return plain_attention(plain_rotary(q, *tables), plain_rotary(k, *tables), v)


class Flash(Block):
    def __init__(self, checkpoint_lvl):
        from flash_attn.ops.fused_dense import FusedMLP

        super().__init__(FusedMLP(DIM, 4 * DIM, DIM, checkpoint_lvl=checkpoint_lvl))

    def attend(self, qkv):
        from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func
        from flash_attn.layers.rotary import apply_rotary_emb_qkv_

        cos, sin = rotary_tables(SEQLEN, DIM // HEADS)
        # The full tables hold each angle twice, for q, k and v; a slice of them is handed on.
        full = [t.repeat(1, 2)[None, :, None, None].repeat(1, 1, 3, 1, 1) for t in (cos, sin)]
        cos, sin = (t.to(qkv.dtype)[0, :, 0, 0, : t.shape[-1] // 2] for t in full)
        assert not cos.is_contiguous()
        with torch.autocast("cpu", enabled=False):
            qkv = apply_rotary_emb_qkv_(qkv, cos, sin)
        batch, seqlen = qkv.shape[:2]
        cu_seqlens = torch.arange(0, (batch + 1) * seqlen, seqlen, dtype=torch.int32)
        out = flash_attn_varlen_qkvpacked_func(
            qkv.flatten(0, 1), cu_seqlens, seqlen, 0.0, causal=False
        )
        return out.unflatten(0, (batch, seqlen))


def pair(checkpoint_lvl=0):
    torch.manual_seed(0)
    flash, plain = Flash(checkpoint_lvl), Plain()
    plain.load_state_dict(flash.state_dict())
    flash.load_state_dict(plain.state_dict())
    return flash, plain, torch.randn(2, SEQLEN, DIM)


@pytest.mark.shows("imported", "forward", "backward")
@pytest.mark.parametrize("checkpoint_lvl", [0, 1, 2])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_fp32(checkpoint_lvl, checkpointed):
    flash, plain, x = pair(checkpoint_lvl)
    x.requires_grad_()
    out = checkpoint(flash, x, use_reentrant=False) if checkpointed else flash(x)
    compare_training(out, plain(x), flash, plain)


@pytest.mark.shows("forward", "backward")
def test_autocast():
    flash, plain, x = pair()
    with torch.autocast("cpu", torch.bfloat16):
        out = flash(x)
    compare_training(out.float(), plain(x), flash, plain, 0.05)


@pytest.mark.shows("compiled")
def test_compile(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    flash, plain, x = pair()
    compare_training(torch.compile(flash)(x), plain(x), flash, plain)
