"""transformers' models with `sdpa` under anyflash.accelerate_sdpa: the numbers stay, our kernels
run. With batches large enough for padding masks to be taken for lengths."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, compare_accelerated, gradients
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
import transformers_models as models  # noqa: E402

SMALL = {"vocab_size": models.VOCABULARY, "pad_token_id": 0}
GPT2 = {**SMALL, "n_layer": 2, "n_head": 4, "n_embd": 128, "bos_token_id": 1, "eos_token_id": 2}
GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
LLAMA = {**SMALL, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}
BERT = {**SMALL, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
BERT |= {"num_attention_heads": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VIT = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": 32}
VIT |= {"num_attention_heads": 4, "patch_size": 8}
WHISPER = {**models.WHISPER[2], "encoder_attention_heads": 2, "decoder_attention_heads": 2}
LENGTHS = (128, 5, 99, 128, 64, 1, 77, 30)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
decoders = pytest.mark.parametrize(
    "kind, config", [("GPT2LMHead", GPT2), ("LlamaForCausal", LLAMA)]
)


def make(name: str, config: dict, dtype: torch.dtype) -> nn.Module:
    prefix = next(p for p in ("GPT2", "Llama", "Bert", "ViT", "Whisper") if name.startswith(p))
    torch.manual_seed(0)
    settings = getattr(transformers, f"{prefix}Config")(**config)
    model = getattr(transformers, name)._from_config(settings, attn_implementation="sdpa")
    return model.to(dtype).eval()


def training(model: nn.Module, run):
    """The output and the gradients of all parameters."""

    def both():
        model.zero_grad()
        out = run()
        out.float().square().mean().backward()
        return out.detach(), gradients(model)

    return both


@pytest.mark.shows("forward", "backward")
@dtypes
@decoders
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_decoders(kind, config, dtype, side):
    model = make(f"{kind}Model" if kind == "GPT2LMHead" else f"{kind}LM", config, dtype)
    ids = models.tokens(8, 128)
    mask = None if side is None else models.padding(LENGTHS, 128, side)

    def run():
        out = model(ids, attention_mask=mask, use_cache=False).logits
        return out if mask is None else out * mask[..., None]

    compare_accelerated(training(model, run), dtype, backward=True)


@pytest.mark.shows("forward")
@decoders
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_generate(kind, config, cache, padded):
    model = make(f"{kind}Model" if kind == "GPT2LMHead" else f"{kind}LM", config, torch.float32)
    ids = models.tokens(8, 128)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    if cache == "static":
        if not models.HAS_INTERFACE:
            pytest.skip("this version has no disable_compile")
        options |= {"cache_implementation": cache, "disable_compile": True}
    mask = models.padding(LENGTHS, 128, "left") if padded else torch.ones_like(ids)
    compare_accelerated(lambda: model.generate(ids, attention_mask=mask, **options), torch.float32)


@pytest.mark.shows("forward", "backward")
@dtypes
def test_encoder(dtype):
    model = make("BertModel", BERT, dtype)
    ids, mask = models.tokens(8, 128), models.padding(LENGTHS, 128, "right")

    def run():
        return model(ids, attention_mask=mask).last_hidden_state * mask[..., None]

    compare_accelerated(training(model, run), dtype, backward=True)


@pytest.mark.shows("forward")
@dtypes
def test_vision_and_sound(dtype):
    vision = make("ViTModel", VIT, dtype)
    images = torch.randn(2, 3, 32, 32).to(dtype)
    sound = make("WhisperForConditionalGeneration", WHISPER, dtype)
    spectrum, ids = torch.randn(2, 8, 24).to(dtype), models.tokens(2, 5)

    def run():
        with torch.no_grad():
            heard = sound(input_features=spectrum, decoder_input_ids=ids).logits
            return vision(images).last_hidden_state, heard

    compare_accelerated(run, dtype)
