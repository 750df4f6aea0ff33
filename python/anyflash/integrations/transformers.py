"""transformers on any machine: an attention implementation, and "flash_attention_2" without a GPU.

transformers asks for a GPU before it calls flash_attn, so "flash_attention_2" is an error on a CPU.
After ``enable()`` its models take ``attn_implementation=NAME`` on any device; after
``enable(flash_attention_2=True)`` code that asks for "flash_attention_2" runs unchanged.

    from anyflash.integrations import transformers as integration
    integration.enable()
    model = AutoModel.from_pretrained(..., attn_implementation=integration.NAME)
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
import warnings
from types import CodeType, FunctionType, ModuleType
from typing import Any, Callable

import torch
from torch import Tensor

from ..attention import attention

# transformers takes every name with "flash" in it for a kernel on its hub.
NAME = "any_attention"

_undo: list[Callable[[], object]] = []  # what disable() has to do, last first


def enable(flash_attention_2: bool = False) -> None:
    """Makes transformers compute its models' attention by anyflash.

    Registers NAME with ``AttentionInterface`` and ``AttentionMaskInterface`` (transformers 4.53 and
    newer). Calling it again changes nothing. anyflash knows padding, packed sequences
    (``position_ids`` that start again, or ``cu_seq_lens_q`` and its companions), sliding windows,
    soft caps, sinks and dropout; masks of any other form are handed over as a whole.

    Args:
        flash_attention_2: Also let ``attn_implementation="flash_attention_2"`` through where there
            is no GPU; continuous batching and sentence-transformers need that name. Changes what
            transformers' ``is_flash_attn_2_available`` answers and leaves out its look at the
            weights' devices, nothing else. Call it before models are imported.

    Raises:
        ImportError: transformers is not installed, has no interface for attention yet (4.53 has),
            or has already loaded modules that asked whether flash_attn is available; there is no
            flash_attn (ANYFLASH_DROPIN=0).
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "anyflash.integrations.transformers: transformers is not installed; "
            "pip install transformers"
        ) from error
    if flash_attention_2:
        _let_flash_attention_2_through()
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        if flash_attention_2:
            return
        raise ImportError(
            f"transformers {transformers.__version__} cannot register an attention implementation, "
            "4.53 and newer can; enable(flash_attention_2=True) works with this one"
        ) from error
    for interface, function in ((AttentionInterface, forward), (AttentionMaskInterface, mask)):
        if NAME not in interface._global_mapping:
            interface.register(NAME, function)
            _undo.append(functools.partial(interface._global_mapping.pop, NAME, None))


def disable() -> None:
    """Takes back what enable() did. Models that were made meanwhile keep what they have."""
    while _undo:
        _undo.pop()()


def _let_flash_attention_2_through() -> None:
    """Where transformers asks for a GPU: one function, and a check of where the weights are."""
    from transformers.utils import import_utils

    available = import_utils.is_flash_attn_2_available
    if available():
        return
    if importlib.util.find_spec("flash_attn") is None:
        raise ImportError(
            "enable(flash_attention_2=True): import flash_attn finds nothing; python -m anyflash "
            "doctor says why"
        )
    stale = [name for name, module in list(sys.modules.items()) if _has_asked(name, module)]
    if stale:
        raise ImportError(
            f"{', '.join(sorted(stale)[:3])}: imported before enable(flash_attention_2=True), and "
            "found no flash_attn then; call enable first"
        )
    # Every module has its own reference to this function, so its body is what can be changed.
    predicate = inspect.unwrap(available)
    assert isinstance(predicate, FunctionType)

    def answer_with(code: CodeType) -> None:
        predicate.__code__ = code
        getattr(available, "cache_clear", lambda: None)()

    _undo.append(functools.partial(answer_with, predicate.__code__))
    answer_with(_always.__code__)
    from transformers import PreTrainedModel

    for name in ("_flash_attn_can_dispatch", "_flash_attn_2_can_dispatch"):
        check = getattr(PreTrainedModel, name, None)
        if check is not None:
            setattr(PreTrainedModel, name, _without_devices(check))
            _undo.append(functools.partial(setattr, PreTrainedModel, name, check))


def _always(*args: object, **kwargs: object) -> bool:
    return True


def _has_asked(name: str, module: ModuleType) -> bool:
    """Whether a module of transformers imported flash_attn only if it was available just then."""
    asks = ("is_flash_attn_available", "is_flash_attn_2_available")
    if not name.startswith("transformers.") or not any(ask in vars(module) for ask in asks):
        return False
    if name == "transformers.modeling_flash_attention_utils":
        return not hasattr(module, "lazy_import_flash_attention")
    return (
        name.startswith("transformers.models.") or name == "transformers.integrations.flash_paged"
    )


def _without_devices(check: Callable[..., bool]) -> Callable[..., bool]:
    """transformers' check of a model, as it is made before the model has weights on a device."""
    signature = inspect.signature(check)

    @functools.wraps(check)
    def checked(*args: Any, **kwargs: Any) -> bool:
        bound = signature.bind(*args, **kwargs)
        bound.arguments["is_init_check"] = True
        return check(*bound.args, **bound.kwargs)

    return checked


# Mask functions of transformers that the arguments of an attention call say as well.
_PLAIN = {
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay.<locals>.inner_mask",
    "sliding_window_bidirectional_overlay.<locals>.inner_mask",
}
_COMPOSED = {
    "and_masks.<locals>.and_mask",
    "remap_positions_for_packed_sequence.<locals>.inner_mask",
}
_PACKED = "packed_sequence_mask_function.<locals>.inner_mask"


def _is_plain(function: Callable[..., Any], batch_size: int) -> bool:
    """Whether is_causal, sliding_window and position_ids say the same as this mask function."""
    name = getattr(function, "__qualname__", "")
    if name in _PLAIN or (name == _PACKED and batch_size == 1):
        return True
    if name not in _COMPOSED:
        return False
    parts = inspect.getclosurevars(function).nonlocals
    inner = parts.get("mask_functions") or (parts["mask_function"],)
    return all(_is_plain(part, batch_size) for part in inner)


def mask(
    *,
    batch_size: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    **rest: Any,
) -> Tensor | None:
    """The mask function under NAME: the padding mask, where the rest is in the attention's call.

    Returns:
        None; or (batch, seqlen_k) bool, true where there is a token; or for mask functions that
        the arguments of ``forward`` cannot say, and all of them in torch.compile, where nothing can
        depend on a mask's values, (batch, 1, seqlen_q, seqlen_k) bool.
    """
    from transformers import masking_utils

    given = {
        "batch_size": batch_size, "kv_length": kv_length, "mask_function": mask_function,
        "attention_mask": attention_mask, **rest,
    }  # fmt: skip
    if torch.compiler.is_compiling() or not _is_plain(mask_function, batch_size):
        return masking_utils.sdpa_mask(**given)
    return masking_utils.flash_attention_mask(**given)


def _unpad(token: Tensor) -> tuple[Tensor, Tensor, int]:
    """Where the tokens of (batch, seqlen) are: their indices, cu_seqlens and the longest row."""
    lengths = token.sum(-1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return token.flatten().nonzero().flatten(), cu_seqlens, int(lengths.max())


def _padded(q: Tensor, k: Tensor, v: Tensor, token: Tensor, options: dict[str, Any]) -> Tensor:
    """Attention of the tokens alone; zero where there is none."""
    batch, seqlen_q = q.shape[:2]
    seqlen_k = token.shape[1]  # a static cache is longer
    token = token.bool()
    where_k, cu_seqlens_k, longest_k = _unpad(token)
    # Queries are the last ones of each row.
    where_q, cu_seqlens_q, longest_q = _unpad(token[:, -seqlen_q:])
    out = attention(
        q.flatten(0, 1)[where_q], k[:, :seqlen_k].flatten(0, 1)[where_k],
        v[:, :seqlen_k].flatten(0, 1)[where_k], cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, max_seqlen_q=longest_q, max_seqlen_k=longest_k, **options,
    )  # fmt: skip
    rows = out.new_zeros(batch * seqlen_q, *out.shape[1:])
    return rows.index_copy(0, where_q, out).unflatten(0, (batch, seqlen_q))


def _starts(position_ids: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """cu_seqlens of sequences that lie in one row, told by positions that start again."""
    if position_ids is None or position_ids.dim() != 2 or q.shape[0] != 1:
        return None
    if torch.compiler.is_compiling():  # then it is in the mask
        return None
    if not 1 < position_ids.shape[-1] == q.shape[1] == k.shape[1]:
        return None
    inner = (position_ids[0].diff() != 1).nonzero().flatten().int() + 1
    if not inner.numel():
        return None
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=q.shape[1])


def forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function under NAME, as transformers calls it.

    Args:
        query: (batch, heads, seqlen_q, head_dim).
        key: (batch, heads_k, seqlen_k, head_dim).
        value: like key; its last dimension may differ.
        attention_mask: (batch, seqlen_k), nonzero where there is a token; or (batch, 1 or heads,
            seqlen_q, seqlen_k), bool or additive, which then says everything about visibility.
        sliding_window: how many keys a query sees, itself included; on both sides where not causal.
        s_aux: (heads,) sinks.
        cu_seq_lens_q to max_length_k: sequences that lie end to end in one row.

    Returns:
        (batch, seqlen_q, heads, head_dim_v) and None, as no probabilities exist.
    """
    if kwargs.get("output_attentions"):
        warnings.warn(f"{NAME} has no attention probabilities; use eager", stacklevel=2)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options: dict[str, Any] = {
        "dropout_p": dropout, "softmax_scale": scaling, "softcap": softcap or 0.0,
        "sinks": None if s_aux is None else s_aux.to(q.dtype),
    }  # fmt: skip
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention(q, k, v, bias=attention_mask[..., : k.shape[1]], **options), None
    options["causal"] = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if sliding_window is not None:
        options["window_size"] = (sliding_window - 1, sliding_window - 1)
    if attention_mask is not None:
        return _padded(q, k, v, attention_mask, options), None
    if cu_seq_lens_q is None:
        cu_seq_lens_q = cu_seq_lens_k = _starts(position_ids, q, k)
    if cu_seq_lens_q is None:
        return attention(q, k, v, **options), None
    out = attention(
        *(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens_q=cu_seq_lens_q,
        cu_seqlens_k=cu_seq_lens_k, max_seqlen_q=max_length_q, max_seqlen_k=max_length_k, **options,
    )  # fmt: skip
    return out.unflatten(0, q.shape[:2]), None
