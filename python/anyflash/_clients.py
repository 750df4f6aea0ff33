"""Which clients of flash_attn are installed here, and what their attention will use.

Metadata alone is read: importing a client costs seconds, and may fail.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any, NamedTuple


class Client(NamedTuple):
    """A package that calls flash_attn, and when it does."""

    distribution: str
    on_gpu: str
    on_cpu: str


_FLASH_2 = 'flash_attn for attn_implementation="flash_attention_2"'
_REFUSED = f"{_FLASH_2}, which transformers refuses where there is no GPU"
_MODEL = "what the model in it uses"
_ALWAYS = "flash_attn"
_CUDA_ONLY = "no flash_attn: it asks for CUDA tensors"

CLIENTS = (
    Client("transformers", _FLASH_2, _REFUSED),
    Client("sentence-transformers", _FLASH_2, _REFUSED),
    Client("peft", _MODEL, _MODEL),
    Client("trl", _MODEL, _MODEL),
    Client("diffusers", *['flash_attn for set_attention_backend("flash")'] * 2),
    Client("xformers", "flash_attn, which it prefers to PyTorch's own copy", _CUDA_ONLY),
    Client("transformer-engine", "flash_attn or its own kernels, per call", _CUDA_ONLY),
    Client("vllm", "its own attention; flash_attn's rotary embedding", "its own attention"),
    Client("x-transformers", "flash_attn where asked for, else PyTorch's attention", _CUDA_ONLY),
    Client("ring-flash-attn", _ALWAYS, _ALWAYS),
    Client("esm", _ALWAYS, _ALWAYS),
)


def installed(gpu: bool) -> list[dict[str, Any]]:
    """Clients that are installed: name, version, and what each uses on this machine."""
    found = []
    for client in CLIENTS:
        try:
            version = importlib.metadata.version(client.distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        uses = client.on_gpu if gpu else client.on_cpu
        found.append({"name": client.distribution, "version": version, "uses": uses})
    return found
