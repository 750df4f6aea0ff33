"""A shape of attention in words: what `anyflash.explain` understands."""

from __future__ import annotations

import re
from typing import Any

from . import backends
from ._drivers import version_of
from ._records import DEVICES

DTYPES = {
    "fp16": ("fp16", "float16", "half", "f16"),
    "bf16": ("bf16", "bfloat16"),
    "fp32": ("fp32", "float32", "f32", "single"),
    "fp64": ("fp64", "float64", "f64", "double"),
}

# GPU names people use, with the compute capability that decides (NVIDIA's list of CUDA GPUs).
_GPUS = {
    "p100": 60, "v100": 70, "t4": 75, "rtx2080": 75, "2080ti": 75, "a100": 80, "a30": 80, "a10": 86,
    "a10g": 86, "a40": 86, "a6000": 86, "rtx3090": 86, "3090": 86, "l4": 89, "l40": 89, "l40s": 89,
    "rtx4090": 89, "4090": 89, "h100": 90, "h200": 90, "gh200": 90, "b100": 100, "b200": 100,
    "gb200": 100, "rtx5090": 120, "5090": 120, "gb10": 121,
}  # fmt: skip

_DEVICES = {"gpu": "cuda", "rocm": "hip", **{name: name for name in DEVICES if name != "other"}}

FEATURE_WORDS = {
    "packed": ("packed", "varlen", "unpadded", "cu_seqlens"),
    "paged": ("paged", "block_table"),
    "seqused_k": ("seqused_k", "seqused", "kvcache", "decode", "decoding"),
    "leftpad_k": ("leftpad_k", "leftpad"),
    "causal": ("causal",),
    "window": ("window", "sliding", "sliding_window", "local"),
    "softcap": ("softcap",),
    "alibi": ("alibi", "alibi_slopes"),
    "bias": ("bias", "attn_bias", "attn_mask", "mask", "boolean_mask"),
    "bias_grad": ("bias_grad", "bias_gradient"),
    "sinks": ("sinks", "sink"),
    "dropout": ("dropout",),
    "gqa": ("gqa", "mqa", "grouped_query"),
    "unequal_head_dims": (),
    "lse": ("lse", "return_lse", "softmax_lse"),
    "lse_grad": ("lse_grad",),
    "deterministic": ("deterministic",),
    "deterministic_bias_grad": (),
}

_ACTIVATIONS = ("mlp", "bias_activation", "gelu", "gelu_tanh", "gelu_erf", "relu") + (
    ("squared_relu", "sqrelu", "silu", "silu_gate", "swiglu")
)

_FILLER = frozenset(
    ("a", "an", "and", "at", "attention", "cache", "for", "full", "in", "kv", "layout", "my", "of")
    + ("on", "plus", "run", "the", "to", "use", "using", "with")
)

# What a call has and no choice depends on; a number may follow.
_SIZES = frozenset(
    ("batch", "batch_size", "head", "heads", "heads_k", "num_heads", "nheads", "hidden", "tokens")
    + ("seqlen", "seqlens", "seqlen_q", "seqlen_k", "max_seqlen", "max_seqlen_q", "max_seqlen_k")
    + ("seq_len", "seq", "len", "length", "lengths", "sequence", "sequences", "total_q", "total_k")
)
_NUMBER = re.compile(r"\d*\.?\d+k?")


def parse_words(words: str) -> dict[str, Any]:
    """Reads a shape in words.

    Args:
        words: Such as "bf16 causal head_dim 192/128 on sm_90 training" or "fp16 packed T4".

    Returns:
        Keywords for `explain`, only what the words say.

    Raises:
        ValueError: A word is not understood; the message lists the vocabulary.
    """
    text = re.sub(r"[=:,;]", " ", words.lower())
    text = re.sub(r"head[ _-]?dim(?:ension)?s?", "head_dim", text)
    text = re.sub(r"\b(non|not)[ -]causal\b|\bbidirectional\b", " ", text)
    facts: dict[str, Any] = {}

    def take(pattern: str) -> re.Match[str] | None:
        nonlocal text
        match = re.search(pattern, text)
        if match:
            text = f"{text[: match.start()]} {text[match.end() :]}"
        return match

    if match := take(
        r"\bbackend ((?:kernel|sdpa|math|aten_\w+|auto)(?:[ ]+(?:kernel|sdpa|math|aten_\w+))*)"
    ):
        facts["backend"] = ",".join(match[1].split())
    if match := take(r"\bhead_dim_v ?(\d+)"):
        facts["head_dim_v"] = int(match[1])
    if match := take(r"\b(?:head_dim|hd|dim|d) ?(\d+)(?: ?/ ?(\d+))?"):
        facts["head_dim"] = int(match[1])
        if match[2]:
            facts["head_dim_v"] = int(match[2])
    if match := take(r"\b(?:sm_?|cc |compute capability )(\d+)(?:\.(\d))?[af]?\b"):
        facts.update(device="cuda", sm=int(match[1] + (match[2] or "")))
    if match := take(r"\bdriver (?:version )?(r?\d+(?:\.\d+)*)"):
        facts["driver"] = version_of(match[1])
    if match := take(r"\btorch ?(\d+)\.(\d+)\S*"):
        facts["torch_version"] = int(match[1]) * 100 + int(match[2])
    _read_single_words(text, facts)
    return facts


def _read_single_words(text: str, facts: dict[str, Any]) -> None:
    """Adds what single words mean to facts; raises ValueError for one that means nothing."""
    dtypes = {alias: name for name, aliases in DTYPES.items() for alias in aliases}
    features = {alias: name for name, aliases in FEATURE_WORDS.items() for alias in aliases}
    for word in re.findall(r"[\w+.]+", text):
        if word in dtypes:
            facts["dtype"] = dtypes[word]
        elif word in features:
            facts.setdefault("features", []).append(features[word])
        elif word in _GPUS:
            facts.update(device="cuda", sm=_GPUS[word])
        elif word in backends.ISAS[1:]:
            facts.update(device="cpu", isa=word)
        elif word in _DEVICES:
            facts["device"] = _DEVICES[word]
        elif word in ("training", "train", "backward", "gradient", "gradients", "grad"):
            facts["training"] = True
        elif word in ("inference", "forward", "eval", "serving"):
            facts["training"] = False
        elif word in _ACTIVATIONS:
            facts["op"] = "bias_activation"
        elif word not in _FILLER | _SIZES and not _NUMBER.fullmatch(word):
            raise ValueError(_not_understood(word))


def _not_understood(word: str) -> str:
    import difflib

    dtypes = [alias for aliases in DTYPES.values() for alias in aliases]
    features = [alias for aliases in FEATURE_WORDS.values() for alias in aliases]
    rest = [*_DEVICES, "training", "inference", "mlp"]
    close = difflib.get_close_matches(word, [*dtypes, *features, *_GPUS, *rest], n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return (
        f'explain: "{word}" is not understood.{hint} It knows '
        f"dtypes ({', '.join(DTYPES)}), features ({', '.join(FEATURE_WORDS)}), head_dim N, "
        "head_dim N/M, devices (cpu, avx512, cuda, sm_NN, T4, A100, H100, hip, mps, xpu, ...), "
        "training, inference, mlp, driver N, torch N.N, backend NAME; seqlen N, batch N, heads N "
        "change nothing"
    )
