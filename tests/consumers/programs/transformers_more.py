"""transformers with "flash_attention_2": checkpointing, compile, vision and continuous batching."""

from __future__ import annotations

import importlib

import pytest
import torch
import transformers  # noqa: E402
import transformers_models as models  # noqa: E402
from helpers import compare, compare_training  # noqa: E402
from transformers_models import DECODERS, FLASH, make_pair  # noqa: E402

from anyflash.integrations import transformers as integration  # noqa: E402
from anyflash.integrations.transformers import NAME  # noqa: E402

integration.enable(flash_attention_2=True)


@pytest.mark.shows("forward", "backward")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    eager, ours = make_pair(DECODERS["Llama"], FLASH, attention_dropout=0.0)
    ids, mask = models.tokens(2, 12), models.padding((12, 7), 12, "left")
    ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    ours.train()
    a, b = (m(ids, attention_mask=mask, use_cache=False).logits * mask[..., None]
            for m in (ours, eager))  # fmt: skip
    compare_training(a, b, ours, eager)


@pytest.fixture
def fresh_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()


@pytest.mark.shows("compiled")
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_flash_attention_2():
    """A training step in one graph. bf16: transformers logs a cast of fp32, which breaks it."""
    eager, ours = make_pair(DECODERS["Llama"], FLASH, torch.bfloat16)
    ids = models.tokens(2, 12)
    step = torch.compile(ours, fullgraph=models.VERSION >= (4, 53))
    found, wanted = step(ids, use_cache=False).logits, eager(ids).logits
    compare_training(found, wanted, ours, eager, 0.05)


@pytest.mark.shows("compiled")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.skipif(not models.HAS_INTERFACE, reason="this version has no AttentionInterface")
def test_compile_registered_attention():
    """The same in fp32, padded and packed: in one graph a mask's values decide nothing."""
    eager, ours = make_pair(DECODERS["Mistral"], NAME)
    step = torch.compile(ours, fullgraph=True)
    ids, mask = models.tokens(2, 12), models.padding((12, 7), 12, "left")
    a, b = (m(ids, attention_mask=mask, use_cache=False).logits * mask[..., None]
            for m in (step, eager))  # fmt: skip
    compare_training(a, b, ours, eager)
    ids, positions = models.tokens(1, 12), torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = step(ids, position_ids=positions, use_cache=False).logits
    compare(packed, torch.cat([eager(part).logits for part in ids.split((5, 7), 1)], 1))


QWEN_VISION = {
    "depth": 2, "hidden_size": 80, "intermediate_size": 64, "num_heads": 4, "patch_size": 2,
    "in_channels": 3, "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 8,
    "fullatt_block_indexes": [1], "out_hidden_size": 32,
}  # fmt: skip


@pytest.mark.shows("forward", "backward")
@pytest.mark.parametrize("implementation", models.IMPLEMENTATIONS)
def test_qwen2_5_vl_vision(implementation):
    """Two pictures in one packed row, windows in the first layer; max_seqlen is a tensor."""
    name = "transformers.models.qwen2_5_vl"
    try:
        module = importlib.import_module(f"{name}.modeling_qwen2_5_vl")
    except ModuleNotFoundError:
        pytest.skip(f"transformers {transformers.__version__} has no Qwen2.5-VL")
    settings = importlib.import_module(f"{name}.configuration_qwen2_5_vl").Qwen2_5_VLVisionConfig
    pair = []
    for attention in ("eager", implementation):
        torch.manual_seed(0)
        kind = module.Qwen2_5_VisionTransformerPretrainedModel
        pair.append(
            kind._from_config(settings(**QWEN_VISION), attn_implementation=attention).eval()
        )
    eager, ours = pair
    grid = torch.tensor([[1, 8, 12], [1, 4, 4]])
    pixels = torch.randn(8 * 12 + 16, 3 * 2 * 2 * 2, generator=torch.Generator().manual_seed(0))
    results = [m(pixels, grid_thw=grid) for m in (ours, eager)]
    if not isinstance(results[0], torch.Tensor):
        results = [getattr(r, "pooler_output", r[0]) for r in results]
    compare_training(*results, ours, eager)


@pytest.mark.shows("forward")
@pytest.mark.skipif(not models.HAS_INTERFACE, reason="this version has no continuous batching")
def test_continuous_batching():
    """A paged cache: several requests of different lengths, against one at a time."""
    eager, ours = make_pair(DECODERS["Llama"], FLASH)
    requests = [models.tokens(1, n)[0].tolist() for n in (7, 3, 11)]
    settings = transformers.GenerationConfig(
        max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cuda_graph=False,
        num_blocks=16, block_size=32, max_batch_tokens=64,
    )  # fmt: skip
    found = ours.generate_batch(inputs=requests, generation_config=settings, progress_bar=False)
    produced = [found[key].generated_tokens for key in sorted(found, key=_number)]
    for prompt, got in zip(requests, produced):
        given = torch.tensor([prompt])
        out = eager.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=6, do_sample=False,
            eos_token_id=None,
        )  # fmt: skip
        compare(torch.tensor(got), out[0, len(prompt) :])


def _number(request_id: str) -> int:
    return int("".join(c for c in request_id if c.isdigit()))
