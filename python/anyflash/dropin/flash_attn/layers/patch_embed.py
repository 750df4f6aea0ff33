"""Images to patch embeddings, with timm's interface."""

from __future__ import annotations

from typing import Callable

from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from flash_attn.ops.fused_dense import FusedDense


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each: a convolution written as one linear layer.

    The rows of ``proj.weight`` are over (channel, row in the patch, column in the patch).

    Args:
        img_size: height and width, or both in one number.
        patch_size: the same of a patch.
        in_chans: channels.
        embed_dim: features of a patch.
        norm_layer: called with embed_dim; None: no norm.
        flatten: one dimension of patches; False: rows and columns of patches.
        bias: whether proj has a bias.
        fused_bias_fc: proj is a FusedDense.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[[int], nn.Module] | None = None,
        flatten: bool = True,
        bias: bool = True,
        fused_bias_fc: bool = False,
    ) -> None:
        super().__init__()
        self.img_size = _pair(img_size)
        self.patch_size = _pair(patch_size)
        self.grid_size = tuple(i // p for i, p in zip(self.img_size, self.patch_size))
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.in_chans = in_chans
        self.flatten = flatten
        linear = FusedDense if fused_bias_fc and bias else nn.Linear
        features = in_chans * self.patch_size[0] * self.patch_size[1]
        self.proj = linear(features, embed_dim, bias=bias)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, patches, embed_dim), or (batch, rows, columns, embed_dim) without flatten.

        Args:
            x: (batch, in_chans, height, width).

        Raises:
            ValueError: another number of dimensions or channels.
            AssertionError: another height or width than img_size, as upstream and timm.
        """
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"x: expected (batch, {self.in_chans}, height, width), got {tuple(x.shape)}"
            )
        for name, size, expected in zip(("height", "width"), x.shape[-2:], self.img_size):
            if size != expected:
                raise AssertionError(
                    f"Input image {name} ({size}) doesn't match model ({expected})."
                )
        rows, columns = self.patch_size
        patches = rearrange(x, "b c (h r) (w s) -> b h w (c r s)", r=rows, s=columns)
        x = self.proj(patches)
        return self.norm(x.flatten(1, 2) if self.flatten else x)
