"""PyInstaller: the name and version that clients of flash_attn ask the package metadata for."""

from PyInstaller.utils.hooks import copy_metadata

datas = copy_metadata("flash-attn")
hiddenimports = ["flash_attn_2_cuda"]
