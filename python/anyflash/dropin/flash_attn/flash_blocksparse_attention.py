"""Modules around block-sparse attention of FlashAttention 1: not offered."""

import flash_attn.flash_blocksparse_attn_interface  # noqa: F401  (raises, and says what works)
