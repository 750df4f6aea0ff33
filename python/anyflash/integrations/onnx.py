"""Models as ONNX: attention as the operator ``Attention`` of opset 24, everything else of this
library as the operations that it consists of."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._operators.attention import AttentionCall
from .._operators.cross_entropy import MATH as CROSS_ENTROPY
from .._operators.mlp import BiasActivationCall, FusedMLPCall
from .._operators.norm import MATH as NORM
from .._operators.rotary import rotate
from .._python_ops.mlp import activate

OPSET = 24


def _refuse_what_onnx_cannot_say(call: AttentionCall) -> None:
    unsaid = {
        "cu_seqlens_q": (call.cu_seqlens_q is not None, "a padded batch with seqused_k"),
        "block_table": (call.block_table is not None, "keys and values without pages"),
        "sinks": (call.sinks is not None, "None"),
        "dropout_p": (call.dropout_p > 0.0, "0, as in eval()"),
        "return_lse": (call.return_lse, "False"),
    }
    for name, (is_there, expected) in unsaid.items():
        if is_there:
            raise RuntimeError(
                f"{name}: ONNX's Attention cannot say it, expected {expected}, got "
                f"{_shown(getattr(call, name))}"
            )


def _shown(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _per_batch(x: Tensor) -> Tensor:
    return x.view(-1, 1, 1, 1)


def _mask(call: AttentionCall) -> tuple[Tensor | None, Tensor | None]:
    """(what is visible, what is added to the scores), each to be broadcast to (batch, heads,
    seqlen_q, seqlen_k). Runtimes align causal masks with the first key; ours end with the last."""
    q, k = call.q, call.k
    rows = torch.arange(q.shape[1], device=q.device).unsqueeze(1)
    keys = torch.arange(k.shape[1], device=q.device)
    used = None if call.seqused_k is None else _per_batch(call.seqused_k)
    last = rows + (k.shape[1] if used is None else used) - q.shape[1]  # each row's own key
    left, right = call.window_size_left, 0 if call.causal else call.window_size_right
    hidden = []
    if used is not None:
        hidden.append(keys >= used)
    if call.leftpad_k is not None:
        hidden.append(keys < _per_batch(call.leftpad_k))
    if left >= 0:
        hidden.append(keys < last - left)
    if right >= 0:
        beyond = keys > last + right
        # A bound that no sequence reaches is none, as upstream has it.
        hidden.append(beyond if right == 0 else beyond & (keys[-1:] >= right))
    added = call.bias
    if added is not None and added.dtype == torch.bool:
        hidden, added = [*hidden, ~added], None
    if call.alibi_slopes is not None:
        slopes = call.alibi_slopes.unflatten(-1, (-1, 1, 1))
        distances = (keys - last).abs().to(slopes.dtype)
        added = -slopes * distances if added is None else added - slopes * distances
    visible = None
    for part in hidden:
        visible = ~part if visible is None else visible & ~part
    return visible, added


def _is_plainly_causal(call: AttentionCall) -> bool:
    """Whether a causal mask is all there is, and both ends are one: as many rows as keys."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    others = (call.bias, call.alibi_slopes, call.seqused_k, call.leftpad_k)
    is_causal = call.causal or call.window_size_right == 0
    is_alone = call.window_size_left < 0 and all(x is None for x in others)
    return is_causal and is_alone and statically_known_true(call.q.shape[1] == call.k.shape[1])


def _attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """_flash_attn_forward as Attention. Rows that see no key are 0, whatever the runtime makes of
    them."""
    call = AttentionCall(*arguments)
    _refuse_what_onnx_cannot_say(call)
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    shape = (*q.shape[:3], v.shape[3])
    attributes: dict[str, Any] = {"scale": call.softmax_scale}
    if call.softcap > 0.0:
        attributes["softcap"] = call.softcap
    visible = added = None
    if _is_plainly_causal(call):
        attributes["is_causal"] = 1
    else:
        visible, added = _mask(call)
    if added is not None:
        while added.dim() < 4:
            added = added.unsqueeze(0)
        is_finite = added > -torch.inf
        visible = is_finite if visible is None else visible & is_finite
    inputs = [q, k, v]
    is_empty = None
    if visible is not None:
        while visible.dim() < 4:
            visible = visible.unsqueeze(0)
        is_empty = ~visible.any(-1, keepdim=True)
        mask = visible | is_empty
        if added is not None:
            mask = torch.where(mask, torch.where(is_empty, 0.0, added), -torch.inf).to(q.dtype)
        inputs.append(mask.expand(-1, -1, q.shape[2], k.shape[2]))  # as onnxruntime asks
    out = torch.onnx.ops.symbolic(
        "Attention", inputs, attributes, dtype=q.dtype, shape=shape, version=OPSET
    )
    if is_empty is not None:
        out = torch.where(is_empty, 0.0, out)
    nothing = q.new_empty(0)
    return out.transpose(1, 2), nothing, nothing


def _bias_activation(*arguments: Any) -> Tensor:
    call = BiasActivationCall(*arguments)
    return activate(call.x, call.bias, call.activation)


def _fused_mlp(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = FusedMLPCall(*arguments)
    hidden = activate(F.linear(call.x, call.weight1), call.bias1, call.activation)
    return F.linear(hidden, call.weight2, call.bias2), call.x.new_empty(0)


def _refuse_caches(program: torch.export.ExportedProgram) -> None:
    ops = torch.ops.anyflash
    written = (ops._flash_attn_kvcache_.default, ops.flash_attn_with_kvcache.default)
    if any(node.target in written for node in program.graph.nodes):
        raise RuntimeError(
            "k_cache: attention over a key/value cache writes into the cache, which ONNX cannot "
            "say, expected attention over keys that the model takes and returns"
        )


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What this library's operators become, for ``torch.export.ExportedProgram.run_decompositions``
    of a program that goes to ``torch.onnx.export`` with ``opset_version=24``.

    Returns:
        operator -> function of its arguments.
    """
    ops = torch.ops.anyflash
    return {
        ops._flash_attn_forward.default: _attention,
        ops._bias_activation_forward.default: _bias_activation,
        ops._fused_mlp_forward.default: _fused_mlp,
        ops.rotary.default: rotate,
        ops.norm_forward.default: NORM["norm_forward"],
        ops.cross_entropy_forward.default: CROSS_ENTROPY["cross_entropy_forward"],
    }


def export(
    model: torch.nn.Module,
    args: Sequence[Any],
    f: str | os.PathLike[str] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    **options: Any,
) -> Any:
    """torch.onnx.export of a model that calls anyflash or flash_attn, for inference.

    Dense attention becomes one ``Attention`` (opset 24): causal masks and windows aligned as ours,
    ALiBi, bias, seqused_k and leftpad_k as its mask, softcap and grouped heads as its attributes.
    Rotary embedding, norms, the MLP and cross entropy become plain operations.

    Args:
        model: the module.
        args: its positional arguments.
        f: the file to write; None: none.
        kwargs: its named arguments.
        dynamic_shapes: as in torch.export.export.
        **options: as in torch.onnx.export.

    Returns:
        torch.onnx.ONNXProgram.

    Raises:
        RuntimeError: a call that ONNX cannot say: packed sequences, pages, a key/value cache,
            dropout, sinks, return_lse; or torch is older than 2.8.
        ImportError: onnx or onnxscript is not installed.
    """
    if not hasattr(torch.onnx, "ops"):
        raise RuntimeError(
            f"ONNX's Attention needs torch 2.8 or newer, this is {torch.__version__}"
        )
    with torch.no_grad():
        program = torch.export.export(
            model, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False
        )
        _refuse_caches(program)
        table = torch.export.default_decompositions()
        table.update(decompositions())
        program = program.run_decompositions(table)
    return torch.onnx.export(program, f=f, dynamo=True, opset_version=OPSET, **options)
