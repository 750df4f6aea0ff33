"""Multi-head attention with its projections: upstream's modules and state dicts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flash_attn.flash_attn_interface import (  # noqa: F401  (clients import these from here)
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attn.layers.rotary import RotaryEmbedding  # noqa: F401
from flash_attn.ops.fused_dense import ColumnParallelLinear, RowParallelLinear
from flash_attn.utils.distributed import get_dim_for_local_rank  # noqa: F401

from ._cached_attention import _Attention, _update_kv_cache, get_alibi_slopes  # noqa: F401
from ._inner_attention import (  # noqa: F401
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
)


def _causal_convolution(convolution: Any, x: Tensor) -> Tensor:
    """Over the tokens of x (batch, seqlen, channels), none of which sees a later one."""
    return convolution(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2).contiguous()


class MHA(_Attention):
    """Attention of a layer: projections, rotary embedding, cache and output.

    Differs from upstream where that computes something else than asked: decoding keeps to
    window_size and batch_size_offset, dwconv works with cross_attn and num_heads_kv, xPos can
    decode, and attention written out honours lengths_per_sample.

    Args:
        embed_dim: features of a token.
        num_heads: divides embed_dim.
        num_heads_kv: heads of keys and values, a divisor of num_heads; None: num_heads.
        cross_attn: projections Wq and Wkv in place of Wqkv, for keys and values from elsewhere.
        qkv_proj_bias: whether Wqkv (Wq, Wkv) has a bias.
        out_proj_bias: whether out_proj has one.
        dropout: probability of dropping a probability, in training mode.
        softmax_scale: None: head_dim ** -0.5.
        causal: query i sees keys up to i + seqlen_k - seqlen_q.
        layer_idx: the key of this layer's cache; needed to generate.
        dwconv: a causal depthwise convolution of three tokens behind the projections.
        rotary_emb_dim: features per head with a rotary embedding; 0: none.
        rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved: as RotaryEmbedding.
        use_alibi: a bias that falls with the distance.
        window_size: keys to the left and right that are visible; -1: all.
        fused_bias_fc: taken and ignored, as upstream does.
        use_flash_attn: attention through anyflash; False: written out in PyTorch operations.
        return_residual: return (output, x).
        checkpointing: compute the inner attention again in the backward.
        device, dtype: of the weights.

    Raises:
        ValueError: options that do not fit together.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if cross_attn and rotary_emb_dim > 0:
            raise ValueError("MHA with rotary embedding does not support cross-attention yet")
        super().__init__(
            embed_dim, num_heads, num_heads_kv, dropout, softmax_scale, causal, layer_idx,
            rotary_emb_dim, rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved,
            use_alibi, window_size, use_flash_attn, checkpointing, device,
        )  # fmt: skip
        self.cross_attn = cross_attn
        self.dwconv = dwconv
        self.return_residual = return_residual
        kind = {"device": device, "dtype": dtype}
        kv_dim = 2 * self.head_dim * self.num_heads_kv
        if cross_attn:
            self.Wq = nn.Linear(embed_dim, embed_dim, bias=qkv_proj_bias, **kind)
            self.Wkv = nn.Linear(embed_dim, kv_dim, bias=qkv_proj_bias, **kind)
        else:
            self.Wqkv = nn.Linear(embed_dim, embed_dim + kv_dim, bias=qkv_proj_bias, **kind)
        if dwconv:
            together = not cross_attn and self.num_heads_kv == num_heads
            sizes = (
                {"dwconv_qkv": embed_dim + kv_dim}
                if together
                else {"dwconv_q": embed_dim, "dwconv_kv": kv_dim}
            )
            for name, size in sizes.items():
                convolution = nn.Conv1d(size, size, kernel_size=3, padding=2, groups=size, **kind)
                self.add_module(name, convolution)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_proj_bias, **kind)

    def _own_heads(self) -> tuple[int, int]:
        return self.num_heads, self.num_heads_kv  # which clients change on the finished module

    def _check_call(self, packed: bool, mask: Any, elsewhere: bool, inference_params: Any) -> None:
        """Raises where one argument would have no effect on the result beside another."""
        if packed and not self.use_flash_attn:
            raise ValueError("cu_seqlens: expected use_flash_attn=True")
        if packed and (self.dwconv or self.rotary_emb_dim > 0):
            raise ValueError(
                "cu_seqlens: expected dwconv=False and rotary_emb_dim=0, got "
                f"{self.dwconv} and {self.rotary_emb_dim}"
            )
        if mask is not None and self.use_flash_attn:
            raise ValueError(
                "key_padding_mask: expected use_flash_attn=False; with it, cu_seqlens of "
                "unpadded sequences (flash_attn.bert_padding.unpad_input)"
            )
        if elsewhere and not self.cross_attn:
            raise ValueError("x_kv, mixer_subset: expected cross_attn=True")
        if inference_params is not None and (packed or mask is not None or self.dwconv):
            raise ValueError(
                "inference_params: expected neither cu_seqlens, key_padding_mask nor dwconv"
            )

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: Any = None,
        inference_params: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Projects, attends and projects back.

        Args:
            x: (batch, seqlen, embed_dim), or (total, embed_dim) with cu_seqlens.
            x_kv: where keys and values come from with cross_attn; None: from x.
            key_padding_mask: (batch, seqlen) bool, true: kept. Without use_flash_attn only.
            cu_seqlens: (batch + 1,) int32, where each packed sequence begins, and the end.
            max_seqlen: the longest of them.
            mixer_subset: an index of tokens; with cross_attn only they become queries.
            inference_params: the cache of a generation (flash_attn.utils.generation).
            kwargs: for the inner attention, such as causal and cu_seqlens_k.

        Returns:
            x's shape; with return_residual (output, x).

        Raises:
            ValueError: arguments that do not fit together.
        """
        elsewhere = x_kv is not None or mixer_subset is not None
        self._check_call(cu_seqlens is not None, key_padding_mask, elsewhere, inference_params)
        if self.use_flash_attn:
            kwargs = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, **kwargs}
        else:
            kwargs = {"key_padding_mask": key_padding_mask, **kwargs}
        if not self.cross_attn:
            qkv = self.Wqkv(x)
            if self.dwconv:
                qkv = self._convolve(qkv)
            context = self._attend_self(qkv, inference_params, **kwargs)
        else:
            q = self.Wq(x if mixer_subset is None else x[:, mixer_subset])
            kv = self.Wkv(x if x_kv is None else x_kv)
            if self.dwconv:
                q = _causal_convolution(self.dwconv_q, q)
                kv = _causal_convolution(self.dwconv_kv, kv)
            q, kv = self._in_heads(q), self._in_heads(kv, 2)
            context = self._attend(q, kv, inference_params, **kwargs)
        out = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out

    def _convolve(self, qkv: Tensor) -> Tensor:
        if self.num_heads_kv == self.num_heads:
            return _causal_convolution(self.dwconv_qkv, qkv)
        q, kv = qkv.split([self.embed_dim, qkv.shape[-1] - self.embed_dim], dim=-1)
        parts = _causal_convolution(self.dwconv_q, q), _causal_convolution(self.dwconv_kv, kv)
        return torch.cat(parts, dim=-1)


class ParallelMHA(_Attention):
    """MHA among the tokens of a sequence, each process of a group with its share of the heads.

    Args:
        process_group: of torch.distributed; None: the default one. Heads may be split unevenly,
            whole groups of query heads with their key head.
        sequence_parallel: inputs and outputs hold this process's share of the tokens; False: all.
        others: as MHA.

    Raises:
        ValueError: options that do not fit together.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        process_group: Any,
        num_heads_kv: int | None = None,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        use_flash_attn: bool = False,
        checkpointing: bool = False,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        world_size = torch.distributed.get_world_size(process_group)
        local_rank = torch.distributed.get_rank(process_group)
        super().__init__(
            embed_dim, num_heads, num_heads_kv, dropout, softmax_scale, causal, layer_idx,
            rotary_emb_dim, rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved,
            use_alibi, window_size, use_flash_attn, checkpointing, device,
            world_size=world_size, rank=local_rank,
        )  # fmt: skip
        self.process_group = process_group
        self.world_size = world_size
        self.local_rank = local_rank
        group = num_heads // self.num_heads_kv
        heads = self._query_heads_of(local_rank, world_size)
        self.num_heads_per_rank = heads.stop - heads.start
        self.num_heads_kv_per_rank = self.num_heads_per_rank // group
        kind = {"sequence_parallel": sequence_parallel, "device": device, "dtype": dtype}
        self.Wqkv = ColumnParallelLinear(
            embed_dim,
            self.head_dim * (num_heads + 2 * self.num_heads_kv),
            process_group,
            bias=qkv_proj_bias,
            multiple_of=self.head_dim * (group + 2),
            **kind,
        )
        self.out_proj = RowParallelLinear(
            embed_dim,
            embed_dim,
            process_group,
            bias=out_proj_bias,
            multiple_of=self.head_dim * group,
            **kind,
        )

    def _own_heads(self) -> tuple[int, int]:
        return self.num_heads_per_rank, self.num_heads_kv_per_rank

    def forward(
        self, x: Tensor, seqlen: int | None = None, inference_params: Any = None, **kwargs: Any
    ) -> Tensor:
        """Projects, attends and projects back.

        Args:
            x: (batch, seqlen, embed_dim); with seqlen (batch * seqlen, embed_dim), so that
                sequence parallelism can cut a small batch. This process's share with
                sequence_parallel.
            seqlen: of each sequence, after the shares have been gathered.
            inference_params: the cache of a generation (flash_attn.utils.generation).
            kwargs: for the inner attention.

        Returns:
            x's shape.
        """
        qkv = self.Wqkv(x)
        if seqlen is not None:
            qkv = qkv.unflatten(0, (-1, seqlen))
        context = self._attend_self(qkv, inference_params, **kwargs).flatten(-2)
        return self.out_proj(context if seqlen is None else context.flatten(0, 1))
