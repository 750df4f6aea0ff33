"""Transformer blocks: a mixer and an MLP with dropout, residual and norm around them."""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor, nn

from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import Mlp
from flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn


class StochasticDepth(nn.Module):
    """Drops whole samples, or the whole batch, and scales what stays (Huang et al. 2016).

    Draws what torchvision.ops.StochasticDepth draws, which upstream imports.

    Args:
        p: probability of dropping, in [0, 1].
        mode: "row" draws for each sample, "batch" once.
    """

    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"drop probability has to be between 0 and 1, but got {p}")
        if mode not in ("row", "batch"):
            raise ValueError(f"mode has to be either 'batch' or 'row', but got {mode}")
        self.p = p
        self.mode = mode

    def forward(self, input: Tensor) -> Tensor:
        """input (batch, ...), itself in evaluation mode."""
        if not self.training or self.p == 0.0:
            return input
        kept = 1.0 - self.p
        samples = input.shape[0] if self.mode == "row" else 1
        noise = input.new_empty([samples] + [1] * (input.dim() - 1)).bernoulli_(kept)
        return input * (noise.div_(kept) if kept > 0.0 else noise)

    def extra_repr(self) -> str:
        """p and mode."""
        return f"p={self.p}, mode={self.mode}"


def _mixer(dim: int, mixer_cls: Callable[..., nn.Module] | None) -> nn.Module:
    return MHA(dim, num_heads=dim // 64) if mixer_cls is None else mixer_cls(dim)


def _mlp(dim: int, mlp_cls: Callable[..., nn.Module] | None) -> nn.Module:
    return Mlp(dim, hidden_features=4 * dim) if mlp_cls is None else mlp_cls(dim)


class _ResidualBlock(nn.Module):
    """What both blocks share."""

    fused_dropout_add_ln: bool
    residual_in_fp32: bool
    # Whatever the factories give; _finish checks those that the fused norm stands for.
    mixer: Any
    dropout1: Any
    dropout2: Any
    norm1: Any
    norm2: Any

    def _finish(self, sequence_parallel: bool, mark_shared_params: bool) -> None:
        """Checks what the fused norm can stand for; marks the parameters of the norms, for
        flash_attn.utils.distributed."""
        fusible = isinstance(self.norm1, (nn.LayerNorm, RMSNorm))
        if self.fused_dropout_add_ln and not (fusible and isinstance(self.dropout1, nn.Dropout)):
            raise ValueError(
                "fused_dropout_add_ln: expected norm_cls nn.LayerNorm or RMSNorm and dropout_cls "
                f"nn.Dropout, got {type(self.norm1).__name__} and {type(self.dropout1).__name__}"
            )
        for norm in (self.norm1, getattr(self, "norm2", None)):
            for parameter in () if norm is None else norm.parameters():
                if sequence_parallel:
                    parameter._sequence_parallel = True
                if mark_shared_params:
                    parameter._shared_params = True

    def _sum_and_norm(
        self, branches: list[Tensor], residual: Tensor | None, norms: list[Any]
    ) -> tuple[Tensor, ...]:
        """(normed by each norm, ..., sum), from branches that have had their dropout."""
        total = branches[0] if residual is None else residual + branches[0]
        for branch in branches[1:]:
            total = total + branch
        normed = [norm(total.to(norm.weight.dtype)) for norm in norms]
        return (*normed, total.float() if self.residual_in_fp32 else total)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """The mixer's cache."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)


class Block(_ResidualBlock):
    """Mixer, then MLP.

    With prenorm a block begins with the sum that the block before it left open: dropout, add,
    norm, mixer, dropout, add, norm, MLP. It returns the MLP's output and the residual apart, so
    that dropout, add and norm are one call. Without prenorm: mixer, dropout, add, norm, MLP,
    dropout, add, norm.

    Args:
        dim: features of a token.
        mixer_cls: called with dim; None: MHA with heads of 64 features.
        mlp_cls: called with dim; None: Mlp with 4 dim hidden features. nn.Identity: no MLP, nor
            what stands before it.
        norm_cls: called with dim.
        dropout_cls: called with the probability.
        prenorm: see above.
        resid_dropout1: dropout before the first norm.
        resid_dropout2: before the second.
        drop_path1: probability of dropping a sample's branch before the first norm.
        drop_path2: before the second.
        fused_dropout_add_ln: dropout, add and norm through layer_norm_fn.
        return_residual: mixer and MLP return (output, their input).
        residual_in_fp32: keep the residual in fp32; prenorm only.
        sequence_parallel: mark the norms' parameters for allreduce_sequence_parallel_grad.
        mark_shared_params: mark them for sync_shared_params.

    Raises:
        ValueError: options that do not fit together.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[..., nn.Module] | None = None,
        mlp_cls: Callable[..., nn.Module] | None = None,
        norm_cls: Callable[..., nn.Module] = nn.LayerNorm,
        dropout_cls: Callable[..., nn.Module] = nn.Dropout,
        prenorm: bool = True,
        resid_dropout1: float = 0.0,
        resid_dropout2: float = 0.0,
        drop_path1: float = 0.0,
        drop_path2: float = 0.0,
        fused_dropout_add_ln: bool = False,
        return_residual: bool = False,
        residual_in_fp32: bool = False,
        sequence_parallel: bool = False,
        mark_shared_params: bool = False,
    ) -> None:
        super().__init__()
        if residual_in_fp32 and not prenorm:
            raise ValueError("residual_in_fp32 is only compatible with prenorm=True")
        self.prenorm = prenorm
        self.fused_dropout_add_ln = fused_dropout_add_ln
        self.return_residual = return_residual
        self.residual_in_fp32 = residual_in_fp32
        self.mixer = _mixer(dim, mixer_cls)
        self.dropout1 = dropout_cls(resid_dropout1)
        self.drop_path1 = StochasticDepth(drop_path1, mode="row")
        self.norm1 = norm_cls(dim)
        self.mlp = _mlp(dim, mlp_cls)
        if not isinstance(self.mlp, nn.Identity):
            self.dropout2 = dropout_cls(resid_dropout2)
            self.drop_path2 = StochasticDepth(drop_path2, mode="row")
            self.norm2 = norm_cls(dim)
        self._finish(sequence_parallel, mark_shared_params)

    def _add_norm(
        self,
        branch: Tensor,
        residual: Tensor | None,
        dropout: Any,
        drop_path: StochasticDepth,
        norm: Any,
    ) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum, which counts with prenorm alone)"""
        if not self.fused_dropout_add_ln:
            normed, total = self._sum_and_norm([drop_path(dropout(branch))], residual, [norm])
            return normed, total
        rowscale = None
        if drop_path.p > 0.0 and self.training:
            rowscale = drop_path(branch.new_ones(branch.shape[:-1]))
        out = layer_norm_fn(
            branch,
            norm.weight,
            norm.bias,
            residual=residual,
            eps=norm.eps,
            dropout_p=dropout.p if self.training else 0.0,
            rowscale=rowscale,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
            is_rms_norm=isinstance(norm, RMSNorm),
        )
        return out if self.prenorm else (out, out)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        mixer_subset: Any = None,
        mixer_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs the block.

        Args:
            hidden_states: (batch, seqlen, dim) or (total, dim).
            residual: like hidden_states, from the block before; None for the first one. Without
                prenorm always None.
            mixer_subset: an index of tokens; only they become queries and go on. Prenorm only.
            mixer_kwargs: for the mixer.

        Returns:
            (hidden_states, residual) with prenorm, else hidden_states.
        """
        kwargs = dict(mixer_kwargs or {})
        if not self.prenorm:
            if residual is not None or mixer_subset is not None:
                raise ValueError("residual, mixer_subset: expected None with prenorm=False")
            return self._forward_postnorm(hidden_states, kwargs)
        first = (self.dropout1, self.drop_path1, self.norm1)
        hidden_states, residual = self._add_norm(hidden_states, residual, *first)
        if mixer_subset is not None:
            kwargs["mixer_subset"] = mixer_subset
            residual = residual[:, mixer_subset]
        hidden_states = self.mixer(hidden_states, **kwargs)
        if not isinstance(self.mlp, nn.Identity):
            second = (self.dropout2, self.drop_path2, self.norm2)
            hidden_states, residual = self._add_norm(hidden_states, residual, *second)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def _forward_postnorm(self, hidden_states: Tensor, mixer_kwargs: dict[str, Any]) -> Tensor:
        branch, hidden_states = self._branch(self.mixer, hidden_states, **mixer_kwargs)
        first = (self.dropout1, self.drop_path1, self.norm1)
        hidden_states, _ = self._add_norm(branch, hidden_states, *first)
        if isinstance(self.mlp, nn.Identity):
            return hidden_states
        branch, hidden_states = self._branch(self.mlp, hidden_states)
        second = (self.dropout2, self.drop_path2, self.norm2)
        return self._add_norm(branch, hidden_states, *second)[0]

    def _branch(self, module: nn.Module, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(output, residual)"""
        out = module(x, **kwargs)
        return out if self.return_residual else (out, x)


class ParallelBlock(_ResidualBlock):
    """Mixer and MLP read the same residual, each through its norm, and both add to it.

    It begins with the sum that the block before it left open: dropout, add, norm, then mixer and
    MLP. It returns both outputs and the residual apart.

    Args:
        resid_dropout1: dropout of the mixer's output of the block before.
        resid_dropout2: of the MLP's output.
        tied_norm: one norm for both branches.
        others: as Block.

    Raises:
        ValueError: options that do not fit together.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[..., nn.Module] | None = None,
        mlp_cls: Callable[..., nn.Module] | None = None,
        norm_cls: Callable[..., nn.Module] = nn.LayerNorm,
        dropout_cls: Callable[..., nn.Module] = nn.Dropout,
        resid_dropout1: float = 0.0,
        resid_dropout2: float = 0.0,
        tied_norm: bool = False,
        fused_dropout_add_ln: bool = False,
        residual_in_fp32: bool = False,
        sequence_parallel: bool = False,
        mark_shared_params: bool = False,
    ) -> None:
        super().__init__()
        self.tied_norm = tied_norm
        self.fused_dropout_add_ln = fused_dropout_add_ln
        self.residual_in_fp32 = residual_in_fp32
        self.mixer = _mixer(dim, mixer_cls)
        self.dropout1 = dropout_cls(resid_dropout1)
        self.norm1 = norm_cls(dim)
        self.mlp = _mlp(dim, mlp_cls)
        self.dropout2 = dropout_cls(resid_dropout2)
        if not tied_norm:
            self.norm2 = norm_cls(dim)
        self._finish(sequence_parallel, mark_shared_params)

    def _fused(self, x: Tensor, x1: Tensor | None, residual: Tensor | None) -> tuple[Tensor, ...]:
        second = None if self.tied_norm else self.norm2
        return layer_norm_fn(
            x,
            self.norm1.weight,
            self.norm1.bias,
            residual=residual,
            x1=x1,
            weight1=None if second is None else second.weight,
            bias1=None if second is None else second.bias,
            eps=self.norm1.eps,
            dropout_p=self.dropout1.p if self.training else 0.0,
            prenorm=True,
            residual_in_fp32=self.residual_in_fp32,
            is_rms_norm=isinstance(self.norm1, RMSNorm),
        )

    def forward(
        self,
        hidden_states1: Tensor,
        hidden_states2: Tensor | None = None,
        residual: Tensor | None = None,
        mixer_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the block.

        Args:
            hidden_states1: (batch, seqlen, dim), the mixer's output of the block before, or the
                embeddings.
            hidden_states2: the MLP's output of the block before; None for the first block.
            residual: from the block before; None for the first one.
            mixer_kwargs: for the mixer.

        Returns:
            (hidden_states1, hidden_states2, residual).
        """
        # The fused call has one dropout probability for both.
        one_dropout = hidden_states2 is None or self.dropout1.p == self.dropout2.p
        if self.fused_dropout_add_ln and (one_dropout or not self.training):
            *normed, residual = self._fused(hidden_states1, hidden_states2, residual)
        else:
            branches = [self.dropout1(hidden_states1)]
            if hidden_states2 is not None:
                branches.append(self.dropout2(hidden_states2))
            norms = [self.norm1] if self.tied_norm else [self.norm1, self.norm2]
            *normed, residual = self._sum_and_norm(branches, residual, norms)
        hidden_states1 = self.mixer(normed[0], **(mixer_kwargs or {}))
        return hidden_states1, self.mlp(normed[-1]), residual
