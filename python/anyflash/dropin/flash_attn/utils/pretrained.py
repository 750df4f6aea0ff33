"""Checkpoints from a folder, or by name from the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Callable, Optional

import torch
from torch import Tensor

from . import _optional

# In the order in which they are looked for; an index lists the files of a checkpoint in parts.
WEIGHTS = ("pytorch_model.bin", "model.safetensors")
INDICES = tuple(f"{name}.index.json" for name in WEIGHTS)

Finder = Callable[[str], Optional[str]]


def _finder(model_name: str) -> Finder:
    """A function from the name of one of the model's files to its path, None if there is none."""
    folder = Path(model_name)
    if folder.is_dir():
        return lambda name: str(folder / name) if (folder / name).is_file() else None
    hub = _optional.load("transformers.utils.hub", f"loading {model_name!r}, which is no folder,")
    return lambda name: hub.cached_file(
        model_name, name, _raise_exceptions_for_missing_entries=False
    )


def _files(model_name: str) -> list[str]:
    """The files that hold the weights together."""
    find = _finder(model_name)
    for weights, index in zip(WEIGHTS, INDICES):
        path = find(weights)
        if path is not None:
            return [path]
        path = find(index)
        if path is not None:
            parts = sorted(set(json.loads(Path(path).read_text())["weight_map"].values()))
            paths = [find(part) for part in parts]
            missing = [part for part, found in zip(parts, paths) if found is None]
            if missing:
                raise OSError(f"{path} lists {', '.join(missing)}, not found in {model_name}")
            return [found for found in paths if found is not None]
    raise OSError(
        f"Model name {model_name} was not found: expected one of {', '.join(WEIGHTS + INDICES)}"
    )


def _read(path: str) -> dict[str, Tensor]:
    if path.endswith(".safetensors"):
        return _optional.load("safetensors.torch", f"reading {path}").load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def state_dict_from_pretrained(
    model_name: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The state dict of a checkpoint.

    Looked for are pytorch_model.bin, its index, model.safetensors and its index, in this order.

    Args:
        model_name: a folder, or the name of a model on the Hugging Face hub.
        device: where the tensors go; None is the CPU.
        dtype: what the tensors are converted to, before they go to the device; None keeps theirs.

    Raises:
        OSError: no such file there, or a part of the checkpoint is missing.
        ImportError: transformers for a name that is no folder, safetensors for such files.
    """
    state_dict: dict[str, Tensor] = {}
    for path in _files(model_name):
        state_dict.update(_read(path))
    # First the dtype: the device need not hold both.
    return {
        name: tensor.to(dtype=dtype).to("cpu" if device is None else device)
        for name, tensor in state_dict.items()
    }
