"""Triton's tutorial kernel for attention, which upstream keeps for comparison: not offered."""

raise ModuleNotFoundError(
    f"{__name__}: a Triton kernel that flash-attn keeps for comparison; anyflash has "
    "no Triton kernels. What works with anyflash: "
    "flash_attn.flash_attn_func(q, k, v, causal=True, softmax_scale=sm_scale) computes the same, "
    "with tensors of (batch, seqlen, heads, head_dim) in place of (batch, heads, seqlen, head_dim)",
    name="triton",
)
