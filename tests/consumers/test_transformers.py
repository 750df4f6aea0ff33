"""transformers with attn_implementation="flash_attention_2" on a machine without CUDA.

transformers refuses FlashAttention 2 where torch sees no CUDA device. The fixture lifts that gate
and nothing else; every call then goes through transformers' own code into flash_attn.
"""

from __future__ import annotations

import functools

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", minversion="5.0", reason="transformers 5 is not installed"
)
import flash_attn  # noqa: E402
import transformers.modeling_flash_attention_utils as flash_utils  # noqa: E402
from transformers.utils import import_utils  # noqa: E402

NAMES = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")


@pytest.fixture
def calls(monkeypatch):
    """Lets flash_attention_2 through, and counts the calls that arrive by the function's name."""
    for module in (flash_utils, import_utils, transformers.utils):
        monkeypatch.setattr(module, "is_flash_attn_2_available", lambda: True)
    versions = flash_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX
    monkeypatch.setitem(versions[2], "general_availability_check", lambda: True)
    monkeypatch.setitem(versions[2], "supported_devices", ((lambda: True, "cpu"),))
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)  # imports flash_attn again
    counts = dict.fromkeys(NAMES, 0)

    def counted(name, function):
        @functools.wraps(function)  # transformers reads the signature
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for name in NAMES:
        monkeypatch.setattr(flash_attn, name, counted(name, getattr(flash_attn, name)))
    return counts


SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def _pair(config_class, model_class, **config):
    """The same random model twice: with plain attention, and with flash_attn."""
    torch.manual_seed(0)
    eager = model_class._from_config(
        config_class(**SMALL, **config), attn_implementation="eager"
    ).eval()
    flash = model_class._from_config(
        config_class(**SMALL, **config), attn_implementation="flash_attention_2"
    ).eval()
    flash.load_state_dict(eager.state_dict())
    return eager, flash


def _llama(**config):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    return _pair(transformers.LlamaConfig, transformers.LlamaForCausalLM, **{**heads, **config})


def _close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_llama_without_padding(calls):
    eager, flash = _llama()
    ids = torch.randint(1, 61, (2, 17))
    a, b = eager(ids, labels=ids), flash(ids, labels=ids)
    _close(b.logits, a.logits)
    assert calls["flash_attn_func"] + calls["flash_attn_varlen_func"] == 2
    a.loss.backward()
    b.loss.backward()
    for p, q in zip(eager.parameters(), flash.parameters()):
        _close(q.grad, p.grad)


@pytest.mark.parametrize("side", ["left", "right"])
def test_llama_with_padding(calls, side):
    eager, flash = _llama()
    ids, mask = torch.randint(1, 61, (3, 12)), torch.ones(3, 12, dtype=torch.int64)
    for row, length in enumerate((12, 5, 9)):
        mask[row] = (
            torch.arange(12) < length if side == "right" else torch.arange(12) >= 12 - length
        )
    a, b = eager(ids, attention_mask=mask).logits, flash(ids, attention_mask=mask).logits
    _close(b[mask.bool()], a[mask.bool()])
    assert calls["flash_attn_varlen_func"] == 2


def test_llama_in_bf16(calls):
    eager, flash = (m.to(torch.bfloat16) for m in _llama())
    ids = torch.randint(1, 61, (2, 17))
    _close(flash(ids).logits.float(), eager(ids).logits.float(), 0.05)
    assert sum(calls.values()) == 2


def test_llama_generates_the_same_tokens(calls):
    eager, flash = _llama()
    ids, mask = torch.randint(1, 61, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    mask[1, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(flash.generate(ids, **options), eager.generate(ids, **options))
    assert sum(calls.values()) == 16


def test_llama_with_packed_sequences(calls):
    """Several sequences in one row, told apart by position_ids: max_seqlen arrives as a tensor."""
    eager, flash = _llama()
    ids = torch.randint(1, 61, (1, 14))
    positions = torch.cat([torch.arange(5), torch.arange(9)])[None]
    packed = flash(ids, position_ids=positions).logits
    _close(packed[:, :5], eager(ids[:, :5]).logits)
    _close(packed[:, 5:], eager(ids[:, 5:]).logits)
    assert calls["flash_attn_varlen_func"] == 2


def test_mistral_with_a_sliding_window(calls):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4}
    eager, flash = _pair(transformers.MistralConfig, transformers.MistralForCausalLM, **heads)
    ids = torch.randint(1, 61, (2, 17))
    _close(flash(ids).logits, eager(ids).logits)
    assert sum(calls.values()) == 2


def test_bert_with_padding(calls):
    eager, flash = _pair(transformers.BertConfig, transformers.BertModel, num_attention_heads=4)
    ids, mask = torch.randint(1, 61, (3, 12)), torch.ones(3, 12, dtype=torch.int64)
    mask[1, 5:] = 0
    a = eager(ids, attention_mask=mask).last_hidden_state
    b = flash(ids, attention_mask=mask).last_hidden_state
    _close(b[mask.bool()], a[mask.bool()])
    assert calls["flash_attn_varlen_func"] == 2
