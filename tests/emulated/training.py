"""Trains the demo's language model with the CUDA kernels, on the emulator.

python tests/emulated/training.py LIBRARY STEPS

LIBRARY is libkernels_on_emulator.so. Writes the losses as a JSON list. The Python operators pass
tensors of the CPU off as a GPU's; ANYFLASH_BACKEND says whether `kernel` or `math` computes
attention.
"""

from __future__ import annotations

import ctypes
import json
import pathlib
import sys

import torch

from anyflash import _core, _records
from anyflash._python_ops import kernel
from anyflash.demo import language_model

ATTENTION = (_records.AttentionCall, _records.BackwardCall, _records.AttentionResults)


def stand_in_for_gpu(library: pathlib.Path) -> None:
    """From here on attention runs on the emulator."""
    if problem := _core.open_library(library):
        raise SystemExit(problem)
    pack = _records._pack

    def pack_as_gpu(
        record: ctypes.Structure,
        name: str,
        x: torch.Tensor,
        data: int,
        host: int,
        room: int,
        device: int,
        index: int,
    ) -> None:
        if isinstance(record, ATTENTION):
            host, device, index = 0, _records._CUDA, 0
        pack(record, name, x, data, host, room, device, index)

    _records._pack = pack_as_gpu
    kernel._on_gpu = lambda x: True


def main() -> None:
    stand_in_for_gpu(pathlib.Path(sys.argv[1]))
    language_model.CONTEXT, language_model.TOKENS_PER_BATCH = 64, 128  # less to emulate
    torch.manual_seed(language_model.SEED)
    text = torch.arange(4000) ** 2 // 7 % 23  # of letters that follow each other by a rule
    model = language_model.LanguageModel(23, flash=True, width=64, heads=2, layers=1)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = language_model.train(
            model, language_model.batches(text, int(sys.argv[2])), "emulated"
        )
    print(json.dumps(losses))


if __name__ == "__main__":
    main()
