"""Layer norm and RMS norm after dropout and residual, on any device; no Triton is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyflash import _autocast
from anyflash.norm import dropout_add_norm
from flash_attn._missing import absent


def maybe_contiguous_lastdim(x: Tensor | None) -> Tensor | None:
    """x, copied unless the elements of a row lie side by side."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """x in contiguous memory; None stays."""
    return None if x is None else x.contiguous()


def triton_autotune_configs() -> list[Any]:
    """Upstream's candidates for its Triton kernels.

    Raises:
        NotImplementedError: always; there is no Triton kernel to tune here.
    """
    raise NotImplementedError(
        "anyflash's layer norm has no Triton kernels to tune; layer_norm_fn and rms_norm_fn run "
        "without Triton"
    )


def _check_buffer(name: str, buffer: Tensor | None, x: Tensor, dtype: torch.dtype) -> None:
    if buffer is None:
        return
    if buffer.shape != x.shape or buffer.device != x.device or buffer.dtype != dtype:
        raise RuntimeError(
            f"{name}: expected {tuple(x.shape)}, {dtype} on {x.device}, got "
            f"{tuple(buffer.shape)}, {buffer.dtype} on {buffer.device}"
        )


def _deliver(buffer: Tensor | None, value: Tensor) -> Tensor:
    return value if buffer is None else buffer.copy_(value)


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """Layer norm of dropout(x * rowscale) + dropout(x1) + residual, as
    ``anyflash.norm.dropout_add_norm``.

    Args:
        residual: its dtype is that of the sum.
        prenorm: the sum is returned too.
        residual_in_fp32: the sum is fp32 where no residual is given; else it has no effect.
        return_dropout_mask: the masks are returned too: bool, true where an element was kept; None
            where nothing was dropped.
        out: where to write y, whose dtype is then this tensor's.
        residual_out: where to write the sum.

    Returns:
        y; then y1 with weight1; then the sum with prenorm; then dropout_mask and dropout_mask1 with
        return_dropout_mask. A tuple where it is more than y.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together. Nothing has been written
            then.
        ValueError: dropout_p outside [0, 1), a negative eps.
    """
    sum_dtype = torch.float32 if residual_in_fp32 else x.dtype
    if residual is not None:
        sum_dtype = residual.dtype
    elif residual_out is not None:
        sum_dtype = residual_out.dtype
    if out is not None:
        _check_buffer("out", out, x, out_dtype or out.dtype)
        out_dtype = out.dtype
    _check_buffer("residual_out", residual_out, x, sum_dtype)
    normed = dropout_add_norm(
        x,
        weight,
        bias,
        residual=residual,
        x1=x1,
        weight1=weight1,
        bias1=bias1,
        rowscale=rowscale,
        dropout_p=dropout_p,
        eps=eps,
        is_rms_norm=is_rms_norm,
        zero_centered_weight=zero_centered_weight,
        return_residual=prenorm or residual_out is not None,
        out_dtype=out_dtype,
        residual_dtype=sum_dtype,
    )
    y = _deliver(out, normed.y)
    total = None if normed.residual is None else _deliver(residual_out, normed.residual)
    results: list[Tensor | None] = [y]
    results += [] if weight1 is None else [normed.y1]
    results += [total] if prenorm else []
    results += [normed.dropout_mask, normed.dropout_mask1] if return_dropout_mask else []
    return y if len(results) == 1 else tuple(results)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """layer_norm_fn with RMS norm."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm,
        residual_in_fp32, zero_centered_weight, True, return_dropout_mask, out_dtype, out,
        residual_out,
    )  # fmt: skip


def _check_linear(x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    shape = linear_weight.shape
    if len(shape) != 2 or shape[1] != x.shape[-1]:
        raise RuntimeError(
            f"linear_weight: expected (out_features, {x.shape[-1]}) for x {tuple(x.shape)}, got "
            f"{tuple(shape)}"
        )
    if linear_bias is not None and linear_bias.shape != shape[:1]:
        raise RuntimeError(
            f"linear_bias: expected ({shape[0]},), the rows of linear_weight, got "
            f"{tuple(linear_bias.shape)}"
        )


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    """A linear layer of layer_norm_fn's y: in x's dtype, under autocast in that of autocast.

    Args:
        linear_weight: (out_features, columns).
        linear_bias: (out_features,) or None.

    Returns:
        (..., out_features); with prenorm the sum beside it.

    Raises:
        RuntimeError, ValueError: as layer_norm_fn; a linear layer that does not fit x.
    """
    normed = dropout_add_norm(
        x,
        norm_weight,
        norm_bias,
        residual=residual,
        eps=eps,
        is_rms_norm=is_rms_norm,
        return_residual=prenorm,
        residual_dtype=torch.float32 if residual_in_fp32 else None,
    )
    y = normed.y
    _check_linear(y, linear_weight, linear_bias)
    if not _autocast.is_enabled(x):
        linear_weight = linear_weight.to(y.dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(y.dtype)
    out = F.linear(y, linear_weight, linear_bias)
    return (out, normed.residual) if prenorm else out


class LayerNormFn:
    """layer_norm_fn under the name of upstream's autograd function."""

    apply = staticmethod(layer_norm_fn)


class LayerNormLinearFn:
    """layer_norm_linear_fn under the name of upstream's autograd function."""

    apply = staticmethod(layer_norm_linear_fn)


class RMSNorm(nn.Module):
    """RMS norm over the last dimension, after dropout and residual if there are any.

    Args:
        hidden_size: columns.
        eps: added to the mean square.
        dropout_p: the share of x that is dropped in training.
        zero_centered_weight: the factor is 1 + weight, and weight begins at 0 instead of 1.
        device: of the weight.
        dtype: of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.bias: Tensor | None
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.zero_centered_weight = zero_centered_weight
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The weight that scales by 1."""
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        """y, or (y, sum) with prenorm, as rms_norm_fn."""
        return rms_norm_fn(
            x,
            self.weight,
            self.bias,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )


# ---- The same in plain operations, for tests: rounded after each of them, as upstream's are.


def _reference(
    normalise: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    parameters: tuple[Tensor | None, ...],
    residual: Tensor | None,
    x1: Tensor | None,
    dropout_p: float,
    rowscale: Tensor | None,
    prenorm: bool,
    zero_centered_weight: bool,
    masks: tuple[Tensor | None, Tensor | None],
    upcast: bool,
) -> Any:
    def widened(tensor: Tensor) -> Tensor:
        return tensor.float() if upcast else tensor

    def dropped(tensor: Tensor, mask: Tensor | None) -> Tensor:
        if dropout_p <= 0.0:
            return tensor
        if mask is None:
            return F.dropout(tensor, p=dropout_p)
        return tensor.masked_fill(~mask, 0.0) / (1.0 - dropout_p)

    if x1 is not None and rowscale is not None:
        raise AssertionError("rowscale is not supported with parallel LayerNorm")
    total = widened(x)
    if rowscale is not None:
        total = total * rowscale[..., None]
    total = dropped(total, masks[0])
    if x1 is not None:
        total = total + dropped(widened(x1), masks[1])
    if residual is not None:
        total = (total + widened(residual)).to(total.dtype)
    weight, bias, weight1, bias1 = (None if p is None else widened(p) for p in parameters)
    results = []
    for w, b in ((weight, bias), (weight1, bias1)):
        if w is not None:
            results.append(normalise(total, w + 1.0 if zero_centered_weight else w, b).to(x.dtype))
    results += [total] if prenorm else []
    return results[0] if len(results) == 1 else tuple(results)


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    zero_centered_weight: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Any:
    """layer_norm_fn in plain operations, in x's dtype or (upcast) in fp32."""

    def normalise(total: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.layer_norm(total.to(weight.dtype), total.shape[-1:], weight, bias, eps)

    return _reference(
        normalise, x, (weight, bias, weight1, bias1), residual, x1, dropout_p, rowscale, prenorm,
        zero_centered_weight, (dropout_mask, dropout_mask1), upcast,
    )  # fmt: skip


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    zero_centered_weight: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Any:
    """rms_norm_fn in plain operations, in x's dtype or (upcast) in fp32."""

    def normalise(total: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        size = torch.sqrt(total.square().mean(-1, keepdim=True) + eps)
        y = total * (1 / size) * weight
        return y if bias is None else y + bias

    return _reference(
        normalise, x, (weight, bias, weight1, bias1), residual, x1, dropout_p, rowscale, prenorm,
        zero_centered_weight, (dropout_mask, dropout_mask1), upcast,
    )  # fmt: skip


__getattr__ = absent(
    __name__,
    dict.fromkeys(
        (
            "_layer_norm_fwd_1pass_kernel",
            "_layer_norm_bwd_kernel",
            "_layer_norm_fwd",
            "_layer_norm_fwd_impl",
            "_layer_norm_bwd",
            "_layer_norm_bwd_impl",
        ),
        "a Triton kernel, or the call of one; layer_norm_fn and rms_norm_fn compute it on every "
        "device, and autograd their gradient",
    ),
)
