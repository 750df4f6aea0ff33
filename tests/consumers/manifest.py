"""Who uses flash_attn, in which versions, and what shows it: the data of scripts/clients.py."""

from __future__ import annotations

from typing import NamedTuple


class Environment(NamedTuple):
    """Packages laid over .venv, pinned."""

    packages: tuple[str, ...] = ()  # with what they require
    alone: tuple[str, ...] = ()  # without: what they require is heavy, or not needed here


ENVIRONMENTS = {
    "venv": Environment(),
    "transformers-5.24": Environment(("transformers==5.24.0",)),
    "transformers-4.57": Environment(("transformers==4.57.6",)),
    "transformers-4.48": Environment(("transformers==4.48.3",)),
    "sentence-transformers": Environment(
        ("scikit-learn", "scipy"), alone=("sentence-transformers==6.2.0",)
    ),
    "timm": Environment(alone=("timm==1.0.31", "torchvision==0.28.0")),
    # Built for torch 2.10: on a newer one its own C++ operators stay away, the rest is Python.
    "xformers": Environment(alone=("xformers==0.0.35",)),
    "trl": Environment(("accelerate==1.15.0", "datasets"), alone=("peft==0.21.2", "trl==1.16.0")),
    "esm": Environment(
        ("attrs", "biopython", "biotite==1.2.0", "brotli", "cloudpathlib", "httpx",
         "msgpack-numpy",
         "pandas", "scipy", "tenacity", "zstd"),
        alone=("esm==3.2.1.post1", "transformers==4.57.6", "huggingface-hub==0.36.0",
               "tokenizers==0.22.1"),
    ),
    "evo": Environment(alone=("stripedhyena==0.2.2", "vtx==1.1.0")),
    "x-transformers": Environment(
        ("einx", "loguru", "torch-einops-utils"), alone=("x-transformers==2.31.10",)
    ),
}  # fmt: skip


class Client(NamedTuple):
    """One row of docs/clients.md."""

    name: str
    version: str  # "installed" is that of .venv; own programs name what their calls are from
    environment: str
    program: str  # a file of pytest tests, under tests/consumers
    seconds: int = 600  # a limit


_TRANSFORMERS = ("venv", "transformers-5.24", "transformers-4.57", "transformers-4.48")

CLIENTS = (
    *(Client("transformers, models", "installed", e, "test_transformers_integration.py")
      for e in _TRANSFORMERS),
    *(Client("transformers, checkpointing, compile, vision, batching", "installed", e,
             "programs/transformers_more.py")
      for e in _TRANSFORMERS),
    *(Client("transformers, accelerate_sdpa", "installed", e, "test_transformers_accelerated.py")
      for e in _TRANSFORMERS),
    Client("timm, accelerate_sdpa", "installed", "timm", "programs/timm_accelerated.py"),
    Client("sentence-transformers", "installed", "sentence-transformers",
           "programs/sentence_embeddings.py"),
    Client("diffusers", "installed", "venv", "test_diffusers.py"),
    Client("xformers", "installed", "xformers", "programs/xformers_flash.py"),
    Client("ring-flash-attn", "installed", "venv", "test_ring_flash_attn.py"),
    Client("esm", "installed", "esm", "programs/esm_c.py"),
    Client("stripedhyena", "installed", "evo", "programs/stripedhyena_evo.py"),
    Client("vtx", "installed", "evo", "programs/vtx_evo2.py"),
    Client("peft", "installed", "trl", "programs/peft_lora.py"),
    Client("trl", "installed", "trl", "programs/trl_sft.py"),
    Client("x-transformers", "installed", "x-transformers", "programs/x_transformers_packed.py"),
    # Not on the package index, or not without a GPU: programs of ours that make their calls.
    Client("calls of SEDD, MDLM, BD3-LM", "0605786, c112c52, 1c3e8f4", "venv", "programs/sedd.py"),
    Client("calls of nanotron", "2411b02", "venv", "programs/nanotron.py"),
    Client("calls of OpenRLHF, verl, axolotl", "0.11.2, 0.9.1, 0.19.0", "venv",
           "programs/trainers.py"),
    Client("calls of InternVideo 2", "3965eef", "venv", "programs/internvideo.py"),
    Client("calls of mamba's MHA, Megatron-LM", "e9594ce, d98e8a64", "venv",
           "programs/decoders.py"),
)  # fmt: skip
