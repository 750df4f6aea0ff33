"""The losses and helpers that OpenRLHF, verl and axolotl take, as each of them calls them."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing
from helpers import compare, join_gloo, leave_gloo, leaves, plain_rotary, rotary_tables


def plain_loss(logits, labels, **options):
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none", **options)


@pytest.mark.shows("imported")
def test_padding_helpers():
    """All four names of bert_padding, rearrange among them, and the way back."""
    from flash_attn.bert_padding import index_first_axis, pad_input, rearrange, unpad_input

    x, mask = torch.randn(2, 5, 3), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    rows, indices, cu_seqlens, longest, *_ = unpad_input(x, mask)
    assert cu_seqlens.tolist() == [0, 3, 8] and longest == 5
    compare(index_first_axis(rearrange(x, "b s d -> (b s) d"), indices), rows)
    compare(pad_input(rows, indices, 2, 5), x * mask[..., None])


@pytest.mark.shows("forward", "backward")
@pytest.mark.parametrize("inplace_backward", [False, True])
def test_log_probabilities(inplace_backward):
    """verl and OpenRLHF: minus the first of two results."""
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    (logits,) = leaves((6, 40))
    labels = torch.arange(6)
    wanted = -plain_loss(logits, labels)
    (expected,) = torch.autograd.grad(wanted.sin().sum(), logits)
    result = cross_entropy_loss(logits * 1.0, labels, inplace_backward=inplace_backward)
    assert isinstance(result, tuple) and len(result) == 2
    compare(-result[0], wanted)
    compare(torch.autograd.grad((-result[0]).sin().sum(), logits)[0], expected)


@pytest.mark.shows("forward", "backward")
def test_loss_with_ignored_labels():
    """axolotl: the module in place of torch's, and the function with a mean of its own."""
    from flash_attn.losses.cross_entropy import CrossEntropyLoss
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    (logits,) = leaves((6, 40))
    labels = torch.tensor([1, -100, 3, 4, -100, 6])
    wanted = torch.nn.functional.cross_entropy(logits, labels)
    loss = CrossEntropyLoss(inplace_backward=True)(logits * 1.0, labels)
    per_token, _ = cross_entropy_loss(logits * 1.0, labels, label_smoothing=0.0, ignore_index=-100)
    found = [loss, per_token.sum() / (labels != -100).sum()]
    compare(found, [wanted, wanted])
    expected = torch.autograd.grad(wanted, logits)
    for value in found:
        compare(torch.autograd.grad(value, logits), expected)


@pytest.mark.shows("forward")
def test_rotary_of_pictures():
    """verl's Megatron layers: fp32 tables beside bf16 queries, cast by the caller."""
    from flash_attn.layers.rotary import apply_rotary_emb

    q = torch.randn(1, 7, 4, 16)
    tables = rotary_tables(7, 16)
    compare(apply_rotary_emb(q.float(), *tables), plain_rotary(q, *tables))


def _gather(rank: int, folder: str) -> None:
    from flash_attn.utils.distributed import all_gather

    join_gloo(rank, folder)
    group = torch.distributed.group.WORLD
    everything = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    mine = everything.chunk(2)[rank].clone().requires_grad_()
    out = all_gather(mine, group)
    compare(out, everything)
    (out * (rank + 1.0)).sum().backward()  # each rank's weight reaches every row: 1 + 2
    compare(mine.grad, torch.full_like(mine, 3.0))
    leave_gloo(rank, folder)


@pytest.mark.shows("forward", "backward")
def test_all_gather(tmp_path):
    """OpenRLHF's ring attention: log probabilities of every rank, with a gradient."""
    torch.multiprocessing.spawn(_gather, args=(str(tmp_path),), nprocs=2)
