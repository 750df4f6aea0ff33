"""Block-sparse attention of FlashAttention 1: not offered."""

raise ModuleNotFoundError(
    f"{__name__}: block-sparse attention of FlashAttention 1 needs the extension flash_attn_cuda, "
    "which flash-attn 2 does not ship either. What works with anyflash: "
    "anyflash.attention(q, k, v, bias=mask) with a boolean mask (true = visible) of any pattern, "
    "or window_size and causal of flash_attn_func for bands",
    name="flash_attn_cuda",
)
