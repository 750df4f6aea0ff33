"""The formula of rotary embedding in float64, and small inputs, for test_rotary*.py."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved=False, conjugate=False
) -> Tensor:
    """In float64, with complex numbers. positions: x.shape[:-2], negative where nothing turns."""
    pairs = cos.shape[1]
    x = x.double()
    turned = x[..., : 2 * pairs]
    if interleaved:
        z = torch.complex(turned[..., ::2], turned[..., 1::2])
    else:
        z = torch.complex(turned[..., :pairs], turned[..., pairs:])
    table = torch.complex(cos.double(), -sin.double() if conjugate else sin.double())
    table = torch.cat([table, torch.ones(1, pairs, dtype=table.dtype)])
    has_angle = (positions >= 0) & (positions < len(cos))
    z = z * table[torch.where(has_angle, positions, len(cos))].unsqueeze(-2)
    if interleaved:
        turned = torch.stack([z.real, z.imag], -1).flatten(-2)
    else:
        turned = torch.cat([z.real, z.imag], -1)
    return torch.cat([turned, x[..., 2 * pairs :]], -1)


def angles(rows: int, pairs: int, dtype=torch.float32, device="cpu") -> tuple[Tensor, Tensor]:
    theta = torch.arange(rows)[:, None] * 10000.0 ** (-torch.arange(pairs) / max(pairs, 1))
    return theta.cos().to(device, dtype), theta.sin().to(device, dtype)


def assert_close(got: Tensor, exact: Tensor) -> None:
    """Within the rounding of the result and of fp32 arithmetic."""
    eps = torch.finfo(got.dtype).eps
    inner = eps if got.dtype == torch.float64 else 2.0**-23
    atol = 4 * inner * max(1.0, exact.abs().max().item() if exact.numel() else 0.0)
    torch.testing.assert_close(got.double().cpu(), exact, rtol=0.51 * eps, atol=atol)


def weighted(y: Tensor) -> Tensor:
    """Something that depends on every element, and not linearly."""
    return (y.sin() * torch.linspace(-1, 1, y.numel()).view_as(y).to(y)).sum()


def sample(heads=3, dtype=torch.float32, device="cpu", requires_grad=True):
    torch.manual_seed(1)
    x = torch.randn(2, 5, heads, 10, device=device).to(dtype).requires_grad_(requires_grad)
    return x, *(t.to(dtype) for t in angles(7, 4, device=device))
