"""Models of other packages on a CPU, unmodified, with anyflash.accelerate_sdpa beside the same
without it. Built from configurations with random weights; nothing is downloaded.

`python scripts/readme.py` puts these rows into the README.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any, Callable

import torch
from benchmarks.measure import Row, accelerated, interleaved

os.environ.setdefault("HF_HUB_OFFLINE", "1")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def rows() -> Iterator[Row]:
    topics = (
        ("transformers", _generation),
        ("transformers", _padded_generation),
        ("transformers", _embedding),
        ("timm", _vision),
        ("diffusers", _diffusion),
    )
    for package, topic in topics:
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed: {topic.__name__[1:]} is left out", file=sys.stderr)
            continue
        for name, dtype in DTYPES.items():
            torch.manual_seed(0)
            yield topic(name, dtype)


@torch.inference_mode()
def _row(name: str, amount: int, run: Callable[[], Any], at_least: float) -> Row:
    """Amounts per second of the run."""
    times = interleaved(accelerated(run), run, seconds=8.0, least=3)
    return Row.rate(name, *(amount / t for t in times), at_least=at_least)


def _gpt2(dtype: torch.dtype) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.GPT2Config(
        n_layer=4, n_head=8, n_embd=512, n_positions=1024, vocab_size=8192,
        bos_token_id=0, eos_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).to(dtype).eval()


def _generate(dtype: torch.dtype, pads: int, **options: Any) -> tuple[int, Callable[[], Any]]:
    """How many tokens a run makes, and the run: 8 sequences, to a context of 1024 tokens."""
    model, batch, new = _gpt2(dtype), 8, 64
    ids = torch.randint(1, 8192, (batch, 1024 - new))
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : pads * row] = 0
    options |= {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    return batch * new, lambda: model.generate(ids, attention_mask=mask, **options)


def _generation(name: str, dtype: torch.dtype) -> Row:
    what = f"transformers GPT-2 4 x 512 {name}, batch 8, 64 tokens up to 1024 (tokens/s)"
    return _row(what, *_generate(dtype, pads=0), at_least=2.0)


def _padded_generation(name: str, dtype: torch.dtype) -> Row:
    what = f"transformers GPT-2 4 x 512 {name}, the same padded, static cache (tokens/s)"
    options = {"cache_implementation": "static", "disable_compile": True}
    return _row(what, *_generate(dtype, pads=50, **options), at_least=2.0)


def _embedding(name: str, dtype: torch.dtype) -> Row:
    import transformers

    config = transformers.BertConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.BertModel(config).to(dtype).eval()
    batches = []
    for shortest in (16, 64, 128, 192):
        lengths = torch.arange(shortest, shortest + 64, 2)
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        batches.append((torch.randint(1000, mask.shape), mask))

    def run() -> None:
        for ids, mask in batches:
            model(input_ids=ids, attention_mask=mask)

    tokens = sum(int(mask.sum()) for _, mask in batches)
    what = f"transformers BERT 6 x 384 {name}, batches of 32 sentences by length (tokens/s)"
    return _row(what, tokens, run, at_least=1.3 if name == "bf16" else 1.0)


def _vision(name: str, dtype: torch.dtype) -> Row:
    import timm

    model = timm.create_model("vit_small_patch16_224", pretrained=False).to(dtype).eval()
    images = torch.randn(8, 3, 224, 224).to(dtype)
    what = f"timm vit_small_patch16_224 {name}, batch 8 (images/s)"
    return _row(what, 8, lambda: model(images), at_least=1.0)


def _diffusion(name: str, dtype: torch.dtype) -> Row:
    import diffusers

    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=6,
        sample_size=64, patch_size=2, norm_type="ada_norm_zero", num_embeds_ada_norm=1000,
    ).to(dtype).eval()  # fmt: skip
    latents, time = torch.randn(1, 4, 64, 64).to(dtype), torch.tensor([500])
    label = torch.tensor([1])
    what = f"diffusers DiT 6 x 384 {name}, latents of 64 x 64 (steps/s)"
    return _row(what, 1, lambda: model(latents, time, label), at_least=1.1)
