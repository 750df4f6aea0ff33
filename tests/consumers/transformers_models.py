"""Tiny random models of transformers, twice: with its eager attention, and with ours."""

from __future__ import annotations

import pytest
import torch
import transformers

from anyflash.integrations.transformers import NAME

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
HAS_INTERFACE = VERSION >= (4, 53)
FLASH = "flash_attention_2"
IMPLEMENTATIONS = [NAME, FLASH] if HAS_INTERFACE else [FLASH]
VOCABULARY = 61

_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48}
_SMALL |= {"num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
_DECODER = {**_SMALL, "num_key_value_heads": 2}
# Before 4.53 the window of transformers' own FlashAttention path is a key wider than the eager one.
_WINDOW = 4 if HAS_INTERFACE else 64
_GPT_OSS = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
_WHISPER = {
    "vocab_size": VOCABULARY, "num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_layers": 1, "decoder_attention_heads": 4, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "d_model": 32, "max_source_positions": 12, "max_target_positions": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
_MODERN_BERT = {
    **_SMALL, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
    "local_attention": 6, "reference_compile": False,
}  # fmt: skip

# name: (class prefix, model class, configuration)
DECODERS = {
    "Llama": ("Llama", "LlamaForCausalLM", _DECODER),
    "Qwen3": ("Qwen3", "Qwen3ForCausalLM", {**_DECODER, "head_dim": 8}),
    "Gemma2": (
        "Gemma2",
        "Gemma2ForCausalLM",
        {**_DECODER, "head_dim": 8, "sliding_window": _WINDOW, "attn_logit_softcapping": 2.0},
    ),
    "Mistral": ("Mistral", "MistralForCausalLM", {**_DECODER, "sliding_window": _WINDOW}),
    "GptOss": (
        "GptOss",
        "GptOssForCausalLM",
        {**_DECODER, **_GPT_OSS, "sliding_window": _WINDOW},
    ),
}
# A mask that no argument of flash attention says, and values of another head dim than keys.
UNUSUAL = {
    "chunked Llama4": (
        "Llama4Text",
        "Llama4ForCausalLM",
        {**_DECODER, "head_dim": 8, "attention_chunk_size": 4, "num_local_experts": 2,
         "intermediate_size_mlp": 48, "layer_types": ["chunked_attention", "full_attention"]},
    ),
    "DeepseekV3": (
        "DeepseekV3",
        "DeepseekV3ForCausalLM",
        {**_SMALL, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
         "num_experts_per_tok": 1, "moe_intermediate_size": 16, "q_lora_rank": 16,
         "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
         "first_k_dense_replace": 1},
    ),
}  # fmt: skip
ENCODERS = {
    "BERT": ("Bert", "BertModel", _SMALL),
    "ModernBERT": ("ModernBert", "ModernBertModel", _MODERN_BERT),
}
WHISPER = ("Whisper", "WhisperForConditionalGeneration", _WHISPER)


def make_pair(model: tuple[str, str, dict], implementation: str, dtype=torch.float32, **more):
    """(eager, ours): one random model with both kinds of attention, in evaluation mode."""
    prefix, model_class, config = model
    if not hasattr(transformers, model_class):
        pytest.skip(f"transformers {transformers.__version__} has no {model_class}")
    if VERSION < (5, 0) and implementation == FLASH and prefix == "GptOss":
        pytest.skip("transformers 4 leaves out the sinks of GptOss with flash_attention_2")
    if VERSION < (5, 0) and implementation == NAME and prefix in ("Bert", "ModernBert"):
        pytest.skip(f"{prefix} takes no registered attention before transformers 5")
    pair = []
    for name in ("eager", implementation):
        torch.manual_seed(0)
        settings = getattr(transformers, f"{prefix}Config")(**{**config, **more})
        try:
            made = getattr(transformers, model_class)._from_config(
                settings, attn_implementation=name
            )
        except (ValueError, ImportError) as error:
            said = str(error)
            if "does not support Flash Attention" in said or "`kernels`" in said:
                pytest.skip(
                    f"transformers itself, {model_class} with {name}: {said.split('. ')[0]}"
                )
            raise
        pair.append(made.to(dtype).eval())
    eager, ours = pair
    ours.load_state_dict(eager.state_dict())
    if prefix == "GptOss":  # zero at first, and then no sink would show
        for layer, twin in zip(eager.model.layers, ours.model.layers):
            torch.nn.init.normal_(layer.self_attn.sinks)
            twin.self_attn.sinks.data.copy_(layer.self_attn.sinks)
    assert eager.config._attn_implementation == "eager"
    assert ours.config._attn_implementation == implementation
    return eager, ours


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def padding(lengths, seqlen: int, side: str) -> torch.Tensor:
    """(batch, seqlen) int64 mask of rows of these lengths, padded at one side."""
    place = torch.arange(seqlen)
    rows = [place < n if side == "right" else place >= seqlen - n for n in lengths]
    return torch.stack(rows).long()
