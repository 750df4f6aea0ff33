"""ESM Cambrian with random weights: packed attention and rotary in place, against its own SDPA."""

from __future__ import annotations

import pytest
import torch
from esm.models import esmc
from esm.tokenization import EsmSequenceTokenizer
from helpers import compare, compare_training


def pair():
    """(plain, flash) with the same weights. The tokenizer needs no file."""
    tokenizer = EsmSequenceTokenizer()
    made = []
    for flash in (False, True):
        torch.manual_seed(0)
        made.append(esmc.ESMC(64, 2, 2, tokenizer, use_flash_attn=flash).eval())
    made[1].load_state_dict(made[0].state_dict())
    return made


SEQUENCES = ["MKTAYIAKQR", "MSE", "MPQQRST"]


@pytest.mark.shows("found")
def test_it_is_found():
    assert esmc.is_flash_attn_available


@pytest.mark.shows("imported")
def test_imports():
    from esm.layers import attention, rotary

    assert rotary.apply_triton_rotary.__module__.startswith("flash_attn")
    assert attention.flash_attn_varlen_qkvpacked_func.__module__.startswith("flash_attn")


@pytest.mark.shows("forward")
def test_forward():
    plain, flash = pair()
    ids = plain._tokenize(SEQUENCES)
    token = ids != plain.tokenizer.pad_token_id
    with torch.no_grad():
        a, b = flash(ids), plain(ids)
    compare(a.sequence_logits[token], b.sequence_logits[token], 1e-3)
    compare(a.embeddings[token], b.embeddings[token], 1e-3)


@pytest.mark.shows("backward")
def test_training():
    """The package rotates views in place without telling autograd that they changed."""
    plain, flash = pair()
    ids = plain._tokenize(SEQUENCES)
    token = ids != plain.tokenizer.pad_token_id
    a, b = (m(ids).sequence_logits[token] for m in (flash, plain))
    compare_training(a, b, flash, plain, 1e-3)
