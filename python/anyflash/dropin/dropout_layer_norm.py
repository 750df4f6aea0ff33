"""The functions of upstream's extension ``dropout_layer_norm``: positional arguments, matrices in,
a list out. They run on every device and record nothing for autograd.

Names are the extension's: x is the sum, z its norm, mu and rsigma its statistics. ``dmask`` is
uint8, 1 where an element was kept. What does not exist is None.
"""

from __future__ import annotations

from typing import Optional

import torch
from flash_attn.ops import _subset_norm
from torch import Tensor

from anyflash._operators.norm import DTYPE_CODES
from anyflash.norm import Normed, norm_backward


def _bytes(mask: Optional[Tensor]) -> Optional[Tensor]:
    return None if mask is None else mask.view(torch.uint8)


def _check_matrix(name: str, x: Tensor) -> None:
    if x.dim() != 2:
        raise RuntimeError(f"{name}: expected (rows, columns), got {tuple(x.shape)}")


def _statistics(normed: Normed) -> tuple[Tensor, Tensor]:
    """mu and rsigma; RMS norm subtracts no mean, so that its mu is 0."""
    return torch.zeros_like(normed.rstd) if normed.mean is None else normed.mean, normed.rstd


@torch.no_grad()
def dropout_add_ln_fwd(
    x0: Tensor,
    residual: Optional[Tensor],
    gamma: Tensor,
    beta_: Optional[Tensor],
    rowscale_: Optional[Tensor],
    colscale_: Optional[Tensor],
    x0_subset_: Optional[Tensor],
    z_subset_: Optional[Tensor],
    dropout_p: float,
    epsilon: float,
    rowscale_const: float,
    z_numrows: int,
    gen_: Optional[torch.Generator],
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> list[Optional[Tensor]]:
    """[z, x, dmask, mu, rsigma]; x is None where it would be x0, dmask without dropout.

    Arguments as in flash_attn.ops.layer_norm.dropout_add_layer_norm_subset; rowscale_const counts
    with subsets alone.
    """
    _check_matrix("x0", x0)
    normed = _subset_norm.normalise(
        x0,
        residual,
        gamma,
        beta_,
        dropout_p,
        epsilon,
        rowscale=rowscale_,
        colscale=colscale_,
        x0_subset=x0_subset_,
        out_subset=z_subset_,
        rowscale_const=rowscale_const,
        out_numrows=z_numrows,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
        return_residual=True,
        generator=gen_,
    )
    x = None if normed.residual is x0 else normed.residual
    return [normed.y, x, _bytes(normed.dropout_mask), *_statistics(normed)]


@torch.no_grad()
def dropout_add_ln_parallel_residual_fwd(
    x0: Tensor,
    x1_: Optional[Tensor],
    residual: Optional[Tensor],
    gamma0: Tensor,
    beta0_: Optional[Tensor],
    gamma1_: Optional[Tensor],
    beta1_: Optional[Tensor],
    dropout_p: float,
    epsilon: float,
    gen_: Optional[torch.Generator],
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> list[Optional[Tensor]]:
    """[z0, z1, x, dmask0, dmask1, mu, rsigma]; x is None where it would be x0."""
    _check_matrix("x0", x0)
    normed = _subset_norm.normalise(
        x0,
        residual,
        gamma0,
        beta0_,
        dropout_p,
        epsilon,
        x1=x1_,
        weight1=gamma1_,
        bias1=beta1_,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
        return_residual=True,
        generator=gen_,
    )
    x = None if normed.residual is x0 else normed.residual
    masks = (_bytes(normed.dropout_mask), _bytes(normed.dropout_mask1))
    return [normed.y, normed.y1, x, *masks, *_statistics(normed)]


def _kept(dmask: Optional[Tensor], dropout_p: float, name: str) -> Optional[Tensor]:
    """The mask as bool; None without dropout."""
    if dropout_p == 0.0:
        return None
    if dmask is None:
        raise RuntimeError(f"{name}: expected the mask of the forward with dropout_p {dropout_p}")
    return dmask.to(torch.bool)


@torch.no_grad()
def dropout_add_ln_bwd(
    dz: Tensor,
    dx_: Optional[Tensor],
    x: Tensor,
    x0_: Optional[Tensor],
    dmask_: Optional[Tensor],
    mu: Tensor,
    rsigma: Tensor,
    gamma: Tensor,
    rowscale_: Optional[Tensor],
    colscale_: Optional[Tensor],
    x0_subset_: Optional[Tensor],
    z_subset_: Optional[Tensor],
    dropout_p: float,
    rowscale_const: float,
    x0_numrows: int,
    has_residual: bool,
    is_rms_norm: bool = False,
) -> list[Optional[Tensor]]:
    """[dx0, dresidual, dgamma, dbeta, dgamma_part, dbeta_part], and with colscale [dcolscale,
    dcolscale_part]; a part is (parts, columns) fp32 (fp64 for fp64) and adds up to the whole.

    ``dx_`` is the gradient of the sum, None where the forward's caller did not use it. dx0 has dz's
    dtype; with colscale x0 is needed.
    """
    _check_matrix("x", x)
    _check_matrix("dz", dz)
    _subset_norm.check_subsets(x, x0_numrows, x0_subset_, z_subset_, dz.shape[0])
    mask = _kept(dmask_, dropout_p, "dmask")
    if x0_subset_ is not None and z_subset_ is not None:
        dz = _subset_norm.take_rows(dz, z_subset_)
        if mask is not None:
            mask = _subset_norm.take_rows(mask, x0_subset_)
        if rowscale_const != 1.0:
            rowscale_ = _subset_norm.factor_of_rows(x, rowscale_const)
    wide = torch.promote_types(dz.dtype, torch.float32)
    dx0, _, dresidual, dgamma, dbeta, *_ = norm_backward(
        dz, None, dx_, x, mu, rsigma, gamma, gamma, None, None, rowscale_, mask, None, None,
        dropout_p, is_rms_norm, False, has_residual, False,
        DTYPE_CODES[dz.dtype if colscale_ is None else wide],
    )  # fmt: skip
    if has_residual and dresidual.numel() == 0:
        dresidual = dx0
    columns: list[Tensor] = []
    if colscale_ is not None:
        if x0_ is None:
            raise RuntimeError("x0: expected x0 beside colscale, got None")
        x0 = x0_ if x0_subset_ is None else _subset_norm.take_rows(x0_, x0_subset_)
        part = (dx0 * x0).sum(0, keepdim=True)
        columns = [part[0].to(colscale_.dtype), part]
        dx0 = _subset_norm.scaled_columns(dx0, colscale_).to(dz.dtype)
    if x0_subset_ is not None:
        dx0 = _subset_norm.put_rows(dx0, x0_subset_, x0_numrows)
    parts = [gradient.to(wide).unsqueeze(0) for gradient in (dgamma, dbeta)]
    return [dx0, dresidual if has_residual else None, dgamma, dbeta, *parts, *columns]


@torch.no_grad()
def dropout_add_ln_parallel_residual_bwd(
    dz0: Tensor,
    dz1_: Optional[Tensor],
    dx_: Optional[Tensor],
    x: Tensor,
    dmask0_: Optional[Tensor],
    dmask1_: Optional[Tensor],
    mu: Tensor,
    rsigma: Tensor,
    gamma0: Tensor,
    gamma1_: Optional[Tensor],
    dropout_p: float,
    has_x1: bool,
    has_residual: bool,
    is_rms_norm: bool = False,
) -> list[Optional[Tensor]]:
    """[dx0, dx1, dresidual, dgamma0, dbeta0, dgamma1, dbeta1, then four parts as in
    dropout_add_ln_bwd]."""
    _check_matrix("x", x)
    mask = _kept(dmask0_, dropout_p, "dmask0")
    mask1 = _kept(dmask1_, dropout_p, "dmask1") if has_x1 else None
    dx0, dx1, dresidual, *gradients, _ = norm_backward(
        dz0, dz1_, dx_, x, mu, rsigma, gamma0, gamma0, gamma1_, gamma1_, None, mask, mask1, None,
        dropout_p, is_rms_norm, False, has_residual, has_x1, DTYPE_CODES[dz0.dtype],
    )  # fmt: skip
    if has_residual and dresidual.numel() == 0:
        dresidual = dx0
    if has_x1 and dx1.numel() == 0:
        dx1 = dx0
    weights = [*gradients[:2], *(gradients[2:] if gamma1_ is not None else (None, None))]
    wide = torch.promote_types(dz0.dtype, torch.float32)
    parts = [None if g is None else g.to(wide).unsqueeze(0) for g in weights]
    inputs = [dx0, dx1 if has_x1 else None, dresidual if has_residual else None]
    return [*inputs, *weights, *parts]
