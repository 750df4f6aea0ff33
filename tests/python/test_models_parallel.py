"""Tensor parallel GPT models: two processes compute together what one does alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from flash_attn.models.gpt import GPTLMHeadModel, combine_state_dicts_tp, shard_state_dict_tp
from gloo import run_processes

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

WORLD_SIZE = 2
IDS = torch.randint(0, 60, (2, 6), generator=torch.Generator().manual_seed(1))

CONFIGS = {
    "plain": {},
    "uneven heads": {"num_attention_heads": 3, "hidden_size": 48},
    "gated, uneven grouped heads, rotary": {
        "num_attention_heads": 6,
        "n_head_kv": 3,
        "hidden_size": 48,
        "n_inner": 128,
        "activation_function": "swiglu",
        "max_position_embeddings": 0,
        "rotary_emb_fraction": 1.0,
        "rms_norm": True,
        "tie_word_embeddings": False,
    },
    "parallel block, biased head": {
        "parallel_block": True,
        "tie_word_embeddings": False,
        "lm_head_bias": True,
    },
    "fused": {"fused_mlp": True, "fused_dropout_add_ln": True, "use_flash_attn": True},
    "normalised head": {"norm_head": True, "tie_word_embeddings": False},
}


def _config(name: str, sequence_parallel: bool) -> SimpleNamespace:
    defaults = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "n_inner": 64,
        "vocab_size": 60,
        "max_position_embeddings": 16,
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.2,
        "fused_bias_fc": True,
        "sequence_parallel": sequence_parallel,
    }
    return SimpleNamespace(**{**defaults, **CONFIGS[name]})


def _close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    atol = 2e-4 * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=atol)


def _gathered(tensor: torch.Tensor) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(WORLD_SIZE)]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def _check(name: str, sequence_parallel: bool, rank: int) -> None:
    config = _config(name, sequence_parallel)
    torch.manual_seed(0)
    whole = GPTLMHeadModel(config)
    state_dict = whole.state_dict()
    parallel = GPTLMHeadModel(config, process_group=dist.group.WORLD)
    # The parameters that all ranks have are the same on all of them from the start.
    for key, parameter in parallel.named_parameters():
        if getattr(parameter, "_shared_params", False) and "bias" not in key:
            first, second = _gathered(parameter.data)
            assert torch.equal(first, second), key
    parallel.load_state_dict(shard_state_dict_tp(dict(state_dict), config, WORLD_SIZE, rank))

    expected = whole(IDS).logits
    logits = parallel(IDS).logits
    if sequence_parallel:
        with pytest.raises(ValueError, match="num_last_tokens: expected None and 0 with sequence"):
            parallel(IDS, num_last_tokens=1)
        assert logits.shape == (12, 30)
        logits = logits.unflatten(0, (2, 6))
    _close(logits, expected.chunk(WORLD_SIZE, dim=-1)[rank])

    # Each rank has the gradient of its shard.
    weights = F.softmax(expected, -1).detach()
    (expected * weights).sum().backward()
    (logits * weights.chunk(WORLD_SIZE, dim=-1)[rank]).sum().backward()
    grads = shard_state_dict_tp(
        {key: parameter.grad for key, parameter in whole.named_parameters()},
        config,
        WORLD_SIZE,
        rank,
    )
    for key, parameter in parallel.named_parameters():
        if key.endswith(("Wqkv.weight", "fc1.weight", "fc2.weight", "out_proj.weight")):
            _close(parameter.grad, grads[key])

    shards: list = [None] * WORLD_SIZE
    dist.all_gather_object(shards, parallel.state_dict())
    combined = combine_state_dicts_tp(shards, config)
    for key, tensor in state_dict.items():
        assert torch.equal(combined[key], tensor), key

    if not sequence_parallel:
        options = {"max_length": 10, "tensor_parallel": WORLD_SIZE, "vocab_size": 60}
        generated = parallel.eval().generate(IDS, **options)
        assert torch.equal(generated, whole.eval().generate(IDS, max_length=10))


def _check_refusals() -> None:
    config = _config("plain", True)
    config.word_embed_proj_dim = 16
    with pytest.raises(ValueError, match="word_embed_proj_dim: expected None .*, got 16"):
        GPTLMHeadModel(config, process_group=dist.group.WORLD)
    config = _config("plain", True)
    config.fused_bias_fc = False
    with pytest.raises(ValueError, match="tensor parallel attention expects fused_bias_fc True"):
        GPTLMHeadModel(config, process_group=dist.group.WORLD)


def _run(rank: int) -> None:
    for name in CONFIGS:
        for sequence_parallel in (False, True):
            try:
                _check(name, sequence_parallel, rank)
            except Exception as error:
                raise AssertionError(f"{name}, sequence_parallel={sequence_parallel}") from error
    _check_refusals()


def test_two_processes(tmp_path):
    run_processes(_run, tmp_path, count=WORLD_SIZE)
