"""flash_attn.modules.block and embedding, layers.patch_embed: against the same written out here."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from flash_attn.layers.patch_embed import PatchEmbed
from flash_attn.modules.block import Block, ParallelBlock, StochasticDepth
from flash_attn.modules.embedding import (
    BertEmbeddings,
    ColumnParallelEmbedding,
    GPT2Embeddings,
    ParallelGPT2Embeddings,
    VocabParallelEmbedding,
)
from flash_attn.modules.mha import MHA
from flash_attn.ops.fused_dense import FusedDense
from flash_attn.ops.triton.layer_norm import RMSNorm
from torch import nn

DIM = 16
Mixer = partial(MHA, num_heads=2)


class Mlp(nn.Module):
    def __init__(self, dim, return_residual=False):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.return_residual = return_residual

    def forward(self, x):
        out = self.fc2(F.gelu(self.fc1(x)))
        return (out, x) if self.return_residual else out


def _make(cls, dtype=torch.float64, **options):
    torch.manual_seed(0)
    block = cls(DIM, **{"mixer_cls": Mixer, "mlp_cls": Mlp, **options})
    for name, parameter in block.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter)
    return block.to(dtype)


def _norm(norm, x):
    """Written out, in x's dtype."""
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    x = x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight
    return x if norm.bias is None else x + norm.bias


def _assert_same(module, inputs, got, expected):
    got, expected = ([r] if isinstance(r, torch.Tensor) else list(r) for r in (got, expected))
    douts = [torch.randn_like(x) for x in expected]
    leaves = [*inputs, *module.parameters()]
    torch.testing.assert_close(got, expected)
    ours = torch.autograd.grad(got, leaves, douts)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, leaves, douts))


def _inputs(count):
    torch.manual_seed(1)
    return [torch.randn(2, 5, DIM, dtype=torch.float64, requires_grad=True) for _ in range(count)]


FUSED = pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
NORMS = pytest.mark.parametrize("norm_cls", [nn.LayerNorm, RMSNorm])


@FUSED
@NORMS
def test_prenorm(norm_cls, fused):
    block = _make(Block, norm_cls=norm_cls, fused_dropout_add_ln=fused)
    x, residual = _inputs(2)
    for given in ([x], [x, residual]):
        first = sum(given)
        second = block.mixer(_norm(block.norm1, first)) + first
        expected = block.mlp(_norm(block.norm2, second)), second
        _assert_same(block, given, block(*given), expected)


@FUSED
@pytest.mark.parametrize("return_residual", [False, True])
def test_postnorm(return_residual, fused):
    block = _make(
        Block, prenorm=False, fused_dropout_add_ln=fused, return_residual=return_residual,
        mixer_cls=partial(Mixer, return_residual=return_residual),
        mlp_cls=partial(Mlp, return_residual=return_residual),
    )  # fmt: skip
    plain = _make(Block)
    plain.load_state_dict(block.state_dict())
    (x,) = _inputs(1)
    first = _norm(plain.norm1, plain.mixer(x) + x)
    expected = _norm(plain.norm2, plain.mlp(first) + first)
    torch.testing.assert_close(block(x), expected)
    for out in (block(x), expected):
        out.square().sum().backward()
    gradients = zip(block.parameters(), plain.parameters())
    assert all(torch.allclose(a.grad, b.grad) for a, b in gradients)


@FUSED
@pytest.mark.parametrize("tied", [False, True])
def test_parallel(tied, fused):
    block = _make(ParallelBlock, tied_norm=tied, fused_dropout_add_ln=fused)
    norm2 = block.norm1 if tied else block.norm2
    x1, x2, residual = _inputs(3)
    for given in ([x1], [x1, x2], [x1, x2, residual]):
        total = sum(given)
        expected = block.mixer(_norm(block.norm1, total)), block.mlp(_norm(norm2, total)), total
        _assert_same(block, given, block(*given), expected)


@FUSED
def test_without_mlp(fused):
    for prenorm in (True, False):
        block = _make(Block, mlp_cls=nn.Identity, prenorm=prenorm, fused_dropout_add_ln=fused)
        assert not any(hasattr(block, name) for name in ("norm2", "dropout2", "drop_path2"))
        (x,) = _inputs(1)
        if prenorm:
            expected = block.mixer(_norm(block.norm1, x)), x
        else:
            expected = _norm(block.norm1, block.mixer(x) + x)
        _assert_same(block, [x], block(x), expected)


@FUSED
def test_residual_in_fp32(fused):
    block = _make(Block, torch.bfloat16, residual_in_fp32=True, fused_dropout_add_ln=fused)
    x = torch.randn(2, 5, DIM).bfloat16()
    out, residual = block(x)
    assert (out.dtype, residual.dtype) == (torch.bfloat16, torch.float32)
    out, residual = block(out, residual)
    assert (out.dtype, residual.dtype) == (torch.bfloat16, torch.float32)


def test_only_a_subset_becomes_queries():
    block = _make(Block, mixer_cls=partial(Mixer, cross_attn=True))
    x, residual = _inputs(2)
    kwargs = {}
    got = block(x, residual, mixer_subset=slice(0, 1), mixer_kwargs=kwargs)
    total = x + residual
    normed = _norm(block.norm1, total)
    second = block.mixer(normed, mixer_subset=slice(0, 1)) + total[:, :1]
    _assert_same(block, [x, residual], got, (block.mlp(_norm(block.norm2, second)), second))
    assert kwargs == {}


@FUSED
def test_whole_samples_are_dropped(fused):
    block = _make(Block, drop_path1=0.5, fused_dropout_add_ln=fused, mlp_cls=nn.Identity)
    x = torch.randn(64, 3, DIM, dtype=torch.float64)
    _, total = block(x, torch.zeros_like(x))
    factors = (total / x).mean((1, 2))
    torch.testing.assert_close(total, x * factors[:, None, None])
    assert set(factors.round(decimals=6).tolist()) == {0.0, 2.0}
    torch.testing.assert_close(block.eval()(x, torch.zeros_like(x))[1], x)


@FUSED
def test_dropout_before_the_sum(fused):
    block = _make(Block, resid_dropout1=0.25, fused_dropout_add_ln=fused, mlp_cls=nn.Identity)
    x = torch.ones(50, 40, DIM, dtype=torch.float64)
    _, total = block(x)
    assert set(total.unique().round(decimals=6).tolist()) == {0.0, round(1 / 0.75, 6)}
    assert abs((total == 0).double().mean() - 0.25) < 0.02


def test_two_dropouts_of_a_parallel_block():
    """The fused call has one probability: other ones are not mixed up."""
    block = _make(ParallelBlock, resid_dropout2=0.5, fused_dropout_add_ln=True)
    x = torch.ones(20, 40, DIM, dtype=torch.float64)
    _, _, total = block(x, x)
    assert set(total.unique().tolist()) == {1.0, 3.0}
    assert set(block.eval()(x, x)[2].unique().tolist()) == {2.0}


def test_stochastic_depth_draws_as_torchvision():
    """A Bernoulli draw per sample, or one, divided by the probability of staying."""
    x = torch.randn(6, 3, 2)
    for mode, samples in (("row", 6), ("batch", 1)):
        torch.manual_seed(2)
        got = StochasticDepth(0.3, mode)(x)
        torch.manual_seed(2)
        noise = torch.empty(samples, 1, 1).bernoulli_(0.7).div_(0.7)
        assert torch.equal(got, x * noise)
    assert not StochasticDepth(1.0, "row")(x).any()
    assert StochasticDepth(0.0, "row")(x) is x and StochasticDepth(0.9, "row").eval()(x) is x
    assert str(StochasticDepth(0.1, mode="row")) == "StochasticDepth(p=0.1, mode=row)"
    for wrong in ((1.5, "row"), (0.5, "column")):
        with pytest.raises(ValueError):
            StochasticDepth(*wrong)


def test_defaults_and_state_dict():
    for cls in (Block, ParallelBlock):
        block = cls(128)
        assert block.mixer.num_heads == 2 and block.mlp.fc1.out_features == 512
        assert list(block.state_dict())[-2:] == ["norm2.weight", "norm2.bias"]
    names = [name for name, _ in Block(128).named_children()]
    assert names == [
        "mixer", "dropout1", "drop_path1", "norm1", "mlp", "dropout2", "drop_path2", "norm2"
    ]  # fmt: skip


def test_marks_for_sequence_parallelism():
    for cls in (Block, ParallelBlock):
        block = _make(cls, sequence_parallel=True, mark_shared_params=True)
        for name, parameter in block.named_parameters():
            marks = [getattr(parameter, m, False) for m in ("_sequence_parallel", "_shared_params")]
            assert marks == ["norm" in name] * 2, name


def test_the_cache_is_the_mixers():
    cache = _make(Block).allocate_inference_cache(2, 7, torch.bfloat16)
    assert cache.shape == (2, 7, 2, 2, DIM // 2) and cache.dtype == torch.bfloat16


def test_blocks_that_do_not_fit():
    x = torch.randn(2, 3, DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match="residual_in_fp32 is only compatible with prenorm=True"):
        Block(DIM, prenorm=False, residual_in_fp32=True)
    with pytest.raises(ValueError, match="fused_dropout_add_ln: .* got Identity and Dropout"):
        Block(DIM, Mixer, Mlp, norm_cls=nn.Identity, fused_dropout_add_ln=True)
    for wrong in ({"residual": x}, {"mixer_subset": slice(0, 1)}):
        with pytest.raises(ValueError, match="expected None with prenorm=False"):
            _make(Block, prenorm=False)(x, **wrong)


# ---- embeddings ----

IDS = torch.tensor([[1, 5, 0], [7, 2, 2]])


def test_gpt2_embeddings():
    module = GPT2Embeddings(8, 10, 6, padding_idx=0, word_embed_proj_dim=4)
    assert list(module.state_dict()) == [
        "word_embeddings.weight", "project_in.weight", "position_embeddings.weight"
    ]  # fmt: skip
    words, project, places = module.parameters()
    torch.testing.assert_close(module(IDS), words[IDS] @ project.T + places[:3])
    own = torch.tensor([[3, 4, 5], [0, 1, 1]])
    torch.testing.assert_close(module(IDS, own), words[IDS] @ project.T + places[own])
    module(IDS).sum().backward()
    assert not words.grad[0].any() and words.grad[1].any()
    module = GPT2Embeddings(8, 10, 0)
    assert torch.equal(module(IDS), module.word_embeddings.weight[IDS])
    assert module.project_in is None
    assert module(IDS[:0]).shape == (0, 3, 8)


def test_bert_embeddings():
    module = BertEmbeddings(8, 10, 6, 2)
    words, places, types = module.parameters()
    torch.testing.assert_close(module(IDS), words[IDS] + places[:3] + types[0])
    kinds = torch.tensor([[0, 1, 1], [0, 0, 1]])
    torch.testing.assert_close(
        module(IDS, position_ids=IDS % 6, token_type_ids=kinds),
        words[IDS] + places[IDS % 6] + types[kinds],
    )
    assert list(BertEmbeddings(8, 10, 0, 0).state_dict()) == ["word_embeddings.weight"]
    assert module(IDS[:0]).shape == (0, 3, 8)


def test_parallel_embeddings_of_one_process():
    torch.manual_seed(0)
    module = ParallelGPT2Embeddings(8, 10, 6, None, padding_idx=1)
    torch.manual_seed(0)
    plain = GPT2Embeddings(8, 10, 6, padding_idx=1)
    assert torch.equal(module(IDS), plain(IDS))
    assert torch.equal(module(IDS, combine_batch_seqlen_dim=True), plain(IDS).flatten(0, 1))
    assert VocabParallelEmbedding(10, 8).weight.shape == (10, 8)
    assert ColumnParallelEmbedding(10, 8).weight.shape == (10, 8)


# ---- patches ----


@pytest.mark.parametrize("options", [{}, {"fused_bias_fc": True}, {"bias": False}], ids=str)
def test_patches_are_a_convolution(options):
    torch.manual_seed(0)
    module = PatchEmbed((8, 12), (2, 4), in_chans=3, embed_dim=5, **options).double()
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64, requires_grad=True)
    weight = module.proj.weight.view(5, 3, 2, 4)
    expected = F.conv2d(x, weight, module.proj.bias, stride=(2, 4)).flatten(2).mT
    _assert_same(module, [x], module(x), expected)
    assert (module.grid_size, module.num_patches) == ((4, 3), 12)
    assert isinstance(module.proj, FusedDense) == options.get("fused_bias_fc", False)
    module.flatten = False
    torch.testing.assert_close(module(x), expected.unflatten(1, (4, 3)))
    with pytest.raises(AssertionError, match=r"Input image width \(8\) doesn't match model \(12\)"):
        module(x[..., :8])
    for wrong in (x[:, :2], x[0]):
        with pytest.raises(ValueError, match=r"x: expected \(batch, 3, height, width\), got"):
            module(wrong)
    assert PatchEmbed(8, 2, norm_layer=nn.LayerNorm).norm.weight.shape == (768,)
