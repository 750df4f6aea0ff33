"""flash_attn.bert_padding: between padded batches and packed sequences, with gradients."""

from __future__ import annotations

import einops
import pytest
import torch
from flash_attn import bert_padding, flash_attn_varlen_qkvpacked_func


@pytest.fixture
def mask(device):
    return torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 1, 1]], device=device)


def test_names():
    assert bert_padding.rearrange is einops.rearrange and bert_padding.repeat is einops.repeat
    assert bert_padding.F is torch.nn.functional
    for name in ("IndexFirstAxis", "IndexPutFirstAxis", "IndexFirstAxisResidual"):
        assert issubclass(getattr(bert_padding, name), torch.autograd.Function)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32])
@pytest.mark.parametrize("trailing", [(), (4,), (2, 4)])
def test_unpad_and_pad(device, mask, dtype, trailing):
    x = torch.randn(3, 5, *trailing, device=device)
    packed, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask.to(dtype))
    assert torch.equal(packed, x[mask.bool()])
    assert indices.tolist() == [0, 1, 10, 12, 13, 14] and indices.dtype == torch.int64
    assert cu_seqlens.tolist() == [0, 2, 2, 6] and cu_seqlens.dtype == torch.int32
    assert longest == 4 and type(longest) is int
    assert used.tolist() == [2, 0, 4] and used.dtype == torch.int32
    padded = bert_padding.pad_input(packed, indices, 3, 5)
    visible = mask.bool().view(3, 5, *(1,) * len(trailing))
    assert torch.equal(padded, x.where(visible, torch.zeros_like(x)))


def test_unused_places_are_taken_along(device, mask):
    x = torch.randn(3, 5, 4, device=device)
    unused = torch.zeros_like(mask)
    unused[0, 4] = unused[1, 0] = 1
    packed, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask, unused)
    assert indices.tolist() == [0, 1, 4, 5, 10, 12, 13, 14]
    assert torch.equal(packed, x.flatten(0, 1)[indices])
    assert cu_seqlens.tolist() == [0, 3, 4, 8] and longest == 4 and used.tolist() == [2, 0, 4]


def test_an_empty_batch(device):
    x = torch.randn(0, 5, 4, device=device)
    packed, _, cu_seqlens, longest, _ = bert_padding.unpad_input(x, torch.ones(0, 5, device=device))
    assert packed.shape == (0, 4) and cu_seqlens.tolist() == [0] and longest == 0


def test_concatenated_sequences(device):
    lengths = torch.tensor(
        [[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]], device=device
    )
    x = torch.randn(3, 6, 4, device=device)
    packed, indices, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(
        x, lengths
    )
    assert torch.equal(packed, torch.cat([x[0, :5], x[1, :5], x[2]]))
    assert indices.tolist() == [*range(5), *range(6, 11), *range(12, 18)]
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16] and cu_seqlens.dtype == torch.int32
    assert longest == 6


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_pad_takes_indices_of_both_kinds(device, dtype):
    """transformers hands over int32."""
    indices = torch.tensor([1, 4], device=device, dtype=dtype)
    padded = bert_padding.pad_input(torch.ones(2, 3, device=device), indices, 2, 3)
    assert padded.shape == (2, 3, 3)
    assert torch.equal(padded.sum((1, 2)), torch.tensor([3.0, 3.0], device=device))


def test_gradients(device):
    indices = torch.tensor([4, 0, 3], device=device)
    x = torch.randn(5, 2, dtype=torch.float64, device=device, requires_grad=True)
    y = torch.randn(3, 2, dtype=torch.float64, device=device, requires_grad=True)
    check = torch.autograd.gradcheck
    assert check(lambda x: bert_padding.index_first_axis(x, indices), x)
    assert check(lambda x: bert_padding.index_first_axis_residual(x, indices), x)
    assert check(lambda y: bert_padding.index_put_first_axis(y, indices, 6), y)
    twice = torch.tensor([1, 1, 2], device=device)
    assert check(lambda x: bert_padding.index_first_axis(x, twice), x)


def test_a_padded_model_gets_the_gradients_of_a_loop(device, mask):
    qkv = torch.randn(3, 5, 3, 2, 8, dtype=torch.float64, device=device, requires_grad=True)
    packed, indices, cu_seqlens, longest, _ = bert_padding.unpad_input(qkv, mask)
    out = flash_attn_varlen_qkvpacked_func(packed, cu_seqlens, longest, causal=True)
    out = bert_padding.pad_input(out, indices, 3, 5)
    loss = out.square().sum()
    (mine,) = torch.autograd.grad(loss, qkv)

    total = 0.0
    for row, visible in zip(qkv, mask.bool()):
        q, k, v = (x.transpose(0, 1) for x in row[visible].unbind(1))
        total = total + torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True
        ).square().sum()  # fmt: skip
    (expected,) = torch.autograd.grad(total, qkv)
    torch.testing.assert_close(mine, expected)
    assert (mine[~mask.bool()] == 0).all()


@pytest.mark.parametrize(
    "masks, message",
    [
        ([torch.ones(2, 4)], r"attention_mask: expected \(batch, seqlen\) .*\(2, 4\)"),
        ([torch.ones(3, 5), torch.zeros(3, 4)], r"unused_mask: expected \(batch, seqlen\)"),
        ([torch.full((3, 5), 2)], "attention_mask: expected 0 or 1 .* got 2"),
        ([torch.full((3, 5), -1.0)], "attention_mask: expected 0 or 1 .* got -1.0"),
        ([torch.ones(3, 5), torch.ones(3, 5)], "attention_mask . unused_mask: expected 0 or 1"),
    ],
)
def test_masks_that_do_not_fit(masks, message):
    with pytest.raises(ValueError, match=message):
        bert_padding.unpad_input(torch.ones(3, 5, 4), *masks)


@pytest.mark.parametrize(
    "lengths, message",
    [
        ([[2, 2]], r"attention_mask_in_length: expected \(batch, seqlen\) .*\(1, 2\)"),
        ([[2, 0, 0], [2, 2, 0]], r"sum of at most seqlen 3, got \[2, 2, 0\] in row 1"),
        ([[-1, 2, 0], [1, 0, 0]], r"lengths of 0 or more .* got \[-1, 2, 0\] in row 0"),
    ],
)
def test_lengths_that_do_not_fit(lengths, message):
    with pytest.raises(ValueError, match=message):
        bert_padding.unpad_input_for_concatenated_sequences(
            torch.ones(2, 3, 4), torch.tensor(lengths)
        )


@pytest.mark.parametrize("index", [-1, 3])
def test_indices_out_of_range(index):
    indices = torch.tensor([0, index])
    message = f"indices: expected 0 <= index < 3 rows, got {index}"
    with pytest.raises(ValueError, match=message):
        bert_padding.index_first_axis(torch.ones(3, 4), indices)
    with pytest.raises(ValueError, match=message):
        bert_padding.index_first_axis_residual(torch.ones(3, 4), indices)
    with pytest.raises(ValueError, match=message):
        bert_padding.pad_input(torch.ones(2, 4), indices, 1, 3)


def test_no_graph_is_guarded_by_values():
    """Indices of other values run on the same graph."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def padded_again(x, indices):
        return bert_padding.pad_input(bert_padding.index_first_axis(x, indices), indices, 1, 3)

    compiled = torch.compile(padded_again, backend=backend, fullgraph=True)
    x = torch.ones(3, 4)
    for taken in ([0, 1], [2, 0]):
        assert torch.equal(compiled(x, torch.tensor(taken)), padded_again(x, torch.tensor(taken)))
    assert len(graphs) == 1


class _Unpadded(torch.nn.Module):
    def forward(self, x, mask):
        return bert_padding.unpad_input(x, mask)[0].sum()


def test_export_reads_no_mask(mask):
    x, mask = torch.randn(3, 5, 4), mask.cpu()
    exported = torch.export.export(_Unpadded(), (x, mask)).module()
    for other in (mask, 1 - mask):
        torch.testing.assert_close(exported(x, other), x[other.bool()].sum())
