"""x-transformers' packed sequences through flash_attn_varlen_func, in its decoder.

It asserts that queries are on a GPU; here they say so, and stay where they are.
"""

from __future__ import annotations

import pytest
import torch
from helpers import compare_training, cumulative
from x_transformers import Decoder
from x_transformers.attend import Attend


class OnCuda(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    @property
    def device(self):
        return torch.device("cuda")


@pytest.fixture
def redirected(monkeypatch):
    real = Attend.flash_attn

    def flash_attn(self, q, k, v, **kwargs):
        if not self.flash_pack_seq:
            return real(self, q, k, v, **kwargs)
        function = self.__dict__["flash_attn_varlen_func"]
        # The package's own call, whose tensors say again where they are.
        self.flash_attn_varlen_func = lambda *qkv, **rest: function(
            *(x.as_subclass(torch.Tensor) for x in qkv), **rest
        )
        out, more = real(self, q.as_subclass(OnCuda), k, v, **kwargs)
        self.flash_attn_varlen_func = function
        return out, more

    monkeypatch.setattr(Attend, "flash_attn", flash_attn)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (8, 0))


@pytest.mark.shows("found", "imported")
def test_it_is_found():
    attend = Attend(flash=True, flash_pack_seq=True)
    assert attend.flash_attn_varlen_func.__module__.startswith("flash_attn")


@pytest.mark.shows("forward", "backward")
@pytest.mark.usefixtures("redirected")
def test_decoder():
    options = {"dim": 32, "depth": 2, "heads": 2, "attn_dim_head": 16, "rotary_pos_emb": True}
    packed = Decoder(**options, attn_flash=True, attn_flash_pack_seq=True).eval()
    plain = Decoder(**options).eval()
    plain.load_state_dict(packed.state_dict())
    lengths, x = [5, 8], torch.randn(1, 13, 32)
    cu, longest = cumulative(lengths), max(lengths)
    given = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest}
    out = packed(x, flash_pack_seq_kwargs={**given, "max_seqlen_k": longest})
    alone = torch.cat([plain(part) for part in x.split(lengths, 1)], 1)
    compare_training(out, alone, packed, plain, 1e-3)
