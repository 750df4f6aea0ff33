"""transformers' models through anyflash on a CPU, against their own eager attention.

With the implementation that `enable` registers, and with "flash_attention_2" let through, in which
case everything goes through transformers' own code into flash_attn. One file for every version of
transformers from 4.48 on: scripts/clients.py runs it with several.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import compare, compare_training

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
import transformers_models as models  # noqa: E402
from transformers_models import DECODERS, ENCODERS, WHISPER, make_pair  # noqa: E402

from anyflash.integrations import transformers as integration  # noqa: E402
from anyflash.integrations.transformers import NAME  # noqa: E402

both = pytest.mark.parametrize("implementation", models.IMPLEMENTATIONS)
decoders = pytest.mark.parametrize("decoder", DECODERS)


@pytest.fixture(scope="module", autouse=True)
def enabled():
    integration.enable(flash_attention_2=True)
    yield
    integration.disable()


@pytest.mark.shows("found")
def test_flash_attention_2_is_available():
    from transformers.utils import is_flash_attn_2_available

    assert is_flash_attn_2_available()


@pytest.mark.shows("imported")
def test_it_calls_flash_attn():
    """transformers takes the functions of our drop-in, by their names."""
    code = (
        "import flash_attn, functools\n"
        "calls, real = [], flash_attn.flash_attn_func\n"
        "@functools.wraps(real)\n"
        "def counted(*args, **kwargs):\n"
        "    calls.append(1)\n"
        "    return real(*args, **kwargs)\n"
        "flash_attn.flash_attn_func = counted\n"
        "from anyflash.integrations import transformers as t; t.enable(flash_attention_2=True)\n"
        "import transformers_models as m\n"
        "_, ours = m.make_pair(m.DECODERS['Llama'], m.FLASH)\n"
        "ours(m.tokens(2, 5))\n"
        "print(len(calls), 'calls')\n"
    )
    assert "2 calls" in _fresh(code)


@pytest.mark.shows("forward", "backward")
@both
@decoders
def test_training(decoder, implementation):
    eager, ours = make_pair(DECODERS[decoder], implementation)
    ids = models.tokens(2, 13)
    compare_training(ours(ids).logits, eager(ids).logits, ours, eager)


@pytest.mark.shows("forward", "backward")
@both
@decoders
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(decoder, implementation, side):
    eager, ours = make_pair(DECODERS[decoder], implementation)
    ids, mask = models.tokens(3, 12), models.padding((12, 5, 9), 12, side)
    a, b = (
        m(ids, attention_mask=mask, use_cache=False).logits * mask[..., None] for m in (ours, eager)
    )
    compare_training(a, b, ours, eager)


@pytest.mark.shows("forward")
@pytest.mark.parametrize("name", models.UNUSUAL)
@pytest.mark.skipif(models.VERSION < (5, 0), reason="configurations of transformers 5")
def test_unusual_attention(name):
    eager, ours = make_pair(models.UNUSUAL[name], NAME)
    ids, mask = models.tokens(2, 12), models.padding((12, 7), 12, "left")
    compare(*(m(ids, attention_mask=mask).logits * mask[..., None] for m in (ours, eager)))


@pytest.mark.shows("forward", "backward")
@both
@decoders
def test_packed_position_ids(decoder, implementation):
    """Three sequences in one row, told apart by positions that start again."""
    eager, ours = make_pair(DECODERS[decoder], implementation)
    lengths = (5, 9, 2)
    ids = models.tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    alone = torch.cat([eager(part).logits for part in ids.split(lengths, 1)], 1)
    packed = ours(ids, position_ids=positions, use_cache=False).logits
    compare_training(packed, alone, ours, eager)


@pytest.mark.shows("forward")
@both
def test_packed_by_cu_seqlens(implementation):
    """What a padding-free collator gives."""
    eager, ours = make_pair(DECODERS["Llama"], implementation)
    lengths = (5, 9)
    ids, cumulative = models.tokens(1, 14), torch.tensor([0, 5, 14], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = ours(
        ids, position_ids=positions, use_cache=False, cu_seq_lens_q=cumulative,
        cu_seq_lens_k=cumulative, max_length_q=9, max_length_k=9,
    ).logits  # fmt: skip
    compare(packed, torch.cat([eager(part).logits for part in ids.split(lengths, 1)], 1))


@pytest.mark.shows("forward")
@both
@decoders
def test_generate(decoder, implementation):
    eager, ours = make_pair(DECODERS[decoder], implementation)
    ids, mask = models.tokens(2, 7), models.padding((7, 4), 7, "left")
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(ids, **options), eager.generate(ids, **options))


@pytest.mark.shows("forward")
@pytest.mark.skipif(not models.HAS_INTERFACE, reason="this version has no AttentionInterface")
def test_generate_with_a_static_cache():
    """Its keys are longer than the mask. transformers refuses this cache with flash_attention_2."""
    eager, ours = make_pair(DECODERS["Llama"], NAME)
    ids, mask = models.tokens(2, 7), models.padding((7, 4), 7, "left")
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    options |= {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(ours.generate(ids, **options), eager.generate(ids, **options))


@pytest.mark.shows("forward", "backward")
@both
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_encoder(encoder, implementation, side):
    eager, ours = make_pair(ENCODERS[encoder], implementation)
    ids, mask = models.tokens(3, 12), models.padding((12, 5, 9), 12, side)
    a, b = (m(ids, attention_mask=mask).last_hidden_state * mask[..., None] for m in (ours, eager))
    compare_training(a, b, ours, eager)


@pytest.mark.shows("forward", "backward")
@both
def test_whisper(implementation):
    """Encoder, decoder and cross attention."""
    eager, ours = make_pair(WHISPER, implementation)
    sound = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(2))
    ids = models.tokens(2, 5)
    a, b = (m(input_features=sound, decoder_input_ids=ids).logits for m in (ours, eager))
    compare_training(a, b, ours, eager)


@pytest.mark.shows("forward")
@both
def test_bf16(implementation):
    eager, ours = make_pair(DECODERS["Llama"], implementation, torch.bfloat16)
    ids = models.tokens(2, 17)
    compare(ours(ids).logits.float(), eager(ids).logits.float(), 0.05)


@pytest.mark.shows("backward")
@both
def test_dropout_acts_in_training_alone(implementation):
    eager, ours = make_pair(DECODERS["Llama"], implementation, attention_dropout=0.5)
    ids = models.tokens(2, 13)
    compare(ours(ids).logits, eager(ids).logits)
    ours.train()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(ours(ids).logits)
    compare(drawn[0], drawn[1])
    assert (drawn[0] - drawn[2]).abs().max() > 1e-3
    drawn[0].square().mean().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.skipif(not models.HAS_INTERFACE, reason="this version has no AttentionInterface")
def test_masks_of_other_forms_are_not_lost():
    """Tokens of one block see each other both ways: no argument of flash attention says that."""
    from transformers import masking_utils

    eager, ours = make_pair(DECODERS["Llama"], NAME)
    block = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0, 0]]).expand(2, -1)

    def overlay(batch_idx, head_idx, q_idx, kv_idx):
        return (block[batch_idx, q_idx] == 1) & (block[batch_idx, kv_idx] == 1)

    ids, padded = models.tokens(2, 9), models.padding((9, 6), 9, "left")
    results = []
    for model in (ours, eager):
        plain = model.model.embed_tokens(ids)
        given = {"config": model.config, "attention_mask": padded, "past_key_values": None}
        embeds = {"inputs_embeds" if models.VERSION >= (5, 0) else "input_embeds": plain}
        if models.VERSION < (5, 0):
            given["cache_position"] = torch.arange(9)
        mask = masking_utils.create_causal_mask(**embeds, **given, or_mask_function=overlay)
        results.append(model(inputs_embeds=plain, attention_mask=mask).logits * padded[..., None])
    compare(*results)
    causal = ours(ids, attention_mask=padded).logits * padded[..., None]
    assert (results[0] - causal).abs().max() > 1e-3


def _fresh(code: str) -> str:
    """What a fresh interpreter prints, with errors."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout + done.stderr


def test_disable_takes_everything_back():
    said = _fresh(
        "from anyflash.integrations import transformers as t\n"
        "t.enable(flash_attention_2=True); t.enable(flash_attention_2=True); t.disable()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "config = dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=9)\n"
        "for name in ('flash_attention_2', t.NAME):\n"
        "    try:\n"
        "        LlamaForCausalLM._from_config(LlamaConfig(**config), attn_implementation=name)\n"
        "    except (ImportError, ValueError) as error:\n"
        "        print('refused', error)\n"
    )
    assert said.count("refused") == 2, said


def test_without_any_flash_attn_it_refuses():
    code = "from anyflash.integrations import transformers as t; t.enable(flash_attention_2=True)"
    said = _fresh(f"import anyflash, sys; sys.modules['flash_attn'] = None\n{code}")
    assert "import flash_attn finds nothing" in said, said


def test_modules_that_have_asked_are_named():
    said = _fresh(
        "import transformers.models.falcon.modeling_falcon\n"
        "from anyflash.integrations import transformers as t\n"
        "t.enable(flash_attention_2=True)"
    )
    assert "imported before enable(flash_attention_2=True)" in said, said


def test_importing_anyflash_imports_no_transformers():
    code = "import sys, anyflash.integrations.transformers; print('transformers' in sys.modules)"
    assert _fresh(code).strip() == "False"
