"""The attention cases: data alone, read by tests, benchmarks and `anyflash.testing`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One attention problem as data; `make_inputs` turns it into tensors.

    Attributes:
        seqlens_q: query rows of each sequence; a dense layout needs them equal.
        seqlens_k: key rows stored for each sequence; a dense layout needs them equal.
        head_dim_v: 0 means head_dim.
        layout: "dense", "packed" (cu_seqlens), "paged" (dense q, paged k and v), "packed_paged"
            (cu_seqlens_q and pages).
        alibi: "", "heads" for slopes (heads,), "batch" for slopes (batch, heads).
        bias: "", or a shape: "full" (batch, heads, seqlen_q, seqlen_k), "head" (1, heads, ..),
            "key" (batch, 1, 1, seqlen_k), "plane" (seqlen_q, seqlen_k); "bool" and "inf" hide keys,
            among them all keys of a row; "lowest" is the dtype's lowest number for all keys of a
            row, which hides nothing.
        seqused_k: keys used of each sequence, leading padding included; None means all stored.
        leftpad_k: leading keys skipped in each sequence.
        strides: "contiguous", "transposed" (heads outermost), "sliced" (NaN between rows and heads,
            odd offset), "fused" (q, k, v views of one buffer), "expanded" (k and v have stride 0
            over the batch).
        slack: rows of storage after the last packed sequence.
    """

    name: str
    seqlens_q: tuple[int, ...] = (33, 33)
    seqlens_k: tuple[int, ...] = (33, 33)
    heads: int = 4
    heads_k: int = 4
    head_dim: int = 32
    head_dim_v: int = 0
    dtype: str = "fp32"
    layout: str = "dense"
    page_size: int = 16
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: str = ""
    bias: str = ""
    sinks: bool = False
    dropout: float = 0.0
    seqused_k: tuple[int, ...] | None = None
    leftpad_k: tuple[int, ...] | None = None
    strides: str = "contiguous"
    softmax_scale: float | None = None
    slack: int = 0

    @property
    def packed(self) -> bool:
        return self.layout.startswith("packed")

    @property
    def longest_k(self) -> int:
        """seqlen_k of dense keys, max_seqlen_k of packed ones: there the keys in use count."""
        return max(self.seqused_k if self.packed and self.seqused_k else self.seqlens_k)

    @property
    def paged(self) -> bool:
        return self.layout.endswith("paged")

    @property
    def differentiable(self) -> bool:
        """Paged caches are read only."""
        return not self.paged


_RAGGED_Q, _RAGGED_K = (7, 40, 1, 23), (19, 40, 33, 5)

CORRECTNESS = [
    # Dense: dtypes, head dims, group sizes.
    Case("dense_fp32"),
    Case("dense_fp16", dtype="fp16", head_dim=64),
    Case("dense_bf16", dtype="bf16", head_dim=64),
    Case("dense_fp64", dtype="fp64"),
    Case("dense_d64_128", head_dim=64, seqlens_q=(128,), seqlens_k=(128,), heads=2, heads_k=2),
    Case("dense_d128_bf16", dtype="bf16", head_dim=128, causal=True),
    Case("dense_d256_fp16", dtype="fp16", head_dim=256, heads=2, heads_k=2),
    Case("dense_longer_k", seqlens_q=(17, 17), seqlens_k=(70, 70)),
    Case("dense_longer_q", seqlens_q=(70, 70), seqlens_k=(17, 17)),
    Case("dense_scale", softmax_scale=0.4),
    Case("gqa", heads=6, heads_k=2),
    Case("gqa_bf16_causal", heads=8, heads_k=2, dtype="bf16", head_dim=64, causal=True),
    Case("mqa_fp16", heads=4, heads_k=1, dtype="fp16", head_dim=64),
    # Masks.
    Case("causal", causal=True),
    Case("causal_fp16", causal=True, dtype="fp16", head_dim=64),
    Case("causal_longer_k", causal=True, seqlens_q=(20, 20), seqlens_k=(53, 53)),
    Case("causal_longer_q", causal=True, seqlens_q=(53, 53), seqlens_k=(20, 20)),
    Case("causal_longer_k_bf16", causal=True, seqlens_q=(40,), seqlens_k=(90,), dtype="bf16"),
    Case("window", window=(5, 3), seqlens_q=(50, 50), seqlens_k=(50, 50)),
    Case("window_left", window=(7, -1), seqlens_q=(50, 50), seqlens_k=(41, 41)),
    Case("window_right", window=(-1, 4), seqlens_q=(30, 30), seqlens_k=(41, 41)),
    Case("window_causal", window=(9, 5), causal=True, seqlens_q=(30, 30), seqlens_k=(60, 60)),
    Case(
        "window_bf16", window=(16, 0), dtype="bf16", head_dim=64, seqlens_q=(80,), seqlens_k=(80,)
    ),
    Case("window_zero_right", window=(-1, 0), seqlens_q=(21,), seqlens_k=(30,)),
    # Score changes.
    Case("softcap", softcap=5.0),
    Case("softcap_causal_bf16", softcap=3.0, causal=True, dtype="bf16", head_dim=64),
    Case("alibi", alibi="heads", seqlens_q=(20, 20), seqlens_k=(33, 33)),
    Case("alibi_causal", alibi="batch", causal=True, seqlens_q=(20, 20), seqlens_k=(33, 33)),
    Case("alibi_window_causal", alibi="heads", causal=True, window=(8, 0)),
    Case("bias_full", bias="full"),
    Case("bias_head_bf16", bias="head", dtype="bf16", head_dim=64, causal=True),
    Case("bias_key_gqa", bias="key", heads=4, heads_k=2),
    Case("bias_plane", bias="plane", seqlens_q=(20, 20), seqlens_k=(31, 31)),
    Case("bias_bool", bias="bool"),
    Case("sinks", sinks=True),
    Case(
        "sinks_causal_window_bf16",
        sinks=True,
        causal=True,
        window=(12, 0),
        dtype="bf16",
        head_dim=64,
    ),
    Case("head_dim_v", head_dim=48, head_dim_v=24),
    Case("head_dim_v_larger", head_dim=32, head_dim_v=80, causal=True, dtype="bf16"),
    Case("dropout", dropout=0.17),
    Case(
        "dropout_causal_bf16",
        dropout=0.3,
        causal=True,
        dtype="bf16",
        seqlens_q=(21, 21),
        seqlens_k=(40, 40),
    ),
    Case("dropout_gqa", dropout=0.2, heads_k=2, causal=True),
    # Packed.
    Case("packed", layout="packed", seqlens_q=_RAGGED_Q, seqlens_k=_RAGGED_K),
    Case(
        "packed_self_causal", layout="packed", seqlens_q=_RAGGED_K, seqlens_k=_RAGGED_K, causal=True
    ),
    Case("packed_causal", layout="packed", seqlens_q=_RAGGED_Q, seqlens_k=_RAGGED_K, causal=True),
    Case(
        "packed_fp16_gqa",
        layout="packed",
        seqlens_q=(31, 64, 9),
        seqlens_k=(31, 64, 9),
        dtype="fp16",
        heads_k=2,
        head_dim=64,
    ),
    Case(
        "packed_bf16_causal",
        layout="packed",
        seqlens_q=(31, 64, 9),
        seqlens_k=(31, 64, 9),
        dtype="bf16",
        causal=True,
        head_dim=64,
    ),
    Case(
        "packed_window_alibi",
        layout="packed",
        seqlens_q=_RAGGED_Q,
        seqlens_k=_RAGGED_K,
        window=(6, 2),
        alibi="batch",
    ),
    Case(
        "packed_softcap_sinks",
        layout="packed",
        seqlens_q=_RAGGED_K,
        seqlens_k=_RAGGED_K,
        softcap=4.0,
        sinks=True,
    ),
    Case(
        "packed_dropout",
        layout="packed",
        seqlens_q=_RAGGED_Q,
        seqlens_k=_RAGGED_K,
        dropout=0.25,
        causal=True,
    ),
    Case("packed_bias", layout="packed", seqlens_q=(9, 20), seqlens_k=(15, 20), bias="full"),
    Case(
        "packed_seqused",
        layout="packed",
        seqlens_q=_RAGGED_Q,
        seqlens_k=_RAGGED_K,
        seqused_k=(10, 33, 20, 5),
        causal=True,
    ),
    # Storage: lengths in the batch, left padding, pages.
    Case("seqused", seqlens_q=(16, 16, 16), seqlens_k=(40, 40, 40), seqused_k=(40, 7, 23)),
    Case("leftpad", seqlens_q=(16, 16), seqlens_k=(40, 40), leftpad_k=(3, 0), causal=True),
    Case(
        "seqused_leftpad_gqa",
        seqlens_q=(16, 16),
        seqlens_k=(40, 40),
        seqused_k=(30, 40),
        leftpad_k=(5, 11),
        heads_k=2,
        window=(9, 1),
    ),
    Case("paged", layout="paged", seqlens_q=(5, 5), seqlens_k=(37, 52), causal=True),
    Case(
        "paged_decode_gqa_bf16",
        layout="paged",
        seqlens_q=(1, 1, 1),
        seqlens_k=(37, 100, 3),
        page_size=256,
        heads_k=2,
        dtype="bf16",
        head_dim=64,
    ),
    Case(
        "packed_paged",
        layout="packed_paged",
        seqlens_q=(5, 1, 17),
        seqlens_k=(37, 52, 17),
        page_size=7,
        causal=True,
    ),
]

CORNER = [
    Case("one_element", seqlens_q=(1,), seqlens_k=(1,), heads=1, heads_k=1, head_dim=1),
    Case("one_query", seqlens_q=(1, 1), seqlens_k=(65, 65), causal=True),
    Case("one_key", seqlens_q=(30,), seqlens_k=(1,), causal=True),
    Case("no_queries", seqlens_q=(0, 0), seqlens_k=(9, 9)),
    Case("no_keys", seqlens_q=(9, 9), seqlens_k=(0, 0)),
    Case("odd_head_dim", head_dim=59, dtype="fp16", causal=True),
    Case("head_dim_3", head_dim=3),
    Case("head_dim_111_bf16", head_dim=111, dtype="bf16"),
    Case(
        "head_dim_512",
        head_dim=512,
        heads=1,
        heads_k=1,
        seqlens_q=(20,),
        seqlens_k=(25,),
        causal=True,
    ),
    Case("head_dim_300_fp16", head_dim=300, heads=2, heads_k=1, dtype="fp16"),
    Case("rows_without_keys_sinks", causal=True, sinks=True, seqlens_q=(40,), seqlens_k=(13,)),
    Case("rows_without_keys_dropout", causal=True, dropout=0.5, seqlens_q=(40,), seqlens_k=(13,)),
    Case("window_misses", window=(2, 1), seqlens_q=(60, 60), seqlens_k=(20, 20)),
    Case("window_wider_than_keys", window=(100, 20), seqlens_q=(60, 60), seqlens_k=(20, 20)),
    Case("window_only_diagonal", window=(0, 0), dtype="bf16"),
    Case("bias_minus_inf", bias="inf"),
    Case("bias_minus_inf_causal_fp16", bias="inf", causal=True, dtype="fp16", head_dim=64),
    Case("bias_lowest", bias="lowest"),
    Case("bias_lowest_sinks", bias="lowest", sinks=True, causal=True),
    Case("bias_lowest_parts", (64,), (832,), heads=1, heads_k=1, causal=True, bias="lowest"),
    Case("bias_lowest_bf16", bias="lowest", causal=True, dtype="bf16", head_dim=64),
    Case("scale_zero", softmax_scale=0.0, causal=True),
    Case("scale_negative", softmax_scale=-0.15, causal=True),
    Case("scale_negative_window_fp64", softmax_scale=-0.3, window=(9, 3), dtype="fp64"),
    Case("dropout_keeps_all", dropout=1e-30),
    # Enough probabilities survive for the error rule, which compares the worst of several.
    Case("dropout_nearly_all", dropout=0.99),
    Case("large_scores_fp16", softmax_scale=30.0, dtype="fp16", head_dim=64),
    Case("transposed", strides="transposed", causal=True),
    Case(
        "transposed_bf16_longer_q",
        strides="transposed",
        dtype="bf16",
        causal=True,
        seqlens_q=(53, 53),
        seqlens_k=(20, 20),
    ),
    Case("sliced", strides="sliced", heads_k=2),
    Case("sliced_fp16_window", strides="sliced", dtype="fp16", window=(7, 3), head_dim=64),
    Case("fused_qkv", strides="fused", dtype="bf16", heads_k=2, causal=True),
    Case("expanded_kv", strides="expanded"),
    Case(
        "packed_fused",
        layout="packed",
        seqlens_q=_RAGGED_K,
        seqlens_k=_RAGGED_K,
        strides="fused",
        causal=True,
    ),
    Case(
        "packed_transposed",
        layout="packed",
        seqlens_q=_RAGGED_Q,
        seqlens_k=_RAGGED_K,
        strides="transposed",
    ),
    Case(
        "packed_sliced_softcap",
        layout="packed",
        seqlens_q=_RAGGED_Q,
        seqlens_k=_RAGGED_K,
        strides="sliced",
        softcap=2.0,
    ),
    Case(
        "packed_empty_sequences",
        layout="packed",
        seqlens_q=(0, 12, 5, 0, 3),
        seqlens_k=(4, 12, 0, 0, 9),
        causal=True,
    ),
    Case("packed_all_empty", layout="packed", seqlens_q=(0, 0), seqlens_k=(0, 0)),
    Case("packed_slack", layout="packed", seqlens_q=(6, 11), seqlens_k=(9, 11), slack=5),
    Case(
        "packed_many_short",
        layout="packed",
        seqlens_q=(1,) * 20,
        seqlens_k=tuple(range(1, 21)),
        causal=True,
    ),
    Case(
        "packed_leftpad",
        layout="packed",
        seqlens_q=(6, 11),
        seqlens_k=(19, 21),
        leftpad_k=(4, 20),
        causal=True,
    ),
    Case("seqused_zero", seqlens_q=(16, 16), seqlens_k=(20, 20), seqused_k=(0, 20), causal=True),
    Case(
        "leftpad_everything",
        seqlens_q=(6, 6),
        seqlens_k=(20, 20),
        seqused_k=(9, 20),
        leftpad_k=(9, 1),
    ),
    Case(
        "paged_page_1",
        layout="paged",
        seqlens_q=(3, 3),
        seqlens_k=(9, 14),
        page_size=1,
        causal=True,
    ),
    Case(
        "paged_empty_sequence", layout="paged", seqlens_q=(3, 3), seqlens_k=(0, 14), window=(4, 0)
    ),
    Case(
        "paged_sliced_alibi",
        layout="paged",
        seqlens_q=(3, 3),
        seqlens_k=(20, 14),
        strides="sliced",
        alibi="heads",
        causal=True,
    ),
]

_LONG = tuple(range(32, 1025, 66))  # 16 sequences

PERFORMANCE = [
    Case("perf_dense_fp32", (1024,) * 2, (1024,) * 2, 8, 8, 64),
    Case("perf_dense_bf16", (1024,) * 2, (1024,) * 2, 8, 8, 64, dtype="bf16"),
    Case("perf_causal_fp32", (1024,) * 2, (1024,) * 2, 8, 8, 64, causal=True),
    Case("perf_causal_longer_k", (512,) * 2, (2048,) * 2, 8, 8, 64, causal=True),
    Case("perf_window", (4096,), (4096,), 8, 8, 64, causal=True, window=(256, 0)),
    Case("perf_packed_fp32", _LONG, _LONG, 8, 8, 64, layout="packed"),
    Case(
        "perf_packed_causal_bf16",
        _LONG,
        _LONG,
        8,
        8,
        64,
        layout="packed",
        dtype="bf16",
        causal=True,
    ),
    Case("perf_decode_gqa", (1,) * 4, (4096,) * 4, 32, 8, 128, dtype="bf16", causal=True),
]
