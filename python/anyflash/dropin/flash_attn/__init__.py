"""flash_attn, served by anyflash."""

import os as _os
import sys as _sys

__version__ = "2.8.3"

# FlashAttention-4 (distribution flash-attn-4) installs flash_attn/cute beside whatever owns
# flash_attn/. A regular package would hide it, so its folder joins our path; pkgutil.extend_path
# would also let in the submodules of another flash-attn. One that ours hides is said.
_passed_over = []
for _entry in _sys.path:
    _folder = _os.path.join(_entry, "flash_attn")
    if _folder in __path__:
        continue
    if _os.path.isfile(_os.path.join(_folder, "cute", "__init__.py")):
        __path__.append(_folder)
    if _os.path.isfile(_os.path.join(_folder, "__init__.py")):
        _passed_over.append(_folder)

from flash_attn._missing import absent as _absent  # noqa: E402  (after the path is complete)
from flash_attn.flash_attn_interface import (  # noqa: E402  (after the path is complete)
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

__getattr__ = _absent(
    __name__,
    {
        "cute": "FlashAttention-4, CuTe kernels for recent NVIDIA GPUs, which the distribution "
        "flash-attn-4 installs beside anyflash (then: import flash_attn.cute); "
        "flash_attn.flash_attn_func computes attention on every device"
    },
)

if _passed_over:
    from anyflash._installs import say_passed_over as _say_passed_over

    _say_passed_over(_passed_over)
